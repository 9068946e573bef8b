"""What the benchmarks share: checks of their arguments, and rates."""

import statistics
import time

from cvt_keras.variants import macs


def require_at_least_one(arguments, *names):
    """Raises ValueError unless each of these numbers is at least 1."""
    for name in names:
        if getattr(arguments, name) < 1:
            raise ValueError(f"`{name}` must be at least 1. Received: {name}={getattr(arguments, name)}")


def image_rates(images, seconds):
    """Returns images per second as fields of a result: the median, the least and the most.

    Args:
        images: number of images per repetition.
        seconds: of each repetition.
    """
    rates = [images / second for second in seconds]
    return {
        "images_per_second": statistics.median(rates),
        "images_per_second_min": min(rates),
        "images_per_second_max": max(rates),
    }


def training_flops(variant, image_size, num_classes):
    """Operations of a training step per image: two for each multiply-accumulate of the forward and the backward pass.

    Args:
        variant: the name of a network in `VARIANTS`.
        image_size: height and width of the images, in pixels.
        num_classes: number of classes.
    """
    # The backward pass computes two products for each one of the forward pass.
    return 3 * 2 * macs(variant, (image_size, image_size, 3), num_classes)


def matrix_product_rate(matrix, wait, products=1, repetitions=5):
    """FLOP/s of products of large square matrices, the best of `repetitions`. One more before them compiles.

    Args:
        matrix: a square matrix on the device, of any framework. Its products must not overflow.
        wait: called with a matrix; returns when it is computed.
        products: products per repetition. Several hide how long it takes to start one.
        repetitions: number of repetitions.
    """
    seconds = []
    for _ in range(repetitions + 1):
        started = time.perf_counter()
        result = matrix
        for _ in range(products):
            result = matrix @ result
        wait(result)
        seconds.append(time.perf_counter() - started)
    return 2 * len(matrix) ** 3 * products / min(seconds[1:])


def matrix_size(on_accelerator):
    """The arguments of `matrix_product_rate` for a device: the side of the matrix, and the number of products."""
    return (8192, 20) if on_accelerator else (2048, 1)
