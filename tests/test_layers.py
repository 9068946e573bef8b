import functools
import importlib.util
import inspect
import json

import keras
import numpy as np
import pytest
from keras import ops
from layer_battery import PRECISIONS, Case, check_config, check_layers
from tools import require

import cvt_keras
from cvt_keras import layers

GRID = (2, 5, 8, 16)  # not square, one side odd
CLS = (2, 1, 16)
QKV = 3 * (16 * 9 + 2 * 16)  # three depthwise convolutions and their BatchNorms
LINEAR = 4 * (16 * 16 + 16)
MLP = 16 * 32 + 32 + 32 * 16 + 16
BLOCK = QKV + LINEAR + MLP + 2 * 2 * 16

CASES = [
    Case(layers.ConvStem, {"dim": 6, "activation": "quick_gelu"}, [GRID], [(2, 5, 8, 6)], 9 * 16 * 6 + 12, 12),
    Case(layers.ConvTokenEmbedding, {"dim": 6}, [GRID], [(2, 3, 4, 6)], 9 * 16 * 6 + 6 + 12, 0),
    Case(
        layers.ConvTokenEmbedding,
        {"dim": 6, "kernel_size": 7, "stride": 4, "padding": 2, "cls_token": True},
        [(2, 16, 24, 3)],
        [(2, 4, 6, 6), (2, 1, 6)],
        49 * 3 * 6 + 6 + 12 + 6,
        0,
    ),
    Case(
        layers.ConvTokenEmbedding,
        {"dim": 6, "cls_token": True, "pool": True, "norm_type": "batch", "activation": "quick_gelu", "identity_init": True},
        [GRID],
        [(2, 2, 4, 6), (2, 1, 6)],
        9 * 16 * 6 + 12 + 6,
        12,
    ),
    Case(layers.ResidualConv, {"dim": 16, "activation": "quick_gelu"}, [GRID], [GRID], 9 * 16 * 16 + 32, 32),
    Case(layers.ResidualConv, {"dim": 16}, [GRID, CLS], [GRID, CLS], 9 * 16 * 16 + 32, 32),
    Case(layers.Whitening, {"kernel_size": 3, "activation": "quick_gelu"}, [(2, 5, 8, 2)], [(2, 3, 6, 36)], 36, 18 * 36),
    Case(layers.ConvProjection, {}, [GRID], [GRID], 9 * 16 + 32, 32),
    Case(layers.ConvProjection, {"kernel_size": 5, "stride": 2}, [GRID], [(2, 3, 4, 16)], 25 * 16 + 32, 32),
    Case(layers.ConvProjection, {"identity_init": True}, [GRID], [GRID], 9 * 16 + 32, 32),
    Case(layers.AverageProjection, {}, [GRID], [(2, 3, 5, 16)], 0, 0),
    Case(layers.ConvAttention, {"dim": 16, "heads": 4}, [GRID], [GRID], QKV + LINEAR, 96),
    Case(
        layers.ConvAttention,
        {"dim": 16, "heads": 4, "attention_scale": "head", "identity_init": True},
        [GRID],
        [GRID],
        QKV + LINEAR,
        96,
    ),
    Case(layers.ConvAttention, {"dim": 16, "heads": 2, "stride_q": 2}, [GRID, CLS], [(2, 3, 4, 16), CLS], QKV + LINEAR, 96),
    Case(layers.ConvAttention, {"dim": 16, "heads": 1, "projection": "avg", "stride_q": 2}, [GRID], [GRID], LINEAR, 0),
    Case(layers.ConvAttention, {"dim": 16, "heads": 1, "projection": "linear"}, [GRID, CLS], [GRID, CLS], LINEAR, 0),
    Case(layers.ConvAttention, {"dim": 16, "heads": 1, "qkv_bias": False}, [GRID], [GRID], QKV + LINEAR - 48, 96),
    Case(layers.MLP, {"hidden_dim": 32, "dim": 16}, [GRID], [GRID], MLP, 0),
    Case(layers.MLP, {"hidden_dim": 32, "dim": 16, "activation": "gelu"}, [CLS], [CLS], MLP, 0),
    Case(layers.MLP, {"hidden_dim": 32, "dim": 16, "conv": True}, [GRID], [GRID], MLP + 9 * 32, 0),
    Case(layers.DropPath, {"rate": 0.5, "seed": 1}, [GRID], [GRID], 0, 0),
    Case(layers.CvTBlock, {"dim": 16, "heads": 4, "mlp_dim": 32}, [GRID], [GRID], BLOCK, 96),
    Case(
        layers.CvTBlock,
        {"dim": 16, "heads": 4, "mlp_dim": 32, "drop_path_rate": 0.01, "activation": "gelu", "stride_kv": 1},
        [GRID, CLS],
        [GRID, CLS],
        BLOCK,
        96,
    ),
    Case(
        layers.CvTBlock,
        {
            **{"dim": 16, "heads": 4, "mlp_dim": 32, "norm_type": "batch", "attention_scale": "head"},
            **{"mlp_conv": True, "identity_init": True},
        },
        [GRID, CLS],
        [GRID, CLS],
        BLOCK + 9 * 32,
        96 + 2 * 2 * 16,
    ),
]


def test_battery_of_configs():
    for case in CASES:
        check_config(case)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_battery(precision, tmp_path):
    check_layers(CASES, precision, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.cls.__name__)
def test_battery_of_each_layer_alone_with_xla(case, precision, tmp_path):
    check_layers([case], precision, tmp_path, compiled=True)


def test_battery_leaves_no_public_layer_out():
    public = {
        value
        for name, value in vars(layers).items()
        if inspect.isclass(value) and issubclass(value, keras.layers.Layer) and not name.startswith("_")
    }
    # PixelNormalization is float32 whatever the policy, and holds a dataclass: it has tests of its own.
    assert public == {case.cls for case in CASES} | {layers.PixelNormalization}
    assert {cls.__name__ for cls in public} <= set(cvt_keras.__all__)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_pixel_normalization_computes_in_float32_and_keeps_its_preprocessing(precision, tmp_path):
    preprocessing = cvt_keras.Preprocessing((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), ("a", "b"), (4, 6))
    layer = layers.PixelNormalization(preprocessing, dtype=precision, name="normalization")
    pixels = np.random.default_rng(0).uniform(0, 255, (2, 4, 6, 3)).astype("float32")
    expected = (pixels / 255 - np.array(preprocessing.mean)) / np.array(preprocessing.std)
    normalized = layer(pixels)
    assert keras.backend.standardize_dtype(normalized.dtype) == "float32"
    np.testing.assert_allclose(ops.convert_to_numpy(normalized), expected, atol=1e-5)
    assert not layer.weights
    config = layer.get_config()
    assert json.loads(json.dumps(config)) == config
    assert layers.PixelNormalization.from_config(config).preprocessing == preprocessing
    images = keras.Input((4, 6, 3))
    keras.Model(images, layer(images)).save(tmp_path / "layer.keras")
    reloaded = keras.saving.load_model(tmp_path / "layer.keras").get_layer("normalization")
    assert reloaded.preprocessing == preprocessing
    np.testing.assert_array_equal(*(ops.convert_to_numpy(part(pixels)) for part in (layer, reloaded)))


def _kernels(layer):
    return {v.path.partition("/")[2]: ops.convert_to_numpy(v) for v in layer.trainable_variables}


def _check_uniform(values, bound):
    assert np.abs(values).max() <= bound
    assert np.abs(values).max() > 0.9 * bound
    assert np.std(values) == pytest.approx(bound / 3**0.5, rel=0.15)


def _check_normal(values):
    assert np.std(values) == pytest.approx(0.02, rel=0.05)
    assert abs(np.mean(values)) < 0.002


def test_initial_kernels_of_convolutions_are_pytorch_defaults():
    embed = layers.ConvTokenEmbedding(256, kernel_size=7, stride=4, padding=2)
    embed.build((None, 32, 32, 3))
    bound = (49 * 3) ** -0.5
    _check_uniform(ops.convert_to_numpy(embed.proj.kernel), bound)
    _check_uniform(ops.convert_to_numpy(embed.proj.bias), bound)

    stem = layers.ConvStem(64)
    stem.build((None, 32, 32, 32))
    _check_uniform(ops.convert_to_numpy(stem.conv.kernel), (9 * 32) ** -0.5)


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_initial_depthwise_kernels_count_their_own_window_as_fan_in(kernel_size):
    projection = layers.ConvProjection(kernel_size)
    projection.build((None, 8, 8, 128))
    _check_uniform(ops.convert_to_numpy(projection.depthwise.kernel), 1 / kernel_size)


def test_initial_depthwise_kernel_of_an_mlp_is_that_of_a_projection():
    mlp = layers.MLP(128, 8, conv=True)
    mlp.build((None, 8, 8, 8))
    _check_uniform(ops.convert_to_numpy(mlp.depthwise.kernel), 1 / 3)


def _built(make, shape):
    """A layer with and without `identity_init`, from the same seed."""
    pair = []
    for identity_init in (True, False):
        keras.utils.set_random_seed(0)
        layer = make(identity_init=identity_init)
        layer.build(shape)
        pair.append(layer)
    return pair


@pytest.mark.parametrize("channels, dim", [(3, 8), (8, 3)])
@pytest.mark.parametrize("kernel_size", [3, 7])
def test_the_first_filters_of_an_identity_like_embedding_pass_a_channel_each(channels, dim, kernel_size):
    make = functools.partial(layers.ConvTokenEmbedding, dim, kernel_size, stride=1, padding=kernel_size // 2)
    layer, random = (ops.convert_to_numpy(part.proj.kernel) for part in _built(make, (None, 8, 8, channels)))
    images = np.random.default_rng(0).normal(size=(1, 8, 8, channels)).astype("float32")
    passed = min(channels, dim)
    outputs = ops.convert_to_numpy(ops.conv(images, layer, 1, "same", data_format="channels_last"))
    np.testing.assert_allclose(outputs[..., :passed], images[..., :passed], atol=1e-6)
    np.testing.assert_array_equal(layer[..., passed:], random[..., passed:])


def test_the_centre_of_an_identity_like_projection_is_larger_by_one():
    layer, random = _built(functools.partial(layers.ConvProjection, 5), (None, 8, 8, 6))
    difference = ops.convert_to_numpy(layer.depthwise.kernel) - ops.convert_to_numpy(random.depthwise.kernel)
    expected = np.zeros((5, 5, 6, 1))
    expected[2, 2] = 1
    np.testing.assert_allclose(difference, expected, atol=1e-6)


@pytest.mark.parametrize("depthwise, shape", [(False, (3, 3, 4, 8)), (True, (3, 3, 4, 1))])
def test_the_config_of_a_convolution_holds_its_identity_like_start(depthwise, shape):
    initializer = layers.NearIdentity(keras.initializers.RandomUniform(seed=1), depthwise)
    conv = keras.layers.Conv2D(8, 3, kernel_initializer=initializer)
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(conv)))
    again = keras.saving.deserialize_keras_object(config).kernel_initializer
    np.testing.assert_array_equal(*(ops.convert_to_numpy(draw(shape)) for draw in (initializer, again)))


def test_an_identity_like_block_changes_its_projections_only():
    block, random = _built(functools.partial(layers.CvTBlock, 16, 2, 32, mlp_conv=True), GRID)
    kernels = _kernels(random)
    changed = {path for path, value in _kernels(block).items() if not np.array_equal(value, kernels[path])}
    assert changed == {f"attention/conv_{name}/depthwise/kernel" for name in "qkv"}


def test_initial_linear_kernels_and_cls_token_deviate_by_002():
    block = layers.CvTBlock(192, 3, 384)
    block.build((None, 8, 8, 192))
    linear = {path: value for path, value in _kernels(block).items() if value.ndim == 2}
    assert set(linear) == {f"attention/proj{name}/kernel" for name in ("", "_q", "_k", "_v")} | {
        "mlp/fc1/kernel",
        "mlp/fc2/kernel",
    }
    for value in linear.values():
        _check_normal(value)
    embed = layers.ConvTokenEmbedding(4096, cls_token=True)
    embed.build((None, 8, 8, 3))
    _check_normal(ops.convert_to_numpy(embed.cls_token_weight))


def test_no_two_initial_kernels_are_equal():
    block = layers.CvTBlock(16, 1, 16)
    block.build((None, 8, 8, 16))
    kernels = [value for path, value in _kernels(block).items() if path.endswith("kernel")]
    assert len({value.tobytes() for value in kernels}) == len(kernels) == 9


def test_initial_biases_are_zero_and_norms_one():
    block = layers.CvTBlock(16, 1, 16)
    block.build((None, 8, 8, 16))
    for path, value in _kernels(block).items():
        if path.endswith(("bias", "beta")):
            assert not value.any(), path
        if path.endswith("gamma"):
            assert (value == 1).all(), path


def test_norms_have_the_authors_constants():
    block = layers.CvTBlock(16, 1, 16)
    assert block.norm1.epsilon == block.norm2.epsilon == 1e-5
    norm = block.attention.conv_q.norm
    assert (norm.epsilon, norm.momentum) == (1e-5, 0.9)
    assert layers.ConvTokenEmbedding(16).norm.epsilon == 1e-5


@pytest.mark.parametrize("side, kernel_size, stride", [(8, 3, 2), (7, 3, 2), (8, 3, 1), (8, 3, 3), (9, 5, 2), (10, 5, 4)])
def test_average_projection_is_pytorch_average_pooling_in_ceil_mode(side, kernel_size, stride):
    require(importlib.util.find_spec("torch"), "pip install -r requirements-dev.txt")
    import torch

    x = np.random.default_rng(0).normal(size=(2, side, side + 3, 4)).astype("float32")
    pool = torch.nn.AvgPool2d(kernel_size, stride, padding=kernel_size // 2, ceil_mode=True)
    expected = pool(torch.tensor(x.transpose(0, 3, 1, 2))).numpy().transpose(0, 2, 3, 1)
    layer = layers.AverageProjection(kernel_size, stride)
    assert layer.compute_output_shape(x.shape) == expected.shape
    np.testing.assert_allclose(ops.convert_to_numpy(layer(x)), expected, atol=1e-6)


def _attention_by_hand(layer, tokens):
    """The formula for one image without convolutions: softmax(q k' / sqrt(width)) v. In the paper, `width` is `dim`."""
    x = tokens.reshape(-1, layer.dim).astype("float64")
    q, k, v = (
        x @ ops.convert_to_numpy(linear.kernel) + ops.convert_to_numpy(linear.bias)
        for linear in (layer.proj_q, layer.proj_k, layer.proj_v)
    )
    width = layer.dim // layer.heads
    heads = []
    for head in range(layer.heads):
        part = slice(head * width, (head + 1) * width)
        scores = np.exp(q[:, part] @ k[:, part].T / {"dim": layer.dim, "head": width}[layer.attention_scale] ** 0.5)
        heads.append(scores / scores.sum(axis=1, keepdims=True) @ v[:, part])
    out = np.concatenate(heads, axis=1) @ ops.convert_to_numpy(layer.proj.kernel) + ops.convert_to_numpy(layer.proj.bias)
    return out.reshape(tokens.shape)


@pytest.mark.parametrize("attention_scale", ["dim", "head"])
def test_attention_scales_by_the_width_of_all_heads_or_of_one(attention_scale):
    layer = layers.ConvAttention(16, 4, projection="linear", attention_scale=attention_scale)
    tokens = np.random.default_rng(0).normal(size=(3, 4, 16)).astype("float32")
    layer.build((None, 3, 4, 16))
    # Larger kernels, as the initial ones give an almost flat softmax, whatever the scale.
    layer.set_weights([20 * weight for weight in layer.get_weights()])
    np.testing.assert_allclose(ops.convert_to_numpy(layer(tokens[None]))[0], _attention_by_hand(layer, tokens), atol=1e-5)


@pytest.mark.parametrize("shapes", [[GRID], [GRID, CLS]])
@pytest.mark.parametrize("cls", [layers.ConvAttention, layers.CvTBlock])
def test_attention_scores_are_returned_beside_the_same_output(cls, shapes):
    layer = cls(16, 4) if cls is layers.ConvAttention else cls(16, 4, 32)
    inputs = [np.random.default_rng(0).normal(size=shape).astype("float32") for shape in shapes]
    expected = keras.tree.flatten(layer(*inputs))
    output, scores = layer(*inputs, return_attention_scores=True)
    for value, other in zip(expected, keras.tree.flatten(output), strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(value), ops.convert_to_numpy(other))
    np.testing.assert_allclose(ops.convert_to_numpy(scores).sum(axis=-1), 1, rtol=1e-5)
    for known in (shapes, [(None, None, None, 16), *shapes[1:]]):
        symbols = [keras.KerasTensor(shape) for shape in known]
        output, symbol = layer(*symbols, return_attention_scores=True)
        assert len(keras.tree.flatten(output)) == len(shapes)
        sizes = scores.shape if known is shapes else (None, 4, None, None)
        assert symbol.shape == tuple(sizes) and symbol.dtype == "float32"


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_softmax_is_float32_in_half_precision(precision, monkeypatch):
    dtypes, softmax = [], ops.softmax
    monkeypatch.setattr(ops, "softmax", lambda x: dtypes.append(keras.backend.standardize_dtype(x.dtype)) or softmax(x))
    layers.ConvAttention(16, 4, dtype=precision)(np.ones(GRID, "float32"))
    assert set(dtypes) == {"float32"}


def test_linear_projection_ignores_strides():
    first = layers.ConvAttention(16, 4, projection="linear", stride_q=2, stride_kv=2)
    second = layers.ConvAttention(16, 4, projection="linear", stride_q=1, stride_kv=1)
    tokens = np.random.default_rng(0).normal(size=GRID).astype("float32")
    first.build(GRID)
    second.build(GRID)
    second.set_weights(first.get_weights())
    np.testing.assert_array_equal(ops.convert_to_numpy(first(tokens)), ops.convert_to_numpy(second(tokens)))


@pytest.mark.parametrize("projection, changes", [("dw_bn", True), ("avg", True), ("linear", False)])
def test_stride_kv_changes_all_projections_but_linear(projection, changes):
    outputs = []
    for stride in (1, 2):
        keras.utils.set_random_seed(0)
        layer = layers.CvTBlock(16, 4, 16, projection=projection, stride_kv=stride)
        outputs.append(ops.convert_to_numpy(layer(np.random.default_rng(0).normal(size=GRID).astype("float32"))))
    assert np.array_equal(*outputs) != changes


def test_cls_token_skips_the_convolutions():
    layer = layers.ConvAttention(16, 4)
    tokens = np.random.default_rng(0).normal(size=GRID).astype("float32")
    cls_token = np.ones(CLS, "float32")
    layer(tokens, cls_token)
    # With all other tokens at 0, the output is the cls token's value, 1, averaged over 1 + 12 keys.
    for conv in (layer.conv_q, layer.conv_k, layer.conv_v):
        conv.norm.gamma.assign(ops.zeros(16))
    layer.proj_k.kernel.assign(ops.zeros((16, 16)))
    layer.proj_v.kernel.assign(ops.eye(16))
    layer.proj.kernel.assign(ops.eye(16))
    grid, cls_out = layer(tokens, cls_token)
    np.testing.assert_allclose(ops.convert_to_numpy(cls_out), 1 / 13, rtol=1e-5)
    np.testing.assert_allclose(ops.convert_to_numpy(grid), 1 / 13, rtol=1e-5)


def test_activations_are_the_named_ones():
    x = np.linspace(-4, 4, 64).astype("float32")[None]
    eye = np.eye(64, dtype="float32")
    outputs = {}
    for activation in ("quick_gelu", "gelu"):
        layer = layers.MLP(64, 64, activation)
        layer.build(x.shape)
        layer.set_weights([eye, np.zeros(64), eye, np.zeros(64)])
        outputs[activation] = ops.convert_to_numpy(layer(x))
    np.testing.assert_allclose(outputs["quick_gelu"], x / (1 + np.exp(-1.702 * x)), atol=1e-6)
    exact = ops.convert_to_numpy(x * 0.5 * (1 + ops.erf(x / 2**0.5)))
    np.testing.assert_allclose(outputs["gelu"], exact, atol=1e-6)


def test_the_convolution_of_an_mlp_has_a_shortcut_and_skips_the_cls_token():
    layer = layers.MLP(16, 16, "gelu", conv=True)
    layer.build(GRID)
    for linear in (layer.fc1, layer.fc2):
        linear.kernel.assign(np.eye(16))
    shift = np.zeros((3, 3, 16, 1))
    shift[1, 0] = 1  # each token receives its left neighbour
    layer.depthwise.kernel.assign(shift)
    grid = np.random.default_rng(0).normal(size=GRID).astype("float32")
    left = np.pad(grid, ((0, 0), (0, 0), (1, 0), (0, 0)))[:, :, :-1]
    for tokens, expected in ((grid, grid + left), (grid[:, :1, 0], grid[:, :1, 0])):
        np.testing.assert_allclose(
            ops.convert_to_numpy(layer(tokens)), ops.convert_to_numpy(ops.gelu(expected, approximate=False)), atol=1e-6
        )


def test_a_residual_convolution_is_a_stem_with_a_shortcut_for_the_grid_only():
    layer, stem = layers.ResidualConv(16, "quick_gelu"), layers.ConvStem(16, activation="quick_gelu")
    tokens = np.random.default_rng(0).normal(size=GRID).astype("float32")
    layer.build(GRID)
    layer.norm.moving_mean.assign(np.linspace(-1, 1, 16))
    stem.build(GRID)
    stem.set_weights(layer.get_weights())
    expected = tokens + ops.convert_to_numpy(stem(tokens))
    np.testing.assert_allclose(ops.convert_to_numpy(layer(tokens)), expected, atol=1e-5)
    grid, cls_token = layer(tokens, np.ones(CLS, "float32"))
    np.testing.assert_allclose(ops.convert_to_numpy(grid), expected, atol=1e-5)
    np.testing.assert_array_equal(ops.convert_to_numpy(cls_token), np.ones(CLS))


def test_a_pooling_embedding_pools_before_norm_and_activation():
    layer = layers.ConvTokenEmbedding(3, stride=2, pool=True, norm_type="batch", identity_init=True)
    images = np.random.default_rng(0).normal(size=(2, 7, 6, 3)).astype("float32")  # the seventh row fills no window
    layer.build(images.shape)
    layer.norm.moving_mean.assign([1.0, 2.0, 3.0])
    largest = images[:, :6].reshape(2, 3, 2, 3, 2, 3).max(axis=(2, 4))
    expected = ops.gelu((largest - [1, 2, 3]) / (1 + 1e-5) ** 0.5, approximate=False)
    np.testing.assert_allclose(ops.convert_to_numpy(layer(images)), ops.convert_to_numpy(expected), atol=1e-5)


def test_a_batch_norm_takes_its_statistics_from_grid_and_cls_token():
    random = np.random.default_rng(0)
    tokens, cls_token = random.normal(size=GRID).astype("float32"), random.normal(1, size=CLS).astype("float32")
    block = layers.CvTBlock(16, 4, 16, norm_type="batch")
    block(tokens, cls_token, training=True)
    both = np.concatenate([tokens.reshape(2, -1, 16), cls_token], axis=1)
    np.testing.assert_allclose(ops.convert_to_numpy(block.norm1.moving_mean), 0.1 * both.mean(axis=(0, 1)), atol=1e-5)
    assert ops.convert_to_numpy(block.norm2.moving_mean).any()


def test_an_embedding_passes_training_to_its_batch_norm():
    layer = layers.ConvTokenEmbedding(4, norm_type="batch")
    layer(np.ones(GRID, "float32"))
    assert not ops.convert_to_numpy(layer.norm.moving_mean).any()
    layer(np.ones(GRID, "float32"), training=True)
    assert ops.convert_to_numpy(layer.norm.moving_mean).any()


# === Whitening ===


@pytest.fixture(scope="module")
def photos():
    """Images whose neighbouring pixels and channels are correlated, with variances far above the constant of whitening."""
    noise = np.random.default_rng(0).normal(size=(60, 9, 10, 3))
    return (30 * (noise.cumsum(axis=1) + noise.cumsum(axis=2) + noise.sum(axis=-1, keepdims=True))).astype("float32")


def _responses(layer, images):
    """The outputs of a whitening layer before bias and activation, (number of patches, filters)."""
    outputs = ops.conv(images, layer.kernel, 1, data_format="channels_last")
    return ops.convert_to_numpy(outputs).reshape(-1, outputs.shape[-1])


def test_whitened_patches_are_uncorrelated_and_of_unit_variance(photos):
    layer = layers.Whitening()
    layer.adapt(photos)
    responses = _responses(layer, photos)
    np.testing.assert_array_equal(responses[:, 12:], -responses[:, :12])
    axes = responses[:, :12]
    np.testing.assert_allclose(axes.T @ axes / len(axes), np.eye(12), atol=1e-3)
    layer.bias.assign(np.arange(24))
    expected = ops.gelu(responses + np.arange(24, dtype="float32"), approximate=False)
    np.testing.assert_allclose(ops.convert_to_numpy(layer(photos)).reshape(-1, 24), ops.convert_to_numpy(expected), atol=1e-4)


def test_a_variance_of_the_constants_size_is_not_whitened_in_full():
    images = np.array([10, 1, 0.1]) * np.random.default_rng(0).normal(size=(50, 20, 20, 3))
    layer = layers.Whitening(1)
    layer.adapt(images)
    variances = np.mean(_responses(layer, images.astype("float32")) ** 2, axis=0)
    np.testing.assert_allclose(variances[:3], [1, 1 / 1.01, 0.5], atol=0.02)


def test_the_whitening_kernel_depends_on_the_images_only(photos):
    kernels = []
    random = np.random.default_rng(0)
    for images in (photos, photos, random.permutation(photos), [photos[40:], photos[:40]], iter(np.split(photos, 3))):
        layer = layers.Whitening()
        layer.adapt(np.ones((1, 4, 4, 3)))  # which the next call forgets
        layer.adapt(images)
        kernels.append(ops.convert_to_numpy(layer.kernel))
    for kernel in kernels[1:]:
        np.testing.assert_allclose(kernel, kernels[0], atol=1e-6)
    axes = kernels[0].reshape(12, 24)[:, :12]
    assert (np.diff(np.linalg.norm(axes, axis=0)) > 0).all()  # falling variance
    assert (axes[np.abs(axes).argmax(axis=0), range(12)] > 0).all()


def test_before_adapt_the_whitening_kernel_is_that_of_typical_images():
    layer = layers.Whitening()
    layer.build((None, 8, 8, 3))
    kernel = ops.convert_to_numpy(layer.kernel).reshape(12, 24)
    np.testing.assert_array_equal(kernel[:, 12:], -kernel[:, :12])
    axes = kernel[:, :12].astype("float64")
    rows, columns, channels = (part.ravel() for part in np.indices((2, 2, 3)))
    neighbours = 0.95 ** (np.abs(rows[:, None] - rows) + np.abs(columns[:, None] - columns))
    covariance = neighbours * np.where(channels[:, None] == channels, 1, 0.9)
    lengths = np.linalg.norm(axes, axis=0)
    np.testing.assert_allclose(axes.T @ axes, np.diag(lengths**2), atol=1e-5)  # orthogonal
    variances = 1 / lengths**2 - layers.WHITENING_EPSILON
    np.testing.assert_allclose(axes.T @ covariance @ axes, np.diag(variances * lengths**2), atol=1e-5)
    # The first is brightness: the mean of all 12 values.
    np.testing.assert_allclose(axes[:, 0], 12**-0.5 / (1.95**2 * 2.8 + 0.01) ** 0.5, rtol=1e-5)


def test_grey_images_have_no_filters_for_colour():
    random = np.random.default_rng(0)
    grey = random.normal(size=(20, 12, 12, 1)).cumsum(axis=1).cumsum(axis=2).astype("float32")
    images = np.repeat(grey, 3, axis=-1)
    layer, single = layers.Whitening(), layers.Whitening()
    layer.adapt(images)
    single.adapt(3**0.5 * grey)
    kernel, expected = (ops.convert_to_numpy(part.kernel) for part in (layer, single))
    expected = np.repeat(expected[..., :4], 3, axis=2) / 3**0.5
    for first, sign in ((0, 1), (12, -1)):  # the axes, and their negatives
        np.testing.assert_allclose(kernel[..., first : first + 4], sign * expected, atol=1e-5)
        assert not kernel[..., first + 4 : first + 12].any()
    noise = random.normal(size=images.shape).astype("float32")
    noise -= noise.mean(axis=-1, keepdims=True)  # colour only
    np.testing.assert_allclose(*(ops.convert_to_numpy(layer(x)) for x in (images + noise, images)), atol=1e-4)


def test_every_axis_of_8_bit_colour_images_has_its_filter():
    random = np.random.default_rng(0)
    grey = random.choice([1, 254], size=(100, 8, 8, 1))
    # The least colour at the highest contrast: noise of about the variance of rounding, 1/12.
    images = np.round(grey + random.uniform(-0.55, 0.55, (100, 8, 8, 3)))
    images = ((images / 255 - 0.5) / 0.5).astype("float32")
    layer = layers.Whitening()
    layer.adapt(images)
    axes = ops.convert_to_numpy(layer.kernel).reshape(12, 24)[:, :12].astype("float64")
    lengths = np.linalg.norm(axes, axis=0)
    assert lengths.all()
    variances = np.mean((_responses(layer, images)[:, :12] / lengths) ** 2, axis=0)
    np.testing.assert_allclose(lengths, (variances + layers.WHITENING_EPSILON) ** -0.5, rtol=1e-4)
    np.testing.assert_allclose(axes.T @ axes, np.diag(lengths**2), atol=1e-4)


def test_the_whitening_kernel_is_never_trained():
    layer = layers.Whitening()
    layer.build((None, 8, 8, 3))
    for trainable in (False, True):
        layer.trainable = trainable
        assert [variable.name for variable in layer.trainable_variables] == ["bias"][: int(trainable)]


@pytest.mark.parametrize(
    "images, part",
    [
        ([], "at least one image"),
        (np.zeros((0, 8, 8, 3)), "at least one image"),
        (np.zeros((2, 8, 8, 4)), r"\(batch, height, width, 3\).*\(2, 8, 8, 4\)"),
        ([np.zeros((2, 8, 8, 3)), np.zeros((8, 8, 3))], r"\(8, 8, 3\)"),
        (np.zeros((2, 1, 8, 3)), r"at least 2x2.*\(2, 1, 8, 3\)"),
        ([np.zeros((2, 8, 8, 3)), np.full((2, 8, 8, 3), np.nan)], "finite.*NaN"),
        (np.full((2, 8, 8, 3), np.inf), "finite.*infinite"),
    ],
)
def test_whitening_refuses_other_images(images, part):
    layer = layers.Whitening()
    layer.build((None, 8, 8, 3))
    before = ops.convert_to_numpy(layer.kernel)
    with pytest.raises(ValueError, match=f"`images` must .*{part}"):
        layer.adapt(images)
    np.testing.assert_array_equal(ops.convert_to_numpy(layer.kernel), before)


@pytest.mark.parametrize(
    "images, part",
    [
        (np.zeros((8, 8, 3)), r"\(batch, height, width, channels\).*\(8, 8, 3\)"),
        ([np.zeros((2, 8, 8, 3)), np.zeros((2, 8, 8, 4))], r"\(batch, height, width, 3\).*\(2, 8, 8, 4\)"),
    ],
)
def test_images_that_whitening_refuses_do_not_build_it(images, part):
    layer = layers.Whitening()
    with pytest.raises(ValueError, match=f"`images` must be {part}"):
        layer.adapt(images)
    assert not layer.built


# === Stochastic depth, training, errors ===


def test_drop_path_drops_whole_images_and_keeps_the_mean():
    layer = layers.DropPath(0.3, seed=1)
    x = np.ones((4000, 2, 3), "float32")
    y = ops.convert_to_numpy(layer(x, training=True))
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.7)}
    assert (y == y[:, :1, :1]).all()
    assert y.mean() == pytest.approx(1, abs=0.05)
    assert not np.array_equal(y, ops.convert_to_numpy(layer(x, training=True)))
    np.testing.assert_array_equal(ops.convert_to_numpy(layer(x)), x)


def test_drop_path_draws_once_for_all_tensors_of_an_image():
    first, second = layers.DropPath(0.5, seed=1)([np.ones((64, 2, 2, 3)), np.ones((64, 1, 3))], training=True)
    np.testing.assert_array_equal(ops.convert_to_numpy(first)[:, 0, 0], ops.convert_to_numpy(second)[:, 0])


def test_drop_path_at_rate_zero_has_no_state():
    assert not layers.DropPath(0.0).variables
    assert len(layers.DropPath(0.1).variables) == 1


def test_block_passes_training_to_its_layers():
    x = np.random.default_rng(0).normal(size=GRID).astype("float32")
    block = layers.CvTBlock(16, 4, 16, drop_path_rate=0.99)
    training = ops.convert_to_numpy(block(x, training=True))
    np.testing.assert_array_equal(training, x)  # dropped
    assert ops.convert_to_numpy(block.attention.conv_q.norm.moving_mean).any()
    assert not np.array_equal(ops.convert_to_numpy(block(x)), x)


def test_layers_ignore_a_channels_first_default():
    x = np.random.default_rng(0).normal(size=GRID).astype("float32")
    try:
        keras.config.set_image_data_format("channels_first")
        tokens = layers.ResidualConv(16)(layers.ConvTokenEmbedding(16)(layers.ConvStem(8)(x)))
        for projection in ("dw_bn", "avg", "linear"):
            tokens = layers.CvTBlock(16, 4, 16, projection=projection)(tokens)
        logits = cvt_keras.CvT.from_variant("cvt_cifar", 10, (32, 48, 3))(np.zeros((1, 32, 48, 3), "float32"))
    finally:
        keras.config.set_image_data_format("channels_last")
    assert tokens.shape == (2, 3, 4, 16)
    assert logits.shape == (1, 10)


@pytest.mark.parametrize(
    "make, parts",
    [
        (lambda: layers.ConvAttention(64, 5), ["heads=5", "dim=64"]),
        (lambda: layers.ConvAttention(64, 0), ["heads=0", "dim=64"]),
        (lambda: layers.ConvAttention(64, 4, projection="conv"), ["`projection`", "dw_bn", "'conv'"]),
        (lambda: layers.ConvProjection(4), ["kernel_size=4", "odd"]),
        (lambda: layers.ConvProjection(3, stride=0), ["stride=0"]),
        (lambda: layers.AverageProjection(2), ["kernel_size=2", "odd"]),
        (lambda: layers.ConvStem(8, kernel_size=2), ["kernel_size=2", "odd"]),
        (lambda: layers.ConvStem(8, activation="relu"), ["`activation`", "'relu'"]),
        (lambda: layers.ResidualConv(8, activation="relu"), ["`activation`", "'relu'"]),
        (lambda: layers.ResidualConv(8).build((None, 8, 8, 4)), ["grid", "dim=8", "(None, 8, 8, 4)"]),
        (lambda: layers.Whitening(0), ["kernel_size=0"]),
        (lambda: layers.Whitening(activation="relu"), ["`activation`", "'relu'"]),
        (lambda: layers.ConvTokenEmbedding(8, norm_type="group"), ["`norm_type`", "'group'"]),
        (lambda: layers.ConvTokenEmbedding(8, activation="relu"), ["`activation`", "'relu'"]),
        (lambda: layers.ConvAttention(8, 1, attention_scale="width"), ["`attention_scale`", "'width'"]),
        (lambda: layers.CvTBlock(8, 1, 8, norm_type="group"), ["`norm_type`", "'group'"]),
        (lambda: layers.MLP(8, 8, conv=True).build((None, 1, 8)), ["`conv`", "grid", "(None, 1, 8)"]),
        (lambda: layers.MLP(8, 8, activation="relu"), ["`activation`", "gelu", "'relu'"]),
        (lambda: layers.DropPath(1.0), ["rate=1.0"]),
        (lambda: layers.ConvAttention(64, 4).build((None, 8, 8, 32)), ["dim=64", "32"]),
        (lambda: layers.ConvAttention(64, 4).build((None, 64, 64)), ["grid", "(None, 64, 64)"]),
        (lambda: layers.MLP(8, 8).build((None, 8, 8, 5)), ["dim=8", "5"]),
        (lambda: layers.PixelNormalization({"mean": [0.5]}), ["`std`", "None"]),
    ],
)
def test_errors_name_argument_and_value(make, parts):
    with pytest.raises(ValueError) as error:
        make()
    for part in parts:
        assert part in str(error.value)
