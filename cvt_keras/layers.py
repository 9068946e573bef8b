"""The layers of the paper (arXiv 2103.15808, sections 3.1 and 3.2), and those of the CIFAR networks, on `keras.ops` alone.

Tokens always form a grid, `(batch, height, width, channels)`: the convolutions need it, and it supports images that are not
square. A cls token is a tensor of its own, because the paper's convolutions never touch it.
"""

import itertools

import keras
import numpy as np
from keras import layers, ops

from cvt_keras.preprocessing import Calibration, Preprocessing
from cvt_keras.variants import ACTIVATIONS, ATTENTION_SCALES, NORMS, PROJECTION_KERNEL_SIZE, PROJECTIONS, pooled

# As in the authors' code. Keras' defaults are 1e-3 and 0.99. Keras' momentum is 1 - PyTorch's.
NORM_EPSILON = 1e-5
BATCH_NORM_MOMENTUM = 0.9

# Added to the variances that whitening divides by: the axes of least variance are mostly noise, of JPEG for instance.
WHITENING_EPSILON = 1e-2
# A smaller share of the mean variance counts as none. Rounding pixels to 8 bits already gives every axis a share of 5e-6.
NEGLIGIBLE_VARIANCE = 1e-6

# Keras truncates a normal at two standard deviations, which leaves 0.8796 of its deviation. PyTorch's
# `trunc_normal_(std=0.02)` truncates at 100 deviations and keeps 0.02.
_TRUNCATION_LOSS = 0.8796


def linear_initializer():
    # A new one for each kernel: a Keras initialiser returns the same numbers for the same shape.
    return keras.initializers.TruncatedNormal(stddev=0.02 / _TRUNCATION_LOSS)


def _conv_initializer():
    """PyTorch's default for a convolution: uniform within 1 / sqrt(fan_in)."""
    return keras.initializers.VarianceScaling(scale=1 / 3, mode="fan_in", distribution="uniform")


def _depthwise_initializer(kernel_size):
    # PyTorch's fan_in is kernel_size^2 here. Keras' fan_in counts every channel: kernels would be 10 times too small.
    return keras.initializers.RandomUniform(-1 / kernel_size, 1 / kernel_size)


@keras.saving.register_keras_serializable(package="cvt_keras")
class NearIdentity(keras.initializers.Initializer):
    """Changes the kernel that `initializer` draws, so that the convolution passes its input through.

    Args:
        initializer: an initializer, or its config.
        depthwise: whether the kernel is depthwise, `(height, width, channels, 1)`. Its centre weights become larger by 1. In
            another kernel, `(height, width, in, out)`, each of the first filters passes one input channel, and the rest stay as
            they are.
    """

    def __init__(self, initializer, depthwise=False):
        self.initializer = keras.initializers.get(initializer)
        self.depthwise = depthwise

    def __call__(self, shape, dtype=None):
        drawn = self.initializer(shape, dtype=dtype)
        height, width, inputs, outputs = shape
        identity = np.zeros(shape, "float32")
        if self.depthwise:
            identity[height // 2, width // 2] = 1
            return drawn + ops.cast(identity, drawn.dtype)
        passing = np.arange(min(inputs, outputs))
        identity[height // 2, width // 2, passing, passing] = 1
        return ops.where(np.arange(outputs) < inputs, ops.cast(identity, drawn.dtype), drawn)

    def get_config(self):
        initializer = keras.saving.serialize_keras_object(self.initializer)
        return {"initializer": initializer, "depthwise": self.depthwise}


def make_norm(norm_type, dtype, name):
    """Returns a LayerNormalization or BatchNormalization layer.

    Args:
        norm_type: `"layer"` or `"batch"`.
        dtype: a dtype policy.
        name: the layer's name.
    """
    if norm_type == "layer":
        return layers.LayerNormalization(epsilon=NORM_EPSILON, dtype=dtype, name=name)
    return layers.BatchNormalization(momentum=BATCH_NORM_MOMENTUM, epsilon=NORM_EPSILON, dtype=dtype, name=name)


def _conv_before_norm(dim, kernel_size, dtype, name):
    """A convolution at stride 1 that keeps height and width."""
    return layers.Conv2D(
        dim,
        kernel_size,
        padding="same",  # symmetric at stride 1
        use_bias=False,  # BatchNorm would subtract it again
        data_format="channels_last",
        kernel_initializer=_conv_initializer(),
        dtype=dtype,
        name=name,
    )


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {tuple(choices)}. Received: {name}={value!r}")


def _check_kernel(kernel_size, stride=1):
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"`kernel_size` must be odd, to pad evenly. Received: kernel_size={kernel_size}")
    if stride < 1:
        raise ValueError(f"`stride` must be a positive integer. Received: stride={stride}")


def _check_grid(shape, dim):
    if len(shape) != 4 or shape[-1] != dim:
        raise ValueError(f"Tokens must be a grid with `dim` channels. Received: shape {shape}, dim={dim}")


def _activate(x, activation):
    if activation == "quick_gelu":
        return x * ops.sigmoid(1.702 * x)
    return ops.gelu(x, approximate=False)


@keras.saving.register_keras_serializable(package="cvt_keras")
class PixelNormalization(layers.Normalization):
    """Normalises raw pixels. It is the first layer of a classifier, and holds its `Preprocessing` and its `Calibration`.

    It computes in float32 whatever the policy: bfloat16 has 8 bits of precision, and subtracting the mean would cancel most of
    them.

    Args:
        preprocessing: a `Preprocessing` with mean and std, or its config.
        calibration: a `Calibration` or its config; `None` means one that changes nothing. The layer only stores it.

    Input shape: `(batch, height, width, channels)`, pixels in 0..255.
    Output shape: the same, `(pixel / 255 - mean) / std`.

    Raises:
        ValueError: if mean or std is missing.
    """

    def __init__(self, preprocessing, calibration=None, **kwargs):
        self.preprocessing = Preprocessing.from_config(preprocessing)
        self.calibration = Calibration.from_config(calibration)
        self.preprocessing.require_channels(len(self.preprocessing.mean or ()))
        super().__init__(
            mean=[255 * value for value in self.preprocessing.mean],
            variance=[(255 * value) ** 2 for value in self.preprocessing.std],
            **{**kwargs, "dtype": "float32"},
        )

    def get_config(self):
        config = super().get_config()
        for name in ("axis", "mean", "variance", "invert"):
            config.pop(name, None)
        return {**config, "preprocessing": self.preprocessing.get_config(), "calibration": self.calibration.get_config()}


@keras.saving.register_keras_serializable(package="cvt_keras")
class Whitening(layers.Layer):
    """A convolution that whitens patches by a fixed kernel, then a trained bias and an activation.

    Its filters are the principal axes of the patches, each divided by the standard deviation along it, and the negatives of
    these filters. Neighbouring pixels are much alike, so without whitening most of the input is brightness. It is not in the
    paper; see Keller Jordan, "94% on CIFAR-10 in 3.29 seconds" (arXiv 2404.00498, section 3.2).

    `adapt` computes the kernel from images: the axes sorted by decreasing variance, each with a positive largest component. An
    axis of no variance, such as every colour in grey images, has filters of zeros: dividing by its standard deviation would
    amplify the noise of other images.

    Before `adapt`, the kernel is that of typical images: its axes are those of the discrete cosine transform over rows, columns
    and channels, and its variances assume that neighbouring pixels correlate by 0.95 and the channels of a pixel by 0.9.

    Args:
        kernel_size: side of a patch, in pixels.
        activation: `"quick_gelu"` or `"gelu"`.

    Input shape: `(batch, height, width, channels)`, normalised images.
    Output shape: `(batch, height - kernel_size + 1, width - kernel_size + 1, 2 * kernel_size**2 * channels)`.

    Raises:
        ValueError: for a `kernel_size` under 1 or an unknown `activation`.

    Example:

    ```python
    layer = Whitening()
    layer.adapt(normalised_images)
    ```
    """

    def __init__(self, kernel_size=2, activation="gelu", **kwargs):
        super().__init__(**kwargs)
        if kernel_size < 1:
            raise ValueError(f"`kernel_size` must be a positive integer. Received: kernel_size={kernel_size}")
        _check_choice("activation", activation, ACTIVATIONS)
        self.kernel_size = kernel_size
        self.activation = activation

    def build(self, input_shape):
        side, channels = self.kernel_size, input_shape[-1]
        filters = 2 * side**2 * channels
        fixed = _whitening_kernel(*_typical_axes(side, channels))
        self.kernel = self.add_weight(
            shape=(side, side, channels, filters),
            initializer=lambda shape, dtype: ops.cast(fixed.reshape(shape), dtype),
            trainable=False,
            name="kernel",
        )
        self.bias = self.add_weight(shape=(filters,), initializer="zeros", name="bias")

    def adapt(self, images):
        """Computes the kernel from images, whose mean should be near 0.

        Args:
            images: normalised floats `(batch, height, width, channels)`, or an iterable of such batches. A few thousand
                images are enough.

        Raises:
            ValueError: for images of another shape or smaller than a patch, for NaN or infinite values, or if there are no
                images.
        """
        batches = [images] if hasattr(images, "shape") else images
        channels = self.kernel.shape[2] if self.built else None
        moments, count = 0.0, 0
        for batch in batches:
            batch = ops.convert_to_numpy(batch).astype("float64")
            _require_images(batch, self.kernel_size, channels)
            channels = batch.shape[-1]
            patches = _patches(batch, self.kernel_size)
            moments = moments + patches.T @ patches
            count += len(patches)
        if not count:
            raise ValueError("`images` must hold at least one image. Received: none")
        variances, axes = np.linalg.eigh(moments / count)
        order = np.argsort(-variances)
        variances, axes = variances[order], axes[:, order]
        # An axis has no sign of its own.
        axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(len(axes))])
        axes[:, variances < NEGLIGIBLE_VARIANCE * variances.mean()] = 0
        if not self.built:
            self.build(batch.shape)
        self.kernel.assign(_whitening_kernel(variances, axes).reshape(self.kernel.shape))

    def call(self, images):
        x = ops.conv(images, self.kernel, 1, padding="valid", data_format="channels_last")
        return _activate(x + self.bias, self.activation)

    def compute_output_shape(self, input_shape):
        batch, height, width, channels = input_shape
        sides = (None if side is None else side - self.kernel_size + 1 for side in (height, width))
        return (batch, *sides, 2 * self.kernel_size**2 * channels)

    def get_config(self):
        return {**super().get_config(), "kernel_size": self.kernel_size, "activation": self.activation}


def _require_images(images, side, channels):
    """Raises unless the array can be whitened. `channels` is `None` if any number will do."""
    shape = images.shape
    if len(shape) != 4 or channels not in (None, shape[-1]):
        raise ValueError(f"`images` must be (batch, height, width, {channels or 'channels'}). Received: shape {shape}")
    if min(shape[1:3]) < side:
        raise ValueError(f"`images` must be at least {side}x{side}, the size of a patch. Received: shape {shape}")
    if not np.isfinite(images).all():
        raise ValueError("`images` must be finite. Received: NaN or infinite values")


def _patches(images, side):
    """All patches of a batch: (B, H, W, C) -> (B * H' * W', side * side * C)."""
    height, width = (length - side + 1 for length in images.shape[1:3])
    shifts = itertools.product(range(side), repeat=2)
    parts = [images[:, row : row + height, column : column + width] for row, column in shifts]
    return np.concatenate(parts, axis=-1).reshape(-1, side * side * images.shape[-1])


def _typical_axes(side, channels):
    """The variances along the axes of patches of typical images, and the axes as the columns of a matrix."""
    positions = np.arange(side)
    neighbours = 0.95 ** np.abs(positions[:, None] - positions)
    colours = np.where(np.eye(channels, dtype=bool), 1.0, 0.9)
    covariance = np.kron(np.kron(neighbours, neighbours), colours)
    axes = np.kron(np.kron(_cosines(side), _cosines(side)), _cosines(channels))
    return np.sum(axes * (covariance @ axes), axis=0), axes


def _cosines(length):
    """The orthonormal discrete cosine transform; its basis vectors are the columns."""
    positions, frequencies = np.arange(length) + 0.5, np.arange(length)
    basis = np.cos(np.pi / length * positions[:, None] * frequencies)
    return basis / np.linalg.norm(basis, axis=0)


def _whitening_kernel(variances, axes):
    """Each axis divided by the deviation along it, then the negatives: `(side * side * C, 2 * side * side * C)`."""
    kernel = axes / np.sqrt(variances + WHITENING_EPSILON)
    return np.concatenate([kernel, -kernel], axis=1).astype("float32")


@keras.saving.register_keras_serializable(package="cvt_keras")
class ConvStem(layers.Layer):
    """A convolution with BatchNorm and activation, at the resolution of its input. It is not in the paper.

    It comes before the first token embedding: the paper's first embedding divides each side by 4, and leaves 8x8 tokens of a
    32x32 image.

    Args:
        dim: output channels.
        kernel_size: side of the kernel, in pixels; odd.
        activation: `"quick_gelu"` or `"gelu"`.

    Input shape: `(batch, height, width, channels)`.
    Output shape: `(batch, height, width, dim)`.

    Raises:
        ValueError: for an even `kernel_size` or an unknown `activation`.
    """

    def __init__(self, dim, kernel_size=3, activation="gelu", **kwargs):
        super().__init__(**kwargs)
        _check_kernel(kernel_size)
        _check_choice("activation", activation, ACTIVATIONS)
        self.dim = dim
        self.kernel_size = kernel_size
        self.activation = activation
        self.conv = _conv_before_norm(dim, kernel_size, self.dtype_policy, "conv")
        self.norm = make_norm("batch", self.dtype_policy, "norm")

    def build(self, input_shape):
        self.conv.build(input_shape)
        self.norm.build(self.conv.compute_output_shape(input_shape))

    def call(self, images, training=False):
        return _activate(self.norm(self.conv(images), training=training), self.activation)

    def compute_output_shape(self, input_shape):
        return self.conv.compute_output_shape(input_shape)

    def get_config(self):
        return {
            **super().get_config(),
            "dim": self.dim,
            "kernel_size": self.kernel_size,
            "activation": self.activation,
        }


@keras.saving.register_keras_serializable(package="cvt_keras")
class ResidualConv(layers.Layer):
    """A 3x3 convolution with BatchNorm, activation and a shortcut, before a stage's blocks. It is not in the paper.

    Args:
        dim: width of a token, in and out.
        activation: `"quick_gelu"` or `"gelu"`.

    Input shape: tokens `(batch, height, width, dim)`; optionally `cls_token` `(batch, 1, dim)`, which stays as it is.
    Output shape: the same; with a cls token a pair.

    Raises:
        ValueError: for an unknown `activation`, or if the tokens are not a grid with `dim` channels.
    """

    def __init__(self, dim, activation="gelu", **kwargs):
        super().__init__(**kwargs)
        _check_choice("activation", activation, ACTIVATIONS)
        self.dim = dim
        self.activation = activation
        self.conv = _conv_before_norm(dim, 3, self.dtype_policy, "conv")
        self.norm = make_norm("batch", self.dtype_policy, "norm")

    def build(self, tokens_shape, cls_token_shape=None):
        _check_grid(tokens_shape, self.dim)
        self.conv.build(tokens_shape)
        self.norm.build(tokens_shape)

    def call(self, tokens, cls_token=None):
        tokens = tokens + _activate(self.norm(self.conv(tokens)), self.activation)
        return tokens if cls_token is None else (tokens, cls_token)

    def compute_output_shape(self, tokens_shape, cls_token_shape=None):
        return tokens_shape if cls_token_shape is None else (tokens_shape, cls_token_shape)

    def get_config(self):
        return {**super().get_config(), "dim": self.dim, "activation": self.activation}


@keras.saving.register_keras_serializable(package="cvt_keras")
class ConvTokenEmbedding(layers.Layer):
    """Opens a stage: a strided convolution makes tokens that overlap, then LayerNorm (paper, section 3.1).

    With `pool`, the convolution has stride 1, and max-pooling, norm and activation follow, similar to the tokenizer of CCT
    (Hassani et al., arXiv 2104.05704).

    Args:
        dim: width of a token.
        kernel_size: side of the square kernel.
        stride: stride of the convolution: the distance between tokens. With `pool`, side of the pooling window.
        padding: zeros added on each of the four sides.
        cls_token: whether to return a learned token as well.
        pool: whether to downsample by max-pooling.
        norm_type: `"layer"` or `"batch"`.
        activation: `"quick_gelu"` or `"gelu"`; used with `pool` only.
        identity_init: whether each of the first filters starts by passing one input channel.

    Input shape: `(batch, height, width, channels)`, an image or the tokens of the stage before.
    Output shape: `(batch, new_height, new_width, dim)`, each side `(side + 2 * padding - kernel_size) // stride + 1`,
        or with `pool` `(side + 2 * padding - kernel_size + 1) // stride`. With `cls_token` a pair: the grid and
        `(batch, 1, dim)`.

    Raises:
        ValueError: for an unknown `norm_type` or `activation`.
    """

    def __init__(
        self,
        dim,
        kernel_size=3,
        stride=2,
        padding=1,
        cls_token=False,
        pool=False,
        norm_type="layer",
        activation="gelu",
        identity_init=False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        _check_choice("norm_type", norm_type, NORMS)
        _check_choice("activation", activation, ACTIVATIONS)
        self.dim = dim
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.cls_token = cls_token
        self.pool = pool
        self.norm_type = norm_type
        self.activation = activation
        self.identity_init = identity_init
        # Keras' "same" is asymmetric at stride 2; the published weights were trained with symmetric padding.
        self.pad = layers.ZeroPadding2D(padding, data_format="channels_last", dtype=self.dtype_policy, name="pad")
        initializer = _conv_initializer()
        self.proj = layers.Conv2D(
            dim,
            kernel_size,
            strides=1 if pool else stride,
            use_bias=norm_type == "layer",  # BatchNorm would subtract it again
            data_format="channels_last",
            kernel_initializer=NearIdentity(initializer) if identity_init else initializer,
            dtype=self.dtype_policy,
            name="proj",
        )
        if pool:
            self.max_pool = layers.MaxPooling2D(stride, data_format="channels_last", dtype=self.dtype_policy, name="max_pool")
        self.norm = make_norm(norm_type, self.dtype_policy, "norm")

    def build(self, input_shape):
        self.pad.build(input_shape)
        padded = self.pad.compute_output_shape(input_shape)
        # PyTorch draws the bias within the kernel's bound, which depends on the input channels.
        bound = (self.kernel_size**2 * input_shape[-1]) ** -0.5
        self.proj.bias_initializer = keras.initializers.RandomUniform(-bound, bound)
        self.proj.build(padded)
        self.norm.build(self._grid_shape(input_shape))
        if self.cls_token:
            self.cls_token_weight = self.add_weight(shape=(1, 1, self.dim), initializer=linear_initializer(), name="cls_token")

    def call(self, images):
        if self.pool:
            tokens = _activate(self.norm(self.max_pool(self.proj(self.pad(images)))), self.activation)
        else:
            tokens = self.norm(self.proj(self.pad(images)))
        if not self.cls_token:
            return tokens
        cls_token = ops.cast(self.cls_token_weight, tokens.dtype)
        return tokens, ops.tile(cls_token, (ops.shape(tokens)[0], 1, 1))  # (1, 1, dim) -> (B, 1, dim)

    def compute_output_shape(self, input_shape):
        grid = self._grid_shape(input_shape)
        return (grid, (input_shape[0], 1, self.dim)) if self.cls_token else grid

    def _grid_shape(self, input_shape):
        grid = self.proj.compute_output_shape(self.pad.compute_output_shape(input_shape))
        return self.max_pool.compute_output_shape(grid) if self.pool else grid

    def get_config(self):
        return {
            **super().get_config(),
            "dim": self.dim,
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "padding": self.padding,
            "cls_token": self.cls_token,
            "pool": self.pool,
            "norm_type": self.norm_type,
            "activation": self.activation,
            "identity_init": self.identity_init,
        }


@keras.saving.register_keras_serializable(package="cvt_keras")
class ConvProjection(layers.Layer):
    """Projects a token grid with a depthwise convolution (paper, section 3.2, figure 2b-c).

    Convolution and BatchNorm mix each token with its neighbours before the linear projection of attention. A stride of 2
    squeezes keys and values to a quarter.

    Args:
        kernel_size: side of the square kernel, in tokens; odd.
        stride: 1 for queries, 2 for squeezed keys and values.
        identity_init: whether the initial centre weights are larger by 1, so that tokens pass through.

    Input shape: `(batch, height, width, channels)`.
    Output shape: `(batch, ceil(height / stride), ceil(width / stride), channels)`.

    Raises:
        ValueError: for an even `kernel_size` or a `stride` under 1.
    """

    def __init__(self, kernel_size=3, stride=1, identity_init=False, **kwargs):
        super().__init__(**kwargs)
        _check_kernel(kernel_size, stride)
        self.kernel_size = kernel_size
        self.stride = stride
        self.identity_init = identity_init
        # Symmetric, as in ConvTokenEmbedding.
        self.pad = layers.ZeroPadding2D(kernel_size // 2, data_format="channels_last", dtype=self.dtype_policy, name="pad")
        initializer = _depthwise_initializer(kernel_size)
        self.depthwise = layers.DepthwiseConv2D(
            kernel_size,
            strides=stride,
            use_bias=False,
            data_format="channels_last",
            depthwise_initializer=NearIdentity(initializer, depthwise=True) if identity_init else initializer,
            dtype=self.dtype_policy,
            name="depthwise",
        )
        self.norm = make_norm("batch", self.dtype_policy, "norm")

    def build(self, input_shape):
        self.pad.build(input_shape)
        padded = self.pad.compute_output_shape(input_shape)
        self.depthwise.build(padded)
        self.norm.build(self.depthwise.compute_output_shape(padded))

    def call(self, tokens, training=False):
        return self.norm(self.depthwise(self.pad(tokens)), training=training)

    def compute_output_shape(self, input_shape):
        return self.depthwise.compute_output_shape(self.pad.compute_output_shape(input_shape))

    def get_config(self):
        return {
            **super().get_config(),
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "identity_init": self.identity_init,
        }


@keras.saving.register_keras_serializable(package="cvt_keras")
class AverageProjection(layers.Layer):
    """Squeezes a token grid by average pooling: the `"avg"` ablation of the authors' code.

    Equals PyTorch's `AvgPool2d(kernel_size, stride, padding=kernel_size // 2, ceil_mode=True)`: the average includes the zeros
    of the padding, but not the cells that ceil mode adds.

    Args:
        kernel_size: side of the square window, in tokens; odd.
        stride: distance between windows.

    Input shape: `(batch, height, width, channels)`.
    Output shape: `(batch, height', width', channels)`; at stride 2 `side // 2 + 1`, so an even grid gets one more row.

    Raises:
        ValueError: for an even `kernel_size` or a `stride` under 1.
    """

    def __init__(self, kernel_size=3, stride=2, **kwargs):
        super().__init__(**kwargs)
        _check_kernel(kernel_size, stride)
        self.kernel_size = kernel_size
        self.stride = stride

    def call(self, tokens):
        before = self.kernel_size // 2
        # The cells that ceil mode adds. No window may start beyond the input.
        beyond = min(self.stride - 1, self.kernel_size - 1 - before)
        # 1 for the cells that the average includes, the same for every image and channel.
        counted = ops.ones_like(tokens[:1, :, :, :1], dtype="float32")
        counted = ops.pad(counted, [(0, 0), (before, before), (before, before), (0, 0)], constant_values=1.0)
        counted = ops.pad(counted, [(0, 0), (0, beyond), (0, beyond), (0, 0)])
        tokens = ops.pad(tokens, [(0, 0), (before, before + beyond), (before, before + beyond), (0, 0)])
        return self._pool(tokens) / ops.cast(self._pool(counted), tokens.dtype)

    def _pool(self, x):
        return ops.average_pool(x, self.kernel_size, self.stride, padding="valid", data_format="channels_last")

    def compute_output_shape(self, input_shape):
        batch, height, width, channels = input_shape
        sides = (None if side is None else pooled(side, self.kernel_size, self.stride) for side in (height, width))
        return (batch, *sides, channels)

    def get_config(self):
        return {**super().get_config(), "kernel_size": self.kernel_size, "stride": self.stride}


@keras.saving.register_keras_serializable(package="cvt_keras")
class ConvAttention(layers.Layer):
    """Multi-head attention whose query, key and value come from convolutional projections (paper, section 3.2).

    A cls token skips the convolutions: it joins the tokens before the linear projections, and is split off after the last.

    Args:
        dim: width of a token, in and out.
        heads: attention heads; must divide `dim`.
        projection: `"dw_bn"`, `"avg"` (key and value; the query has none) or `"linear"` (none, strides are ignored).
        qkv_bias: whether the linear projections of query, key and value have a bias.
        kernel_size: side of the projections' kernel, in tokens; odd.
        stride_q: stride of the query's projection.
        stride_kv: stride of the key's and value's projections.
        attention_scale: scores are divided by the square root of a width: `"dim"`, that of all heads together, or
            `"head"`, that of one head.
        identity_init: see `ConvProjection`.

    Input shape: tokens `(batch, height, width, dim)`; optionally `cls_token` `(batch, 1, dim)`.
    Output shape: `(batch, ceil(height / stride_q), ceil(width / stride_q), dim)`; with a cls token a pair: the grid and
        `(batch, 1, dim)`. If `call` gets `return_attention_scores=True`, a pair: this output, and the weights after the
        softmax, float32 `(batch, heads, queries, keys)`. Queries and keys are in row-major order, the cls token first.

    Raises:
        ValueError: if `heads` does not divide `dim`, or if the tokens are not a grid with `dim` channels.
    """

    def __init__(
        self,
        dim,
        heads,
        projection="dw_bn",
        qkv_bias=True,
        kernel_size=PROJECTION_KERNEL_SIZE,
        stride_q=1,
        stride_kv=2,
        attention_scale="dim",
        identity_init=False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if dim < 1 or heads < 1 or dim % heads:
            raise ValueError(f"`heads` must divide `dim`. Received: heads={heads}, dim={dim}")
        _check_choice("projection", projection, PROJECTIONS)
        _check_choice("attention_scale", attention_scale, ATTENTION_SCALES)
        self.dim = dim
        self.heads = heads
        self.projection = projection
        self.qkv_bias = qkv_bias
        self.kernel_size = kernel_size
        self.stride_q = stride_q
        self.stride_kv = stride_kv
        self.attention_scale = attention_scale
        self.identity_init = identity_init
        self.conv_q = self._conv("linear" if projection == "avg" else projection, stride_q, "conv_q")
        self.conv_k = self._conv(projection, stride_kv, "conv_k")
        self.conv_v = self._conv(projection, stride_kv, "conv_v")
        self.proj_q = self._linear(qkv_bias, "proj_q")
        self.proj_k = self._linear(qkv_bias, "proj_k")
        self.proj_v = self._linear(qkv_bias, "proj_v")
        self.proj = self._linear(True, "proj")

    def _conv(self, projection, stride, name):
        if projection == "linear":
            return layers.Identity(dtype=self.dtype_policy.name, name=name)
        if projection == "avg":
            return AverageProjection(self.kernel_size, stride, dtype=self.dtype_policy, name=name)
        return ConvProjection(self.kernel_size, stride, self.identity_init, dtype=self.dtype_policy, name=name)

    def _linear(self, use_bias, name):
        return layers.Dense(
            self.dim, use_bias=use_bias, kernel_initializer=linear_initializer(), dtype=self.dtype_policy, name=name
        )

    def build(self, tokens_shape, cls_token_shape=None):
        _check_grid(tokens_shape, self.dim)
        for conv in (self.conv_q, self.conv_k, self.conv_v):
            conv.build(tokens_shape)
        for linear in (self.proj_q, self.proj_k, self.proj_v, self.proj):
            linear.build((None, None, self.dim))

    def call(self, tokens, cls_token=None, return_attention_scores=False):
        grid_q = self.conv_q(tokens)
        # By default scaled by the whole width, not a head's, as in the authors' code. Scaling the query is cheapest.
        width = self.dim if self.attention_scale == "dim" else self.dim // self.heads
        q = self._split_heads(self.proj_q(_sequence(grid_q, cls_token)) * width**-0.5)
        k = self._split_heads(self.proj_k(_sequence(self.conv_k(tokens), cls_token)))
        v = self._split_heads(self.proj_v(_sequence(self.conv_v(tokens), cls_token)))

        scores = ops.matmul(q, ops.transpose(k, (0, 1, 3, 2)))  # (B, heads, Nq, Nk)
        # In half precision, small softmax weights would round to the same value.
        weights = ops.softmax(ops.cast(scores, "float32"))
        x = ops.matmul(ops.cast(weights, v.dtype), v)
        x = ops.transpose(x, (0, 2, 1, 3))  # (B, heads, Nq, dim/heads) -> (B, Nq, heads, dim/heads)
        x = self.proj(ops.reshape(x, (-1, ops.shape(x)[1], self.dim)))  # -> (B, Nq, dim)

        _, height, width, _ = ops.shape(grid_q)
        if cls_token is None:
            output = ops.reshape(x, (-1, height, width, self.dim))  # (B, H*W, dim) -> (B, H, W, dim)
        else:
            output = ops.reshape(x[:, 1:], (-1, height, width, self.dim)), x[:, :1]
        return (output, weights) if return_attention_scores else output

    def _split_heads(self, x):
        x = ops.reshape(x, (-1, ops.shape(x)[1], self.heads, self.dim // self.heads))  # (B, N, dim) -> (B, N, heads, -1)
        return ops.transpose(x, (0, 2, 1, 3))  # -> (B, heads, N, dim/heads)

    def compute_output_shape(self, tokens_shape, cls_token_shape=None):
        grid = self.conv_q.compute_output_shape(tokens_shape)
        return grid if cls_token_shape is None else (grid, cls_token_shape)

    def compute_output_spec(self, tokens, cls_token=None, return_attention_scores=False):
        output = super().compute_output_spec(tokens, cls_token)
        if not return_attention_scores:
            return output
        grids = (conv.compute_output_shape(tokens.shape) for conv in (self.conv_q, self.conv_k))
        lengths = (
            None if height is None or width is None else height * width + (cls_token is not None)
            for _, height, width, _ in grids
        )
        return output, keras.KerasTensor((tokens.shape[0], self.heads, *lengths), "float32")

    def get_config(self):
        return {
            **super().get_config(),
            "dim": self.dim,
            "heads": self.heads,
            "projection": self.projection,
            "qkv_bias": self.qkv_bias,
            "kernel_size": self.kernel_size,
            "stride_q": self.stride_q,
            "stride_kv": self.stride_kv,
            "attention_scale": self.attention_scale,
            "identity_init": self.identity_init,
        }


def _sequence(grid, cls_token):
    """(B, H, W, C) and optionally (B, 1, C) -> (B, H*W, C) or (B, 1 + H*W, C), the cls token first."""
    _, height, width, channels = ops.shape(grid)
    tokens = ops.reshape(grid, (-1, height * width, channels))
    return tokens if cls_token is None else ops.concatenate([cls_token, tokens], axis=1)


@keras.saving.register_keras_serializable(package="cvt_keras")
class MLP(layers.Layer):
    """Two linear layers with a GELU between them.

    Args:
        hidden_dim: width of the first layer.
        dim: width of a token, in and out.
        activation: `"quick_gelu"`, `x * sigmoid(1.702 x)`, or `"gelu"`, the exact one.
        conv: whether a depthwise 3x3 convolution with a shortcut comes before the activation, so that each token sees its
            neighbours (similar to CeiT, Yuan et al., arXiv 2103.11816). A cls token skips it.

    Input shape: `(batch, height, width, dim)`, or a cls token `(batch, 1, dim)`. With `conv`, the layer must be built for
        a grid.
    Output shape: the same.

    Raises:
        ValueError: for an unknown `activation`, or if the tokens have other than `dim` channels.
    """

    def __init__(self, hidden_dim, dim, activation="quick_gelu", conv=False, **kwargs):
        super().__init__(**kwargs)
        _check_choice("activation", activation, ACTIVATIONS)
        self.hidden_dim = hidden_dim
        self.dim = dim
        self.activation = activation
        self.conv = conv
        self.fc1 = self._linear(hidden_dim, "fc1")
        if conv:
            self.depthwise = layers.DepthwiseConv2D(
                PROJECTION_KERNEL_SIZE,
                padding="same",  # symmetric at stride 1
                use_bias=False,
                data_format="channels_last",
                depthwise_initializer=_depthwise_initializer(PROJECTION_KERNEL_SIZE),
                dtype=self.dtype_policy,
                name="depthwise",
            )
        self.fc2 = self._linear(dim, "fc2")

    def _linear(self, units, name):
        return layers.Dense(units, kernel_initializer=linear_initializer(), dtype=self.dtype_policy, name=name)

    def build(self, input_shape):
        if input_shape[-1] != self.dim:
            raise ValueError(f"Tokens must have `dim` channels. Received: shape {input_shape}, dim={self.dim}")
        if self.conv and len(input_shape) != 4:
            raise ValueError(f"With `conv`, tokens must be a grid. Received: shape {input_shape}")
        hidden_shape = (*input_shape[:-1], self.hidden_dim)
        self.fc1.build(input_shape)
        if self.conv:
            self.depthwise.build(hidden_shape)
        self.fc2.build(hidden_shape)

    def call(self, tokens):
        hidden = self.fc1(tokens)
        if self.conv and len(tokens.shape) == 4:
            hidden = hidden + self.depthwise(hidden)
        return self.fc2(_activate(hidden, self.activation))

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.dim)

    def get_config(self):
        return {
            **super().get_config(),
            "hidden_dim": self.hidden_dim,
            "dim": self.dim,
            "activation": self.activation,
            "conv": self.conv,
        }


@keras.saving.register_keras_serializable(package="cvt_keras")
class DropPath(layers.Layer):
    """Stochastic depth: in training, drops a residual branch for whole images (Huang et al., arXiv 1603.09382).

    Kept branches are divided by `1 - rate`, which preserves the mean.

    Args:
        rate: share of the images whose branch is dropped; at least 0 and less than 1.
        seed: seed of the draws; `None` picks one at random.

    Input shape: any with the batch first, or a list of such tensors, which share one draw per image.
    Output shape: the same.

    Raises:
        ValueError: for a `rate` outside its range.
    """

    def __init__(self, rate, seed=None, **kwargs):
        super().__init__(**kwargs)
        if not 0 <= rate < 1:
            raise ValueError(f"`rate` must be at least 0 and less than 1. Received: rate={rate}")
        self.rate = rate
        self.seed = seed
        # At rate 0 there is no generator, so checkpoints hold no state of it.
        self.seed_generator = keras.random.SeedGenerator(seed) if rate else None

    def call(self, branch, training=False):
        if not training or not self.rate:
            return branch
        batch = ops.shape(keras.tree.flatten(branch)[0])[0]
        kept = keras.random.uniform((batch,), seed=self.seed_generator) >= self.rate

        def drop(x):
            scale = ops.cast(kept, x.dtype) / (1 - self.rate)
            return x * ops.reshape(scale, (-1, *[1] * (len(x.shape) - 1)))  # (B,) -> (B, 1, ...)

        return keras.tree.map_structure(drop, branch)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "rate": self.rate, "seed": self.seed}


@keras.saving.register_keras_serializable(package="cvt_keras")
class CvTBlock(layers.Layer):
    """Convolutional attention, then an MLP, each after a norm and with a shortcut (paper, figure 2b).

    Args:
        dim: width of a token.
        heads: attention heads; must divide `dim`.
        mlp_dim: hidden width of the MLP.
        drop_path_rate: stochastic depth rate of both branches.
        activation: activation of the MLP, `"quick_gelu"` or `"gelu"`.
        projection, qkv_bias, stride_kv: see `ConvAttention`. The query's stride is 1, because the output is added to the input.
        norm_type: `"layer"`, as in the paper, or `"batch"`.
        attention_scale, identity_init: see `ConvAttention`.
        mlp_conv: `conv` of the `MLP`.

    Input shape: tokens `(batch, height, width, dim)`; optionally `cls_token` `(batch, 1, dim)`.
    Output shape: the same; with a cls token a pair. `return_attention_scores=True` adds the weights, as in `ConvAttention`.
    """

    def __init__(
        self,
        dim,
        heads,
        mlp_dim,
        drop_path_rate=0.0,
        activation="quick_gelu",
        projection="dw_bn",
        qkv_bias=True,
        stride_kv=2,
        norm_type="layer",
        attention_scale="dim",
        mlp_conv=False,
        identity_init=False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        _check_choice("norm_type", norm_type, NORMS)
        self.dim = dim
        self.heads = heads
        self.mlp_dim = mlp_dim
        self.drop_path_rate = drop_path_rate
        self.activation = activation
        self.projection = projection
        self.qkv_bias = qkv_bias
        self.stride_kv = stride_kv
        self.norm_type = norm_type
        self.attention_scale = attention_scale
        self.mlp_conv = mlp_conv
        self.identity_init = identity_init
        self.norm1 = make_norm(norm_type, self.dtype_policy, "norm1")
        self.attention = ConvAttention(
            dim,
            heads,
            projection,
            qkv_bias,
            stride_kv=stride_kv,
            attention_scale=attention_scale,
            identity_init=identity_init,
            dtype=self.dtype_policy,
            name="attention",
        )
        self.drop_path = DropPath(drop_path_rate, dtype=self.dtype_policy, name="drop_path")
        self.norm2 = make_norm(norm_type, self.dtype_policy, "norm2")
        self.mlp = MLP(mlp_dim, dim, activation, mlp_conv, dtype=self.dtype_policy, name="mlp")

    def build(self, tokens_shape, cls_token_shape=None):
        self.norm1.build(tokens_shape)
        self.attention.build(tokens_shape, cls_token_shape)
        self.drop_path.build(tokens_shape)
        self.norm2.build(tokens_shape)
        self.mlp.build(tokens_shape)

    def call(self, tokens, cls_token=None, return_attention_scores=False):
        # The paper's x is one sequence. Here the grid and the cls token are separate; only attention mixes them.
        x = [tokens] if cls_token is None else [tokens, cls_token]
        attended = self.attention(*self._normalized(self.norm1, x), return_attention_scores=return_attention_scores)
        attended, weights = attended if return_attention_scores else (attended, None)
        x = _add(x, self.drop_path(attended))
        x = _add(x, self.drop_path(_each(self.mlp, self._normalized(self.norm2, x))))
        output = x[0] if cls_token is None else tuple(x)
        return (output, weights) if return_attention_scores else output

    def _normalized(self, norm, x):
        if self.norm_type == "layer" or len(x) == 1:
            return _each(norm, x)
        # BatchNorm takes its statistics from grid and cls token together.
        grid, cls_token = x
        tokens = norm(ops.expand_dims(_sequence(grid, cls_token), 2))  # -> (B, 1 + H*W, 1, C)
        return [ops.reshape(tokens[:, 1:], (-1, *ops.shape(grid)[1:])), tokens[:, 0]]  # -> (B, H, W, C) and (B, 1, C)

    def compute_output_shape(self, tokens_shape, cls_token_shape=None):
        return tokens_shape if cls_token_shape is None else (tokens_shape, cls_token_shape)

    def compute_output_spec(self, tokens, cls_token=None, return_attention_scores=False):
        output = super().compute_output_spec(tokens, cls_token)
        if not return_attention_scores:
            return output
        return output, self.attention.compute_output_spec(tokens, cls_token, return_attention_scores=True)[1]

    def get_config(self):
        return {
            **super().get_config(),
            "dim": self.dim,
            "heads": self.heads,
            "mlp_dim": self.mlp_dim,
            "drop_path_rate": self.drop_path_rate,
            "activation": self.activation,
            "projection": self.projection,
            "qkv_bias": self.qkv_bias,
            "stride_kv": self.stride_kv,
            "norm_type": self.norm_type,
            "attention_scale": self.attention_scale,
            "mlp_conv": self.mlp_conv,
            "identity_init": self.identity_init,
        }


def _each(layer, parts):
    return [layer(part) for part in parts]


def _add(shortcut, branch):
    return [x + y for x, y in zip(shortcut, keras.tree.flatten(branch))]
