import dataclasses
import json
import runpy
import sys
import warnings

import keras
import numpy as np
import pytest
import safetensors.numpy
import torch
from checkpoint_files import MICROSOFT, TINY, TRANSFORMERS, random_arrays, save_torch, weights_of
from transformers import AutoImageProcessor, CvtConfig, CvtForImageClassification

from benchmarks.network import differences, golden_model
from benchmarks.pretrained import CASES, logits, peak_memory, reference_model
from benchmarks.pretrained import differences as live_differences
from cvt_keras import VARIANTS, CvT, Preprocessing, Stage, Variant, build_classifier, cli, preprocessing_of
from cvt_keras.conversion import configs
from cvt_keras.conversion.checkpoint import load_state_dict
from cvt_keras.conversion.layouts import LAYOUTS, microsoft_weights, transformers_weights
from cvt_keras.data.images import fit
from cvt_keras.errors import ArgumentError
from cvt_keras.pretrained import to_torch_state_dict, transformers_config, transformers_processor

# === Agreement ===


def test_golden_files_are_there():
    assert (len(MICROSOFT), len(TRANSFORMERS)) == (3, 2)


@pytest.mark.parametrize("path", [*TRANSFORMERS, *MICROSOFT], ids=lambda path: path.stem)
def test_logits_and_stages_agree_with_the_reference(path):
    largest = differences(path)
    cls_token = {"stage2_cls"} if path in MICROSOFT and "nocls" not in path.stem else set()
    assert set(largest) == {"logits", "stage0", "stage1", "stage2"} | cls_token
    assert max(largest.values()) < 1e-4, largest


@pytest.mark.parametrize("path", [TRANSFORMERS[0], MICROSOFT[0], MICROSOFT[-1]], ids=lambda path: path.stem)
def test_the_same_weights_come_from_a_file(path, tmp_path):
    model, state_dict, golden = golden_model(path)
    file = save_torch(tmp_path / "weights.bin", state_dict)
    variant = model.variant
    if path in TRANSFORMERS:
        (tmp_path / "config.json").write_bytes(bytes(golden["config_json"]))
        variant = None
    again = CvT.from_pretrained(file, variant=variant, input_shape=model.input_shape[1:])
    assert again.variant == model.variant
    for ours, theirs in zip(again.get_weights(), model.get_weights()):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "variant, size", [("cvt_13", (96, 128)), *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES)]
)
def test_the_network_agrees_with_transformers_in_both_directions(variant, size, tmp_path):
    loaded, written, largest = live_differences(variant, size, tmp_path)
    assert loaded < 1e-4 and written < 1e-4
    assert largest > 1  # two networks with outputs near 0 would agree whatever they compute


@pytest.mark.slow
def test_the_largest_network_converts_under_4_gib(tmp_path):
    size, peak, _ = peak_memory("cvt_w24", ".pth", tmp_path)
    assert size > 2**30
    assert (tmp_path / "model.keras").stat().st_size > size
    assert peak < 4 * 2**30


# === Arguments ===


def test_another_number_of_classes_gets_a_new_head(tiny_folder):
    same = CvT.from_pretrained(tiny_folder, num_classes=5)
    assert same.preprocessing.class_names == tuple(f"class {i}" for i in range(5))
    other = CvT.from_pretrained(tiny_folder, num_classes=3)
    assert other.output_shape == (None, 3)
    assert other.preprocessing.class_names is None
    assert other.preprocessing.mean == (0.1, 0.2, 0.3)
    ours, theirs = weights_of(other), weights_of(same)
    assert 0 < np.abs(ours["head/kernel"]).max() < 0.2  # its initialiser's
    for path in set(ours) - {"head/kernel", "head/bias"}:
        np.testing.assert_array_equal(ours[path], theirs[path])


def test_any_image_size_is_accepted(tiny_folder):
    model = CvT.from_pretrained(tiny_folder, input_shape=(96, 64, 3))
    assert model.input_shape == (None, 96, 64, 3)
    assert model.preprocessing.image_size == (64, 64)  # the checkpoint's
    with pytest.raises(ArgumentError, match="96x64"):  # the model's size, and the checkpoint's crop
        transformers_processor(model)
    model.preprocessing = model.preprocessing.replace(resize="stretch")
    assert transformers_processor(model)["size"] == {"height": 96, "width": 64}
    free = CvT.from_pretrained(tiny_folder, input_shape=(None, None, 3))
    images = np.random.default_rng(0).normal(size=(1, 96, 64, 3)).astype("float32")
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(free(images)), keras.ops.convert_to_numpy(model(images)), rtol=1e-4, atol=1e-5
    )


def test_a_classifier_around_it_takes_raw_pixels(tiny_folder):
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


def test_dtype_and_name_are_passed_to_the_network(tiny_folder):
    model = CvT.from_pretrained(tiny_folder, dtype="mixed_bfloat16", name="backbone")
    assert (model.dtype_policy.name, model.name) == ("mixed_bfloat16", "backbone")


def test_the_preprocessing_argument_overrides_the_checkpoints(tiny_folder):
    model = CvT.from_pretrained(tiny_folder, preprocessing={"mean": [0.3, 0.2, 0.1]})
    assert model.preprocessing == CvT.from_pretrained(tiny_folder).preprocessing.replace(mean=[0.3, 0.2, 0.1])
    assert model.preprocessing.class_names == tuple(f"class {i}" for i in range(5))
    model = CvT.from_pretrained(tiny_folder, preprocessing={"resize": "stretch"})
    assert (model.preprocessing.resize, model.preprocessing.interpolation) == ("stretch", "bicubic")
    model = CvT.from_pretrained(tiny_folder, preprocessing={"image_size": [96, 64]})
    assert model.input_shape == (None, 96, 64, 3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_state_dict_is_float32_whatever_the_precision(dtype, tiny_folder):
    model = CvT.from_pretrained(tiny_folder, dtype=dtype)
    expected = random_arrays(transformers_weights(TINY, 5))
    for key, array in to_torch_state_dict(model, "transformers").items():
        assert array.dtype == expected[key].dtype
        np.testing.assert_allclose(array, expected[key], rtol=1e-2)


@pytest.mark.files
def test_no_conversion_imports_pytorch(tiny_folder, tmp_path, monkeypatch):
    file = save_torch(tmp_path / "weights.pth", random_arrays(microsoft_weights("cvt_tiny", 5)))
    monkeypatch.setitem(sys.modules, "torch", None)
    to_torch_state_dict(CvT.from_pretrained(tiny_folder), "transformers")
    CvT.from_pretrained(file, variant="cvt_tiny", input_shape=(16, 16, 3))


# === Back to PyTorch ===


def test_a_trained_classifier_loads_into_transformers(tmp_path):
    """The lines of docs/guides/pretrained.md."""
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


@pytest.mark.parametrize("crop_pct, interpolation", [(0.9, "bicubic"), (1.0, "bilinear")])
def test_transformers_crops_as_the_classifier_was_trained(crop_pct, interpolation, tmp_path):
    preprocessing = Preprocessing([0.0] * 3, [1.0] * 3, None, [64, 64], "crop", crop_pct, interpolation)
    model = CvT(TINY, 5, (64, 64, 3), preprocessing=preprocessing)
    (tmp_path / "config.json").write_text(json.dumps(transformers_config(model)))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(transformers_processor(model)))
    photo = np.broadcast_to(128 + 90 * np.sin(np.arange(150) / 9), (3, 100, 150)).transpose(1, 2, 0).astype("uint8")
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    [prepared] = processor(photo, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(255 * prepared.transpose(1, 2, 0), fit(photo, preprocessing), atol=2)
    assert configs.read(tmp_path / "config.json", 3)[1] == preprocessing


def test_a_network_with_four_channels_loads_into_transformers(tmp_path):
    model = CvT(TINY, 5, (64, 64, 4))
    (tmp_path / "config.json").write_text(json.dumps(transformers_config(model)))
    safetensors.numpy.save_file(to_torch_state_dict(model, "transformers"), tmp_path / "model.safetensors", {"format": "pt"})
    images = np.random.default_rng(0).normal(size=(1, 64, 64, 4)).astype("float32")
    theirs = CvtForImageClassification.from_pretrained(tmp_path).eval()
    np.testing.assert_allclose(logits(theirs, images), keras.ops.convert_to_numpy(model(images)), atol=1e-4)
    assert CvT.from_pretrained(tmp_path).preprocessing.mean is None  # ImageNet's has three channels


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_round_trip_is_exact(layout):
    variant = dataclasses.replace(VARIANTS["cvt_tiny"], activation=LAYOUTS[layout].activation)
    arrays = random_arrays(LAYOUTS[layout].weights(variant, 5))
    model = CvT(variant, 5, (16, 16, 3))
    load_state_dict(model, arrays, LAYOUTS[layout].weights(variant, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        back = to_torch_state_dict(model, layout)
    assert set(back) == set(arrays)
    for key, array in arrays.items():
        assert back[key].dtype == array.dtype and back[key].flags.c_contiguous
        np.testing.assert_array_equal(back[key], array)


def test_the_state_dict_has_the_authors_keys():
    model, state_dict, _ = golden_model(MICROSOFT[0])
    assert set(to_torch_state_dict(model)) == set(state_dict)


def test_an_activation_that_the_other_code_lacks_is_warned_about_and_other_parts_refused():
    model = CvT("cvt_tiny", 5, (16, 16, 3))
    with pytest.warns(UserWarning, match="uses quick_gelu, but code for the layout 'transformers' always uses gelu"):
        to_torch_state_dict(model, "transformers")
    with pytest.raises(ValueError, match="layout='timm'"):
        to_torch_state_dict(model, "timm")
    with pytest.raises(ValueError, match="Received: Sequential"):
        to_torch_state_dict(keras.Sequential())
    for layout in LAYOUTS:
        with pytest.raises(ArgumentError) as error:
            to_torch_state_dict(CvT("cvt_cifar", 5, (32, 32, 3)), layout)
        assert error.value.argument == "model"
        for part in (
            "whitening=2",
            "norm='batch'",
            "attention_scale='head'",
            "pool=True in stage 2",
            "residual_convs=1 in stage 1",
        ):
            assert f"Received: {part}" in str(error.value)
    changed = CvT(dataclasses.replace(VARIANTS["cvt_tiny"], identity_init=True), 5, (16, 16, 3))
    assert to_torch_state_dict(changed).keys() == to_torch_state_dict(model).keys()


def _stage(**change):
    return Stage(**{"dim": 8, "depth": 3, "heads": 1, **change})


_LAST = _stage(cls_token=True)


@pytest.mark.files
@pytest.mark.parametrize(
    "stages",
    [
        (_LAST,),
        (_stage(depth=1), _stage(depth=2), _stage(depth=3), _stage(depth=4, cls_token=True)),
        (_LAST, _LAST),
        (
            _stage(mlp_ratio=4, drop_path=0, qkv_bias=False),
            _stage(mlp_ratio=2.7, drop_path=0.9, cls_token=True, dim=16, heads=4),
        ),
        (_stage(kernel_size=4, stride=3, padding=0), _stage(kernel_size=2, padding=1, stride_kv=3, cls_token=True)),
    ],
)
def test_transformers_builds_the_network_that_the_config_describes(stages):
    variant = Variant(stages, activation="gelu")
    theirs = CvtForImageClassification(CvtConfig(**transformers_config(variant), num_labels=3)).eval()
    model = CvT(variant, 3, (64, 64, 3))
    state_dict = to_torch_state_dict(model, "transformers")
    theirs.load_state_dict({key: torch.from_numpy(array) for key, array in state_dict.items()}, strict=True)
    images = np.random.default_rng(0).normal(size=(1, 64, 64, 3)).astype("float32")
    np.testing.assert_allclose(logits(theirs, images), keras.ops.convert_to_numpy(model(images)), atol=1e-5)


@pytest.mark.files
@pytest.mark.parametrize(
    "stages, reasons",
    [
        ((_stage(), _stage(depth=1, cls_token=True)), ["2 blocks or more in stage 1. Received: depth=1"]),
        ((_stage(), _stage(), _stage(depth=2, cls_token=True)), ["3 blocks or more in stage 2. Received: depth=2"]),
        ((_LAST, _stage()), ["cls_token=False in its last stage"]),
        ((_stage(dim=4, cls_token=True), _LAST), ["as wide as the last stage"]),
        ((_stage(projection="linear"), _LAST), ["projection='linear' in stage 0"]),
        ((_stage(projection="avg"), _stage(depth=1)), ["cls_token=False", "projection='avg'", "2 blocks or more"]),
    ],
)
def test_a_network_that_transformers_can_not_build_is_refused(stages, reasons):
    variant = Variant(stages, activation="gelu")
    for write in (transformers_config, lambda v: to_torch_state_dict(CvT(v, 3, (32, 32, 3)), "transformers")):
        with pytest.raises(ArgumentError) as error:
            write(variant)
        assert error.value.argument in ("model_or_variant", "model")
        assert len(error.value.details) == len(reasons)
        for reason, detail in zip(reasons, error.value.details):
            assert reason in detail
    with pytest.raises((IndexError, RuntimeError, AttributeError)):  # otherwise the refusal would be wrong
        config = CvtConfig(**configs.config_of(variant), num_labels=3)
        CvtForImageClassification(config)(torch.zeros(1, 3, 32, 32))


# === The command line ===


@pytest.mark.files
@pytest.mark.filterwarnings("ignore:'cvt_keras.pretrained' found in sys.modules:RuntimeWarning")
def test_the_module_is_a_command_that_converts(tiny_folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.keras"
    monkeypatch.setattr(sys, "argv", ["pretrained", str(tiny_folder), str(out)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("cvt_keras.pretrained", run_name="__main__")
    assert not stop.value.code
    assert "5 classes, images of 64x64, gelu" in capsys.readouterr().out.splitlines()[-1]
    model = keras.saving.load_model(out)
    assert isinstance(model, CvT)
    assert model.preprocessing.class_names[4] == "class 4"
    for ours, theirs in zip(model.get_weights(), CvT.from_pretrained(tiny_folder).get_weights()):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.files
def test_the_command_passes_the_variant_on(tmp_path, capsys):
    file = save_torch(tmp_path / "weights.pth", random_arrays(microsoft_weights("cvt_tiny", 5)))
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
def test_the_command_passes_which_on(tmp_path, capsys):
    arrays = random_arrays(microsoft_weights("cvt_tiny", 5))
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
    doubled = {key: tensor * 2 for key, tensor in tensors.items()}
    torch.save({"student": tensors, "teacher": doubled}, tmp_path / "last.ckpt")
    command = ["convert", str(tmp_path / "last.ckpt"), str(tmp_path / "out.keras"), "--variant", "cvt_tiny"]
    assert cli.main(command) == 1
    assert "--which student" in capsys.readouterr().err
    assert cli.main([*command, "--which", "pupil"]) == 2
    assert cli.main([*command, "--which", "teacher"]) == 0
    kernel = weights_of(keras.saving.load_model(tmp_path / "out.keras"))["head/kernel"]
    np.testing.assert_array_equal(kernel.T, 2 * arrays["head.weight"])
    with pytest.raises(ArgumentError) as error:
        CvT.from_pretrained(tmp_path / "out.keras", which="ema")
    assert error.value.argument == "which"


@pytest.mark.files
def test_a_full_disk_ends_the_command_in_one_line(tiny_folder, tmp_path, monkeypatch, capsys):
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
        ("damaged.pth", "there.keras", 2, ["must not exist yet", "there.keras"]),
        ("damaged.pth", "nowhere/out.keras", 2, ["nowhere/out.keras"]),
        ("damaged.pth", "/proc/out.keras", 2, ["/proc/out.keras", "writable"]),
    ],
)
def test_a_wrong_argument_ends_the_command_in_one_line(source, out, code, parts, tmp_path, monkeypatch, capsys):
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
def test_an_interrupted_command_ends_with_130_and_leaves_no_file(tiny_folder, tmp_path, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(CvT, "save", stop)
    assert cli.main(["convert", str(tiny_folder), str(tmp_path / "out.keras")]) == 130
    assert "stopped" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.keras")) and not list(tmp_path.glob(".*"))


@pytest.mark.files
def test_every_weight_of_the_reference_model_is_random():
    """The tests against transformers rely on it: equal weights could be swapped unnoticed."""
    state_dict = reference_model(TINY, 5).state_dict()
    for key, value in state_dict.items():
        if key.endswith(("running_mean", "running_var", "weight", "bias", "cls_token")):
            assert value.std() > 0, key


@pytest.mark.files
def test_a_network_without_a_head_is_not_converted():
    headless = CvT("cvt_tiny", 0, (32, 32, 3))
    for convert in (to_torch_state_dict, transformers_config):
        with pytest.raises(ValueError, match="num_classes=0"):
            convert(headless)
