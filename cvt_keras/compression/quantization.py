"""Quantisation-aware training: a network learns with the roundings that its integer file will have."""

import contextlib
from typing import ClassVar

import numpy as np
import tensorflow as tf

from cvt_keras.compression import tfmot
from cvt_keras.compression.kernels import Zeros, share_of_zeros
from cvt_keras.errors import RecipeError, RunError
from cvt_keras.layers import DropPath
from cvt_keras.quantized.layers import FakeQuantize, QuantizedConv
from cvt_keras.quantized.model import quantize
from cvt_keras.training.compressor import Compressor

# For the first limits of the activations; training then follows what its batches have.
CALIBRATION_IMAGES = 1000
# Half the width of a range in which there is nothing but 0: a scale of 0 is none.
_LEAST = 1e-6


class QuantizationAwareTraining(Compressor):
    """Trains a classifier's `quantize` form, and lets its files have the ranges that training found.

    The ranges are found by tfmot's quantizers: of activations first by `AllValuesQuantizer` on training images, then by
    `MovingAverageQuantizer`, which alone would start at -6..6 and hardly move; of kernels by `LastValueQuantizer`, a range for
    each output channel.

    Args:
        keep_zeros: whether a kernel's zeros stay zeros: those of a pruned run.
        after: `settings` of the compression that the weights come from, for recipe.json; or `None`.
    """

    refused: ClassVar = {
        "cluster": "training would move its values apart. Start from the run that it was clustered from, or export it: its "
        "int8 file is quantised after training",
        "qat": "start from the run before it",
    }

    def __init__(self, keep_zeros=False, after=None):
        super().__init__({"method": "qat", "keep_zeros": keep_zeros}, after)
        self.keep_zeros = keep_zeros
        self.parts = tfmot.load()
        self._zeros = Zeros({})

    def require(self, recipe):
        if recipe.precision != "float32":
            raise RecipeError(
                "`precision` must be float32 to train for quantisation: 8 of 16 bits would be lost before the rounding. "
                f"Received: precision={recipe.precision}"
            )
        super().require(recipe)

    def wrap(self, classifier):
        try:
            return quantize(classifier)
        except ValueError as error:
            raise RecipeError(f"`variant` can't be trained for quantisation: {error}") from error

    def start(self, classifier, batches, steps, epochs):
        layers = list(classifier._flatten_layers())
        self._rounding = [layer for layer in layers if isinstance(layer, FakeQuantize) and layer.limits is None]
        self._convs = [layer for layer in layers if isinstance(layer, QuantizedConv)]
        kinds = self.parts
        every = kinds.AllValuesQuantizer(num_bits=8, per_axis=False, symmetric=False, narrow_range=False)
        average = kinds.MovingAverageQuantizer(num_bits=8, per_axis=False, symmetric=False, narrow_range=False)
        last = kinds.LastValueQuantizer(num_bits=8, per_axis=True, symmetric=True, narrow_range=True)
        for layer in self._rounding:
            layer.observer = _observer(every) if layer.axis is None else _observer(last, layer.axis)
            for limit in (layer.minimum, layer.maximum):
                limit.assign(np.zeros(limit.shape))  # which `every` only widens

        @tf.function(autograph=False)
        def observe(images):
            classifier(images, training=True)

        seen = 0
        with _whole(layers):
            for images, _ in batches:
                observe(images)
                seen += len(images)
                if seen >= CALIBRATION_IMAGES:
                    break
        for layer in self._rounding:
            if layer.axis is None:
                layer.observer = _observer(average)
        self._settle_limits()
        kernels = _kernels(classifier)
        self._zeros = Zeros(kernels if self.keep_zeros else {})
        self.variables = list(self._zeros.masks.values())

        @tf.function(autograph=False)
        def hold():
            self._zeros.hold(kernels)

        self._hold = hold

    def on_train_batch_end(self, batch, logs=None):
        self._hold()

    def on_test_begin(self, logs=None):
        self._settle_limits()

    def _settle_limits(self):
        """The kernels' limits are those of the step before the last: of the kernels as they are now from here on."""
        for conv in self._convs:
            conv.kernel_quantizer(conv.kernel, training=True)
        for layer in self._rounding:
            empty = np.asarray(layer.minimum) == np.asarray(layer.maximum)
            if empty.any():
                layer.minimum.assign(np.where(empty, -_LEAST, layer.minimum))
                layer.maximum.assign(np.where(empty, _LEAST, layer.maximum))

    def check(self, classifier):
        limits = {
            path: [float(np.min(layer.minimum)), float(np.max(layer.maximum))] for path, layer in _roundings(classifier).items()
        }
        if broken := [
            path for path, (least, most) in limits.items() if not (np.isfinite([least, most]).all() and least < most)
        ]:
            raise RunError(f"no range was found for {broken[0]}: train anew, at a lower --peak-learning-rate")
        kernels = _kernels(classifier)
        self._zeros.check(kernels)
        return {"sparsity": float(share_of_zeros(kernels.values())), "ranges": limits}


@contextlib.contextmanager
def _whole(layers):
    """Without stochastic depth: what it lets through is larger than anything at inference."""
    rates = {layer: layer.rate for layer in layers if isinstance(layer, DropPath)}
    for layer in rates:
        layer.rate = 0.0
    try:
        yield
    finally:
        for layer, rate in rates.items():
            layer.rate = rate


def _kernels(classifier):
    """Path in the network -> the kernel of a `QuantizedConv`."""
    kernels = [layer.conv.kernel for layer in classifier._flatten_layers() if isinstance(layer, QuantizedConv)]
    return {kernel.path.removesuffix("/conv/kernel"): kernel for kernel in kernels}


def _roundings(classifier):
    """Path in the network -> `FakeQuantize` whose limits training finds."""
    layers = [layer for layer in classifier._flatten_layers() if isinstance(layer, FakeQuantize) and layer.limits is None]
    return {layer.minimum.path.removesuffix("/minimum"): layer for layer in layers}


def _observer(quantizer, axis=None):
    """A `FakeQuantize.observer` by one of tfmot's quantizers, which take the variables that Keras' hold.

    Args:
        axis: that of the limits, which the quantizer looks for in the last one.
    """

    def observe(x, minimum, maximum):
        limits = {"min_var": minimum.value, "max_var": maximum.value}
        if axis is None:
            return quantizer(x, training=True, weights=limits)
        order = [*range(len(x.shape))]
        order[axis], order[-1] = order[-1], order[axis]
        return tf.transpose(quantizer(tf.transpose(x, order), training=True, weights=limits), order)

    return observe
