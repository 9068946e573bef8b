"""A small folder of images with unequal classes: class weights, early stopping, and fine-tuning from the run's weights."""

import dataclasses
import hashlib
import shutil

import keras
import numpy as np
import pytest
from labelled_images import write_image

from cvt_keras.data.record import ImageRecord
from cvt_keras.errors import DataError
from cvt_keras.model import cvt_of
from cvt_keras.report import predictions
from cvt_keras.training import plan, run
from cvt_keras.training.recipes import SMOKE

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few") / "photos"
    for name, n in {"common": 60, "rare": 10}.items():
        for i in range(n):
            write_image(folder / name / f"{i}.png", np.random.default_rng([n, i]).integers(0, 256, (8, 8, 3), "uint8"))
    return folder


@pytest.fixture(scope="module")
def recipe(photos):
    # At such a low learning rate the epochs soon stop to improve.
    return dataclasses.replace(
        SMOKE, dataset="folder", data_dir=photos, image_size=16, batch_size=16, epochs=20, peak_learning_rate=1e-7,
        class_weights="auto", early_stopping=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def result(recipe, tmp_path_factory):
    return run(recipe, tmp_path_factory.mktemp("few") / "run")


def test_the_report_has_the_class_weights_and_the_epoch_of_early_stopping(result):
    report = result.report
    common, rare = report.train_images_per_class
    assert common + rare == report.train_images
    n = report.train_images
    assert report.class_weights == pytest.approx({"common": n / 2 / common, "rare": n / 2 / rare})
    assert report.epochs == 20
    assert report.epochs_trained == len(result.history) == report.kept_epoch + 1 < 20
    assert [warning for warning in report.data_warnings if "rare" in warning]
    assert [warning for warning in report.data_warnings if "validation images" in warning]
    assert not [warning for warning in report.data_warnings if "--class-weights" in warning]


def test_a_run_that_stopped_early_is_finished(result, recipe, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(result.run_dir, run_dir)
    (run_dir / "report.json").unlink()
    (run_dir / "images.csv").unlink()  # as in an older version
    again = run(recipe, run_dir, resume=True)
    assert again.history == result.history
    assert again.report == result.report
    assert (run_dir / "images.csv").read_bytes() == (result.run_dir / "images.csv").read_bytes()


def test_the_record_has_every_image(result, photos):
    record = ImageRecord.read(result.run_dir / "images.csv")
    files = {hashlib.sha256(path.read_bytes()).hexdigest(): path.parent.name for path in photos.rglob("*.png")}
    assert {digest: image.label for digest, image in record.images.items()} == files
    splits = [image.split for image in record.images.values()]
    assert splits.count("train") == result.report.train_images
    assert splits.count("test") == result.report.test["images"]


def test_the_predictions_have_the_digests_of_the_test_images(result):
    record = ImageRecord.read(result.run_dir / "images.csv")
    rows = predictions.read(result.run_dir)
    assert {row.image: row.label for row in rows} == {
        digest: image.label for digest, image in record.images.items() if image.split == "test"
    }


def test_fine_tuning_does_not_test_on_images_that_the_weights_were_trained_on(result, recipe, photos, tmp_path, capsys):
    record = ImageRecord.read(result.run_dir / "images.csv").images
    # A new folder with training images in test/ and one training image missing.
    trained, others = [], []
    for path in sorted(photos.rglob("*.png")):
        split = record[hashlib.sha256(path.read_bytes()).hexdigest()].split
        (trained if split == "train" else others).append(path)
    missing, *trained = trained
    new = tmp_path / "photos"
    for i, path in enumerate((*trained, *others)):
        copy = new / ("test" if path in trained and i % 3 == 0 else "train") / path.parent.name / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    start = keras.saving.load_model(result.run_dir / "model.keras")
    tuned = dataclasses.replace(
        recipe, data_dir=new, weights=result.run_dir / "model.keras", freeze="backbone", epochs=1, peak_learning_rate=0.1
    )
    report = run(tuned, tmp_path / "tuned").report
    [difference] = [line for line in report.data_warnings if line.startswith(f"images differ from those of {result.run_dir}")]
    assert "1 missing, " in difference and difference.endswith(" in another split than their folder says.")
    assert f"WARNING: {difference}" in capsys.readouterr().err
    tuned_record = ImageRecord.read(tmp_path / "tuned" / "images.csv").images
    digest = hashlib.sha256(missing.read_bytes()).hexdigest()
    assert tuned_record == {**record, digest: record[digest]._replace(split="earlier")}  # the weights were trained on it
    assert report.test["images"] == result.report.test["images"]
    model = keras.saving.load_model(tmp_path / "tuned" / "model.keras")
    for before, after in zip(start.weights, model.weights, strict=True):
        assert np.array_equal(before, after) != before.path.endswith(("head/kernel", "head/bias")), before.path
    assert not [layer.name for layer in cvt_of(model).layers if not layer.trainable]  # the saved model can be trained further


def test_without_a_cache_a_file_that_changes_during_a_run_is_named(photos, recipe, tmp_path, monkeypatch):
    own = shutil.copytree(photos, tmp_path / "photos")
    load_images = plan.load_images

    def changed_later(recipe):
        loaded = load_images(recipe)
        for path in own.rglob("*.png"):
            write_image(path)
        return loaded

    monkeypatch.setattr(plan, "load_images", changed_later)
    with pytest.raises(DataError, match="has changed since this command began"):
        run(dataclasses.replace(recipe, data_dir=own, cache="off", cache_dir=str(tmp_path / "cache")), tmp_path / "run")
