import dataclasses
import functools
import json
import os
import shutil
import sys
from pathlib import Path

import keras
import pytest
import tensorflow as tf

from cvt_keras import VARIANTS, CvT, Stage, Variant, runs
from cvt_keras.data import sources, tfds
from cvt_keras.errors import (
    ArgumentError,
    CheckpointError,
    DataError,
    DifferentRunError,
    MissingPackageError,
    OccupiedError,
    RecipeError,
    RunError,
    UnavailableError,
)
from cvt_keras.training import loop, plan
from cvt_keras.training.compressor import Compressor
from cvt_keras.training.plan import resolve
from cvt_keras.training.recipes import SMOKE

pytestmark = pytest.mark.usefixtures("eager")


def run(*args, **kwargs):
    """Trains and returns the report."""
    return loop.run(*args, **kwargs).report


# === Device ===


def test_auto_follows_the_device(monkeypatch):
    assert (resolve(SMOKE).precision, resolve(SMOKE).xla) == ("float32", "off")
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["a GPU"])
    for capability, precision in (((8, 0), "mixed_bfloat16"), ((7, 5), "mixed_float16")):
        details = {"compute_capability": capability}
        monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda gpu, details=details: details)
        assert (resolve(SMOKE).precision, resolve(SMOKE).xla) == (precision, "on")
    forced = dataclasses.replace(SMOKE, precision="float32", xla="off")
    assert resolve(forced) == forced


def test_an_nvidia_device_that_tensorflow_can_not_use_is_warned_of(short, tmp_path, monkeypatch, capsys):
    for exists in (True, False):
        monkeypatch.setattr(plan.environment, "has_nvidia_device", lambda exists=exists: exists)
        with pytest.raises(DataError):
            run(dataclasses.replace(short, data_dir=str(tmp_path / "nowhere")), tmp_path / "run")
        assert ("tensorflow[and-cuda]" in capsys.readouterr().err) == exists


def test_another_backend_is_refused(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(keras.config, "backend", lambda: "torch")
    with pytest.raises(ArgumentError) as error:
        run(recipe, tmp_path / "run")
    assert "torch" in error.value.summary
    assert error.value.hint == "Set KERAS_BACKEND=tensorflow"


def test_compression_is_refused_on_jax(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    with pytest.raises(ArgumentError) as error:
        loop.run(recipe, tmp_path / "run", compressor=Compressor({"method": "prune"}))
    assert error.value.summary.startswith("Keras must use the tensorflow backend here. Received: jax")


def test_more_devices_on_tensorflow_are_refused_with_the_way_to_them(recipe, tmp_path):
    for devices in (2, 0, "two"):
        with pytest.raises(ArgumentError) as error:
            loop.run(recipe, tmp_path / "run", devices=devices)
        assert error.value.argument == "devices"
        assert f"Received: devices={devices}" in error.value.summary.replace("'", "")
    with pytest.raises(ArgumentError) as error:
        loop.run(recipe, tmp_path / "run", devices=2)
    assert "KERAS_BACKEND=jax" in error.value.hint
    assert not (tmp_path / "run").exists()


def test_the_fingerprint_tells_recipes_images_and_weights_apart(recipe, tmp_path):
    def fingerprint(**change):
        return loop.settle(dataclasses.replace(recipe, **change), tmp_path / "run").fingerprint()

    same, first = fingerprint(cache="memory"), fingerprint()
    assert first == same
    json.dumps(first)
    for change, name in (
        ({"seed": 9}, "seed"),
        ({"dataset": "digits"}, "checksum of train images"),
        ({"class_weights": "auto"}, "class weights"),
    ):
        assert fingerprint(**change)[name] != first[name]
    assert first["mean"] and first["version"] and "keras" in first["versions"]


@pytest.mark.parametrize(("devices", "batch_size", "nearest"), [(4, 130, 128), (4, 131, 132), (4, 1, 4), (3, 128, 129)])
def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_that_does(devices, batch_size, nearest):
    plan._require_divisible(nearest, [None] * devices)
    with pytest.raises(RecipeError) as error:
        plan._require_divisible(batch_size, [None] * devices)
    assert error.value.argument == "batch_size"
    assert error.value.hint == f"Use --batch-size {nearest}"


# === Data ===


def test_auto_warns_at_start_and_end_that_it_trains_on_digits_and_why(short, tmp_path, monkeypatch, capsys):
    def unavailable(data_dir, preprocessing, cache):
        raise UnavailableError("CIFAR-10 is nowhere")

    monkeypatch.setattr(tfds, "cifar10", unavailable)
    report = run(dataclasses.replace(short, dataset="auto"), tmp_path / "run")
    assert report.dataset == report.recipe["dataset"] == "digits"
    assert report.recipe["flip"] is False  # a mirrored digit is a different sign
    assert "8x8" in report.data_note and "CIFAR-10 is nowhere" in report.data_note
    warnings = [line for line in capsys.readouterr().err.splitlines() if "CIFAR-10 is nowhere" in line]
    assert len(warnings) == 2
    assert warnings[0].startswith("WARNING: ")

    (tmp_path / "run" / "report.json").unlink()
    run(dataclasses.replace(short, dataset="auto"), tmp_path / "run", resume=True)
    assert capsys.readouterr().err.count("WARNING: this run was started on scikit-learn's digits") == 2
    run(dataclasses.replace(short, dataset="digits"), tmp_path / "run", resume=True)
    assert "WARNING" not in capsys.readouterr().err


def test_a_run_without_data_leaves_no_folder(recipe, tmp_path):
    with pytest.raises(DataError):
        run(dataclasses.replace(recipe, data_dir=str(tmp_path / "nowhere")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# === The run folder ===


@pytest.mark.parametrize("dataset, folder", [("digits", "digits"), ("tfds:imagenette/160px-v2", "tfds-imagenette-160px-v2")])
def test_a_folder_is_named_after_recipe_data_and_variant(dataset, folder):
    recipe = dataclasses.replace(SMOKE, dataset=dataset)
    assert plan.default_run_dir("smoke", recipe) == Path(f"runs/smoke-{folder}-cvt_tiny")


@pytest.fixture
def no_cifar10(monkeypatch, tmp_path):
    """`auto` loads the digits, and runs are written to `tmp_path`."""

    def unavailable(*_):
        raise UnavailableError("CIFAR-10 is nowhere")

    monkeypatch.setattr(tfds, "cifar10", unavailable)
    monkeypatch.chdir(tmp_path)


def test_the_default_folder_is_named_after_the_loaded_data_set(short, no_cifar10, capsys):
    auto = dataclasses.replace(short, dataset="auto", data_dir=None)
    result = loop.run(auto, name="smoke", evaluate_test=False)
    assert result.run_dir == Path("runs/smoke-digits-cvt_tiny")
    assert (result.run_dir / "report.json").exists()
    with pytest.raises(OccupiedError):
        loop.run(auto, name="smoke")
    (result.run_dir / "report.html").unlink()
    again = loop.run(auto, name="smoke", resume=True, evaluate_test=False)
    assert (again.run_dir, again.report.validation) == (result.run_dir, result.report.validation)
    assert "no run to resume" not in capsys.readouterr().out


def test_a_default_folder_of_version_0_1_is_resumed(short, no_cifar10):
    auto = dataclasses.replace(short, dataset="auto", data_dir=None)
    run_dir = Path("runs/smoke-auto-cvt_tiny")
    run_dir.mkdir(parents=True)
    digits = dataclasses.replace(auto, dataset="digits", flip=False, precision="float32", xla="off")
    runs.write_json(run_dir / "recipe.json", digits.settings())
    settled = plan.settle(auto, name="smoke", resume=True)
    assert settled.resumed and settled.run_dir == run_dir
    shutil.copytree(run_dir, "runs/smoke-digits-cvt_tiny")
    with pytest.raises(ArgumentError) as error:
        loop.run(auto, name="smoke", resume=True)
    assert error.value.argument == "run_dir"


def test_a_run_is_never_overwritten(recipe, tmp_path):
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(OccupiedError) as error:
        run(recipe, tmp_path)
    assert (error.value.argument, error.value.exit_code) == ("run_dir", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_folder_without_write_permission_is_refused_before_data_is_loaded(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "load", None)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(RunError) as error:
        run(recipe, tmp_path / "runs" / "mine")
    assert error.value.argument == "run_dir"
    assert "--run-dir" in error.value.hint


# === Settings that do not fit ===


def test_a_batch_larger_than_the_data_is_refused(recipe, tmp_path):
    with pytest.raises(RecipeError) as error:
        run(dataclasses.replace(recipe, train_limit=31), tmp_path / "run")
    assert (error.value.argument, error.value.hint) == ("batch_size", "Use --batch-size 31 or less")
    assert not (tmp_path / "run").exists()


def test_a_padding_wider_than_the_image_is_refused(recipe, tmp_path):
    with pytest.raises(RecipeError) as error:
        run(dataclasses.replace(recipe, crop_padding=32), tmp_path / "run")
    assert error.value.argument == "crop_padding"
    assert not (tmp_path / "run").exists()


def test_images_too_small_for_the_variant_are_refused(recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(VARIANTS, "coarse", Variant((Stage(8, 1, 1, kernel_size=63, stride=64, padding=31),)))
    with pytest.raises(RecipeError) as error:
        run(dataclasses.replace(recipe, variant="coarse"), tmp_path / "run")
    assert error.value.argument == "image_size"
    assert "at least 64 for coarse" in error.value.summary
    with pytest.raises(RecipeError, match="Received: image_size=40x64"):
        run(dataclasses.replace(recipe, variant="coarse", image_size=(40, 64)), tmp_path / "run")


def test_a_compression_in_a_recipe_is_refused(short, tmp_path):
    with pytest.raises(RecipeError) as error:
        run(dataclasses.replace(short, compression={"method": "prune"}), tmp_path / "run")
    assert error.value.argument == "compression"
    assert "cvt-keras prune" in error.value.hint


# === Weights ===


@pytest.mark.parametrize(
    "change, argument, part",
    [
        ({"variant": None, "weights": None}, "weights", "variant=None"),
        ({"variant": None, "weights": "nowhere.pth"}, "weights", "nowhere.pth"),
        ({"variant": "cvt_13"}, "variant", ""),
        ({"variant": None, "weights": "{grey}"}, "weights", "grey.keras, with 1"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_data_is_loaded(
    change, argument, part, short, weights, tmp_path, monkeypatch
):
    monkeypatch.setattr(sources, "load", None)
    CvT("cvt_tiny", 10, (16, 16, 1)).save(tmp_path / "grey.keras")
    change = {name: value and value.format(grey=tmp_path / "grey.keras") for name, value in change.items()}
    with pytest.raises(RecipeError) as error:
        run(dataclasses.replace(short, **{"weights": weights, **change}), tmp_path / "run")
    assert error.value.argument == argument
    assert part in error.value.summary
    assert not (tmp_path / "run").exists()


CROP = {"resize": "crop", "crop_pct": 0.9, "interpolation": "bicubic"}


@pytest.fixture(scope="module")
def cropped_weights(weights, tmp_path_factory):
    """Weights that were trained on crops."""
    path = tmp_path_factory.mktemp("weights") / "crop.keras"
    model = CvT.from_pretrained(weights, preprocessing=CROP)
    model.save(path)
    return str(path)


def _resizing(recipe):
    return {name: getattr(recipe, name) for name in CROP}


def test_images_are_resized_as_the_weights_were_trained_unless_a_flag_differs(
    short, weights, cropped_weights, tmp_path, capsys
):
    settle = functools.partial(plan.settle, run_dir=tmp_path / "run")
    tuned = dataclasses.replace(short, weights=cropped_weights, variant=None, crop_padding=99)
    settled = settle(tuned)
    assert _resizing(settled.recipe) == CROP
    assert settled.recipe.preprocessing.crop_from == (35, 35)
    line = "resize: crop, 32 of 35, bicubic; training draws areas of 8% to 100% of the image, in place of crop_padding"
    assert line in capsys.readouterr().out.splitlines()
    assert _resizing(settle(dataclasses.replace(tuned, resize="stretch", crop_padding=4)).recipe)["resize"] == "stretch"
    assert "resize:" not in capsys.readouterr().out
    for name, value in {"crop_pct": 0.5, "interpolation": "bilinear"}.items():
        assert _resizing(settle(dataclasses.replace(tuned, **{name: value})).recipe) == {**CROP, name: value}
    stretched = {"resize": "stretch", "crop_pct": 0.875, "interpolation": "bilinear"}
    for recipe in (short, dataclasses.replace(short, weights=weights)):
        assert _resizing(settle(recipe).recipe) == stretched


def test_a_resumed_run_resizes_as_before(short, cropped_weights, tmp_path, capsys):
    tuned = dataclasses.replace(short, weights=cropped_weights, variant=None)
    settled = plan.settle(tuned, tmp_path)
    path = tmp_path / "recipe.json"
    runs.write_json(path, settled.recipe.settings())
    assert plan.settle(tuned, tmp_path, resume=True).recipe == settled.recipe
    with pytest.raises(DifferentRunError) as error:
        plan.settle(dataclasses.replace(tuned, resize="stretch", scale=(0.5, 1.0)), tmp_path, resume=True)
    assert error.value.differences == {"resize": ("'crop'", "'stretch'"), "scale": ("[0.08, 1.0]", "[0.5, 1.0]")}
    # Older versions stretched, whatever the weights.
    newer = ("resize", "crop_pct", "interpolation", "scale", "ratio")
    older = {name: value for name, value in settled.recipe.settings().items() if name not in newer}
    runs.write_json(path, older)
    resumed = plan.settle(dataclasses.replace(tuned, resize="crop"), tmp_path, resume=True).recipe
    assert _resizing(resumed) == {"resize": "stretch", "crop_pct": 0.875, "interpolation": "bilinear"}
    assert "resize=crop is ignored" in capsys.readouterr().out


def test_weights_without_read_permission_are_named(short, weights, tmp_path, monkeypatch):
    def read(*_, **__):  # root may read anything
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(plan.checkpoints, "read", read)
    with pytest.raises(CheckpointError) as error:
        run(dataclasses.replace(short, weights=weights), tmp_path / "run")
    assert weights in error.value.summary and "Permission denied" in error.value.summary


def test_a_missing_package_for_the_weights_is_named(short, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    (tmp_path / "weights.safetensors").write_text("")
    with pytest.raises(MissingPackageError, match="pip install safetensors"):
        run(dataclasses.replace(short, weights=str(tmp_path / "weights.safetensors")), tmp_path / "run")
