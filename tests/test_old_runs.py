"""Run folders of version 0.1 can be loaded and resumed. tests/export exports them."""

import json
import shutil
import tarfile
from pathlib import Path

import keras
import numpy as np
import pytest

from cvt_keras import CvT, cli, preprocessing_of, runs
from cvt_keras.errors import DifferentRunError
from cvt_keras.report import predictions
from cvt_keras.training import RECIPES, run

ARCHIVES = Path(__file__).parent / "golden" / "old_runs"
# A rounding to 8 bits that falls the other way moves a logit by a whole step.
TOLERANCES = {"plain": 1e-5, "qat": 0.05}


@pytest.fixture
def old_run(tmp_path):
    """A function that unpacks a run folder and returns its path."""

    def unpack(name):
        with tarfile.open(ARCHIVES / f"{name}.tar.xz") as archive:
            archive.extractall(tmp_path, filter="data")
        return tmp_path / name

    return unpack


@pytest.mark.parametrize("name", ["plain", "qat"])
def test_a_model_of_version_0_1_predicts_as_before(name, old_run):
    run_dir = old_run(name)
    classifier = keras.saving.load_model(run_dir / "model.keras", compile=False)
    images = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3)).astype("float32")
    with np.load(run_dir / "expected_logits.npz") as expected:
        np.testing.assert_allclose(classifier.predict(images, verbose=0), expected["logits"], atol=TOLERANCES[name])
    preprocessing = preprocessing_of(classifier)
    assert preprocessing.class_names == tuple("0123456789")
    assert preprocessing.image_size == (32, 32)


def test_fine_tuning_can_start_from_a_model_of_version_0_1(old_run):
    model = CvT.from_pretrained(old_run("plain") / "model.keras", num_classes=3)
    assert (model.preprocessing.mean, model.preprocessing.std) == ((0.3057,) * 3, (0.3239,) * 3)  # those of its training images
    assert model.preprocessing.class_names is None
    assert model.output_shape == (None, 3)


def test_a_run_of_version_0_1_is_compared_by_the_predictions_of_its_model(old_run, monkeypatch, capsys):
    run_dir = old_run("plain")
    monkeypatch.chdir(run_dir.parent)
    shutil.copytree("plain", "later")
    predictions.write("later", predictions.from_labels(None, [0] * 64, [0] * 64, "0123456789"))
    assert cli.main(["compare", "plain", "later", "--json"]) == 0
    [test] = json.loads(capsys.readouterr().out)["mcnemar"]
    assert test["reason"] == "the test images differ"  # their labels do
    rows, report = predictions.read("plain"), runs.read_json(run_dir / runs.REPORT)
    assert sum(row.label == row.prediction for row in rows) == round(report["test"]["top1"] * len(rows)) and len(rows) == 64


def test_an_interrupted_run_of_version_0_1_ends_like_an_uninterrupted_one(old_run, capsys):
    run_dir = old_run("stopped")
    # Its recipe.json has no `validation_limit`, which the recipe smoke has now, and no `adamw_weight_decay`.
    assert cli.main(
        ["train", "smoke", "--dataset", "digits", "--train-limit", "128", "--test-limit", "64", "--epochs", "3", "--ema", "0.9"]
        + ["--adamw-weight-decay", "50", "--run-dir", str(run_dir), "--resume"]
    ) == 0  # fmt: skip
    output = capsys.readouterr().out
    assert "resuming after epoch 1 of 3" in output
    assert "adamw_weight_decay=50.0 is ignored" in output
    resumed, uninterrupted = runs.read_history(run_dir), runs.read_history(run_dir / "expected")
    assert [row["epoch"] for row in resumed] == [1, 2, 3]
    timed = {"train_seconds", "seconds"}
    for ours, theirs in zip(resumed, uninterrupted, strict=True):
        for name in set(theirs) - timed:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    models = [keras.saving.load_model(folder / "model.keras") for folder in (run_dir, run_dir / "expected")]
    for ours, theirs in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_run_of_version_0_1_is_resumed_with_its_own_settings_only(old_run):
    recipe = RECIPES["smoke"]
    with pytest.raises(DifferentRunError) as error:
        run(recipe, old_run("stopped"), resume=True)
    assert "validation_limit" not in error.value.differences
    assert error.value.differences["epochs"] == ("3", "2")
