import collections
import gc
import json
import math

import keras
import numpy as np
import pytest
from keras import ops
from layer_battery import PRECISIONS

import cvt_keras
from cvt_keras import (
    VARIANTS,
    Calibration,
    CvT,
    Preprocessing,
    Stage,
    Variant,
    build_classifier,
    calibration_of,
    macs,
    preprocessing_of,
)
from cvt_keras.conversion.layouts import microsoft_weights
from cvt_keras.errors import ArgumentError, CheckpointError
from cvt_keras.model import set_calibration
from cvt_keras.pretrained import to_torch_state_dict

TINY = VARIANTS["cvt_tiny"]

# Every part that the paper's networks lack, at the smallest size, around a cls token.
_NEW_PARTS = {"whitening": 2, "norm": "batch", "attention_scale": "head", "identity_init": True}
NEW = Variant((Stage(8, 1, 2, drop_path=0.1, cls_token=True, pool=True, residual_convs=2, mlp_conv=True),), **_NEW_PARTS)

# Trainable values at 1000 and at 10 classes; the paper's were read off the authors' code.
PARAMETERS = {
    "cvt_13": (19_997_480, 19_616_330),
    "cvt_21": (31_622_696, 31_241_546),
    "cvt_w24": (277_196_392, 276_181_642),
    "cvt_cifar": (1_735_072, 1_480_642),
    "cvt_cifar_large": (16_981_824, 16_473_954),
    "cvt_tiny": (24_856, 8_026),
}


def _images(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def _trainable(model):
    return sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)


def test_every_variant_has_its_golden_count():
    assert set(PARAMETERS) == set(VARIANTS)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "cvt_w24" else name for name in PARAMETERS]
)
def test_parameters(name):
    at_1000, at_10 = PARAMETERS[name]
    model = CvT.from_variant(name, 10, (None, None, 3))
    assert _trainable(model) == at_10
    width = VARIANTS[name].stages[-1].dim
    assert at_10 + 990 * (width + 1) == at_1000


def test_parameters_of_the_largest_network():
    """Counted in its weight map: the network takes a gigabyte. Its two maps agree, by tests/conversion/test_layouts.py."""
    for num_classes, expected in zip((1000, 10), PARAMETERS["cvt_w24"]):
        weights = microsoft_weights("cvt_w24", num_classes)
        assert sum(int(np.prod(weight.shape)) for weight in weights if ".running_" not in weight.key) == expected


# === What makes it a CvT ===


def _layer_macs(model, monkeypatch):
    """Counts the multiply-accumulates of each layer of a model in a forward pass of one image, by kernels and output shapes."""
    counted = collections.Counter()

    def count(layer, call):
        def counting_call(*args, **kwargs):
            outputs = call(*args, **kwargs)
            counted[layer.path] += math.prod(outputs.shape[1:-1]) * int(np.prod(layer.kernel.shape))
            return outputs

        return counting_call

    for layer in model._flatten_layers():
        if hasattr(layer, "kernel"):
            layer.call = count(layer, layer.call)
    matmul = ops.matmul

    def counting_matmul(a, b):  # only attention calls it by this name
        counted["_block attention"] += math.prod(a.shape) * b.shape[-1]
        return matmul(a, b)

    monkeypatch.setattr(ops, "matmul", counting_matmul)
    model(np.zeros((1, *model.input_shape[1:]), "float32"))
    return counted


@pytest.mark.parametrize(
    "variant, shape",
    [
        ("cvt_tiny", (32, 32, 3)),
        ("cvt_cifar", (33, 46, 4)),
        (NEW, (9, 12, 3)),
        (Variant((Stage(8, 2, 1, kernel_size=7, stride=4, padding=2, projection="avg"),), stem=(4, 6)), (30, 27, 3)),
    ],
)
def test_macs_are_those_of_the_layers(variant, shape, monkeypatch):
    counted = _layer_macs(CvT(variant, 10, shape), monkeypatch)
    assert sum(counted.values()) == macs(variant, shape, 10)


@pytest.mark.parametrize("name, budget, share", [("cvt_cifar", 60e6, 0.24), ("cvt_cifar_large", 350e6, 0.53)])
def test_the_cifar_networks_are_cvts_within_their_budget(name, budget, share, monkeypatch):
    """docs/network.md gives this rule."""
    model = CvT(name, 10, (32, 32, 3))
    for i, stage in enumerate(model.variant.stages):
        assert isinstance(model.get_layer(f"stage{i}_embed").proj, keras.layers.Conv2D)
        assert stage.depth >= 1 and stage.projection == "dw_bn"
        for part in "qkv":
            conv = getattr(model.get_layer(f"stage{i}_block0").attention, f"conv_{part}")
            assert isinstance(conv, cvt_keras.ConvProjection)
    counted = _layer_macs(model, monkeypatch)
    in_blocks = sum(count for path, count in counted.items() if "_block" in path) / sum(counted.values())
    assert in_blocks == pytest.approx(share, abs=0.01) and in_blocks >= 0.2
    assert sum(counted.values()) <= budget


def test_each_part_of_a_stage_is_one_layer():
    """The names are the format of `.keras` files."""
    names = [layer.name for layer in CvT(NEW, 10, (9, 12, 3)).layers]
    stage = ["stage0_embed", "stage0_conv0", "stage0_conv1", "stage0_block0", "stage0"]
    assert [name for name in names if name.startswith("stage")] == stage


# === Training, saving, sizes ===


@pytest.fixture(scope="module")
def every_kind():
    """A network with each kind of layer."""
    stages = (
        Stage(8, 1, 1, projection="avg", drop_path=0.1, pool=True),
        Stage(8, 2, 1, projection="linear", drop_path=0.1, cls_token=True, residual_convs=1),
        Stage(8, 1, 2, qkv_bias=False, mlp_conv=True),
    )
    return Variant(stages, stem=(4,), **_NEW_PARTS)


# XLA compiles for seconds: it gets one stage, with a stem, a cls token and drop path, or with every new part.
_ONE_STAGE = Variant((Stage(8, 2, 2, drop_path=0.1, cls_token=True),), stem=(4,))


@pytest.mark.parametrize(
    "precision, xla, variant",
    [
        ("float32", False, "every_kind"),
        ("mixed_bfloat16", True, "one_stage"),
        ("mixed_float16", True, "new_parts"),
        *(pytest.param(precision, True, "every_kind", marks=pytest.mark.slow) for precision in PRECISIONS),
    ],
)
def test_the_model_trains_and_reloads(precision, xla, variant, every_kind, tmp_path):
    variants = {"every_kind": every_kind, "one_stage": _ONE_STAGE, "new_parts": NEW}
    model = CvT(variants[variant], 10, (32, 32, 3), dtype=precision)
    if model.variant.whitening:
        model.get_layer("whitening").adapt(_images(4, 32, 32, 3).cumsum(axis=1))  # the file must hold this kernel
    before = [ops.convert_to_numpy(v) for v in model.trainable_variables]
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=xla)
    losses = [model.train_on_batch(_images(4, 32, 32, 3), np.arange(4)) for _ in range(3)]
    assert model.jit_compile is xla
    assert np.all(np.isfinite(losses))
    changed = [not np.array_equal(a, ops.convert_to_numpy(b)) for a, b in zip(before, model.trainable_variables)]
    assert np.mean(changed) > 0.8
    assert model.output.dtype == "float32"
    assert model.dtype_policy.name == precision
    assert all(layer.dtype_policy.name == precision for layer in model.layers if layer.name.startswith("stage"))

    model.save(tmp_path / "model.keras")
    reloaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(reloaded) is CvT
    assert reloaded.get_config() == model.get_config()
    assert reloaded.dtype_policy.name == precision
    x = _images(2, 32, 32, 3)
    np.testing.assert_array_equal(*(ops.convert_to_numpy(net(x)) for net in (model, reloaded)))


def _two_stages(projection, cls_token):
    return Variant((Stage(8, 1, 1, projection=projection), Stage(16, 1, 2, projection=projection, cls_token=cls_token)))


@pytest.mark.parametrize(
    "variant, sizes",
    [
        *((_two_stages(*arguments), ((4, 4), (17, 40))) for arguments in (("dw_bn", True), ("avg", False), ("linear", True))),
        (NEW, ((3, 3), (17, 40))),
        ("cvt_cifar", ((9, 9), (33, 46))),
    ],
)
def test_height_and_width_may_be_unknown_and_differ(variant, sizes):
    model = CvT(variant, 5, (None, None, 3))
    for size in sizes:
        x = _images(2, *size, 3)
        fixed = CvT(variant, 5, (*size, 3))
        fixed.set_weights(model.get_weights())
        logits = ops.convert_to_numpy(model(x))
        assert logits.shape == (2, 5)
        np.testing.assert_allclose(logits, ops.convert_to_numpy(fixed(x)), atol=1e-5)
        for tokens, grid in zip(model.features(x).values(), model.variant.grids(*size), strict=True):
            assert keras.tree.flatten(tokens)[0].shape[1:3] == grid
    model.compile(jit_compile=False)
    np.testing.assert_allclose(logits, model.predict(x, verbose=0), atol=1e-5)


def test_a_cls_token_before_the_last_stage_stays_there():
    model = CvT(Variant((Stage(8, 1, 1, cls_token=True), Stage(16, 1, 2))), 5, (16, 16, 3))
    grid, cls_token = model.get_layer("stage0").output
    assert (grid.shape, cls_token.shape) == ((None, 8, 8, 8), (None, 1, 8))
    assert model(_images(2, 16, 16, 3)).shape == (2, 5)


def test_a_network_cut_at_a_stage_reloads(tmp_path):
    model = CvT(TINY, 10, (32, 32, 3))
    x = _images(2, 32, 32, 3)
    for layer in ("stage0", "stage1"):  # without and with a cls token
        cut = keras.Model(model.input, model.get_layer(layer).output)
        cut.save(tmp_path / "cut.keras")
        reloaded = keras.saving.load_model(tmp_path / "cut.keras")
        for ours, theirs in zip(keras.tree.flatten(cut(x)), keras.tree.flatten(reloaded(x)), strict=True):
            np.testing.assert_array_equal(ops.convert_to_numpy(ours), ops.convert_to_numpy(theirs))


def test_a_clone_computes_the_same():
    model = CvT(TINY, 10, (32, 32, 3))
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    x = _images(2, 32, 32, 3)
    np.testing.assert_array_equal(*(ops.convert_to_numpy(net(x)) for net in (model, clone)))


def test_every_layer_is_built_with_the_network(every_kind):
    """Keras' `quantize` refuses a network with a layer that is not built."""
    for layer in build_classifier(every_kind, 3)._flatten_layers():
        assert layer.built, layer.name


@pytest.fixture
def frozen_garbage():
    """Keras runs the garbage collector after each layer that it quantizes: a second each among the objects of a test run."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.files
@pytest.mark.usefixtures("frozen_garbage")
@pytest.mark.parametrize("mode", ["int8", pytest.param("int4", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
def test_a_classifier_that_keras_quantizes_reloads_and_clones(mode, every_kind, tmp_path):
    classifier = build_classifier(every_kind, 3)
    pixels = 255 * np.abs(_images(2, 32, 32, 3))
    before = ops.convert_to_numpy(classifier(pixels))
    classifier.quantize(mode, filters=lambda layer: layer.name != "fc2")
    expected = ops.convert_to_numpy(classifier(pixels))
    np.testing.assert_allclose(expected, before, atol=0.05)
    assert not np.array_equal(expected, before)
    classifier.save(tmp_path / "quantized.keras")
    again = keras.saving.load_model(tmp_path / "quantized.keras")
    clone = keras.models.clone_model(classifier)
    clone.set_weights(classifier.get_weights())
    for model in (again, clone):
        np.testing.assert_array_equal(ops.convert_to_numpy(model(pixels)), expected)
        assert [str(variable.dtype) for variable in model.variables] == [str(v.dtype) for v in classifier.variables]
        block = model.get_layer("cvt").get_layer("stage1_block0")
        assert (block.mlp.fc1.quantization_mode, block.mlp.fc2.quantization_mode) == (mode, None)
    with pytest.raises(CheckpointError, match="`quantize`"):
        CvT.from_pretrained(tmp_path / "quantized.keras")
    with pytest.raises(ArgumentError, match="float kernels"):
        to_torch_state_dict(again)


def test_lora_kernels_are_saved_and_merged_for_pytorch(tmp_path):
    model = CvT("cvt_tiny", 3, (32, 32, 3))
    frozen = ops.convert_to_numpy(model.get_layer("head").kernel)
    for layer in (model.get_layer("head"), model.get_layer("stage0_block0").mlp.fc1):
        layer.enable_lora(2)
        layer.lora_kernel_b.assign(np.ones(layer.lora_kernel_b.shape))
    expected = ops.convert_to_numpy(model(_images(1, 32, 32, 3)))
    model.save(tmp_path / "lora.keras")
    again = keras.saving.load_model(tmp_path / "lora.keras")
    np.testing.assert_allclose(ops.convert_to_numpy(again(_images(1, 32, 32, 3))), expected, atol=1e-5)
    ours, theirs = to_torch_state_dict(again), to_torch_state_dict(model)
    for key, array in ours.items():
        np.testing.assert_allclose(array, theirs[key], atol=1e-6)
    assert not np.allclose(theirs["head.weight"].T, frozen)


def test_frozen_layers_stay_frozen(tmp_path):
    model = CvT(TINY, 10, (32, 32, 3))
    model.get_layer("stage0_embed").trainable = False
    model.save(tmp_path / "model.keras")
    reloaded = keras.saving.load_model(tmp_path / "model.keras")
    trainable = [variable.path for variable in model.trainable_variables]
    assert [variable.path for variable in reloaded.trainable_variables] == trainable
    assert not any(path.startswith("stage0_embed") for path in trainable)


@pytest.mark.parametrize("variant, side", [(TINY, 4), (NEW, 3)])
def test_a_model_of_any_size_refuses_an_image_that_is_too_small(variant, side):
    network = CvT(variant, 10, (None, None, 3))
    for call in (network, build_classifier(network), network.features):
        call(_images(1, side, 24, 3))
        with pytest.raises(ValueError, match=rf"{side}x{side}.*{side - 1}x24"):
            call(_images(1, side - 1, 24, 3))


def test_the_whitening_kernel_stays_fixed(tmp_path):
    model = CvT(NEW, 10, (16, 16, 3))
    assert "whitening/bias" in {variable.path for variable in model.trainable_variables}
    for trainable in (False, True):
        model.trainable = trainable
        assert "whitening/kernel" not in {variable.path for variable in model.trainable_variables}
    before = ops.convert_to_numpy(model.get_layer("whitening").kernel)
    model.compile(keras.optimizers.SGD(1.0), "mse", run_eagerly=True)
    model.train_on_batch(_images(4, 16, 16, 3), np.ones((4, 10)))
    np.testing.assert_array_equal(ops.convert_to_numpy(model.get_layer("whitening").kernel), before)
    assert ops.convert_to_numpy(model.get_layer("whitening").bias).any()


def _expected_start(path, shape):
    """The initial distribution in the authors' code, and its constant, bound or standard deviation."""
    name, stem_or_embed = path.rpartition("/")[2], "/proj/" in path or "/conv/" in path
    if name in ("beta", "moving_mean"):
        return "constant", 0
    if name in ("gamma", "moving_variance"):
        return "constant", 1
    if "/depthwise/" in path:
        return "uniform", 1 / shape[0]
    if stem_or_embed and len(shape) == 4:
        return "uniform", (shape[0] * shape[1] * shape[2]) ** -0.5
    if name == "kernel" and len(shape) == 2:
        return "normal", 0.02
    if name == "cls_token":
        return "normal", 0.02
    if name == "bias" and "_embed/proj/" in path:
        return "uniform", None  # its kernel's bound
    if name == "bias":
        return "constant", 0
    raise AssertionError(f"unclassified: {path}")


@pytest.mark.parametrize("cls_token", [False, True])
def test_initial_weights_are_as_in_the_authors_code(cls_token):
    stages = (Stage(48, 1, 2, kernel_size=7, stride=4, padding=2), Stage(96, 2, 3, cls_token=cls_token))
    model = CvT(Variant(stages, stem=(24,)), 200, (32, 32, 3))
    bounds = {}
    for variable in model.weights:
        value = ops.convert_to_numpy(variable)
        kind, scale = _expected_start(variable.path, value.shape)
        if kind == "constant":
            assert (value == scale).all(), variable.path
        elif kind == "uniform":
            scale = scale or bounds[variable.path.replace("bias", "kernel")]
            bounds[variable.path] = scale
            assert 0.85 * scale < np.abs(value).max() <= scale, variable.path
            assert np.std(value) == pytest.approx(scale / 3**0.5, rel=0.3), variable.path
        else:
            assert np.std(value) == pytest.approx(scale, rel=0.25 if value.size < 1000 else 0.05), variable.path
    assert ("stage1_embed/cls_token" in {variable.path for variable in model.weights}) == cls_token


def test_without_a_cls_token_the_head_gets_the_mean():
    model = CvT(Variant((Stage(8, 1, 1),)), 5, (16, 16, 3))
    x = _images(2, 16, 16, 3)
    tokens = keras.Model(model.input, model.get_layer("norm").output)(x)
    expected = model.get_layer("head")(ops.mean(tokens, axis=(1, 2)))
    np.testing.assert_allclose(*(ops.convert_to_numpy(y) for y in (model(x), expected)), atol=1e-6)


def test_the_variant_sets_every_layer():
    stages = (
        Stage(8, 2, 2, kernel_size=5, stride=3, padding=2, mlp_ratio=3.0, drop_path=0.2, qkv_bias=False, stride_kv=1),
        Stage(12, 1, 3, projection="avg", cls_token=True),
        Stage(16, 2, 4, pool=True, residual_convs=2, mlp_conv=True),
    )
    model = CvT(Variant(stages, activation="gelu", stem=(4, 6)), 5, (32, 32, 3))
    stem = model.get_layer("stem1")
    assert (stem.dim, stem.activation) == (6, "gelu")
    embed = model.get_layer("stage0_embed")
    assert (embed.dim, embed.kernel_size, embed.stride, embed.padding, embed.cls_token) == (8, 5, 3, 2, False)
    block = model.get_layer("stage0_block1")
    assert (block.heads, block.mlp_dim, block.drop_path_rate, block.activation) == (2, 24, 0.2, "gelu")
    assert (block.projection, block.qkv_bias, block.stride_kv) == ("dw_bn", False, 1)
    assert model.get_layer("stage0_block0").drop_path_rate == 0
    assert model.get_layer("stage1_embed").cls_token
    assert model.get_layer("stage1_block0").projection == "avg"
    assert [model.get_layer(f"stage{i}_embed").pool for i in range(3)] == [False, False, True]
    assert [model.get_layer(f"stage{i}_block0").mlp_conv for i in range(3)] == [False, False, True]
    conv = model.get_layer("stage2_conv1")
    assert (conv.dim, conv.activation) == (16, "gelu")
    fields = ("norm_type", "attention_scale", "identity_init")
    for changes in ({}, {"activation": "quick_gelu", **_NEW_PARTS}):
        variant = Variant(stages[2:], **changes)
        network = CvT(variant, 5, (16, 16, 3))
        embed, block, norm = (network.get_layer(name) for name in ("stage0_embed", "stage0_block1", "norm"))
        expected = tuple(getattr(variant, name.removesuffix("_type")) for name in fields)
        assert tuple(getattr(block, name) for name in fields) == expected
        assert (embed.norm_type, embed.identity_init, embed.activation) == (expected[0], expected[2], variant.activation)
        assert isinstance(norm, keras.layers.BatchNormalization) == (variant.norm == "batch")
    whitening = network.get_layer("whitening")
    assert (whitening.kernel_size, whitening.activation) == (2, "quick_gelu")
    assert network.layers[1] is whitening


def test_residual_convolutions_lie_between_embedding_and_blocks():
    model = CvT(Variant((Stage(8, 1, 1, residual_convs=2),)), 5, (16, 16, 3))
    x = model.get_layer("stage0_embed").output
    for j in range(2):
        x = model.get_layer(f"stage0_conv{j}")(x)
    by_hand = keras.Model(model.input, model.get_layer("stage0_block0")(x))
    images = _images(2, 16, 16, 3)
    np.testing.assert_allclose(*map(ops.convert_to_numpy, (by_hand(images), model.features(images)["stage0"])), atol=1e-6)


def test_config_is_json_and_takes_a_variant_in_every_form():
    preprocessing = {"mean": [0.1, 0.2, 0.3], "class_names": ["a", "b"]}
    model = CvT(TINY, 2, (16, 24, 3), preprocessing=preprocessing)
    config = model.get_config()
    assert json.loads(json.dumps(config)) == config
    assert CvT.from_config(config).get_config() == config
    assert config["preprocessing"] == Preprocessing(**preprocessing).get_config()
    assert CvT(config["variant"], 2, (16, 24, 3)).variant == CvT.from_variant("cvt_tiny", 2, (16, 24, 3)).variant == TINY


def test_numpy_arguments_are_saved_as_python_values(tmp_path):
    preprocessing = {"mean": np.array([0.1, 0.2, 0.3]), "class_names": np.array(["a", "b"])}
    model = CvT(TINY, np.int64(2), (16, 24, 3), preprocessing=preprocessing)
    model.save(tmp_path / "model.keras")
    reloaded = keras.saving.load_model(tmp_path / "model.keras")
    assert reloaded.preprocessing == Preprocessing(mean=(0.1, 0.2, 0.3), class_names=("a", "b"))
    classifier = build_classifier("cvt_tiny", 2, (16, 16, 3), mean=np.array([0.5] * 3), std=np.array([0.5] * 3))
    assert preprocessing_of(classifier).mean == (0.5,) * 3


def test_a_classifier_of_any_size_keeps_the_models_image_size():
    model = CvT(TINY, 2, (None, None, 3), preprocessing={"image_size": (224, 224)})
    assert preprocessing_of(build_classifier(model)).image_size == (224, 224)


def test_the_seed_determines_the_weights():
    weights = []
    for seed in (0, 0, 1):
        keras.utils.set_random_seed(seed)
        weights.append(CvT(TINY, 10, (16, 16, 3)).get_weights())
    assert all(np.array_equal(a, b) for a, b in zip(weights[0], weights[1]))
    assert not all(np.array_equal(a, b) for a, b in zip(weights[0], weights[2]))


@pytest.mark.parametrize(
    "make, parts",
    [
        (lambda: CvT.from_variant("cvt_14"), ["'cvt_14'", "cvt_13", "cvt_tiny"]),
        (lambda: CvT.from_variant("cvt_13", 10, (8, 8, 3)), ["`input_shape`", "16x16", "8x8"]),
        (lambda: CvT.from_variant("cvt_13", 10, (None, 8, 3)), ["`input_shape`", "16x16", "x8"]),
        (lambda: CvT(TINY, -1), ["num_classes=-1"]),
        (lambda: CvT(TINY, True), ["num_classes=True"]),
        (lambda: CvT(TINY, 10, (32, 32)), ["input_shape=(32, 32)"]),
        (lambda: CvT(TINY, 10, None), ["input_shape=None"]),
        (lambda: CvT(TINY, 10, (32, 32, 0)), ["input_shape=(32, 32, 0)"]),
        (lambda: CvT(TINY, 10, preprocessing={"means": 1}), ["`preprocessing`", "means", "class_names"]),
        (lambda: CvT(TINY, 10, 224), ["input_shape=224"]),
        (lambda: CvT(TINY, 10, ("a", 32, 3)), ["input_shape=('a', 32, 3)"]),
        (lambda: build_classifier("cvt_tiny"), ["num_classes"]),
        (lambda: build_classifier("cvt_tiny", class_names="ab"), ["class_names='ab'"]),
        (lambda: build_classifier("cvt_tiny", 2, class_names="ab"), ["class_names='ab'"]),
        (lambda: build_classifier("cvt_tiny", 0, class_names=["a", "b"]), ["num_classes=0"]),
        (lambda: build_classifier(CvT(TINY, 0)), ["head", "num_classes=0"]),
        (lambda: preprocessing_of(keras.Sequential([keras.layers.Dense(1)])), ["`model`", "Sequential"]),
        (lambda: build_classifier("cvt_tiny", 10, mean=0.5), ["`mean`", "0.5"]),
        (lambda: build_classifier("cvt_tiny", 10, mean=(125, 123, 114)), ["`mean`", "255", "125"]),
        (lambda: build_classifier("cvt_tiny", 10, mean=[0.5]), ["`mean`", "3 channels", "0.5"]),
        (lambda: build_classifier("cvt_tiny", 10, std=[1.0, 1.0, 0.0]), ["`std`", "0.0"]),
        (lambda: build_classifier("cvt_tiny", 10, class_names=["cat"]), ["`class_names`", "10", "1"]),
        (lambda: build_classifier(CvT(TINY, 10), num_classes=5), ["num_classes=5", "10"]),
        (lambda: build_classifier(CvT(TINY, 10), dtype="mixed_float16"), ["dtype"]),
        (lambda: build_classifier(CvT(TINY, 10, (32, 32, 3)), input_shape=(48, 48, 3)), ["(48, 48, 3)", "(32, 32, 3)"]),
    ],
)
def test_errors_name_argument_and_value(make, parts):
    with pytest.raises(ValueError) as error:
        make()
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("make", [CvT.from_variant, build_classifier])
def test_an_unknown_argument_is_refused(make):
    with pytest.raises(TypeError, match="pretrained"):
        make("cvt_tiny", 10, (32, 32, 3), pretrained=True)


def test_classifier_takes_raw_pixels():
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
    classifier = build_classifier("cvt_tiny", 10, (32, 32, 3), mean=mean, std=std, class_names=list("abcdefghij"))
    pixels = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype("float32")
    model = classifier.get_layer("cvt")
    expected = model((pixels / 255 - np.array(mean)) / np.array(std))
    np.testing.assert_allclose(*(ops.convert_to_numpy(x) for x in (classifier(pixels), expected)), atol=1e-5)
    assert preprocessing_of(classifier) == Preprocessing(mean, std, tuple("abcdefghij"), (32, 32))


def test_classifier_reloads_with_its_preprocessing(tmp_path):
    classifier = build_classifier("cvt_tiny", input_shape=(32, 32, 3), class_names=("cat", "dog"))
    classifier.save(tmp_path / "model.keras")
    reloaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(reloaded.get_layer("cvt")) is CvT
    assert preprocessing_of(reloaded) == preprocessing_of(classifier)
    assert preprocessing_of(reloaded) == Preprocessing((0.5,) * 3, (0.5,) * 3, ("cat", "dog"), (32, 32))
    pixels = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype("float32")
    np.testing.assert_array_equal(*(ops.convert_to_numpy(net(pixels)) for net in (classifier, reloaded)))


def test_classifiers_around_a_model_share_its_weights_and_do_not_change_it():
    own = Preprocessing((0.1,) * 3, (0.2,) * 3, ("a", "b"))
    model = CvT(TINY, 2, (32, 32, 3), preprocessing=own)
    first = build_classifier(model)
    second = build_classifier(model, mean=(0.3,) * 3, class_names=("c", "d"))
    assert first.get_layer("cvt") is second.get_layer("cvt") is model
    np.testing.assert_allclose(np.ravel(first.get_layer("normalization").mean), 0.1 * 255, rtol=1e-6)
    assert model.preprocessing == own
    assert preprocessing_of(first) == Preprocessing((0.1,) * 3, (0.2,) * 3, ("a", "b"), (32, 32))
    assert preprocessing_of(second) == Preprocessing((0.3,) * 3, (0.2,) * 3, ("c", "d"), (32, 32))


def test_preprocessing_of_a_classifier_from_version_0_1(tmp_path):
    network = CvT(TINY, 2, (32, 32, 3), preprocessing={"mean": [0.1] * 3, "std": [0.2] * 3, "class_names": ["a", "b"]})
    pixels = keras.Input((32, 32, 3))
    normalize = keras.layers.Normalization(mean=[25.5] * 3, variance=[51.0**2] * 3, name="normalization")
    keras.Model(pixels, network(normalize(pixels))).save(tmp_path / "model.keras")
    reloaded = keras.saving.load_model(tmp_path / "model.keras")
    assert preprocessing_of(reloaded) == Preprocessing((0.1,) * 3, (0.2,) * 3, ("a", "b"))
    same = CvT.from_pretrained(tmp_path / "model.keras")
    assert same.preprocessing == Preprocessing((0.1,) * 3, (0.2,) * 3, ("a", "b"), (32, 32))


@pytest.mark.parametrize("cls_token, parts", [(False, {}), (True, {}), (False, _NEW_PARTS), (True, _NEW_PARTS)])
def test_without_a_head_the_output_is_the_heads_input(cls_token, parts, tmp_path):
    variant = Variant((Stage(8, 1, 1), Stage(16, 1, 2, cls_token=cls_token)), **parts)
    model = CvT(variant, 10, (16, 24, 3))
    headless = CvT(variant, 0, (16, 24, 3), dtype="float32")
    headless.set_weights(model.get_weights()[:-2])
    x = _images(2, 16, 24, 3)
    features = ops.convert_to_numpy(headless(x))
    assert features.shape == (2, 16)
    np.testing.assert_allclose(
        ops.convert_to_numpy(model.get_layer("head")(features)), ops.convert_to_numpy(model(x)), atol=1e-6
    )
    headless.save(tmp_path / "headless.keras")
    reloaded = keras.saving.load_model(tmp_path / "headless.keras")
    assert reloaded.num_classes == 0
    np.testing.assert_array_equal(ops.convert_to_numpy(reloaded(x)), features)


def test_pretrained_weights_load_without_their_head(tmp_path):
    model = CvT(TINY, 10, (32, 32, 3))
    model.save(tmp_path / "model.keras")
    headless = CvT.from_pretrained(tmp_path / "model.keras", num_classes=0)
    x = _images(2, 32, 32, 3)
    expected = ops.convert_to_numpy(model(x))
    np.testing.assert_allclose(ops.convert_to_numpy(model.get_layer("head")(headless(x))), expected, atol=1e-6)


def test_features_are_the_tokens_of_each_stage_by_name(tmp_path):
    model = CvT(TINY, 10, (32, 48, 3))
    x = _images(2, 32, 48, 3)
    features = model.features(x)
    assert list(features) == ["stage0", "stage1"]
    assert features["stage0"].shape == (2, 16, 24, 8)
    grid, cls_token = features["stage1"]
    assert (grid.shape, cls_token.shape) == ((2, 8, 12, 16), (2, 1, 16))
    # They are the input of the rest of the network.
    logits = model.get_layer("head")(model.get_layer("pool")(model.get_layer("norm")(cls_token)))
    np.testing.assert_allclose(ops.convert_to_numpy(logits), ops.convert_to_numpy(model(x)), atol=1e-6)
    weights = len(model.weights)
    model.save(tmp_path / "model.keras")  # without the graph of the features
    reloaded = keras.saving.load_model(tmp_path / "model.keras")
    assert len(model.weights) == len(reloaded.weights) == weights
    for ours, theirs in zip(keras.tree.flatten(features), keras.tree.flatten(reloaded.features(x)), strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(ours), ops.convert_to_numpy(theirs))


def test_features_in_training_drop_paths():
    variant = Variant((Stage(8, 2, 1, drop_path=0.9),))
    model = CvT(variant, 10, (16, 16, 3))
    x = _images(8, 16, 16, 3)
    plain = ops.convert_to_numpy(model.features(x)["stage0"])
    np.testing.assert_array_equal(plain, ops.convert_to_numpy(model.features(x)["stage0"]))
    assert not np.allclose(plain, ops.convert_to_numpy(model.features(x, training=True)["stage0"]))


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_classifier_keeps_fractions_of_pixels_in_half_precision(precision):
    classifier = build_classifier("cvt_tiny", 10, (32, 32, 3), mean=[0] * 3, std=[1 / 255] * 3, dtype=precision)
    normalized = keras.Model(classifier.input, classifier.get_layer("normalization").output)
    outputs = []
    layer = classifier.get_layer("normalization")
    call = layer.call
    layer.call = lambda x: outputs.append(ops.convert_to_numpy(call(x))) or call(x)
    classifier(np.full((1, 32, 32, 3), 100.7, "float32"))
    np.testing.assert_allclose(outputs[0], 100.7, rtol=1e-6)
    assert normalized.output.dtype == "float32"


def test_float16_classifier_scales_its_loss():
    classifier = build_classifier("cvt_tiny", 10, (32, 32, 3), dtype="mixed_float16")
    classifier.compile("adam", "mse")
    assert isinstance(classifier.optimizer, keras.optimizers.LossScaleOptimizer)


def test_public_names():
    for name in cvt_keras.__all__:
        assert getattr(cvt_keras, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="vit"):
        cvt_keras.vit  # noqa: B018
    assert set(cvt_keras.__all__) <= set(dir(cvt_keras))


def test_modules_are_attributes_of_the_package():
    assert cvt_keras.layers.MLP is cvt_keras.MLP
    assert cvt_keras.variants.VARIANTS is cvt_keras.VARIANTS


def test_a_classifier_saves_its_calibration(tmp_path):
    classifier = build_classifier("cvt_tiny", num_classes=2)
    assert calibration_of(classifier) == Calibration()
    set_calibration(classifier, Calibration(1.5, 0.25))
    classifier.save(tmp_path / "model.keras")
    reloaded = keras.saving.load_model(tmp_path / "model.keras")
    assert calibration_of(reloaded) == Calibration(1.5, 0.25)
    np.testing.assert_array_equal(reloaded(np.ones((1, 32, 32, 3))), classifier(np.ones((1, 32, 32, 3))))
    network = CvT("cvt_tiny", 2, (32, 32, 3))
    assert calibration_of(network) == Calibration()
    with pytest.raises(ValueError, match="CvT"):
        set_calibration(network, Calibration())
