import dataclasses
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import keras
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from transformers import AutoImageProcessor, CvtConfig, CvtForImageClassification

from benchmarks.network import differences, golden_model
from benchmarks.pretrained import CASES, logits, peak_memory, reference_model
from benchmarks.pretrained import differences as live_differences
from cvt_keras import VARIANTS, CvT, Preprocessing, Stage, Variant, build_classifier, cli, preprocessing_of
from cvt_keras.conversion import checkpoint, configs, layouts
from cvt_keras.conversion.checkpoint import load_state_dict
from cvt_keras.conversion.layouts import LAYOUTS, microsoft_weights, transformers_weights
from cvt_keras.errors import CheckpointError
from cvt_keras.pretrained import to_torch_state_dict, transformers_config, transformers_processor

ROOT = Path(__file__).parent.parent
GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.npz"))
MICROSOFT = [path for path in GOLDEN if path.stem.startswith("ms_")]
TRANSFORMERS = [path for path in GOLDEN if path.stem.startswith("hf_")]

# The paper's widths, which a checkpoint without a config is known by, at the least depth: `shallow` to the tests.
SHALLOW = dataclasses.replace(
    VARIANTS["cvt_13"], stages=tuple(dataclasses.replace(stage, depth=1) for stage in VARIANTS["cvt_13"].stages)
)
# What transformers can build of `cvt_tiny`'s size.
TINY = Variant(
    (
        Stage(8, 1, 1, 7, 4, 2, mlp_ratio=2.0),
        Stage(16, 2, 2, mlp_ratio=2.0, drop_path=0.1, cls_token=True),
    ),
    activation="gelu",
)


def _arrays(weights, counters=True):
    random = np.random.default_rng(0)
    arrays = {weight.key: random.normal(size=weight.shape).astype("float32") for weight in weights}
    arrays |= {key: np.abs(array) for key, array in arrays.items() if key.endswith("running_var")}
    return {**arrays, **({key: np.zeros((), "int64") for key in layouts.counters(weights)} if counters else {})}


def _save_torch(path, arrays, wrap=lambda arrays: arrays, **options):
    torch.save(wrap({key: torch.from_numpy(array) for key, array in arrays.items()}), path, **options)
    return path


def _config(variant, num_classes, **change):
    names = {str(i): f"class {i}" for i in range(num_classes)}
    return {**transformers_config(variant), "id2label": names, **change}


@pytest.fixture(autouse=True)
def shallow_too(monkeypatch):
    """`shallow` is one of the paper's networks to these tests: CvT-13's 80 MB would take them minutes."""
    monkeypatch.setitem(VARIANTS, "shallow", SHALLOW)
    monkeypatch.setattr(layouts, "PAPER", (*layouts.PAPER, "shallow"))


@pytest.fixture(scope="module")
def shallow_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("microsoft") / "CvT-13-64x96-IN-1k.pth"
    return _save_torch(path, _arrays(microsoft_weights(SHALLOW, 5)))


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformers") / "tiny"
    folder.mkdir()
    safetensors.numpy.save_file(_arrays(transformers_weights(TINY, 5)), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(_config(TINY, 5)))
    processor = {"size": {"shortest_edge": 64}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def _copy(folder, to):
    """A copy of a transformers folder, to be damaged."""
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def _loaded(model):
    return {variable.path: keras.ops.convert_to_numpy(variable) for variable in model.weights}


# === Agreement ===


def test_golden_files_are_there():
    assert (len(MICROSOFT), len(TRANSFORMERS)) == (3, 2)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_logits_and_stages_agree_with_the_reference(path):
    found = differences(path)
    cls_token = {"stage2_cls"} if path in MICROSOFT and "nocls" not in path.stem else set()
    assert set(found) == {"logits", "stage0", "stage1", "stage2"} | cls_token
    assert max(found.values()) < 1e-4, found


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_same_weights_come_from_a_file(path, tmp_path):
    model, state_dict, golden = golden_model(path)
    file = _save_torch(tmp_path / "weights.bin", state_dict)
    variant = model.variant
    if path in TRANSFORMERS:
        (tmp_path / "config.json").write_bytes(bytes(golden["config_json"]))
        variant = None
    again = CvT.from_pretrained(file, variant=variant, input_shape=model.input_shape[1:])
    assert again.variant == model.variant
    for ours, theirs in zip(again.get_weights(), model.get_weights()):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("variant, size", CASES[:2])
def test_the_network_agrees_with_transformers_there_and_back(variant, size, tmp_path):
    there, back, largest = live_differences(variant, size, tmp_path)
    assert there < 1e-4 and back < 1e-4
    assert largest > 1  # a network that puts out next to nothing would agree with any other


@pytest.mark.slow
@pytest.mark.parametrize("variant, size", CASES[2:])
def test_larger_networks_and_images_agree_too(variant, size, tmp_path):
    there, back, _ = live_differences(variant, size, tmp_path)
    assert there < 1e-4 and back < 1e-4


@pytest.mark.slow
def test_the_largest_network_converts_under_4_gib(tmp_path):
    size, peak, _ = peak_memory("cvt_w24", ".pth", tmp_path)
    assert size > 2**30
    assert (tmp_path / "model.keras").stat().st_size > size
    assert peak < 4 * 2**30


@pytest.mark.parametrize("name", ["cvt_13", "cvt_21", "cvt_w24"])
def test_transformers_has_the_keys_and_shapes_of_the_papers_networks(name):
    with torch.device("meta"):  # shapes without memory
        reference = CvtForImageClassification(CvtConfig(**_config(name, 1000))).state_dict()
    weights = transformers_weights(name, 1000)
    ours = {weight.key: weight.shape for weight in weights} | {key: () for key in layouts.counters(weights)}
    assert ours == {key: tuple(value.shape) for key, value in reference.items()}


# === The maps ===


def _keras_shapes(weights):
    return {weight.path: checkpoint._transposed(weight.shape, weight.axes) for weight in weights}


@pytest.mark.parametrize("name", ["cvt_13", "cvt_21", "cvt_w24", "cvt_tiny"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_map_covers_the_network_whole(layout, name):
    weights = LAYOUTS[layout].weights(name, 7, 4)
    assert len({weight.key for weight in weights}) == len({weight.path for weight in weights}) == len(weights)
    if name == "cvt_w24":  # a gigabyte
        shapes = {
            path: shape for layout in LAYOUTS for path, shape in _keras_shapes(LAYOUTS[layout].weights(name, 7, 4)).items()
        }
    else:
        shapes = {variable.path: tuple(variable.shape) for variable in CvT(VARIANTS[name], 7, (None, None, 4)).weights}
    assert shapes == _keras_shapes(weights)


@pytest.mark.parametrize("projection", ["avg", "linear"])
def test_the_authors_ablations_have_a_map(projection):
    variant = Variant((Stage(8, 1, 1, projection=projection, qkv_bias=False),))
    keys = {weight.key for weight in microsoft_weights(variant, 5)}
    assert not any("conv_proj" in key or key.endswith("proj_q.bias") for key in keys)
    assert {weight.path for weight in microsoft_weights(variant, 5)} == set(_loaded(CvT(variant, 5, (16, 16, 3))))


@pytest.mark.parametrize(
    "layout, variant, part",
    [
        ("microsoft", "cvt_cifar", "stem=(32,"),
        ("transformers", "cvt_cifar", "stem=(32,"),
        ("transformers", Variant((Stage(8, 1, 1, projection="avg", cls_token=True),)), "projection='avg'"),
        ("transformers", Variant((Stage(8, 1, 1, cls_token=True), Stage(16, 1, 1, cls_token=True))), "stage 0"),
        ("transformers", Variant((Stage(8, 1, 1), Stage(16, 1, 1))), "cls_token=False in its last stage"),
    ],
)
def test_what_a_layout_has_not_is_refused(layout, variant, part):
    with pytest.raises(ValueError) as error:
        LAYOUTS[layout].weights(variant)
    assert part in str(error.value)


def test_a_state_dict_is_used_whole_or_refused():
    model, state_dict, _ = golden_model(MICROSOFT[-1])
    weights = microsoft_weights(model.variant, model.num_classes)
    before = model.get_weights()
    damaged = dict(state_dict)
    damaged["head.extra"] = damaged.pop("head.bias")
    damaged["norm.weight"] = np.ones(3, "float32")
    damaged["head.weight"] = damaged["head.weight"].T
    damaged["stage0.patch_embed.proj.bias"] = np.ones(16, "int64")
    damaged["stage0.patch_embed.norm.bias"] = np.full(16, np.nan, "float32")
    damaged["norm.num_batches_tracked"] = np.zeros((), "int64")  # there is no BatchNorm there
    variance = "stage0.blocks.0.attn.conv_proj_q.bn.running_var"
    damaged[variance] = -damaged[variance]
    with pytest.raises(CheckpointError) as error:
        load_state_dict(model, damaged, weights)
    assert "1 missing, 2 unused, 5 of wrong shape or type" in error.value.summary
    expected = {
        "missing: head.bias",
        "unused: head.extra",
        "unused: norm.num_batches_tracked",
        "norm.weight: its shape must be (64,). Received: (3,)",
        "head.weight: its shape must be (10, 64). Received: (64, 10)",
        "stage0.patch_embed.proj.bias: its dtype must be one of float16, bfloat16, float32, float64. Received: int64",
        "stage0.patch_embed.norm.bias: it holds a NaN, an infinity or what float32 can't hold",
        f"{variance}: it holds a negative variance",
    }
    assert set(error.value.details) == expected
    assert str(error.value).splitlines()[1:] == [f"  {detail}" for detail in error.value.details]
    for ours, old in zip(model.get_weights(), before):
        np.testing.assert_array_equal(ours, old)


@pytest.mark.parametrize(
    "key, shape",
    [
        ("stage0.blocks.0.mlp.fc1.bias", (255,)),
        ("stage0.blocks.0.mlp.fc2.weight", (64, 255)),
        ("stage0.patch_embed.norm.bias", (3,)),
    ],
)
def test_the_array_that_is_cut_is_the_one_that_is_told(key, shape, tmp_path):
    arrays = {**_arrays(microsoft_weights(SHALLOW, 5)), key: np.zeros(shape, "float32")}
    with pytest.raises(CheckpointError) as error:
        checkpoint.read(_save_torch(tmp_path / "weights.pth", arrays))
    [line] = error.value.details
    assert line.startswith(f"{key}: its shape must be (")
    assert line.endswith(f"Received: {shape}")


def test_a_head_that_disagrees_with_itself_is_told(tmp_path):
    arrays = {**_arrays(microsoft_weights(SHALLOW, 5)), "head.bias": np.zeros(4, "float32")}
    with pytest.raises(CheckpointError, match=r"head\.weight and head\.bias .*\(5, 384\) and \(4,\)"):
        checkpoint.read(_save_torch(tmp_path / "weights.pth", arrays))


def test_a_lost_cls_token_is_told_with_the_way_out(tmp_path):
    arrays = _arrays(microsoft_weights(SHALLOW, 5))
    del arrays["stage2.cls_token"]
    file = _save_torch(tmp_path / "weights.pth", arrays)
    with pytest.raises(
        CheckpointError, match=r"the paper's shallow.*\(another network needs `variant`\)[^\n]*\n.*: stage2\.cls_token$"
    ):
        checkpoint.read(file)
    stages = SHALLOW.stages
    without = Variant((*stages[:2], dataclasses.replace(stages[2], cls_token=False)))
    assert checkpoint.read(file, without).variant == without


def test_the_weights_are_the_networks_own(tmp_path):
    """JAX keeps the array that it is given: a file that changes, or goes, must not reach it."""
    weights = microsoft_weights("cvt_tiny", 5)
    arrays = _arrays(weights)
    expected = {path: (arrays[key].transpose(axes) if axes else arrays[key]).copy() for key, path, _, axes in weights}
    file = _save_torch(tmp_path / "weights.pth", arrays)
    read, given = CvT.from_pretrained(file, variant="cvt_tiny", input_shape=(16, 16, 3)), CvT("cvt_tiny", 5, (16, 16, 3))
    load_state_dict(given, arrays, weights)
    size = file.stat().st_size
    with open(file, "r+b") as opened:
        opened.write(bytes(size))
        opened.truncate(0)
    for array in arrays.values():
        array[...] = 0
    for model in (read, given):
        for path, array in _loaded(model).items():
            np.testing.assert_array_equal(array, expected[path])


def test_a_stray_key_of_the_other_layout_is_told_as_one(tmp_path):
    arrays = {**_arrays(microsoft_weights(SHALLOW, 5)), "cvt.encoder": np.ones(3, "float32")}
    with pytest.raises(CheckpointError, match=r"; 0 missing, 1 unused, 0 of[^\n]*\n  unused: cvt\.encoder$"):
        checkpoint.read(_save_torch(tmp_path / "weights.pth", arrays))


def test_what_float32_can_not_hold_is_refused():
    weights = transformers_weights(TINY, 5)
    arrays = {**_arrays(weights), "layernorm.weight": np.full(16, 1e300)}
    with pytest.raises(CheckpointError, match=r"layernorm\.weight: it holds .*float32"):
        load_state_dict(CvT(TINY, 5, (32, 32, 3)), arrays, weights)


def test_a_map_of_another_network_is_refused():
    model, _, _ = golden_model(MICROSOFT[-1])
    weights = microsoft_weights("cvt_tiny", 10)
    with pytest.raises(ValueError, match="stage1_block1"):
        load_state_dict(model, _arrays(weights), weights)


# === Reading ===


@pytest.mark.parametrize("name", ["cvt_13", "cvt_21", "cvt_w24"])
def test_the_papers_networks_are_known_by_their_shapes(name):
    shapes = {weight.key: weight.shape for weight in microsoft_weights(name, 5, 4)}
    assert layouts.paper_network(shapes) == name


@pytest.mark.files
def test_lost_blocks_and_biases_make_no_smaller_network(tmp_path):
    sound = _arrays(microsoft_weights("cvt_13", 5))
    damages = {
        r"its stages have \[1, 2, 9\].* \[1, 2, 10\] of cvt_13, \[1, 4, 16\] of cvt_21": r"stage2\.blocks\.9\.",
        r"missing: stage2\.blocks\.4\.norm1\.weight": r"stage2\.blocks\.4\.",
        r"missing: stage1\.blocks\.0\.attn\.proj_k\.bias": r"stage1\.blocks\.\d+\.attn\.proj_[qkv]\.bias",
        r"missing: stage0\.blocks\.0\.attn\.proj_v\.bias": r".*\.attn\.proj_[qkv]\.bias",
        r"missing: stage1\.patch_embed\.proj\.weight": r"stage1\.",
        r"none of the paper's: give `variant`": r"stage2\.",
    }
    for told, lost in damages.items():
        arrays = {key: array for key, array in sound.items() if not re.match(lost, key)}
        with pytest.raises(CheckpointError, match=told):
            checkpoint.read(_save_torch(tmp_path / "weights.pth", arrays))


@pytest.mark.files
def test_another_variant_than_the_weights_is_told_with_the_right_one(shallow_file):
    with pytest.raises(
        CheckpointError, match=r"do not fit `variant` \(their widths, kernels and depths are those of shallow\); \d+ m"
    ):
        checkpoint.read(shallow_file, "cvt_21")


@pytest.mark.files
def test_the_authors_file_says_its_resolution_by_its_name(shallow_file, tmp_path):
    model = CvT.from_pretrained(shallow_file)
    assert model.input_shape == (None, 64, 96, 3)
    assert model.num_classes == 5
    assert model.variant.activation == "quick_gelu"
    assert model.preprocessing == Preprocessing([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], None, [64, 96])
    for name in ("weights", "cvt13_2x4gpu", "cvt-2x2", "run_12x08"):
        assert configs.published_preprocessing(VARIANTS["cvt_13"], 3, name).image_size == (224, 224)
    assert configs.published_preprocessing(VARIANTS["cvt_w24"], 3, "weights").image_size == (384, 384)


@pytest.mark.files
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("give", ["folder", "file"])
def test_a_transformers_folder_is_read_with_its_configs(suffix, give, tiny_folder, tmp_path):
    folder = _copy(tiny_folder, tmp_path / "tiny")
    if suffix == ".bin":
        file = folder / "model.safetensors"
        _save_torch(folder / "pytorch_model.bin", safetensors.numpy.load_file(file))
        file.unlink()
    file = folder / ("model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin")
    model = CvT.from_pretrained(folder if give == "folder" else str(file))
    assert model.variant == TINY
    assert model.preprocessing == Preprocessing([0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [f"class {i}" for i in range(5)], [64, 64])
    assert model.input_shape == (None, 64, 64, 3)
    expected = _arrays(transformers_weights(TINY, 5))
    for key, array in to_torch_state_dict(model, "transformers").items():
        np.testing.assert_array_equal(array, expected[key])


@pytest.mark.files
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_other_floats_become_float32(dtype, suffix, tiny_folder, tmp_path):
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    arrays = {key: array.astype(kind) for key, array in _arrays(transformers_weights(TINY, 5), counters=False).items()}
    folder = _copy(tiny_folder, tmp_path / "tiny")
    file = folder / f"weights{suffix}"
    if suffix == ".pth":
        tensors = {key: torch.from_numpy(array.astype("float64")).to(getattr(torch, dtype)) for key, array in arrays.items()}
        torch.save(tensors, file)
    else:
        safetensors.numpy.save_file(arrays, file)
    model = CvT.from_pretrained(file)
    np.testing.assert_array_equal(_loaded(model)["head/kernel"].T, arrays["classifier.weight"].astype("float32"))
    assert {str(array.dtype) for array in _loaded(model).values()} == {"float32"}


# === Arguments ===


def test_a_new_head_where_the_classes_differ(tiny_folder):
    same = CvT.from_pretrained(tiny_folder, num_classes=5)
    assert same.preprocessing.class_names == tuple(f"class {i}" for i in range(5))
    other = CvT.from_pretrained(tiny_folder, num_classes=3)
    assert other.output_shape == (None, 3)
    assert other.preprocessing.class_names is None
    assert other.preprocessing.mean == (0.1, 0.2, 0.3)
    ours, theirs = _loaded(other), _loaded(same)
    assert 0 < np.abs(ours["head/kernel"]).max() < 0.2  # its initialiser's
    for path in set(ours) - {"head/kernel", "head/bias"}:
        np.testing.assert_array_equal(ours[path], theirs[path])


def test_a_damaged_head_is_refused_also_where_it_is_not_used(tiny_folder, tmp_path):
    folder = _copy(tiny_folder, tmp_path / "tiny")
    arrays = _arrays(transformers_weights(TINY, 5))
    del arrays["classifier.weight"]
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: classifier\.weight"):
        CvT.from_pretrained(folder, num_classes=3)


def test_any_size_of_image_will_do(tiny_folder):
    model = CvT.from_pretrained(tiny_folder, input_shape=(96, 64, 3))
    assert model.input_shape == (None, 96, 64, 3)
    assert model.preprocessing.image_size == (64, 64)  # the checkpoint's
    assert transformers_processor(model)["size"] == {"height": 96, "width": 64}  # what it is for now
    free = CvT.from_pretrained(tiny_folder, input_shape=(None, None, 3))
    images = np.random.default_rng(0).normal(size=(1, 96, 64, 3)).astype("float32")
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(free(images)), keras.ops.convert_to_numpy(model(images)), rtol=1e-4, atol=1e-5
    )


def test_a_classifier_of_it_takes_raw_pixels(tiny_folder):
    model = CvT.from_pretrained(tiny_folder)
    classifier = build_classifier(model)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype("float32")
    normalized = (pixels / 255 - np.array([0.1, 0.2, 0.3])) / np.array([0.4, 0.5, 0.6])
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(classifier(pixels)),
        keras.ops.convert_to_numpy(model(normalized.astype("float32"))),
        rtol=1e-3,
        atol=1e-3,
    )


def test_a_keras_file_is_a_source_too(tiny_folder, tmp_path):
    model = CvT.from_pretrained(tiny_folder)
    model.save(tmp_path / "model.keras")
    build_classifier(model).save(tmp_path / "classifier.keras")
    for name in ("model.keras", "classifier.keras"):
        again = CvT.from_pretrained(tmp_path / name)
        assert (again.variant, again.preprocessing) == (model.variant, model.preprocessing)
        for ours, theirs in zip(again.get_weights(), model.get_weights()):
            np.testing.assert_array_equal(ours, theirs)
    assert CvT.from_pretrained(tmp_path / "model.keras", num_classes=2).output_shape == (None, 2)
    for side in (32, None):  # without preprocessing its own size is all that there is
        CvT(TINY, 5, (side, side, 3)).save(tmp_path / "plain.keras")
        assert CvT.from_pretrained(tmp_path / "plain.keras").input_shape == (None, side, side, 3)
    other = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    other.save(tmp_path / "other.keras")
    with pytest.raises(CheckpointError, match=r"other\.keras: it holds no CvT"):
        CvT.from_pretrained(tmp_path / "other.keras")
    for text, said in {"hello": "download it again", "version https://git-lfs.github.com": "git lfs pull"}.items():
        (tmp_path / "text.keras").write_text(text)
        with pytest.raises(CheckpointError, match=rf"text\.keras: it is damaged or no \.keras file: .*{said}"):
            CvT.from_pretrained(tmp_path / "text.keras")


def test_a_variant_is_a_shape_and_the_weights_know_the_activation(tmp_path):
    folder = tmp_path / "cvt"
    folder.mkdir()
    arrays = _arrays(transformers_weights("cvt_13", 5))
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"config\.json must lie beside it"):
        checkpoint.read(folder / "model.safetensors")
    assert checkpoint.read(folder / "model.safetensors", "cvt_13").variant.activation == "gelu"
    assert checkpoint.read(folder / "model.safetensors", VARIANTS["cvt_13"]).variant.activation == "gelu"
    (folder / "config.json").write_text(json.dumps(_config("cvt_13", 5)))
    assert checkpoint.read(folder, "cvt_13").variant.activation == "gelu"
    heads = [dataclasses.replace(stage, heads=2) for stage in VARIANTS["cvt_13"].stages]
    with pytest.raises(ValueError, match=r"`variant` .*heads of stage 0 is 1, not 2"):
        checkpoint.read(folder, Variant(tuple(heads)))


def test_precision_and_name_go_to_the_network(tiny_folder):
    model = CvT.from_pretrained(tiny_folder, dtype="mixed_bfloat16", name="backbone")
    assert (model.dtype_policy.name, model.name) == ("mixed_bfloat16", "backbone")


def test_preprocessing_that_is_given_stands_beside_the_checkpoints(tiny_folder):
    model = CvT.from_pretrained(tiny_folder, preprocessing={"mean": [0.3, 0.2, 0.1]})
    assert model.preprocessing == Preprocessing([0.3, 0.2, 0.1], [0.4, 0.5, 0.6], [f"class {i}" for i in range(5)], [64, 64])
    model = CvT.from_pretrained(tiny_folder, preprocessing={"image_size": [96, 64]})
    assert model.input_shape == (None, 96, 64, 3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "mixed_bfloat16"])
def test_the_way_back_is_float32_whatever_the_precision(dtype, tiny_folder):
    model = CvT.from_pretrained(tiny_folder, dtype=dtype)
    expected = _arrays(transformers_weights(TINY, 5))
    for key, array in to_torch_state_dict(model, "transformers").items():
        assert array.dtype == expected[key].dtype
        np.testing.assert_allclose(array, expected[key], rtol=1e-2)


# === Refusals ===


@pytest.mark.files
@pytest.mark.parametrize(
    "damage, parts",
    [
        (lambda folder: (folder / "config.json").write_text("{"), ["config.json", "Expecting property name"]),
        (lambda folder: (folder / "preprocessor_config.json").write_text('{"size": 4}'), ["preprocessor_config.json", "4x4"]),
        (
            lambda folder: (folder / "config.json").write_text(
                json.dumps(_config(TINY, 5, qkv_projection_method=["avg", "avg"]))
            ),
            ["config.json", "projection='avg'"],
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), ["neither"]),
        (lambda folder: (folder / "model.safetensors").write_text("hello"), ["damaged"]),
        (
            lambda folder: safetensors.numpy.save_file({"conv1.weight": np.ones(3)}, folder / "model.safetensors"),
            ["no CvT", "conv1"],
        ),
        (
            lambda folder: safetensors.numpy.save_file(_arrays(transformers_weights(TINY, 0)), folder / "model.safetensors"),
            ["classifier.weight", "a class at least"],
        ),
        (
            lambda folder: (folder / "config.json").write_text(json.dumps(_config(TINY, 4))),
            ["config.json names 4 classes, and the weights are of 5"],
        ),
    ],
)
def test_a_damaged_folder_is_told_in_a_line(damage, parts, tiny_folder, tmp_path):
    folder = _copy(tiny_folder, tmp_path / "tiny")
    damage(folder)
    with pytest.raises(CheckpointError) as error:
        CvT.from_pretrained(folder, num_classes=3)
    [line] = str(error.value).splitlines()
    for part in (str(folder), *parts):
        assert part in line


@pytest.mark.files
def test_a_network_that_the_shapes_do_not_settle_asks_for_the_variant(tmp_path):
    variant = Variant((Stage(8, 1, 1), Stage(16, 1, 2)))
    file = _save_torch(tmp_path / "weights.pth", _arrays(microsoft_weights(variant, 5)))
    with pytest.raises(CheckpointError, match=r"give `variant`"):
        CvT.from_pretrained(file)
    assert CvT.from_pretrained(file, variant=variant, input_shape=(32, 32, 3)).variant == variant
    for change in ({"projection": "linear"}, {"qkv_bias": False}, {"mlp_ratio": 2.0}):
        other = Variant(tuple(dataclasses.replace(stage, **change) for stage in SHALLOW.stages))
        file = _save_torch(tmp_path / "other.pth", _arrays(microsoft_weights(other, 5)))
        with pytest.raises(CheckpointError, match="another network needs `variant`"):
            checkpoint.read(file)
        assert checkpoint.read(file, other).variant == other


@pytest.mark.files
@pytest.mark.parametrize(
    "arguments, part",
    [
        ({"variant": "cvt_14"}, "'cvt_14'"),
        ({"variant": "cvt_cifar"}, "stem"),
        ({"variant": "cvt_tiny"}, "missing: "),
        ({"input_shape": (64, 64, 1)}, "3 channels"),
        ({"input_shape": 224}, "input_shape=224"),
        ({"input_shape": (8, 8, 3)}, "16x16"),
        ({"num_classes": -1}, "`num_classes`"),
    ],
)
def test_arguments_that_do_not_fit_are_told(arguments, part, shallow_file):
    with pytest.raises(ValueError) as error:
        CvT.from_pretrained(shallow_file, **arguments)
    assert part in str(error.value)


@pytest.mark.files
def test_pytorch_is_needed_for_nothing_else(tiny_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    to_torch_state_dict(CvT.from_pretrained(tiny_folder), "transformers")


def _damage(kind, random, arrays):
    """Damages a state dict in place -> the keys of which one must be named."""
    key = random.choice(sorted(key for key in arrays if not key.endswith("num_batches_tracked")))
    array = arrays[key]
    if kind == "dropped":
        del arrays[key]
    elif kind == "renamed":
        at = random.integers(len(key))
        renamed = f"{key[:at]}{'z' if key[at] != 'z' else 'y'}{key[at + 1 :]}"
        arrays[renamed] = arrays.pop(key)
        return key, renamed
    elif kind == "reshaped":
        shapes = [array[None], array.ravel() if array.ndim > 1 else array[:, None], array[:-1], np.concatenate([array, array])]
        arrays[key] = np.ascontiguousarray(shapes[random.integers(4)])
    elif kind == "integer":
        arrays[key] = array.astype(random.choice(["int8", "int64", "uint8", "bool"]))
    elif kind == "not finite":
        array.flat[random.integers(array.size)] = random.choice([np.nan, np.inf, -np.inf])
    elif kind == "negative":
        key = random.choice([key for key in arrays if key.endswith("running_var")])
        arrays[key].flat[0] = -1e-3
    return (key,)


@pytest.mark.files
def test_200_damaged_checkpoints_are_refused_by_name(tmp_path, tiny_folder):
    random = np.random.default_rng(0)
    kinds = ["dropped", "renamed", "reshaped", "integer", "truncated", "not finite", "negative"]
    (tmp_path / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    files = {"weights.pth": microsoft_weights(SHALLOW, 5), "model.safetensors": transformers_weights(TINY, 5)}
    files |= {"old.pth": microsoft_weights(SHALLOW, 5), "pytorch_model.bin": transformers_weights(TINY, 5)}
    sound = {name: _arrays(weights) for name, weights in files.items()}
    for i in range(200):
        kind, name = kinds[i % len(kinds)], list(files)[i // len(kinds) % len(files)]
        arrays = dict(sound[name])
        if kind in ("not finite", "negative"):
            arrays = {key: array.copy() for key, array in arrays.items()}
        keys = (name,) if kind == "truncated" else _damage(kind, random, arrays)
        file = tmp_path / name
        if file.suffix == ".safetensors":
            safetensors.numpy.save_file(arrays, file)
        else:
            _save_torch(file, arrays, _use_new_zipfile_serialization=name != "old.pth")
        if kind == "truncated":
            data = file.read_bytes()
            file.write_bytes(data[: random.integers(len(data))])
        with pytest.raises(CheckpointError) as error:
            CvT.from_pretrained(file)
        said = str(error.value)
        assert str(file) in said, (i, kind, keys)
        assert any(key in said for key in keys), (i, kind, keys, said)


# === The way back ===


def test_what_is_trained_here_loads_into_transformers(tmp_path):
    """The lines of docs/pretrained.md."""
    names, mean = ["cat", "dog", "fish"], [0.1, 0.2, 0.3]
    classifier = build_classifier(TINY, input_shape=(64, 96, 3), class_names=names, mean=mean, std=[0.4, 0.5, 0.6])
    model = classifier.get_layer("cvt")
    random = np.random.default_rng(0)
    model.set_weights([w + random.uniform(0.1, 0.2, w.shape).astype("float32") for w in model.get_weights()])
    (tmp_path / "config.json").write_text(json.dumps(transformers_config(classifier)))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(transformers_processor(classifier)))
    safetensors.numpy.save_file(
        to_torch_state_dict(classifier, layout="transformers"), tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    theirs, report = CvtForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert theirs.config.id2label == {0: "cat", 1: "dog", 2: "fish"}
    images = random.normal(size=(2, 64, 96, 3)).astype("float32")
    np.testing.assert_allclose(logits(theirs.eval(), images), keras.ops.convert_to_numpy(model(images)), atol=1e-4)
    pixels = random.integers(0, 256, (2, 64, 96, 3), dtype="uint8")
    prepared = AutoImageProcessor.from_pretrained(tmp_path)(list(pixels), return_tensors="np")["pixel_values"]
    normalized = keras.ops.convert_to_numpy(classifier.get_layer("normalization")(pixels.astype("float32")))
    np.testing.assert_allclose(prepared.transpose(0, 2, 3, 1), normalized, atol=1e-5)
    again = CvT.from_pretrained(tmp_path)
    assert again.preprocessing == preprocessing_of(classifier)
    assert again.preprocessing == Preprocessing(mean, [0.4, 0.5, 0.6], names, [64, 96])


def test_a_network_of_four_channels_goes_to_transformers(tmp_path):
    model = CvT(TINY, 5, (64, 64, 4))
    (tmp_path / "config.json").write_text(json.dumps(transformers_config(model)))
    safetensors.numpy.save_file(to_torch_state_dict(model, "transformers"), tmp_path / "model.safetensors", {"format": "pt"})
    images = np.random.default_rng(0).normal(size=(1, 64, 64, 4)).astype("float32")
    theirs = CvtForImageClassification.from_pretrained(tmp_path).eval()
    np.testing.assert_allclose(logits(theirs, images), keras.ops.convert_to_numpy(model(images)), atol=1e-4)
    assert CvT.from_pretrained(tmp_path).preprocessing.mean is None  # ImageNet's is of three


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_round_trip_is_exact(layout):
    variant = dataclasses.replace(VARIANTS["cvt_tiny"], activation=LAYOUTS[layout].activation)
    arrays = _arrays(LAYOUTS[layout].weights(variant, 5))
    model = CvT(variant, 5, (16, 16, 3))
    load_state_dict(model, arrays, LAYOUTS[layout].weights(variant, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        back = to_torch_state_dict(model, layout)
    assert set(back) == set(arrays)
    for key, array in arrays.items():
        assert back[key].dtype == array.dtype and back[key].flags.c_contiguous
        np.testing.assert_array_equal(back[key], array)


def test_an_authors_state_dict_has_pytorchs_keys():
    model, state_dict, _ = golden_model(MICROSOFT[0])
    assert set(to_torch_state_dict(model)) == set(state_dict)


def test_the_way_back_tells_what_the_other_code_computes():
    model = CvT("cvt_tiny", 5, (16, 16, 3))
    with pytest.warns(UserWarning, match="quick_gelu, that code always gelu"):
        to_torch_state_dict(model, "transformers")
    with pytest.raises(ValueError, match="layout='timm'"):
        to_torch_state_dict(model, "timm")
    with pytest.raises(ValueError, match="Received: Sequential"):
        to_torch_state_dict(keras.Sequential())
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no stem"):
        to_torch_state_dict(CvT("cvt_cifar", 5, (32, 32, 3)))


# === The command line ===


@pytest.mark.files
def test_the_command_converts(tiny_folder, tmp_path):
    out = tmp_path / "out.keras"
    command = [sys.executable, "-m", "cvt_keras.pretrained", str(tiny_folder), str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "5 classes, images of 64x64, gelu" in done.stdout.splitlines()[-1]
    model = keras.saving.load_model(out)
    assert isinstance(model, CvT)
    assert model.preprocessing.class_names[4] == "class 4"
    for ours, theirs in zip(model.get_weights(), CvT.from_pretrained(tiny_folder).get_weights()):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.files
def test_the_commands_variant_is_heard(tmp_path, capsys):
    file = _save_torch(tmp_path / "weights.pth", _arrays(microsoft_weights("cvt_tiny", 5)))
    assert cli.main(["convert", str(file), str(tmp_path / "out.keras")]) == 1
    assert "give `variant`" in capsys.readouterr().err
    assert cli.main(["convert", str(file), str(tmp_path / "out.keras"), "--variant", "cvt_tiny"]) == 0
    assert keras.saving.load_model(tmp_path / "out.keras").variant == VARIANTS["cvt_tiny"]
    CvT("cvt_tiny", 5, (None, None, 3)).save(tmp_path / "any.keras")
    assert cli.main(["convert", str(tmp_path / "any.keras"), str(tmp_path / "any-out.keras")]) == 0
    assert "images of any size" in capsys.readouterr().out
    assert cli.main(["convert", str(file), str(tmp_path / "more.keras"), "--variant", "cvt_14"]) == 2
    assert "'cvt_14'" in capsys.readouterr().err


@pytest.mark.files
def test_the_command_tells_of_a_full_disk(tiny_folder, tmp_path, monkeypatch, capsys):
    def save(model, path):
        path.write_text("a part")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(CvT, "save", save)
    assert cli.main(["convert", str(tiny_folder), str(tmp_path / "out.keras")]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line == f"cvt-keras convert: {tmp_path / 'out.keras'} can't be written: No space left on device"
    assert not list(tmp_path.iterdir())


@pytest.mark.files
@pytest.mark.parametrize(
    "source, out, code, parts",
    [
        ("nowhere.pth", "out.keras", 2, ["nowhere.pth"]),
        ("damaged.pth", "out.keras", 1, ["damaged.pth"]),
        ("damaged.pth", "out.h5", 2, ["must end in .keras", "out.h5"]),
        ("damaged.pth", "there.keras", 2, ["already exists", "there.keras"]),
        ("damaged.pth", "nowhere/out.keras", 2, ["nowhere/out.keras"]),
        ("damaged.pth", "/proc/out.keras", 2, ["/proc/out.keras", "can be written to"]),
    ],
)
def test_the_command_tells_a_wrong_argument_in_a_line(source, out, code, parts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged.pth").write_text("hello")
    (tmp_path / "there.keras").write_text("mine")
    assert cli.main(["convert", source, out]) == code
    [line] = capsys.readouterr().err.splitlines()
    for part in ("cvt-keras convert: ", *parts):
        assert part in line
    assert (tmp_path / "there.keras").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged.pth", "there.keras"]


@pytest.mark.files
def test_the_command_ends_with_130_and_nothing_when_stopped(tiny_folder, tmp_path, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(CvT, "save", stop)
    assert cli.main(["convert", str(tiny_folder), str(tmp_path / "out.keras")]) == 130
    assert "stopped" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.keras")) and not list(tmp_path.glob(".*"))


@pytest.mark.files
def test_reference_models_statistics_are_random():
    """What the live tests stand on."""
    state_dict = reference_model(TINY, 5).state_dict()
    for key, value in state_dict.items():
        if key.endswith(("running_mean", "running_var", "weight", "bias", "cls_token")):
            assert value.std() > 0, key
