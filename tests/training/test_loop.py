import csv
import dataclasses
import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from cvt_keras import VARIANTS, CvT, Stage, Variant, evaluation
from cvt_keras.data import sources
from cvt_keras.training import RecipeError, loop, run
from cvt_keras.training.loop import resolve
from cvt_keras.training.recipes import SMOKE
from cvt_keras.variants import to_dict


@pytest.fixture(scope="module")
def recipe(cifar10_dir):
    return dataclasses.replace(SMOKE, data_dir=str(cifar10_dir), test_limit=100, peak_learning_rate=5e-3)


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    return run(recipe, run_dir), run_dir


def test_a_run_leaves_its_folder(finished, recipe):
    report, run_dir = finished
    assert json.loads((run_dir / "report.json").read_text()) == dataclasses.asdict(report)
    stored = json.loads((run_dir / "recipe.json").read_text())
    assert stored["variant"] == to_dict(VARIANTS["cvt_tiny"])
    assert (stored["precision"], stored["xla"]) == ("float32", "off")
    assert stored["epochs"] == recipe.epochs
    with open(run_dir / "history.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert float(rows[1]["val_loss"]) > 0


def test_report_holds_the_contracts_fields(finished, recipe):
    report, _ = finished
    assert set(dataclasses.asdict(report)) == {
        *("dataset", "data_note", "variant", "recipe", "epochs", "seed", "image_size", "class_names", "parameters", "macs"),
        *("train_seconds", "train_images_per_second", "test", "validation", "per_class", "device", "versions"),
    }
    assert (report.dataset, report.variant, report.image_size) == ("cifar10", "cvt_tiny", [32, 32])
    assert report.test["images"] == 100
    assert report.validation["images"] == 5_000
    assert report.train_seconds > 0
    assert report.train_images_per_second > 0
    assert report.versions["keras"] == keras.__version__
    assert [row["name"] for row in report.per_class] == report.class_names


def test_the_model_is_the_one_of_the_report(finished, recipe):
    report, run_dir = finished
    model = keras.saving.load_model(run_dir / "model.keras")
    assert not model.compiled
    assert isinstance(model.get_layer("cvt"), CvT)
    test = sources.cifar10(recipe.data_dir).test.limit(100)
    metrics = evaluation.metrics(model.predict(test.images.astype("float32"), verbose=0), test.labels)
    assert metrics["top1"] == report.test["top1"]
    assert metrics["loss"] == pytest.approx(report.test["loss"], rel=1e-5)
    assert report.parameters == sum(int(np.prod(v.shape)) for v in model.trainable_variables)


def test_it_learns(finished):
    report, _ = finished
    assert report.validation["top1"] > 0.2  # chance is 0.1


def test_the_best_validation_epoch_is_kept(recipe, tmp_path, monkeypatch):
    class Spoiled(loop.Stopwatch):
        """Ruins the last epoch's weights just before they are validated."""

        def on_test_begin(self, logs=None):
            super().on_test_begin(logs)
            if len(self.epoch_seconds) == recipe.epochs:
                self.model.get_layer("cvt").get_layer("head").bias.assign(1e6 * np.eye(10)[0])

    monkeypatch.setattr(loop, "Stopwatch", Spoiled)
    report = run(recipe, tmp_path / "run", evaluate_test=False)
    with open(tmp_path / "run" / "history.csv") as file:
        first, last = (float(row["val_accuracy"]) for row in csv.DictReader(file))
    assert first > last == pytest.approx(0.1, abs=0.01)
    assert report.validation["top1"] == pytest.approx(first, abs=1e-4)


def test_a_seed_gives_the_same_run(recipe, tmp_path):
    short = dataclasses.replace(recipe, epochs=1, train_limit=64)
    first, again, other = (
        run(dataclasses.replace(short, seed=seed), tmp_path / name, evaluate_test=False)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    # Threads add in any order: equal but for rounding.
    assert first.validation["loss"] == pytest.approx(again.validation["loss"], rel=1e-5)
    assert first.validation["loss"] != pytest.approx(other.validation["loss"], rel=1e-4)
    assert first.test is None
    assert first.per_class is None


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_a_mixed_precision_run_leaves_a_float32_model(recipe, precision, tmp_path):
    short = dataclasses.replace(recipe, epochs=1, train_limit=64, precision=precision)
    report = run(short, tmp_path / "run", evaluate_test=False)
    assert report.recipe["precision"] == precision
    model = keras.saving.load_model(tmp_path / "run" / "model.keras")
    assert {layer.dtype_policy.name for layer in model._flatten_layers()} == {"float32"}


def test_xla_can_be_forced(recipe, tmp_path, monkeypatch):
    compiled = []
    original = keras.Model.compile
    monkeypatch.setattr(
        keras.Model, "compile", lambda self, *args, **kwargs: compiled.append(kwargs) or original(self, *args, **kwargs)
    )
    for xla in ("on", "off"):
        run(dataclasses.replace(recipe, epochs=1, train_limit=64, xla=xla), tmp_path / xla, evaluate_test=False)
    assert [kwargs["jit_compile"] for kwargs in compiled if "jit_compile" in kwargs] == [True, False]


def test_auto_follows_the_device(monkeypatch):
    assert (resolve(SMOKE).precision, resolve(SMOKE).xla) == ("float32", "off")
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["a GPU"])
    for capability, precision in (((8, 0), "mixed_bfloat16"), ((7, 5), "mixed_float16")):
        details = {"compute_capability": capability}
        monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda gpu, details=details: details)
        assert (resolve(SMOKE).precision, resolve(SMOKE).xla) == (precision, "on")
    forced = dataclasses.replace(SMOKE, precision="float32", xla="off")
    assert resolve(forced) == forced


def test_a_run_is_never_overwritten(recipe, tmp_path):
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(FileExistsError, match="--run-dir"):
        run(recipe, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_batch_larger_than_the_data_is_refused(recipe, tmp_path):
    with pytest.raises(RecipeError, match="batch_size=32"):
        run(dataclasses.replace(recipe, train_limit=31), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_backend_is_refused(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    with pytest.raises(RecipeError, match="KERAS_BACKEND=jax"):
        run(recipe, tmp_path / "run")


def test_a_padding_wider_than_the_image_is_refused(recipe, tmp_path):
    with pytest.raises(RecipeError, match=r"32 pixels.*crop_padding=32"):
        run(dataclasses.replace(recipe, crop_padding=32), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_variant_too_coarse_for_the_images_is_refused(recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(VARIANTS, "coarse", Variant((Stage(8, 1, 1, kernel_size=63, stride=64, padding=31),)))
    with pytest.raises(RecipeError, match=r"coarse.*64x64"):
        run(dataclasses.replace(recipe, variant="coarse"), tmp_path / "run")


def test_a_loss_that_is_no_number_ends_the_run(recipe, tmp_path):
    wild = dataclasses.replace(recipe, peak_learning_rate=1e30, gradient_clip=0)
    with pytest.raises(FloatingPointError, match=r"epoch 1.*1e\+30"):
        run(wild, tmp_path / "run")
    assert not (tmp_path / "run" / "model.keras").exists()


def test_a_run_without_data_leaves_no_folder_in_the_way(recipe, tmp_path):
    with pytest.raises(sources.DataError):
        run(dataclasses.replace(recipe, data_dir=str(tmp_path / "nowhere")), tmp_path / "run")
    assert not (tmp_path / "run").exists()
