import dataclasses
import itertools
import json
import re

import keras
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from checkpoint_files import MICROSOFT, PAPER, SHALLOW, TINY, config_of, copy_folder, random_arrays, save_torch, weights_of
from transformers import CvtForImageClassification

from benchmarks.network import golden_model
from cvt_keras import VARIANTS, CvT, Preprocessing, Stage, Variant, build_classifier
from cvt_keras.conversion import checkpoint, configs, layouts
from cvt_keras.conversion.checkpoint import load_state_dict
from cvt_keras.conversion.layouts import microsoft_weights, transformers_weights
from cvt_keras.errors import ArgumentError, CheckpointError
from cvt_keras.pretrained import to_torch_state_dict


@pytest.fixture(autouse=True)
def narrow_networks(monkeypatch):
    """Adds small networks to those of the paper: CvT-13's 80 MB would take these tests minutes."""
    for name, variant in PAPER.items():
        monkeypatch.setitem(VARIANTS, name, variant)
    monkeypatch.setattr(layouts, "PAPER", (*layouts.PAPER, *PAPER))


@pytest.fixture(scope="module")
def shallow_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("microsoft") / "CvT-13-64x96-IN-1k.pth"
    return save_torch(path, random_arrays(microsoft_weights(SHALLOW, 5)))


# === Loading ===


def test_every_fault_of_a_state_dict_is_listed_and_the_model_keeps_its_weights():
    model, state_dict, _ = golden_model(MICROSOFT[-1])
    weights = microsoft_weights(model.variant, model.num_classes)
    before = model.get_weights()
    damaged = dict(state_dict)
    damaged["head.extra"] = damaged.pop("head.bias")
    damaged["norm.weight"] = np.ones(3, "float32")
    damaged["head.weight"] = damaged["head.weight"].T
    damaged["stage0.patch_embed.proj.bias"] = np.ones(16, "int64")
    damaged["stage0.patch_embed.norm.bias"] = np.full(16, np.nan, "float32")
    damaged["norm.num_batches_tracked"] = np.zeros((), "int64")  # `norm` is no BatchNorm
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
        "stage0.patch_embed.norm.bias: it holds a NaN, an infinity or a value too large for float32",
        f"{variance}: it holds a negative variance",
    }
    assert set(error.value.details) == expected
    assert str(error.value).splitlines()[1:] == [f"  {detail}" for detail in error.value.details]
    for ours, old in zip(model.get_weights(), before):
        np.testing.assert_array_equal(ours, old)


def test_loaded_weights_are_copies(tmp_path):
    """JAX keeps a reference to an assigned array: later changes to the file or the array must not reach the network."""
    weights = microsoft_weights("cvt_tiny", 5)
    arrays = random_arrays(weights)
    expected = {path: (arrays[key].transpose(axes) if axes else arrays[key]).copy() for key, path, _, axes in weights}
    file = save_torch(tmp_path / "weights.pth", arrays)
    from_file = CvT.from_pretrained(file, variant="cvt_tiny", input_shape=(16, 16, 3))
    from_arrays = CvT("cvt_tiny", 5, (16, 16, 3))
    load_state_dict(from_arrays, arrays, weights)
    size = file.stat().st_size
    with open(file, "r+b") as opened:
        opened.write(bytes(size))
        opened.truncate(0)
    for array in arrays.values():
        array[...] = 0
    for model in (from_file, from_arrays):
        for path, array in weights_of(model).items():
            np.testing.assert_array_equal(array, expected[path])


def test_values_beyond_float32_are_refused():
    weights = transformers_weights(TINY, 5)
    arrays = {**random_arrays(weights), "layernorm.weight": np.full(16, 1e300)}
    with pytest.raises(CheckpointError) as error:
        load_state_dict(CvT(TINY, 5, (32, 32, 3)), arrays, weights)
    [line] = error.value.details
    assert line.startswith("layernorm.weight: ") and "float32" in line


def test_a_map_of_another_network_is_refused():
    model, _, _ = golden_model(MICROSOFT[-1])
    weights = microsoft_weights("cvt_tiny", 10)
    with pytest.raises(ValueError, match="stage1_block1"):
        load_state_dict(model, random_arrays(weights), weights)


# === Reading ===


@pytest.mark.files
def test_the_resolution_is_read_from_the_name_of_an_authors_file(shallow_file):
    model = CvT.from_pretrained(shallow_file)
    assert model.input_shape == (None, 64, 96, 3)
    assert model.num_classes == 5
    assert model.variant.activation == "quick_gelu"
    assert model.preprocessing == Preprocessing(
        [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], None, [64, 96], "crop", interpolation="bicubic"
    )
    for name in ("weights", "cvt13_2x4gpu", "cvt-2x2", "run_12x08"):
        assert configs.published_preprocessing(VARIANTS["cvt_13"], 3, name).image_size == (224, 224)
    assert configs.published_preprocessing(VARIANTS["cvt_w24"], 3, "weights").image_size == (384, 384)


@pytest.mark.files
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("give", ["folder", "file"])
def test_a_transformers_folder_is_read_with_its_configs(suffix, give, tiny_folder, tmp_path):
    folder = copy_folder(tiny_folder, tmp_path / "tiny")
    if suffix == ".bin":
        file = folder / "model.safetensors"
        save_torch(folder / "pytorch_model.bin", safetensors.numpy.load_file(file))
        file.unlink()
    file = folder / ("model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin")
    model = CvT.from_pretrained(folder if give == "folder" else str(file))
    assert model.variant == TINY
    assert model.preprocessing == Preprocessing(
        [0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [f"class {i}" for i in range(5)], [64, 64], "crop", interpolation="bicubic"
    )
    assert model.input_shape == (None, 64, 64, 3)
    expected = random_arrays(transformers_weights(TINY, 5))
    for key, array in to_torch_state_dict(model, "transformers").items():
        np.testing.assert_array_equal(array, expected[key])


@pytest.mark.files
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_give_the_same_weights_as_one_file(suffix, tiny_folder, tmp_path):
    whole = CvT.from_pretrained(tiny_folder)
    folder = copy_folder(tiny_folder, tmp_path / "tiny")
    if suffix == ".safetensors":
        theirs = CvtForImageClassification.from_pretrained(folder)
        theirs.save_pretrained(folder, max_shard_size="4KB")
        (folder / "model.safetensors").unlink(missing_ok=True)
    else:
        arrays = list(safetensors.numpy.load_file(folder / "model.safetensors").items())
        (folder / "model.safetensors").unlink()
        shards = {f"pytorch_model-0000{i + 1}-of-00002.bin": dict(arrays[i::2]) for i in range(2)}
        for name, part in shards.items():
            save_torch(folder / name, part)
        weight_map = {key: name for name, part in shards.items() for key in part}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert len(list(folder.glob("*-of-*"))) > 1
    for ours, theirs in zip(CvT.from_pretrained(folder).get_weights(), whole.get_weights()):
        np.testing.assert_array_equal(ours, theirs)
    shard = min(folder.glob("*-of-*"))
    shard.unlink()
    with pytest.raises(CheckpointError) as error:
        CvT.from_pretrained(folder)
    assert str(folder) in error.value.summary and error.value.details == (f"missing: {shard.name}",)


@pytest.mark.files
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_other_floats_become_float32(dtype, suffix, tiny_folder, tmp_path):
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    arrays = {key: array.astype(kind) for key, array in random_arrays(transformers_weights(TINY, 5), counters=False).items()}
    folder = copy_folder(tiny_folder, tmp_path / "tiny")
    file = folder / f"weights{suffix}"
    if suffix == ".pth":
        tensors = {key: torch.from_numpy(array.astype("float64")).to(getattr(torch, dtype)) for key, array in arrays.items()}
        torch.save(tensors, file)
    else:
        safetensors.numpy.save_file(arrays, file)
    model = CvT.from_pretrained(file)
    np.testing.assert_array_equal(weights_of(model)["head/kernel"].T, arrays["classifier.weight"].astype("float32"))
    assert {str(array.dtype) for array in weights_of(model).values()} == {"float32"}


def test_a_keras_file_is_a_source(tiny_folder, tmp_path):
    model = CvT.from_pretrained(tiny_folder)
    model.save(tmp_path / "model.keras")
    build_classifier(model).save(tmp_path / "classifier.keras")
    for name in ("model.keras", "classifier.keras"):
        again = CvT.from_pretrained(tmp_path / name)
        assert (again.variant, again.preprocessing) == (model.variant, model.preprocessing)
        for ours, theirs in zip(again.get_weights(), model.get_weights()):
            np.testing.assert_array_equal(ours, theirs)
    assert CvT.from_pretrained(tmp_path / "model.keras", num_classes=2).output_shape == (None, 2)
    for side in (32, None):  # without an image size in `preprocessing`, the input's is used
        CvT(TINY, 5, (side, side, 3)).save(tmp_path / "plain.keras")
        assert CvT.from_pretrained(tmp_path / "plain.keras").input_shape == (None, side, side, 3)
    other = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    other.save(tmp_path / "other.keras")
    with pytest.raises(CheckpointError) as error:
        CvT.from_pretrained(tmp_path / "other.keras")
    assert "other.keras" in error.value.summary
    for text, advice in {"hello": "download or write it again", "version https://git-lfs.github.com": "git lfs pull"}.items():
        (tmp_path / "text.keras").write_text(text)
        with pytest.raises(CheckpointError) as error:
            CvT.from_pretrained(tmp_path / "text.keras")
        assert "text.keras" in error.value.summary and advice in error.value.summary


def test_the_activation_follows_the_weights_whatever_the_variant_says(tmp_path):
    folder = tmp_path / "cvt"
    folder.mkdir()
    arrays = random_arrays(transformers_weights("narrow_13", 5))
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        checkpoint.read(folder / "model.safetensors")
    assert "config.json" in error.value.summary
    assert checkpoint.read(folder / "model.safetensors", "narrow_13").variant.activation == "gelu"
    assert checkpoint.read(folder / "model.safetensors", PAPER["narrow_13"]).variant.activation == "gelu"
    (folder / "config.json").write_text(json.dumps(config_of("narrow_13", 5)))
    assert checkpoint.read(folder, "narrow_13").variant.activation == "gelu"
    heads = [dataclasses.replace(stage, heads=2) for stage in PAPER["narrow_13"].stages]
    with pytest.raises(ArgumentError) as error:
        checkpoint.read(folder, Variant(tuple(heads)))
    assert error.value.argument == "variant"
    assert "heads of stage 0 is 1, not 2" in error.value.summary


def test_a_keras_file_takes_another_start_but_no_other_network(tmp_path):
    stage = Stage(8, 1, 1, mlp_conv=True)
    CvT(Variant((stage,), norm="batch"), 5, (16, 16, 3)).save(tmp_path / "model.keras")
    same = Variant((dataclasses.replace(stage, drop_path=0.1),), norm="batch", identity_init=True)
    assert checkpoint.read(tmp_path / "model.keras", same).variant == same
    for variant, differences in (
        (Variant((stage,), stem=(4,), whitening=2), "stem is (), not (4,); whitening is 0, not 2; norm is batch, not layer"),
        (Variant((stage,), norm="batch", attention_scale="head"), "attention_scale is dim, not head"),
        (Variant((dataclasses.replace(stage, mlp_conv=False),), norm="batch"), "mlp_conv of stage 0 is True, not False"),
        (Variant((stage, stage), norm="batch"), "number of stages is 1, not 2"),
    ):
        with pytest.raises(ArgumentError) as error:
            checkpoint.read(tmp_path / "model.keras", variant)
        assert error.value.summary.endswith(f"`variant` is not the checkpoint's network: {differences}")


# === Refusals ===


@pytest.mark.parametrize(
    "key, shape",
    [
        ("stage0.blocks.0.mlp.fc1.bias", (31,)),
        ("stage0.blocks.0.mlp.fc2.weight", (8, 31)),
        ("stage0.patch_embed.norm.bias", (3,)),
    ],
)
def test_an_array_of_the_wrong_shape_is_named_alone(key, shape, tmp_path):
    arrays = {**random_arrays(microsoft_weights(SHALLOW, 5)), key: np.zeros(shape, "float32")}
    with pytest.raises(CheckpointError) as error:
        checkpoint.read(save_torch(tmp_path / "weights.pth", arrays))
    [line] = error.value.details
    assert line.startswith(f"{key}: its shape must be (")
    assert line.endswith(f"Received: {shape}")


def test_a_head_whose_kernel_and_bias_disagree_is_refused(tmp_path):
    arrays = {**random_arrays(microsoft_weights(SHALLOW, 5)), "head.bias": np.zeros(4, "float32")}
    with pytest.raises(CheckpointError) as error:
        checkpoint.read(save_torch(tmp_path / "weights.pth", arrays))
    for part in ("head.weight", "head.bias", "(5, 48)", "(4,)"):
        assert part in error.value.summary


def test_a_missing_cls_token_is_named_with_the_hint_to_give_the_variant(tmp_path):
    arrays = random_arrays(microsoft_weights(SHALLOW, 5))
    del arrays["stage2.cls_token"]
    file = save_torch(tmp_path / "weights.pth", arrays)
    with pytest.raises(CheckpointError) as error:
        checkpoint.read(file)
    assert "shallow" in error.value.summary and "`variant`" in error.value.summary
    assert error.value.details == ("missing: stage2.cls_token",)
    stages = SHALLOW.stages
    without = Variant((*stages[:2], dataclasses.replace(stages[2], cls_token=False)))
    assert checkpoint.read(file, without).variant == without


def test_a_key_of_the_other_layout_is_named_as_unused(tmp_path):
    arrays = {**random_arrays(microsoft_weights(SHALLOW, 5)), "cvt.encoder": np.ones(3, "float32")}
    with pytest.raises(CheckpointError) as error:
        checkpoint.read(save_torch(tmp_path / "weights.pth", arrays))
    assert error.value.details == ("unused: cvt.encoder",)


@pytest.mark.files
def test_a_checkpoint_with_missing_blocks_or_biases_is_not_taken_for_a_smaller_network(tmp_path):
    sound = random_arrays(microsoft_weights("narrow_13", 5))
    damages = {
        r"stage2\.blocks\.9\.": ["[1, 2, 9]", "[1, 2, 10] of narrow_13", "[1, 4, 16] of narrow_21"],
        r"stage2\.": ["`variant`"],
        r"stage2\.blocks\.4\.": "missing: stage2.blocks.4.norm1.weight",
        r"stage1\.blocks\.\d+\.attn\.proj_[qkv]\.bias": "missing: stage1.blocks.0.attn.proj_k.bias",
        r".*\.attn\.proj_[qkv]\.bias": "missing: stage0.blocks.0.attn.proj_v.bias",
        r"stage1\.": ["missing: stage1.patch_embed.proj.weight"],
    }
    for lost, detail in damages.items():
        arrays = {key: array for key, array in sound.items() if not re.match(lost, key)}
        with pytest.raises(CheckpointError) as error:
            checkpoint.read(save_torch(tmp_path / "weights.pth", arrays))
        if isinstance(detail, str):
            assert detail in error.value.details
        else:
            assert all(part in error.value.summary for part in detail), lost


@pytest.mark.files
def test_the_right_variant_is_named_where_another_is_passed(shallow_file):
    with pytest.raises(CheckpointError) as error:
        checkpoint.read(shallow_file, "cvt_21")
    assert "`variant`" in error.value.summary and "shallow" in error.value.summary
    assert error.value.details


def test_a_damaged_head_is_refused_even_if_it_is_replaced(tiny_folder, tmp_path):
    folder = copy_folder(tiny_folder, tmp_path / "tiny")
    arrays = random_arrays(transformers_weights(TINY, 5))
    del arrays["classifier.weight"]
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        CvT.from_pretrained(folder, num_classes=3)
    assert error.value.details == ("missing: classifier.weight",)


@pytest.mark.files
@pytest.mark.parametrize(
    "damage, parts",
    [
        (lambda folder: (folder / "config.json").write_text("{"), ["config.json", "Expecting property name"]),
        (lambda folder: (folder / "preprocessor_config.json").write_text('{"size": 4}'), ["preprocessor_config.json", "4x4"]),
        (
            lambda folder: (folder / "config.json").write_text(
                json.dumps(config_of(TINY, 5, qkv_projection_method=["avg", "avg"]))
            ),
            ["config.json", "projection='avg'"],
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), ["none of model.safetensors"]),
        (lambda folder: (folder / "model.safetensors").write_text("hello"), ["damaged"]),
        (
            lambda folder: safetensors.numpy.save_file({"conv1.weight": np.ones(3)}, folder / "model.safetensors"),
            ["no CvT", "conv1"],
        ),
        (
            lambda folder: safetensors.numpy.save_file(
                random_arrays(transformers_weights(TINY, 0)), folder / "model.safetensors"
            ),
            ["classifier.weight", "at least one class"],
        ),
        (
            lambda folder: (folder / "config.json").write_text(json.dumps(config_of(TINY, 4))),
            ["config.json names 4 classes, but the weights have 5"],
        ),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(damage, parts, tiny_folder, tmp_path):
    folder = copy_folder(tiny_folder, tmp_path / "tiny")
    damage(folder)
    with pytest.raises(CheckpointError) as error:
        CvT.from_pretrained(folder, num_classes=3)
    [line] = str(error.value).splitlines()
    for part in (str(folder), *parts):
        assert part in line


@pytest.mark.files
def test_a_network_that_the_shapes_do_not_determine_needs_the_variant(tmp_path):
    variant = Variant((Stage(8, 1, 1), Stage(16, 1, 2)))
    file = save_torch(tmp_path / "weights.pth", random_arrays(microsoft_weights(variant, 5)))
    with pytest.raises(CheckpointError) as error:
        CvT.from_pretrained(file)
    assert "`variant`" in error.value.summary
    assert CvT.from_pretrained(file, variant=variant, input_shape=(32, 32, 3)).variant == variant
    for change in ({"projection": "linear"}, {"qkv_bias": False}, {"mlp_ratio": 2.0}):
        other = Variant(tuple(dataclasses.replace(stage, **change) for stage in SHALLOW.stages))
        file = save_torch(tmp_path / "other.pth", random_arrays(microsoft_weights(other, 5)))
        with pytest.raises(CheckpointError) as error:
            checkpoint.read(file)
        assert "`variant`" in error.value.summary
        assert checkpoint.read(file, other).variant == other


@pytest.mark.files
@pytest.mark.parametrize(
    "arguments, part",
    [
        ({"variant": "cvt_14"}, "'cvt_14'"),
        ({"variant": "cvt_cifar"}, "whitening=2"),
        ({"variant": "cvt_tiny"}, "missing: "),
        ({"input_shape": (64, 64, 1)}, "3 channels"),
        ({"input_shape": 224}, "input_shape=224"),
        ({"input_shape": (8, 8, 3)}, "16x16"),
        ({"num_classes": -1}, "`num_classes`"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments, part, shallow_file):
    with pytest.raises(ValueError) as error:
        CvT.from_pretrained(shallow_file, **arguments)
    assert part in str(error.value)


def _damage(kind, random, arrays):
    """Damages a state dict in place and returns keys, one of which the error must name."""
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


_KINDS = ("dropped", "renamed", "reshaped", "integer", "truncated", "not finite", "negative")


@pytest.mark.files
@pytest.mark.parametrize("times", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_damaged_checkpoints_are_refused_by_name(times, tmp_path, tiny_folder):
    """Seven kinds of damage in four kinds of file."""
    random = np.random.default_rng(0)
    (tmp_path / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    files = {"weights.pth": microsoft_weights(SHALLOW, 5), "model.safetensors": transformers_weights(TINY, 5)}
    files |= {"old.pth": microsoft_weights(SHALLOW, 5), "pytorch_model.bin": transformers_weights(TINY, 5)}
    for kind, (name, weights) in times * [*itertools.product(_KINDS, files.items())]:
        arrays = random_arrays(weights)
        keys = (name,) if kind == "truncated" else _damage(kind, random, arrays)
        file = tmp_path / name
        if file.suffix == ".safetensors":
            safetensors.numpy.save_file(arrays, file)
        else:
            save_torch(file, arrays, _use_new_zipfile_serialization=name != "old.pth")
        if kind == "truncated":
            data = file.read_bytes()
            file.write_bytes(data[: random.integers(len(data))])
        with pytest.raises(CheckpointError) as error:
            CvT.from_pretrained(file)
        message = str(error.value)
        assert str(file) in message, (kind, keys)
        assert any(key in message for key in keys), (kind, keys, message)
