"""The paper's layers (arXiv 2103.15808, sections 3.1 and 3.2), on `keras.ops` alone.

Tokens always form a grid, `(batch, height, width, channels)`: the convolutions need it, and it supports images that are not
square. A cls token is a tensor of its own, because the paper's convolutions never touch it.
"""

import keras
from keras import layers, ops

from cvt_keras.preprocessing import Preprocessing
from cvt_keras.variants import ACTIVATIONS, PROJECTION_KERNEL_SIZE, PROJECTIONS, pooled

# As in the authors' code. Keras' defaults are 1e-3 and 0.99. Keras' momentum is 1 - PyTorch's.
NORM_EPSILON = 1e-5
BATCH_NORM_MOMENTUM = 0.9

# Keras truncates a normal at two standard deviations, which leaves 0.8796 of its deviation. PyTorch's
# `trunc_normal_(std=0.02)` truncates at 100 deviations and keeps 0.02.
_TRUNCATION_LOSS = 0.8796


def linear_initializer():
    # A new one for each kernel: a Keras initialiser returns the same numbers for the same shape.
    return keras.initializers.TruncatedNormal(stddev=0.02 / _TRUNCATION_LOSS)


def _conv_initializer():
    """PyTorch's default for a convolution: uniform within 1 / sqrt(fan_in)."""
    return keras.initializers.VarianceScaling(scale=1 / 3, mode="fan_in", distribution="uniform")


def _layer_norm(dtype, name):
    return layers.LayerNormalization(epsilon=NORM_EPSILON, dtype=dtype, name=name)


def _batch_norm(dtype, name):
    return layers.BatchNormalization(momentum=BATCH_NORM_MOMENTUM, epsilon=NORM_EPSILON, dtype=dtype, name=name)


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {tuple(choices)}. Received: {name}={value!r}")


def _check_kernel(kernel_size, stride=1):
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"`kernel_size` must be odd, to pad evenly. Received: kernel_size={kernel_size}")
    if stride < 1:
        raise ValueError(f"`stride` must be a positive integer. Received: stride={stride}")


def _activate(x, activation):
    if activation == "quick_gelu":
        return x * ops.sigmoid(1.702 * x)
    return ops.gelu(x, approximate=False)


@keras.saving.register_keras_serializable(package="cvt_keras")
class PixelNormalization(layers.Normalization):
    """Normalises raw pixels. It is the first layer of a classifier, and holds the classifier's `Preprocessing`.

    It computes in float32 whatever the policy: bfloat16 has 8 bits of precision, and subtracting the mean would cancel most of
    them.

    Args:
        preprocessing: a `Preprocessing` with mean and std, or its config.

    Input shape: `(batch, height, width, channels)`, pixels in 0..255.
    Output shape: the same, `(pixel / 255 - mean) / std`.

    Raises:
        ValueError: if mean or std is missing.
    """

    def __init__(self, preprocessing, **kwargs):
        self.preprocessing = Preprocessing.from_config(preprocessing)
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
        return {**config, "preprocessing": self.preprocessing.get_config()}


@keras.saving.register_keras_serializable(package="cvt_keras")
class ConvStem(layers.Layer):
    """A convolution with BatchNorm and activation at full resolution, before the first token embedding.

    It is not in the paper, whose first embedding divides each side by 4 and leaves 8x8 tokens of a 32x32 image.

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
        self.conv = layers.Conv2D(
            dim,
            kernel_size,
            padding="same",  # symmetric at stride 1
            use_bias=False,  # BatchNorm would subtract it again
            data_format="channels_last",
            kernel_initializer=_conv_initializer(),
            dtype=self.dtype_policy,
            name="conv",
        )
        self.norm = _batch_norm(self.dtype_policy, "norm")

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
class ConvTokenEmbedding(layers.Layer):
    """Opens a stage: a strided convolution makes tokens that overlap, then LayerNorm (paper, section 3.1).

    Args:
        dim: width of a token.
        kernel_size: side of the square kernel.
        stride: stride of the convolution: the distance between tokens.
        padding: zeros added on each of the four sides.
        cls_token: whether to return a learned token as well.

    Input shape: `(batch, height, width, channels)`, an image or the tokens of the stage before.
    Output shape: `(batch, new_height, new_width, dim)`, each side `(side + 2 * padding - kernel_size) // stride + 1`.
        With `cls_token` a pair: the grid and `(batch, 1, dim)`.
    """

    def __init__(self, dim, kernel_size=3, stride=2, padding=1, cls_token=False, **kwargs):
        super().__init__(**kwargs)
        self.dim = dim
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.cls_token = cls_token
        # Keras' "same" is asymmetric at stride 2; the published weights were trained with symmetric padding.
        self.pad = layers.ZeroPadding2D(padding, data_format="channels_last", dtype=self.dtype_policy, name="pad")
        self.proj = layers.Conv2D(
            dim,
            kernel_size,
            strides=stride,
            data_format="channels_last",
            kernel_initializer=_conv_initializer(),
            dtype=self.dtype_policy,
            name="proj",
        )
        self.norm = _layer_norm(self.dtype_policy, "norm")

    def build(self, input_shape):
        self.pad.build(input_shape)
        padded = self.pad.compute_output_shape(input_shape)
        # PyTorch draws the bias within the kernel's bound, which depends on the input channels.
        bound = (self.kernel_size**2 * input_shape[-1]) ** -0.5
        self.proj.bias_initializer = keras.initializers.RandomUniform(-bound, bound)
        self.proj.build(padded)
        self.norm.build(self.proj.compute_output_shape(padded))
        if self.cls_token:
            self.cls_token_weight = self.add_weight(shape=(1, 1, self.dim), initializer=linear_initializer(), name="cls_token")

    def call(self, images):
        tokens = self.norm(self.proj(self.pad(images)))
        if not self.cls_token:
            return tokens
        cls_token = ops.cast(self.cls_token_weight, tokens.dtype)
        return tokens, ops.tile(cls_token, (ops.shape(tokens)[0], 1, 1))  # (1, 1, dim) -> (B, 1, dim)

    def compute_output_shape(self, input_shape):
        grid = self.proj.compute_output_shape(self.pad.compute_output_shape(input_shape))
        return (grid, (input_shape[0], 1, self.dim)) if self.cls_token else grid

    def get_config(self):
        return {
            **super().get_config(),
            "dim": self.dim,
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "padding": self.padding,
            "cls_token": self.cls_token,
        }


@keras.saving.register_keras_serializable(package="cvt_keras")
class ConvProjection(layers.Layer):
    """Projects a token grid with a depthwise convolution (paper, section 3.2, figure 2b-c).

    Convolution and BatchNorm mix each token with its neighbours before the linear projection of attention. A stride of 2
    squeezes keys and values to a quarter.

    Args:
        kernel_size: side of the square kernel, in tokens; odd.
        stride: 1 for queries, 2 for squeezed keys and values.

    Input shape: `(batch, height, width, channels)`.
    Output shape: `(batch, ceil(height / stride), ceil(width / stride), channels)`.

    Raises:
        ValueError: for an even `kernel_size` or a `stride` under 1.
    """

    def __init__(self, kernel_size=3, stride=1, **kwargs):
        super().__init__(**kwargs)
        _check_kernel(kernel_size, stride)
        self.kernel_size = kernel_size
        self.stride = stride
        # Symmetric, as in ConvTokenEmbedding.
        self.pad = layers.ZeroPadding2D(kernel_size // 2, data_format="channels_last", dtype=self.dtype_policy, name="pad")
        self.depthwise = layers.DepthwiseConv2D(
            kernel_size,
            strides=stride,
            use_bias=False,
            data_format="channels_last",
            # PyTorch's fan_in is kernel_size^2 here. Keras' fan_in counts every channel: kernels would be 10 times too small.
            depthwise_initializer=keras.initializers.RandomUniform(-1 / kernel_size, 1 / kernel_size),
            dtype=self.dtype_policy,
            name="depthwise",
        )
        self.norm = _batch_norm(self.dtype_policy, "norm")

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
        return {**super().get_config(), "kernel_size": self.kernel_size, "stride": self.stride}


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

    Input shape: tokens `(batch, height, width, dim)`; optionally `cls_token` `(batch, 1, dim)`.
    Output shape: `(batch, ceil(height / stride_q), ceil(width / stride_q), dim)`; with a cls token a pair: the grid and
        `(batch, 1, dim)`.

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
        **kwargs,
    ):
        super().__init__(**kwargs)
        if dim < 1 or heads < 1 or dim % heads:
            raise ValueError(f"`heads` must divide `dim`. Received: heads={heads}, dim={dim}")
        _check_choice("projection", projection, PROJECTIONS)
        self.dim = dim
        self.heads = heads
        self.projection = projection
        self.qkv_bias = qkv_bias
        self.kernel_size = kernel_size
        self.stride_q = stride_q
        self.stride_kv = stride_kv
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
        cls = ConvProjection if projection == "dw_bn" else AverageProjection
        return cls(self.kernel_size, stride, dtype=self.dtype_policy, name=name)

    def _linear(self, use_bias, name):
        return layers.Dense(
            self.dim, use_bias=use_bias, kernel_initializer=linear_initializer(), dtype=self.dtype_policy, name=name
        )

    def build(self, tokens_shape, cls_token_shape=None):
        if len(tokens_shape) != 4 or tokens_shape[-1] != self.dim:
            raise ValueError(f"Tokens must be a grid with `dim` channels. Received: shape {tokens_shape}, dim={self.dim}")
        for conv in (self.conv_q, self.conv_k, self.conv_v):
            conv.build(tokens_shape)
        for linear in (self.proj_q, self.proj_k, self.proj_v, self.proj):
            linear.build((None, None, self.dim))

    def call(self, tokens, cls_token=None):
        grid_q = self.conv_q(tokens)
        # Scaled by the whole width, not a head's, as in the authors' code. Scaling the query is cheapest.
        q = self._split_heads(self.proj_q(_sequence(grid_q, cls_token)) * self.dim**-0.5)
        k = self._split_heads(self.proj_k(_sequence(self.conv_k(tokens), cls_token)))
        v = self._split_heads(self.proj_v(_sequence(self.conv_v(tokens), cls_token)))

        scores = ops.matmul(q, ops.transpose(k, (0, 1, 3, 2)))  # (B, heads, Nq, Nk)
        # In half precision, small softmax weights would round to the same value.
        weights = ops.cast(ops.softmax(ops.cast(scores, "float32")), v.dtype)
        x = ops.transpose(ops.matmul(weights, v), (0, 2, 1, 3))  # (B, heads, Nq, dim/heads) -> (B, Nq, heads, dim/heads)
        x = self.proj(ops.reshape(x, (-1, ops.shape(x)[1], self.dim)))  # -> (B, Nq, dim)

        _, height, width, _ = ops.shape(grid_q)
        if cls_token is None:
            return ops.reshape(x, (-1, height, width, self.dim))  # (B, H*W, dim) -> (B, H, W, dim)
        return ops.reshape(x[:, 1:], (-1, height, width, self.dim)), x[:, :1]

    def _split_heads(self, x):
        x = ops.reshape(x, (-1, ops.shape(x)[1], self.heads, self.dim // self.heads))  # (B, N, dim) -> (B, N, heads, -1)
        return ops.transpose(x, (0, 2, 1, 3))  # -> (B, heads, N, dim/heads)

    def compute_output_shape(self, tokens_shape, cls_token_shape=None):
        grid = self.conv_q.compute_output_shape(tokens_shape)
        return grid if cls_token_shape is None else (grid, cls_token_shape)

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

    Input shape: `(..., dim)`.
    Output shape: the same.

    Raises:
        ValueError: for an unknown `activation`.
    """

    def __init__(self, hidden_dim, dim, activation="quick_gelu", **kwargs):
        super().__init__(**kwargs)
        _check_choice("activation", activation, ACTIVATIONS)
        self.hidden_dim = hidden_dim
        self.dim = dim
        self.activation = activation
        self.fc1 = self._linear(hidden_dim, "fc1")
        self.fc2 = self._linear(dim, "fc2")

    def _linear(self, units, name):
        return layers.Dense(units, kernel_initializer=linear_initializer(), dtype=self.dtype_policy, name=name)

    def build(self, input_shape):
        if input_shape[-1] != self.dim:
            raise ValueError(f"Tokens must have `dim` channels. Received: shape {input_shape}, dim={self.dim}")
        self.fc1.build(input_shape)
        self.fc2.build((*input_shape[:-1], self.hidden_dim))

    def call(self, tokens):
        return self.fc2(_activate(self.fc1(tokens), self.activation))

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.dim)

    def get_config(self):
        return {
            **super().get_config(),
            "hidden_dim": self.hidden_dim,
            "dim": self.dim,
            "activation": self.activation,
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
    """Convolutional attention, then an MLP, each after LayerNorm and with a shortcut (paper, figure 2b).

    Args:
        dim: width of a token.
        heads: attention heads; must divide `dim`.
        mlp_dim: hidden width of the MLP.
        drop_path_rate: stochastic depth rate of both branches.
        activation: activation of the MLP, `"quick_gelu"` or `"gelu"`.
        projection, qkv_bias, stride_kv: see `ConvAttention`. The query's stride is 1, because the output is added to the input.

    Input shape: tokens `(batch, height, width, dim)`; optionally `cls_token` `(batch, 1, dim)`.
    Output shape: the same; with a cls token a pair.
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
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.dim = dim
        self.heads = heads
        self.mlp_dim = mlp_dim
        self.drop_path_rate = drop_path_rate
        self.activation = activation
        self.projection = projection
        self.qkv_bias = qkv_bias
        self.stride_kv = stride_kv
        self.norm1 = _layer_norm(self.dtype_policy, "norm1")
        self.attention = ConvAttention(
            dim, heads, projection, qkv_bias, stride_kv=stride_kv, dtype=self.dtype_policy, name="attention"
        )
        self.drop_path = DropPath(drop_path_rate, dtype=self.dtype_policy, name="drop_path")
        self.norm2 = _layer_norm(self.dtype_policy, "norm2")
        self.mlp = MLP(mlp_dim, dim, activation, dtype=self.dtype_policy, name="mlp")

    def build(self, tokens_shape, cls_token_shape=None):
        self.norm1.build(tokens_shape)
        self.attention.build(tokens_shape, cls_token_shape)
        self.drop_path.build(tokens_shape)
        self.norm2.build(tokens_shape)
        self.mlp.build(tokens_shape)

    def call(self, tokens, cls_token=None):
        # The paper's x is one sequence. Here the grid and the cls token are separate; only attention mixes them.
        x = [tokens] if cls_token is None else [tokens, cls_token]
        x = _add(x, self.drop_path(self.attention(*_each(self.norm1, x))))
        x = _add(x, self.drop_path(_each(self.mlp, _each(self.norm2, x))))
        return x[0] if cls_token is None else tuple(x)

    def compute_output_shape(self, tokens_shape, cls_token_shape=None):
        return tokens_shape if cls_token_shape is None else (tokens_shape, cls_token_shape)

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
        }


def _each(layer, parts):
    return [layer(part) for part in parts]


def _add(shortcut, branch):
    return [x + y for x, y in zip(shortcut, keras.tree.flatten(branch))]
