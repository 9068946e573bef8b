"""What the benchmarks share: checks of their arguments, and rates."""

import statistics


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
