"""Measures the training speed of a network: python benchmarks/train_step.py --help.

Trains on one batch of synthetic pixels, so that only the network is measured. With JAX the batch stays on the device; with
TensorFlow, tf.data copies it there during the previous step. With KERAS_BACKEND=jax it runs without TensorFlow.
"""

import dataclasses
import itertools
import json
import resource
import sys
import time
from pathlib import Path
from typing import Literal

import keras
import numpy as np
import tyro
from keras import ops

sys.path[:0] = map(str, Path(__file__).parents[:2])  # to run without installing the package

from cvt_keras import CvT, environment
from cvt_keras.training.optimizers import decays
from cvt_keras.variants import get_variant
from measuring import image_rates, matrix_product_rate, matrix_size, require_at_least_one, training_flops


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measures images per second, peak memory, and FLOP/s as a share of the FLOP/s of a large matrix product."""

    variant: str = "cvt_cifar"
    """The name of a network in VARIANTS."""
    image_size: int = 32
    """Height and width of the images, in pixels."""
    num_classes: int = 10
    """Number of classes."""
    batch_size: int = 128
    """Images per training step."""
    precision: Literal["float32", "mixed_bfloat16", "mixed_float16"] = "float32"
    """A Keras dtype policy."""
    xla: Literal["auto", "on", "off"] = "auto"
    """Compile with XLA. auto: the default of Keras."""
    steps: int = 20
    """Steps per repetition."""
    repetitions: int = 5
    """Repetitions; the result is their median. One more before them compiles, and is not counted."""

    def __post_init__(self):
        require_at_least_one(self, "image_size", "num_classes", "batch_size", "steps", "repetitions")
        get_variant(self.variant).grids(self.image_size, self.image_size)


class RepetitionSeconds(keras.callbacks.Callback):
    """Measures the seconds of each repetition, which is an epoch in Keras. Reading the loss waits for the device."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self._started = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        float(logs["loss"])
        self.seconds.append(time.perf_counter() - self._started)


def training_seconds(arguments):
    """Returns the seconds of each repetition, without the one that compiles, and whether XLA was used."""
    keras.utils.set_random_seed(0)
    shape = (arguments.image_size, arguments.image_size, 3)
    model = CvT.from_variant(arguments.variant, arguments.num_classes, shape, dtype=arguments.precision)
    optimizer = keras.optimizers.AdamW(1e-3, weight_decay=0.05)
    optimizer.exclude_from_weight_decay(var_list=[v for v in model.trainable_variables if not decays(v)])
    model.compile(
        optimizer,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile={"auto": "auto", "on": True, "off": False}[arguments.xla],
    )
    random = np.random.default_rng(0)
    images = ops.convert_to_tensor(random.normal(size=(arguments.batch_size, *shape)).astype("float32"))
    labels = ops.convert_to_tensor(random.integers(arguments.num_classes, size=arguments.batch_size).astype("int32"))

    watch = RepetitionSeconds()
    model.fit(
        _repeated(images, labels),
        steps_per_epoch=arguments.steps,
        epochs=arguments.repetitions + 1,
        callbacks=[watch],
        shuffle=False,  # there is only one batch
        verbose=0,
    )
    return watch.seconds[1:], bool(model.jit_compile)


def _repeated(images, labels):
    if keras.config.backend() != "tensorflow":
        return ((images, labels) for _ in itertools.count())  # of iterators, Keras accepts only generators
    import tensorflow as tf

    return tf.data.Dataset.from_tensors((images, labels)).repeat().prefetch(tf.data.AUTOTUNE)


def product_rate(precision):
    """FLOP/s of the product of two large square matrices on this device."""
    side, products = matrix_size(_on_accelerator())
    dtype = {"float32": "float32", "mixed_bfloat16": "bfloat16", "mixed_float16": "float16"}[precision]
    matrix = np.random.default_rng(0).normal(size=(side, side)).astype("float32") / side**0.5
    matrix = ops.cast(ops.convert_to_tensor(matrix), dtype)
    return matrix_product_rate(matrix, lambda product: float(ops.cast(product[0, 0], "float32")), products)


def _on_accelerator():
    return device()[1] is not None


def device():
    """Returns the name of the device that Keras uses, and a function for its peak memory in bytes, `None` on a CPU."""
    if keras.config.backend() == "jax":
        import jax

        [first, *_] = jax.devices()
        if first.platform != "cpu":
            return first.device_kind, lambda: first.memory_stats()["peak_bytes_in_use"]
    else:
        import tensorflow as tf

        if gpus := tf.config.list_physical_devices("GPU"):
            name = tf.config.experimental.get_device_details(gpus[0]).get("device_name", "GPU")
            return name, lambda: tf.config.experimental.get_memory_info("GPU:0")["peak"]
    return environment.cpu(), None


def _process_peak_bytes():
    # In kilobytes on Linux, in bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(arguments):
    """Returns the result: a dict of JSON values."""
    name, peak_bytes = device()
    seconds, xla = training_seconds(arguments)
    # Read before the large matrices are allocated: they may need more than a small network.
    memory = peak_bytes() if peak_bytes else _process_peak_bytes()
    rates = image_rates(arguments.steps * arguments.batch_size, seconds)
    flops = training_flops(arguments.variant, arguments.image_size, arguments.num_classes) * rates["images_per_second"]
    product = product_rate(arguments.precision)
    return {
        **dataclasses.asdict(arguments),
        "backend": keras.config.backend(),
        "xla": "on" if xla else "off",
        "device": name,
        **rates,
        "peak_memory_bytes": memory,
        "peak_memory_of": "device" if peak_bytes else "process",
        "training_flops": flops,
        "matrix_product_flops": product,
        "share_of_matrix_product": flops / product,
        "versions": environment.versions(),
    }


def main(arguments):
    result = measure(arguments)
    print(json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    main(tyro.cli(Arguments))
