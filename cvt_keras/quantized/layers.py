"""Fake-quantised layers of an 8-bit network, as in the `model.keras` of a quantisation-aware run.

Each layer represents an integer operation of a TFLite file. It rounds kernels and outputs to the 256 values that they have in
the file (fake quantisation, Jacob et al., arXiv 1712.05877). BatchNorm is folded into a convolution next to it where that is
exact, and is a scale and a shift per channel elsewhere. Biases, which have 32 bits in the file, and the scale and shift of a
norm are not rounded. With `quantized=False` the layers are the same folded network in floats. They need Keras only, so that the
file opens like any other.
"""

import keras
from keras import layers, ops

from cvt_keras.layers import NORM_EPSILON, DropPath
from cvt_keras.variants import PROJECTION_KERNEL_SIZE

LEVELS = 255  # steps between the smallest and the largest 8-bit value
# The output range of TFLite's integer softmax and sigmoid, for every input.
PROBABILITIES = (0.0, LEVELS / 256)
PIXELS = (0.0, 255.0)
INITIAL_LIMIT = 6.0  # as in tfmot's quantizers


@keras.saving.register_keras_serializable(package="cvt_keras")
class FakeQuantize(layers.Layer):
    """Clips to a range, and rounds to the 256 values that 8 bits hold in it.

    The gradient is 1 inside the range and 0 outside.

    Args:
        axis: for weights, the axis whose entries have a range each, symmetric and of 255 values. `None`, for activations, means
            one range, which includes 0.
        limits: a fixed `(minimum, maximum)`. `None` means variables, which training sets.

    Attributes:
        minimum, maximum: the limits, variables or numbers.
        observer: called in training with the tensor, `minimum` and `maximum`. It sets these two and returns the rounded
            tensor. `None` keeps the limits as they are.

    Input shape: any.
    Output shape: the same.
    """

    def __init__(self, axis=None, limits=None, **kwargs):
        super().__init__(**kwargs)
        self.axis = axis
        self.limits = limits
        self.observer = None

    def build(self, input_shape):
        if self.limits is not None:
            self.minimum, self.maximum = self.limits
            return
        shape = () if self.axis is None else (input_shape[self.axis],)
        for name, limit in (("minimum", -INITIAL_LIMIT), ("maximum", INITIAL_LIMIT)):
            initializer = keras.initializers.Constant(limit)
            setattr(self, name, self.add_weight(shape=shape, initializer=initializer, trainable=False, name=name))

    def call(self, x, training=False):
        if training and self.observer is not None:
            return self.observer(x, self.minimum, self.maximum)
        if self.axis is None:
            return keras.quantizers.fake_quant_with_min_max_vars(x, self.minimum, self.maximum)
        # On JAX, Keras takes the ranges for those of the last axis whatever `axis` is.
        x = keras.quantizers.fake_quant_with_min_max_vars(
            ops.swapaxes(x, self.axis, -1), self.minimum, self.maximum, narrow_range=True, axis=len(x.shape) - 1
        )
        return ops.swapaxes(x, self.axis, -1)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "axis": self.axis, "limits": self.limits}


def fake_quantize(quantized, name, dtype, **kwargs):
    """Returns a `FakeQuantize`, or an `Identity` of the same name if not `quantized`."""
    # The config of an Identity can hold a policy's name only.
    return FakeQuantize(name=name, dtype=dtype, **kwargs) if quantized else layers.Identity(name=name, dtype=dtype.name)


@keras.saving.register_keras_serializable(package="cvt_keras")
class QuantizedConv(layers.Layer):
    """A convolution. With a 1x1 kernel it also replaces a Dense.

    Args:
        filters: output channels; `None` is a depthwise convolution.
        kernel_size: side of the kernel.
        stride: stride of the convolution.
        padding: zeros added on each of the four sides.
        quantized: whether kernel and output are rounded.
        rounds_output: whether to round the output here and not in the next layer. TFLite drops one of two roundings in a row.
        scale: multiplies kernel and bias before they are rounded. The file holds the products. The variables stay unscaled,
            because an optimizer's steps are as large for small weights as for large ones.

    Input shape: `(batch, height, width, channels)`.
    Output shape: `(batch, new_height, new_width, filters)`.
    """

    def __init__(
        self, filters=None, kernel_size=1, stride=1, padding=0, quantized=True, rounds_output=True, scale=1.0, **kwargs
    ):
        super().__init__(**kwargs)
        self.filters = filters
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.quantized = quantized
        self.rounds_output = rounds_output
        self.scale = scale
        settings = {"strides": stride, "data_format": "channels_last", "dtype": self.dtype_policy, "name": "conv"}
        if filters is None:
            self.conv = layers.DepthwiseConv2D(kernel_size, **settings)
        else:
            self.conv = layers.Conv2D(filters, kernel_size, **settings)
        self.pad = layers.ZeroPadding2D(padding, data_format="channels_last", dtype=self.dtype_policy, name="pad")
        # Separate layers: a .keras file does not restore weights added to a subclass of Dense or Conv2D.
        self.kernel_quantizer = fake_quantize(quantized, "kernel_quantizer", self.dtype_policy, axis=3 if filters else 2)
        self.output_quantizer = fake_quantize(quantized and rounds_output, "output_quantizer", self.dtype_policy)

    def build(self, input_shape):
        self.conv.build(self.pad.compute_output_shape(input_shape))
        self.kernel_quantizer.build(self.conv.kernel.shape)
        self.output_quantizer.build(self.compute_output_shape(input_shape))

    @property
    def kernel(self):
        """The kernel of the file before rounding."""
        return self.conv.kernel * self.scale

    def call(self, x):
        kernel = self.kernel_quantizer(self.kernel)
        convolve = ops.conv if self.filters else ops.depthwise_conv
        if self.padding:
            x = self.pad(x)
        x = convolve(x, kernel, self.stride, padding="valid", data_format="channels_last")
        return self.output_quantizer(x + self.conv.bias * self.scale)

    def compute_output_shape(self, input_shape):
        return self.conv.compute_output_shape(self.pad.compute_output_shape(input_shape))

    def get_config(self):
        return {
            **super().get_config(),
            "filters": self.filters,
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "padding": self.padding,
            "quantized": self.quantized,
            "rounds_output": self.rounds_output,
            "scale": self.scale,
        }


@keras.saving.register_keras_serializable(package="cvt_keras")
class QuantizedLayerNorm(layers.Layer):
    """LayerNorm over the last axis, in steps that TFLite computes in integers. Each step's result is rounded.

    Args:
        quantized: whether to round.
        rounds_output: see `QuantizedConv`.

    Input shape: any, with its last axis known.
    Output shape: the same.
    """

    STEPS = ("mean", "centred", "square", "variance", "shifted", "inverse", "normalized", "scaled", "output")

    def __init__(self, quantized=True, rounds_output=True, **kwargs):
        super().__init__(**kwargs)
        self.quantized = quantized
        self.rounds_output = rounds_output
        self.quantizers = {
            step: fake_quantize(quantized and (rounds_output or step != "output"), f"{step}_quantizer", self.dtype_policy)
            for step in self.STEPS
        }

    def build(self, input_shape):
        self.gamma = self.add_weight(shape=(input_shape[-1],), initializer="ones", name="gamma")
        self.beta = self.add_weight(shape=(input_shape[-1],), initializer="zeros", name="beta")
        for quantizer in self.quantizers.values():
            quantizer.build(input_shape)

    def call(self, x, training=False):
        rounded = self.quantizers
        mean = rounded["mean"](ops.mean(x, axis=-1, keepdims=True))
        centred = rounded["centred"](x - mean)
        # Uses the difference before rounding: TFLite has an integer squared difference, but no square.
        square = rounded["square"](ops.square(x - mean))
        variance = rounded["variance"](ops.mean(square, axis=-1, keepdims=True))
        shifted = rounded["shifted"](variance + NORM_EPSILON)
        if self.quantized and training:
            # A variance that rounds to 0 has an infinite inverse root. Inference clips that to the inverse's range, as TFLite
            # does. In training, it would widen the range to infinity, and the gradient would be NaN.
            shifted = ops.maximum(shifted, rounded["shifted"].maximum / (2 * LEVELS))
        inverse = rounded["inverse"](ops.rsqrt(shifted))
        normalized = rounded["normalized"](centred * inverse)
        return rounded["output"](rounded["scaled"](normalized * self.gamma) + self.beta)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "quantized": self.quantized, "rounds_output": self.rounds_output}


@keras.saving.register_keras_serializable(package="cvt_keras")
class QuantizedBatchNorm(layers.Layer):
    """BatchNorm at inference: a scale and a shift per channel, as a depthwise 1x1 convolution with a rounded output.

    The scale is not rounded: a kernel of one weight per channel is exact in 8 bits.

    Args:
        quantized: whether to round.

    Input shape: `(batch, height, width, channels)`.
    Output shape: the same.
    """

    def __init__(self, quantized=True, **kwargs):
        super().__init__(**kwargs)
        self.quantized = quantized
        self.output_quantizer = fake_quantize(quantized, "output_quantizer", self.dtype_policy)

    def build(self, input_shape):
        # Not the names of a convolution: weight decay, pruning and counts of zeros apply to kernels.
        self.gamma = self.add_weight(shape=(input_shape[-1],), initializer="ones", name="gamma")
        self.beta = self.add_weight(shape=(input_shape[-1],), initializer="zeros", name="beta")
        self.output_quantizer.build(input_shape)

    def call(self, x):
        kernel = ops.reshape(self.gamma, (1, 1, -1, 1))
        x = ops.depthwise_conv(x, kernel, 1, padding="valid", data_format="channels_last")
        return self.output_quantizer(x + self.beta)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "quantized": self.quantized}


def quantized_norm(norm_type, quantized, dtype, name, **kwargs):
    """Returns a `QuantizedLayerNorm` or `QuantizedBatchNorm`.

    Args:
        norm_type: `"layer"` or `"batch"`.
        quantized, dtype, name, kwargs: of the layer.
    """
    cls = {"layer": QuantizedLayerNorm, "batch": QuantizedBatchNorm}[norm_type]
    return cls(quantized, dtype=dtype, name=name, **kwargs)


@keras.saving.register_keras_serializable(package="cvt_keras")
class QuantizedActivation(layers.Layer):
    """GELU with a rounded output.

    Args:
        activation: `"quick_gelu"` or `"gelu"`.
        quantized: whether to round.
        rounds_output: see `QuantizedConv`.

    Input shape: any.
    Output shape: the same.
    """

    def __init__(self, activation, quantized=True, rounds_output=True, **kwargs):
        super().__init__(**kwargs)
        self.activation = activation
        self.quantized = quantized
        self.rounds_output = rounds_output
        if activation == "quick_gelu":
            self.steepened_quantizer = fake_quantize(quantized, "steepened_quantizer", self.dtype_policy)
            self.sigmoid_quantizer = fake_quantize(quantized, "sigmoid_quantizer", self.dtype_policy, limits=PROBABILITIES)
        self.output_quantizer = fake_quantize(quantized and rounds_output, "output_quantizer", self.dtype_policy)

    def build(self, input_shape):
        if self.activation == "quick_gelu":
            self.steepened_quantizer.build(input_shape)
            self.sigmoid_quantizer.build(input_shape)
        self.output_quantizer.build(input_shape)

    def call(self, x):
        if self.activation == "quick_gelu":
            share = self.sigmoid_quantizer(ops.sigmoid(self.steepened_quantizer(1.702 * x)))
            return self.output_quantizer(x * share)
        return self.output_quantizer(ops.gelu(x, approximate=False))

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {
            **super().get_config(),
            "activation": self.activation,
            "quantized": self.quantized,
            "rounds_output": self.rounds_output,
        }


@keras.saving.register_keras_serializable(package="cvt_keras")
class QuantizedWhitening(layers.Layer):
    """`Whitening` in 8 bits: a convolution with a fixed kernel and a trained bias, then an activation.

    Args:
        kernel_size, activation: as in `Whitening`.
        quantized: see `QuantizedConv`.

    Input shape: `(batch, height, width, channels)`, normalised images.
    Output shape: `(batch, height - kernel_size + 1, width - kernel_size + 1, 2 * kernel_size**2 * channels)`.
    """

    def __init__(self, kernel_size=2, activation="gelu", quantized=True, **kwargs):
        super().__init__(**kwargs)
        self.kernel_size = kernel_size
        self.activation = activation
        self.quantized = quantized
        self.kernel_quantizer = fake_quantize(quantized, "kernel_quantizer", self.dtype_policy, axis=3)
        self.output_quantizer = fake_quantize(quantized, "output_quantizer", self.dtype_policy)
        self.activate = QuantizedActivation(activation, quantized, dtype=self.dtype_policy, name="activate")

    def build(self, input_shape):
        output_shape = self.compute_output_shape(input_shape)
        side, channels, filters = self.kernel_size, input_shape[-1], output_shape[-1]
        self.kernel = self.add_weight(shape=(side, side, channels, filters), trainable=False, name="kernel")
        self.bias = self.add_weight(shape=(filters,), initializer="zeros", name="bias")
        self.kernel_quantizer.build(self.kernel.shape)
        self.output_quantizer.build(output_shape)
        self.activate.build(output_shape)

    def call(self, images):
        x = ops.conv(images, self.kernel_quantizer(self.kernel), 1, padding="valid", data_format="channels_last")
        return self.activate(self.output_quantizer(x + self.bias))

    def compute_output_shape(self, input_shape):
        batch, height, width, channels = input_shape
        sides = (None if side is None else side - self.kernel_size + 1 for side in (height, width))
        return (batch, *sides, 2 * self.kernel_size**2 * channels)

    def get_config(self):
        return {
            **super().get_config(),
            "kernel_size": self.kernel_size,
            "activation": self.activation,
            "quantized": self.quantized,
        }


@keras.saving.register_keras_serializable(package="cvt_keras")
class QuantizedStem(layers.Layer):
    """`ConvStem` in 8 bits, with its BatchNorm folded.

    Args:
        dim: output channels.
        activation: `"quick_gelu"` or `"gelu"`.
        quantized: see `QuantizedConv`.

    Input shape: `(batch, height, width, channels)`.
    Output shape: `(batch, height, width, dim)`.
    """

    def __init__(self, dim, activation="gelu", quantized=True, **kwargs):
        super().__init__(**kwargs)
        self.dim = dim
        self.activation = activation
        self.quantized = quantized
        self.conv = QuantizedConv(dim, 3, padding=1, quantized=quantized, dtype=self.dtype_policy, name="conv")
        self.activate = QuantizedActivation(activation, quantized, dtype=self.dtype_policy, name="activate")

    def build(self, input_shape):
        self.conv.build(input_shape)
        self.activate.build(self.conv.compute_output_shape(input_shape))

    def call(self, images):
        return self.activate(self.conv(images))

    def compute_output_shape(self, input_shape):
        return self.conv.compute_output_shape(input_shape)

    def get_config(self):
        return {**super().get_config(), "dim": self.dim, "activation": self.activation, "quantized": self.quantized}


@keras.saving.register_keras_serializable(package="cvt_keras")
class QuantizedConcatenation(layers.Layer):
    """Puts a cls token before a grid's tokens. Both have one range, as TFLite concatenates only tensors of equal scale.

    Args:
        quantized: whether to round.

    Input shape: `(batch, 1, 1, dim)` and `(batch, height, width, dim)`.
    Output shape: `(batch, 1 + height * width, 1, dim)`.
    """

    def __init__(self, quantized=True, **kwargs):
        super().__init__(**kwargs)
        self.quantized = quantized
        self.quantizer = fake_quantize(quantized, "quantizer", self.dtype_policy)

    def build(self, cls_token_shape, tokens_shape):
        self.quantizer.build(cls_token_shape)

    def call(self, cls_token, tokens, training=False):
        parts = [cls_token, _sequence(tokens)]
        if training:  # both at once, so that the range covers both
            return self.quantizer(ops.concatenate(parts, axis=1))
        return ops.concatenate([self.quantizer(part) for part in parts], axis=1)

    def compute_output_shape(self, cls_token_shape, tokens_shape):
        batch, height, width, dim = tokens_shape
        return (batch, 1 + height * width, 1, dim)

    def get_config(self):
        return {**super().get_config(), "quantized": self.quantized}


def _sequence(grid):
    """(B, H, W, C) -> (B, H*W, 1, C)."""
    _, height, width, channels = ops.shape(grid)
    return ops.reshape(grid, (-1, height * width, 1, channels))


def split_cls_token(sequence, grid):
    """Splits what `QuantizedConcatenation` joined.

    Args:
        sequence: `(batch, 1 + height * width, 1, dim)`.
        grid: `(height, width)`.

    Returns:
        The cls token `(batch, 1, 1, dim)` and the tokens `(batch, height, width, dim)`.
    """
    return sequence[:, :1], ops.reshape(sequence[:, 1:], (-1, *grid, sequence.shape[-1]))


@keras.saving.register_keras_serializable(package="cvt_keras")
class QuantizedResidualConv(layers.Layer):
    """`ResidualConv` in 8 bits, with its BatchNorm folded.

    Args:
        dim, activation: as in `ResidualConv`.
        grid: see `QuantizedAttention`.
        quantized: see `QuantizedConv`.

    Input shape: tokens `(batch, height, width, dim)`, or with a cls token `(batch, 1 + height * width, 1, dim)`.
    Output shape: the same.
    """

    def __init__(self, dim, activation="gelu", grid=None, quantized=True, **kwargs):
        super().__init__(**kwargs)
        self.dim = dim
        self.activation = activation
        self.grid = grid
        self.quantized = quantized
        self.conv = QuantizedConv(dim, 3, padding=1, quantized=quantized, dtype=self.dtype_policy, name="conv")
        self.activate = QuantizedActivation(activation, quantized, dtype=self.dtype_policy, name="activate")
        self.sum_quantizer = fake_quantize(quantized, "sum_quantizer", self.dtype_policy)

    def build(self, tokens_shape):
        grid = (None, *(self.grid or tokens_shape[1:3]), self.dim)
        self.conv.build(grid)
        self.activate.build(grid)
        self.sum_quantizer.build(tokens_shape)

    def call(self, x):
        if not self.grid:
            return self.sum_quantizer(x + self.activate(self.conv(x)))
        _, tokens = split_cls_token(x, self.grid)
        branch = _sequence(self.activate(self.conv(tokens)))  # (B, H, W, C) -> (B, H*W, 1, C)
        return self.sum_quantizer(x + ops.pad(branch, ((0, 0), (1, 0), (0, 0), (0, 0))))  # adds 0 to the cls token

    def compute_output_shape(self, tokens_shape):
        return tokens_shape

    def get_config(self):
        return {
            **super().get_config(),
            "dim": self.dim,
            "activation": self.activation,
            "grid": self.grid,
            "quantized": self.quantized,
        }


@keras.saving.register_keras_serializable(package="cvt_keras")
class QuantizedTokenEmbedding(layers.Layer):
    """`ConvTokenEmbedding` in 8 bits.

    BatchNorm is folded into the convolution, but not with `pool`: a negative scale would turn the maximum into the minimum.

    Args:
        dim, kernel_size, stride, padding, cls_token, pool, norm_type, activation: as in `ConvTokenEmbedding`.
        quantized: see `QuantizedConv`.

    Input shape: `(batch, height, width, channels)`.
    Output shape: `(batch, new_height, new_width, dim)`; with `cls_token` `(batch, 1 + new_height * new_width, 1, dim)`.
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
        quantized=True,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.dim = dim
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.cls_token = cls_token
        self.pool = pool
        self.norm_type = norm_type
        self.activation = activation
        self.quantized = quantized
        self.folded = norm_type == "batch" and not pool
        self.proj = QuantizedConv(
            dim,
            kernel_size,
            1 if pool else stride,
            padding,
            quantized,
            rounds_output=not (self.folded and cls_token),
            dtype=self.dtype_policy,
            name="proj",
        )
        if pool:
            self.max_pool = layers.MaxPooling2D(stride, data_format="channels_last", dtype=self.dtype_policy, name="max_pool")
            self.activate = QuantizedActivation(
                activation, quantized, rounds_output=not cls_token, dtype=self.dtype_policy, name="activate"
            )
        if norm_type == "layer":
            rounds_output = pool or not cls_token
            self.norm = QuantizedLayerNorm(quantized, rounds_output, dtype=self.dtype_policy, name="norm")
        elif pool:
            self.norm = QuantizedBatchNorm(quantized, dtype=self.dtype_policy, name="norm")
        if cls_token:
            self.join = QuantizedConcatenation(quantized, dtype=self.dtype_policy, name="join")

    def build(self, input_shape):
        self.proj.build(input_shape)
        grid = self._grid_shape(input_shape)
        if not self.folded:
            self.norm.build(grid)
        if self.pool:
            self.activate.build(grid)
        if self.cls_token:
            self.cls_token_weight = self.add_weight(shape=(1, 1, self.dim), name="cls_token")
            self.join.build((None, 1, 1, self.dim), grid)

    def call(self, images):
        tokens = self.proj(images)
        if self.pool:
            tokens = self.activate(self.norm(self.max_pool(tokens)))
        elif not self.folded:
            tokens = self.norm(tokens)
        if not self.cls_token:
            return tokens
        cls_token = ops.expand_dims(self.cls_token_weight, 1)
        return self.join(ops.tile(cls_token, (ops.shape(tokens)[0], 1, 1, 1)), tokens)  # (1, 1, 1, dim) -> (B, 1, 1, dim)

    def compute_output_shape(self, input_shape):
        grid = self._grid_shape(input_shape)
        return self.join.compute_output_shape(None, grid) if self.cls_token else grid

    def _grid_shape(self, input_shape):
        grid = self.proj.compute_output_shape(input_shape)
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
            "quantized": self.quantized,
        }


@keras.saving.register_keras_serializable(package="cvt_keras")
class QuantizedAttention(layers.Layer):
    """`ConvAttention` in 8 bits, with its BatchNorms folded and the scores' scale in the query's projection.

    The linear projections are 1x1 convolutions: TFLite keeps a Dense on three axes in floats.

    Args:
        dim, heads, projection, stride_kv, attention_scale: as in `ConvAttention`; `projection` is `"dw_bn"` or `"linear"`.
        grid: `(height, width)` of the tokens after a cls token; `None` without a cls token.
        quantized: see `QuantizedConv`.

    Input shape: tokens `(batch, height, width, dim)`, or with a cls token `(batch, 1 + height * width, 1, dim)`.
    Output shape: the same.
    """

    def __init__(self, dim, heads, projection="dw_bn", stride_kv=2, attention_scale="dim", grid=None, quantized=True, **kwargs):
        super().__init__(**kwargs)
        self.dim = dim
        self.heads = heads
        self.projection = projection
        self.stride_kv = stride_kv
        self.attention_scale = attention_scale
        self.grid = grid
        self.quantized = quantized
        self.conv_q, self.conv_k, self.conv_v = (
            self._conv(stride, name) for stride, name in ((1, "conv_q"), (stride_kv, "conv_k"), (stride_kv, "conv_v"))
        )
        if grid:
            self.join_q, self.join_k, self.join_v = (
                QuantizedConcatenation(quantized, dtype=self.dtype_policy, name=f"join_{name}") for name in "qkv"
            )
        width = dim if attention_scale == "dim" else dim // heads
        self.proj_q, self.proj_k, self.proj_v = (
            QuantizedConv(dim, quantized=quantized, rounds_output=not grid, scale=scale, dtype=self.dtype_policy, name=name)
            for name, scale in (("proj_q", width**-0.5), ("proj_k", 1.0), ("proj_v", 1.0))
        )
        self.proj = QuantizedConv(dim, quantized=quantized, dtype=self.dtype_policy, name="proj")
        self.scores_quantizer = fake_quantize(quantized, "scores_quantizer", self.dtype_policy)
        self.weights_quantizer = fake_quantize(quantized, "weights_quantizer", self.dtype_policy, limits=PROBABILITIES)
        self.context_quantizer = fake_quantize(quantized, "context_quantizer", self.dtype_policy)

    def _conv(self, stride, name):
        if self.projection == "linear":
            return layers.Identity(dtype=self.dtype_policy.name, name=name)
        kernel = PROJECTION_KERNEL_SIZE
        return QuantizedConv(None, kernel, stride, kernel // 2, self.quantized, dtype=self.dtype_policy, name=name)

    def build(self, tokens_shape):
        grid = (None, *(self.grid or tokens_shape[1:3]), self.dim)
        for conv in (self.conv_q, self.conv_k, self.conv_v):
            conv.build(grid)
        for join in (self.join_q, self.join_k, self.join_v) if self.grid else ():
            join.build((None, 1, 1, self.dim), grid)
        sequence = (None, None, 1, self.dim)
        for linear in (self.proj_q, self.proj_k, self.proj_v, self.proj):
            linear.build(sequence)
        for quantizer in (self.scores_quantizer, self.weights_quantizer, self.context_quantizer):
            quantizer.build(sequence)

    def call(self, tokens):
        shape = (-1, *ops.shape(tokens)[1:])
        if self.grid:
            cls_token, tokens = split_cls_token(tokens, self.grid)
        q, k, v = self.proj_q(self.conv_q(tokens)), self.proj_k(self.conv_k(tokens)), self.proj_v(self.conv_v(tokens))
        if self.grid:
            q, k, v = (
                self.join_q(self.proj_q(cls_token), q),
                self.join_k(self.proj_k(cls_token), k),
                self.join_v(self.proj_v(cls_token), v),
            )
        else:
            q, k, v = _sequence(q), _sequence(k), _sequence(v)  # (B, H, W, dim) -> (B, N, 1, dim)
        q, k, v = self._heads(q), self._heads(k), self._heads(v)

        scores = self.scores_quantizer(ops.matmul(q, ops.transpose(k, (0, 1, 3, 2))))  # (B, heads, Nq, Nk)
        weights = self.weights_quantizer(ops.softmax(scores))
        x = self.context_quantizer(ops.matmul(weights, v))  # (B, heads, Nq, dim/heads)
        x = ops.transpose(x, (0, 2, 1, 3))  # -> (B, Nq, heads, dim/heads)
        x = self.proj(ops.reshape(x, (-1, ops.shape(x)[1], 1, self.dim)))  # -> (B, Nq, 1, dim)
        return ops.reshape(x, shape)

    def _heads(self, x):
        x = ops.reshape(x, (-1, ops.shape(x)[1], self.heads, self.dim // self.heads))  # (B, N, 1, dim) -> (B, N, heads, -1)
        return ops.transpose(x, (0, 2, 1, 3))  # -> (B, heads, N, dim/heads)

    def compute_output_shape(self, tokens_shape):
        return tokens_shape

    def get_config(self):
        return {
            **super().get_config(),
            "dim": self.dim,
            "heads": self.heads,
            "projection": self.projection,
            "stride_kv": self.stride_kv,
            "attention_scale": self.attention_scale,
            "grid": self.grid,
            "quantized": self.quantized,
        }


@keras.saving.register_keras_serializable(package="cvt_keras")
class QuantizedBlock(layers.Layer):
    """`CvTBlock` in 8 bits. The kernel of `mlp_conv` includes its shortcut.

    BatchNorm as the second norm is folded into `fc1`. The first is not: the convolutions after it pad with zeros, and a zero
    after the norm is not a zero before it.

    Args:
        dim, heads, mlp_dim, drop_path_rate, activation, projection, stride_kv, norm_type, attention_scale, mlp_conv: as in
            `CvTBlock`.
        grid: see `QuantizedAttention`.
        quantized: see `QuantizedConv`.

    Input shape: tokens `(batch, height, width, dim)`, or with a cls token `(batch, 1 + height * width, 1, dim)`.
    Output shape: the same.
    """

    def __init__(
        self,
        dim,
        heads,
        mlp_dim,
        drop_path_rate=0.0,
        activation="quick_gelu",
        projection="dw_bn",
        stride_kv=2,
        norm_type="layer",
        attention_scale="dim",
        mlp_conv=False,
        grid=None,
        quantized=True,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.dim = dim
        self.heads = heads
        self.mlp_dim = mlp_dim
        self.drop_path_rate = drop_path_rate
        self.activation = activation
        self.projection = projection
        self.stride_kv = stride_kv
        self.norm_type = norm_type
        self.attention_scale = attention_scale
        self.mlp_conv = mlp_conv
        self.grid = grid
        self.quantized = quantized
        self.norm1 = quantized_norm(norm_type, quantized, self.dtype_policy, "norm1")
        self.attention = QuantizedAttention(
            dim, heads, projection, stride_kv, attention_scale, grid, quantized, dtype=self.dtype_policy, name="attention"
        )
        self.sum1_quantizer = fake_quantize(quantized, "sum1_quantizer", self.dtype_policy)
        self.drop_path = DropPath(drop_path_rate, dtype=self.dtype_policy, name="drop_path")
        if norm_type == "layer":
            self.norm2 = QuantizedLayerNorm(quantized, dtype=self.dtype_policy, name="norm2")
        self.fc1 = QuantizedConv(mlp_dim, quantized=quantized, dtype=self.dtype_policy, name="fc1")
        if mlp_conv:
            self.depthwise = QuantizedConv(
                None,
                PROJECTION_KERNEL_SIZE,
                padding=PROJECTION_KERNEL_SIZE // 2,
                quantized=quantized,
                rounds_output=not grid,
                dtype=self.dtype_policy,
                name="depthwise",
            )
            if grid:
                self.join = QuantizedConcatenation(quantized, dtype=self.dtype_policy, name="join")
        self.activate = QuantizedActivation(activation, quantized, dtype=self.dtype_policy, name="activate")
        self.fc2 = QuantizedConv(dim, quantized=quantized, dtype=self.dtype_policy, name="fc2")
        self.sum2_quantizer = fake_quantize(quantized, "sum2_quantizer", self.dtype_policy)

    def build(self, tokens_shape):
        for layer in (self.norm1, self.attention, self.sum1_quantizer, self.fc1, self.sum2_quantizer):
            layer.build(tokens_shape)
        if self.norm_type == "layer":
            self.norm2.build(tokens_shape)
        hidden = (*tokens_shape[:-1], self.mlp_dim)
        if self.mlp_conv:
            grid = (None, *self.grid, self.mlp_dim) if self.grid else hidden
            self.depthwise.build(grid)
            if self.grid:
                self.join.build((None, 1, 1, self.mlp_dim), grid)
        self.activate.build(hidden)
        self.fc2.build(hidden)

    def call(self, x):
        x = self.sum1_quantizer(x + self.drop_path(self.attention(self.norm1(x))))
        hidden = self.fc1(self.norm2(x) if self.norm_type == "layer" else x)
        if self.mlp_conv:
            hidden = self._convolved(hidden)
        return self.sum2_quantizer(x + self.drop_path(self.fc2(self.activate(hidden))))

    def _convolved(self, hidden):
        if not self.grid:
            return self.depthwise(hidden)
        cls_token, tokens = split_cls_token(hidden, self.grid)
        return self.join(cls_token, self.depthwise(tokens))

    def compute_output_shape(self, tokens_shape):
        return tokens_shape

    def get_config(self):
        return {
            **super().get_config(),
            "dim": self.dim,
            "heads": self.heads,
            "mlp_dim": self.mlp_dim,
            "drop_path_rate": self.drop_path_rate,
            "activation": self.activation,
            "projection": self.projection,
            "stride_kv": self.stride_kv,
            "norm_type": self.norm_type,
            "attention_scale": self.attention_scale,
            "mlp_conv": self.mlp_conv,
            "grid": self.grid,
            "quantized": self.quantized,
        }
