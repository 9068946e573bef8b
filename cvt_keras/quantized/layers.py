"""Fake-quantised layers of an 8-bit network, as in the `model.keras` of a quantisation-aware run.

Each layer represents an integer operation of a TFLite file. It rounds kernels and outputs to the 256 values that they have in
the file (fake quantisation, Jacob et al., arXiv 1712.05877), and BatchNorm is folded into the convolution before it. Biases,
which have 32 bits in the file, and the scale and shift of a LayerNorm, which have 8, are not rounded. With `quantized=False`
the layers are the same folded network in floats. They need Keras only, so that the file opens like any other.
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
        return keras.quantizers.fake_quant_with_min_max_vars(
            x, self.minimum, self.maximum, narrow_range=self.axis is not None, axis=self.axis
        )

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
class QuantizedActivation(layers.Layer):
    """GELU with a rounded output.

    Args:
        activation: `"quick_gelu"` or `"gelu"`.
        quantized: whether to round.

    Input shape: any.
    Output shape: the same.
    """

    def __init__(self, activation, quantized=True, **kwargs):
        super().__init__(**kwargs)
        self.activation = activation
        self.quantized = quantized
        if activation == "quick_gelu":
            self.steepened_quantizer = fake_quantize(quantized, "steepened_quantizer", self.dtype_policy)
            self.sigmoid_quantizer = fake_quantize(quantized, "sigmoid_quantizer", self.dtype_policy, limits=PROBABILITIES)
        self.output_quantizer = fake_quantize(quantized, "output_quantizer", self.dtype_policy)

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
        return {**super().get_config(), "activation": self.activation, "quantized": self.quantized}


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


@keras.saving.register_keras_serializable(package="cvt_keras")
class QuantizedTokenEmbedding(layers.Layer):
    """`ConvTokenEmbedding` in 8 bits.

    Args:
        dim, kernel_size, stride, padding, cls_token: as in `ConvTokenEmbedding`.
        quantized: see `QuantizedConv`.

    Input shape: `(batch, height, width, channels)`.
    Output shape: `(batch, new_height, new_width, dim)`; with `cls_token` `(batch, 1 + new_height * new_width, 1, dim)`.
    """

    def __init__(self, dim, kernel_size=3, stride=2, padding=1, cls_token=False, quantized=True, **kwargs):
        super().__init__(**kwargs)
        self.dim = dim
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.cls_token = cls_token
        self.quantized = quantized
        self.proj = QuantizedConv(dim, kernel_size, stride, padding, quantized, dtype=self.dtype_policy, name="proj")
        self.norm = QuantizedLayerNorm(quantized, rounds_output=not cls_token, dtype=self.dtype_policy, name="norm")
        if cls_token:
            self.join = QuantizedConcatenation(quantized, dtype=self.dtype_policy, name="join")

    def build(self, input_shape):
        self.proj.build(input_shape)
        grid = self.proj.compute_output_shape(input_shape)
        self.norm.build(grid)
        if self.cls_token:
            self.cls_token_weight = self.add_weight(shape=(1, 1, self.dim), name="cls_token")
            self.join.build((None, 1, 1, self.dim), grid)

    def call(self, images):
        tokens = self.norm(self.proj(images))
        if not self.cls_token:
            return tokens
        cls_token = ops.expand_dims(self.cls_token_weight, 1)
        return self.join(ops.tile(cls_token, (ops.shape(tokens)[0], 1, 1, 1)), tokens)  # (1, 1, 1, dim) -> (B, 1, 1, dim)

    def compute_output_shape(self, input_shape):
        grid = self.proj.compute_output_shape(input_shape)
        return self.join.compute_output_shape(None, grid) if self.cls_token else grid

    def get_config(self):
        return {
            **super().get_config(),
            "dim": self.dim,
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "padding": self.padding,
            "cls_token": self.cls_token,
            "quantized": self.quantized,
        }


@keras.saving.register_keras_serializable(package="cvt_keras")
class QuantizedAttention(layers.Layer):
    """`ConvAttention` in 8 bits, with its BatchNorms folded and the scores' scale in the query's projection.

    The linear projections are 1x1 convolutions: TFLite keeps a Dense on three axes in floats.

    Args:
        dim, heads, projection, stride_kv: as in `ConvAttention`; `projection` is `"dw_bn"` or `"linear"`.
        grid: `(height, width)` of the tokens after a cls token; `None` without a cls token.
        quantized: see `QuantizedConv`.

    Input shape: tokens `(batch, height, width, dim)`, or with a cls token `(batch, 1 + height * width, 1, dim)`.
    Output shape: the same.
    """

    def __init__(self, dim, heads, projection="dw_bn", stride_kv=2, grid=None, quantized=True, **kwargs):
        super().__init__(**kwargs)
        self.dim = dim
        self.heads = heads
        self.projection = projection
        self.stride_kv = stride_kv
        self.grid = grid
        self.quantized = quantized
        self.conv_q, self.conv_k, self.conv_v = (
            self._conv(stride, name) for stride, name in ((1, "conv_q"), (stride_kv, "conv_k"), (stride_kv, "conv_v"))
        )
        if grid:
            self.join_q, self.join_k, self.join_v = (
                QuantizedConcatenation(quantized, dtype=self.dtype_policy, name=f"join_{name}") for name in "qkv"
            )
        self.proj_q, self.proj_k, self.proj_v = (
            QuantizedConv(dim, quantized=quantized, rounds_output=not grid, scale=scale, dtype=self.dtype_policy, name=name)
            for name, scale in (("proj_q", dim**-0.5), ("proj_k", 1.0), ("proj_v", 1.0))
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
            cls_token, tokens = tokens[:, :1], ops.reshape(tokens[:, 1:], (-1, *self.grid, self.dim))
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
            "grid": self.grid,
            "quantized": self.quantized,
        }


@keras.saving.register_keras_serializable(package="cvt_keras")
class QuantizedBlock(layers.Layer):
    """`CvTBlock` in 8 bits.

    Args:
        dim, heads, mlp_dim, drop_path_rate, activation, projection, stride_kv: as in `CvTBlock`.
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
        self.grid = grid
        self.quantized = quantized
        self.norm1 = QuantizedLayerNorm(quantized, dtype=self.dtype_policy, name="norm1")
        self.attention = QuantizedAttention(
            dim, heads, projection, stride_kv, grid, quantized, dtype=self.dtype_policy, name="attention"
        )
        self.sum1_quantizer = fake_quantize(quantized, "sum1_quantizer", self.dtype_policy)
        self.drop_path = DropPath(drop_path_rate, dtype=self.dtype_policy, name="drop_path")
        self.norm2 = QuantizedLayerNorm(quantized, dtype=self.dtype_policy, name="norm2")
        self.fc1 = QuantizedConv(mlp_dim, quantized=quantized, dtype=self.dtype_policy, name="fc1")
        self.activate = QuantizedActivation(activation, quantized, dtype=self.dtype_policy, name="activate")
        self.fc2 = QuantizedConv(dim, quantized=quantized, dtype=self.dtype_policy, name="fc2")
        self.sum2_quantizer = fake_quantize(quantized, "sum2_quantizer", self.dtype_policy)

    def build(self, tokens_shape):
        for layer in (self.norm1, self.attention, self.sum1_quantizer, self.norm2, self.fc1, self.sum2_quantizer):
            layer.build(tokens_shape)
        hidden = (*tokens_shape[:-1], self.mlp_dim)
        self.activate.build(hidden)
        self.fc2.build(hidden)

    def call(self, x):
        x = self.sum1_quantizer(x + self.drop_path(self.attention(self.norm1(x))))
        return self.sum2_quantizer(x + self.drop_path(self.fc2(self.activate(self.fc1(self.norm2(x))))))

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
            "grid": self.grid,
            "quantized": self.quantized,
        }
