"""Converts a `CvT` to its 8-bit form and back."""

import keras
from keras import layers, ops

from cvt_keras.layers import ConvStem, ConvTokenEmbedding, CvTBlock, ResidualConv, Whitening
from cvt_keras.model import block_settings, cvt_of, embedding_settings, preprocessing_of
from cvt_keras.preprocessing import Calibration, Preprocessing
from cvt_keras.quantized.layers import (
    PIXELS,
    QuantizedBlock,
    QuantizedConv,
    QuantizedResidualConv,
    QuantizedStem,
    QuantizedTokenEmbedding,
    QuantizedWhitening,
    fake_quantize,
    quantized_norm,
    split_cls_token,
)
from cvt_keras.variants import get_variant, to_dict


@keras.saving.register_keras_serializable(package="cvt_keras")
class QuantizedCvT(keras.Model):
    """A fake-quantised `CvT` of raw pixels. Normalisation is its first convolution.

    Args:
        variant: a `Variant`, its dict, or a name in `VARIANTS`, with the projections `"dw_bn"` or `"linear"`.
        num_classes: outputs of the head.
        input_shape: `(height, width, channels)` of the images.
        preprocessing: a `Preprocessing` or its dict. The first convolution holds its mean and std.
        calibration: a `Calibration` or its dict, which is stored only.
        quantized: whether weights and activations are rounded. `False` is the same network in floats.

    Input shape: `(batch, height, width, channels)`, pixels in 0..255.
    Output shape: `(batch, num_classes)`, logits.

    Raises:
        ValueError: for the projection `"avg"`.
    """

    def __init__(
        self,
        variant,
        num_classes,
        input_shape,
        preprocessing=None,
        calibration=None,
        quantized=True,
        name="cvt",
        trainable=True,
    ):
        variant = get_variant(variant)
        if any(stage.projection == "avg" for stage in variant.stages):
            raise ValueError("`projection` must be dw_bn or linear, as TFLite has no integer form of avg. Received: avg")

        # === Functional Model ===
        # Whatever the global policy: half precision's own rounding would hide that of 8 bits.
        dtype = keras.dtype_policies.get("float32")
        images = keras.Input(tuple(input_shape), name="images")
        x = fake_quantize(quantized, "pixels_quantizer", dtype, limits=PIXELS)(images)
        normalization = QuantizedConv(None, quantized=quantized, dtype=dtype, name="normalization")
        normalization.trainable = False
        x = normalization(x)
        if variant.whitening:
            x = QuantizedWhitening(variant.whitening, variant.activation, quantized, dtype=dtype, name="whitening")(x)
        for i, dim in enumerate(variant.stem):
            x = QuantizedStem(dim, variant.activation, quantized, dtype=dtype, name=f"stem{i}")(x)
        for i, (stage, grid) in enumerate(zip(variant.stages, variant.grids(*input_shape[:2]))):
            x = _stage(x, stage, grid, variant, quantized, dtype, name=f"stage{i}")
            if stage.cls_token:
                cls_token, x = split_cls_token(x, grid)
        norm = quantized_norm(variant.norm, quantized, dtype, "norm")
        if not stage.cls_token:
            x = layers.GlobalAveragePooling2D(data_format="channels_last", keepdims=True, dtype=dtype, name="pool")(norm(x))
            x = fake_quantize(quantized, "pool_quantizer", dtype)(x)  # (B, 1, 1, C)
        else:
            x = norm(cls_token)
        x = QuantizedConv(num_classes, quantized=quantized, dtype=dtype, name="head")(x)
        super().__init__(images, layers.Flatten(dtype=dtype, name="logits")(x), name=name, trainable=trainable)

        # === Config ===
        self.variant = variant
        self.num_classes = num_classes
        self.preprocessing = Preprocessing.from_config(preprocessing)
        self.calibration = Calibration.from_config(calibration)
        self.quantized = quantized

    def get_config(self):
        return {
            "variant": to_dict(self.variant),
            "num_classes": self.num_classes,
            "input_shape": list(self.input_shape[1:]),
            "preprocessing": self.preprocessing.get_config(),
            "calibration": self.calibration.get_config(),
            "quantized": self.quantized,
            "name": self.name,
            "trainable": self.trainable,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        return cls(**config)


def _stage(x, stage, grid, variant, quantized, dtype, name):
    """Applies a stage to a grid of tokens. Returns its grid, or with a cls token the sequence of both."""
    common = {"quantized": quantized, "dtype": dtype}
    x = QuantizedTokenEmbedding(**embedding_settings(stage, variant), **common, name=f"{name}_embed")(x)
    cls_grid = grid if stage.cls_token else None
    for j in range(stage.residual_convs):
        x = QuantizedResidualConv(stage.dim, variant.activation, cls_grid, **common, name=f"{name}_conv{j}")(x)
    for j, rate in enumerate(stage.drop_path_rates):
        x = QuantizedBlock(**block_settings(stage, variant, rate), grid=cls_grid, **common, name=f"{name}_block{j}")(x)
    return layers.Identity(dtype=dtype.name, name=name)(x)


# === Conversion ===


def quantize(classifier):
    """Returns the fake-quantised form of a classifier, with its weights. Training sets the limits of the activations.

    Args:
        classifier: a float32 classifier of raw pixels, as `build_classifier` returns it.

    Returns:
        A `keras.Model` of raw pixels. Its `QuantizedCvT` is the layer with the name of the `CvT`.

    Raises:
        ValueError: for a network with the projection `"avg"`.
    """
    network, preprocessing = cvt_of(classifier), preprocessing_of(classifier)
    converted = QuantizedCvT(network.variant, network.num_classes, network.input_shape[1:], preprocessing, name=network.name)
    std = ops.convert_to_tensor([255.0 * value for value in preprocessing.std])
    mean = ops.convert_to_tensor([255.0 * value for value in preprocessing.mean])
    channels = network.input_shape[-1]
    _set(converted.get_layer("normalization"), ops.reshape(1 / std, (1, 1, channels, 1)), -mean / std)
    for layer in network.layers:
        if layer.weights:
            _FOLDS[type(layer)](layer, converted.get_layer(layer.name))
    return _classifier(converted)


def float_form(classifier):
    """Returns the same network without rounding, for the float files of a quantisation-aware run.

    Args:
        classifier: as `quantize` returns it.
    """
    network = quantized_cvt_of(classifier)
    converted = QuantizedCvT(**{**network.get_config(), "quantized": False})
    converted.set_weights([ops.convert_to_numpy(variable) for variable in network.weights if not _is_limit(variable)])
    return _classifier(converted)


def quantized_cvt_of(model):
    """The `QuantizedCvT` in a classifier, or `None`."""
    return next((layer for layer in getattr(model, "layers", ()) if isinstance(layer, QuantizedCvT)), None)


def _is_limit(variable):
    return variable.name in ("minimum", "maximum")


def _classifier(network):
    pixels = keras.Input(network.input_shape[1:], name="images", dtype="float32")
    return keras.Model(pixels, network(pixels), name="classifier")


def _set(conv, kernel, bias):
    conv.conv.kernel.assign(ops.reshape(kernel, conv.conv.kernel.shape))
    conv.conv.bias.assign(bias)


def _scale_and_shift(norm):
    """What BatchNorm multiplies by and adds at inference, per channel."""
    scale = norm.gamma / ops.sqrt(norm.moving_variance + norm.epsilon)
    return scale, norm.beta - norm.moving_mean * scale


def _fold(conv, norm, kernel, axis):
    """Folds BatchNorm, as at inference, into the convolution before it."""
    scale, shift = _scale_and_shift(norm)
    shape = [1] * len(kernel.shape)
    shape[axis] = -1
    _set(conv, kernel * ops.reshape(scale, shape), shift)


def _fold_norm(norm, converted):
    is_batch_norm = isinstance(norm, layers.BatchNormalization)
    gamma, beta = _scale_and_shift(norm) if is_batch_norm else (norm.gamma, norm.beta)
    converted.gamma.assign(gamma)
    converted.beta.assign(beta)


def _fold_whitening(whitening, converted):
    converted.kernel.assign(whitening.kernel)
    converted.bias.assign(whitening.bias)


def _fold_conv(layer, converted):
    _fold(converted.conv, layer.norm, layer.conv.kernel, axis=3)


def _fold_embedding(embedding, converted):
    if converted.folded:
        _fold(converted.proj, embedding.norm, embedding.proj.kernel, axis=3)
    else:
        _copy(embedding.proj, converted.proj)
        _fold_norm(embedding.norm, converted.norm)
    if embedding.cls_token:
        converted.cls_token_weight.assign(embedding.cls_token_weight)


def _copy(layer, converted):
    """Copies a Dense or Conv2D layer, with a bias of 0 if it has none."""
    _set(converted, layer.kernel, layer.bias if layer.use_bias else ops.zeros(layer.kernel.shape[-1]))


def _fold_block(block, converted):
    _fold_norm(block.norm1, converted.norm1)
    attention = block.attention
    for name in ("conv_q", "conv_k", "conv_v"):
        if attention.projection == "dw_bn":
            projection = getattr(attention, name)
            _fold(getattr(converted.attention, name), projection.norm, projection.depthwise.kernel, axis=2)
    for name in ("proj_q", "proj_k", "proj_v", "proj"):
        _copy(getattr(attention, name), getattr(converted.attention, name))
    _fold_mlp(block, converted)


def _fold_mlp(block, converted):
    mlp = block.mlp
    if block.norm_type == "layer":
        _fold_norm(block.norm2, converted.norm2)
        _copy(mlp.fc1, converted.fc1)
    else:
        scale, shift = _scale_and_shift(block.norm2)
        _set(converted.fc1, mlp.fc1.kernel * ops.reshape(scale, (-1, 1)), mlp.fc1.bias + ops.matmul(shift, mlp.fc1.kernel))
    if block.mlp_conv:
        kernel = ops.convert_to_numpy(mlp.depthwise.kernel).copy()
        kernel[kernel.shape[0] // 2, kernel.shape[1] // 2] += 1  # the shortcut
        _set(converted.depthwise, kernel, ops.zeros(block.mlp_dim))
    _copy(mlp.fc2, converted.fc2)


_FOLDS = {
    Whitening: _fold_whitening,
    ConvStem: _fold_conv,
    ResidualConv: _fold_conv,
    ConvTokenEmbedding: _fold_embedding,
    CvTBlock: _fold_block,
    layers.LayerNormalization: _fold_norm,
    layers.BatchNormalization: _fold_norm,
    layers.Dense: _copy,
}
