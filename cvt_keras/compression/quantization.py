"""Quantisation-aware training: trains a network with the rounding of its int8 file."""

import contextlib
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

from cvt_keras.compression import tfmot
from cvt_keras.compression.kernels import Zeros, share_of_zeros
from cvt_keras.errors import RecipeError, RunError
from cvt_keras.layers import DropPath
from cvt_keras.quantized.layers import FakeQuantize, QuantizedConv
from cvt_keras.quantized.model import quantize
from cvt_keras.training.compressor import Compressor

# Training images that set the first ranges of the activations. During training, the ranges follow the batches.
CALIBRATION_IMAGES = 1000
# Half the range of an array of zeros, as a scale can't be 0.
_LEAST = 1e-6


class QuantizationAwareTraining(Compressor):
    """Trains the `quantize` form of a classifier. Exported int8 files use the ranges that the training measured.

    tfmot's quantizers measure the ranges. For activations, `AllValuesQuantizer` sets them from training images and
    `MovingAverageQuantizer` adapts them; alone it would start at -6..6 and hardly move. For kernels, `LastValueQuantizer` sets
    a range per output channel.

    Args:
        keep_zeros: whether the zeros of a pruned run stay zero.
        after: `settings` of the compression that the starting weights come from, or `None`.
    """

    refused: ClassVar = {
        "cluster": "training would move its equal values apart. Start from the run that it was made from, or export it: its "
        "int8 file is quantised after training",
        "qat": "start from the run that it was made from",
    }

    def __init__(self, keep_zeros: bool = False, after: dict[str, Any] | None = None) -> None:
        super().__init__({"method": "qat", "keep_zeros": keep_zeros}, after)
        self.keep_zeros = keep_zeros
        self.parts = tfmot.load()
        self._zeros = Zeros({})

    def require(self, recipe):
        if recipe.precision != "float32":
            raise RecipeError(
                "`precision` must be float32 for quantisation-aware training: float16 and bfloat16 would round a second time. "
                f"Received: precision={recipe.precision}",
                argument="precision",
            )
        super().require(recipe)

    def wrap(self, classifier):
        try:
            return quantize(classifier)
        except ValueError as error:
            raise RecipeError(f"`variant` has no quantised form: {error}", argument="variant") from error

    def start(self, classifier, batches, steps, epochs):
        layers = list(classifier._flatten_layers())
        self._rounding = [layer for layer in layers if isinstance(layer, FakeQuantize) and layer.limits is None]
        self._convs = [layer for layer in layers if isinstance(layer, QuantizedConv)]
        parts = self.parts
        all_values = parts.AllValuesQuantizer(num_bits=8, per_axis=False, symmetric=False, narrow_range=False)
        average = parts.MovingAverageQuantizer(num_bits=8, per_axis=False, symmetric=False, narrow_range=False)
        last_value = parts.LastValueQuantizer(num_bits=8, per_axis=True, symmetric=True, narrow_range=True)
        for layer in self._rounding:
            layer.observer = _observer(all_values) if layer.axis is None else _observer(last_value, layer.axis)
            for limit in (layer.minimum, layer.maximum):
                limit.assign(np.zeros(limit.shape))  # `all_values` only widens a range

        @tf.function(autograph=False)
        def observe(images):
            classifier(images, training=True)

        calibrated = 0
        with _without_drop_path(layers):
            for images, _ in batches:
                observe(images)
                calibrated += len(images)
                if calibrated >= CALIBRATION_IMAGES:
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
        """Sets the kernels' limits from their present values. A training step sets them before it changes the kernels."""
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
        for path, (least, most) in limits.items():
            if not (np.isfinite([least, most]).all() and least < most):
                raise RunError(
                    f"{path} has no valid range, but {least}..{most}, so no model was written",
                    argument="peak_learning_rate",
                    hint="Train again in another --run-dir, with a lower --peak-learning-rate",
                )
        kernels = _kernels(classifier)
        self._zeros.check(kernels)
        return {"sparsity": float(share_of_zeros(kernels.values())), "ranges": limits}


@contextlib.contextmanager
def _without_drop_path(layers):
    """Turns stochastic depth off in the block: its rescaling would widen the ranges beyond those of inference."""
    rates = {layer: layer.rate for layer in layers if isinstance(layer, DropPath)}
    for layer in rates:
        layer.rate = 0.0
    try:
        yield
    finally:
        for layer, rate in rates.items():
            layer.rate = rate


def _kernels(classifier):
    """Returns the kernel of each `QuantizedConv`, by its path in the network."""
    kernels = [layer.conv.kernel for layer in classifier._flatten_layers() if isinstance(layer, QuantizedConv)]
    return {kernel.path.removesuffix("/conv/kernel"): kernel for kernel in kernels}


def _roundings(classifier):
    """Returns each `FakeQuantize` whose limits are measured in training, by its path in the network."""
    layers = [layer for layer in classifier._flatten_layers() if isinstance(layer, FakeQuantize) and layer.limits is None]
    return {layer.minimum.path.removesuffix("/minimum"): layer for layer in layers}


def _observer(quantizer, axis=None):
    """Returns a `FakeQuantize.observer` that calls one of tfmot's quantizers on the `tf.Variable`s of the limits.

    Args:
        quantizer: tfmot's, which expects the channels on the last axis.
        axis: axis of the channels; `None` for one range over the whole array.
    """

    def observe(x, minimum, maximum):
        limits = {"min_var": minimum.value, "max_var": maximum.value}
        if axis is None:
            return quantizer(x, training=True, weights=limits)
        order = [*range(len(x.shape))]  # swaps `axis` and the last axis
        order[axis], order[-1] = order[-1], order[axis]
        return tf.transpose(quantizer(tf.transpose(x, order), training=True, weights=limits), order)

    return observe
