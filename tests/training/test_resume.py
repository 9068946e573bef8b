import dataclasses
import hashlib
import pickle
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from cvt_keras import preprocessing_of, runs
from cvt_keras.data import sources
from cvt_keras.data.record import ImageRecord
from cvt_keras.errors import (
    DifferentRunError,
    OccupiedError,
    RecipeError,
    RunError,
)
from cvt_keras.training import loop
from cvt_keras.training.recipes import SMOKE
from cvt_keras.training.resume import StoredRun, newer_fields, same_weights, without_newer_fields


def run(*args, **kwargs):
    """Trains -> the report."""
    return loop.run(*args, **kwargs).report


def test_a_finished_run_is_left_as_it_is(finished, recipe, capsys):
    report, run_dir = finished
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    assert run(recipe, run_dir, resume=True) == report
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before
    assert "finished" in capsys.readouterr().out


def test_files_that_broke_since_may_be_skipped(tmp_path):
    stored = StoredRun(tmp_path, SMOKE, newer_fields=())
    stored.require_same(dataclasses.replace(SMOKE, skip_broken=True))
    with pytest.raises(DifferentRunError):
        stored.require_same(dataclasses.replace(SMOKE, early_stopping=3))


def test_a_finished_run_needs_its_images_no_more(finished, recipe, monkeypatch):
    report, run_dir = finished
    monkeypatch.setattr(sources, "load", None)
    assert run(recipe, run_dir, resume=True) == report


def test_resume_begins_where_there_is_no_run_and_refuses_another_folder(short, tmp_path, capsys):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "letter.txt").touch()
    with pytest.raises(OccupiedError) as error:
        run(short, tmp_path / "letters", resume=True)
    assert error.value.argument == "run_dir"
    assert "letters" in error.value.summary
    assert run(short, tmp_path / "run", resume=True, evaluate_test=False).epochs == 1
    assert "no run to resume" in capsys.readouterr().out
    for name in ("checkpoints", "plots"):
        shutil.rmtree(tmp_path / "run" / name)
    run(short, tmp_path / "run", resume=True, evaluate_test=False)
    assert f"no finished epoch to resume from in {tmp_path}/run" in capsys.readouterr().out


def test_a_run_that_was_killed_as_it_began_begins_again(short, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / ".7-recipe.json").write_text("{")
    run(short, run_dir, evaluate_test=False)
    assert not (run_dir / ".7-recipe.json").exists()


@pytest.mark.parametrize(
    "names",
    [("model.keras", "report.json", "report.html", "history.csv"), ("report.html",), ("model.keras",), ("history.csv",)],
)
def test_what_a_run_lost_after_its_last_epoch_is_made_again(short, tmp_path, names):
    report = run(short, tmp_path / "run")
    for name in names:
        (tmp_path / "run" / name).unlink()
    assert run(short, tmp_path / "run", resume=True) == report
    for name in names:
        assert (tmp_path / "run" / name).exists()
    assert len(runs.read_history(tmp_path / "run")) == 1


def test_the_test_images_may_be_asked_for_later(short, tmp_path):
    assert run(short, tmp_path / "run", evaluate_test=False).test is None
    report = run(short, tmp_path / "run", resume=True)
    assert report.test["images"] == 100
    assert run(short, tmp_path / "run", resume=True, evaluate_test=False) == report


def _stop_in_second_epoch(recipe, run_dir, monkeypatch):
    class Stopped(loop.Stopwatch):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                raise KeyboardInterrupt
            super().on_epoch_begin(epoch, logs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "Stopwatch", Stopped)
        run(recipe, run_dir, evaluate_test=False)


def test_fine_tuning_goes_on(short, weights, tmp_path, monkeypatch):
    recipe = dataclasses.replace(short, weights=weights, variant=None, epochs=2, layer_decay=0.5)
    whole = run(recipe, tmp_path / "whole", evaluate_test=False)
    _stop_in_second_epoch(recipe, tmp_path / "run", monkeypatch)
    for other in ({"weights": None, "variant": "cvt_cifar"}, {"weights": str(Path(weights).with_name("other.keras"))}):
        with pytest.raises(DifferentRunError) as error:
            run(dataclasses.replace(recipe, **other), tmp_path / "run", resume=True)
        assert error.value.differences == {"weights": (repr(weights), repr(other["weights"]))}
    moved = tmp_path / Path(weights).name
    shutil.copy(weights, moved)
    with pytest.raises(DifferentRunError) as error:  # as long as both are there, they may be two
        run(dataclasses.replace(recipe, weights=str(moved)), tmp_path / "run", resume=True)
    assert list(error.value.differences) == ["weights"]
    # What the first epoch made of the weights is all that it takes: the file may be elsewhere, or gone.
    Path(weights).rename(f"{weights}.away")
    try:
        monkeypatch.chdir(tmp_path)
        again = run(dataclasses.replace(recipe, weights=moved.name), tmp_path / "run", resume=True, evaluate_test=False)
        moved.unlink()
        assert again.validation == whole.validation
        assert again.recipe["weights"] == weights
        assert run(recipe, tmp_path / "run", resume=True, evaluate_test=False) == again
    finally:
        Path(f"{weights}.away").rename(weights)
    preprocessing = preprocessing_of(keras.saving.load_model(tmp_path / "run" / "model.keras"))
    assert (preprocessing.mean, preprocessing.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


# === Another run ===


def test_a_run_goes_on_with_its_own_settings_alone(finished, recipe):
    _, run_dir = finished
    with pytest.raises(DifferentRunError) as error:
        run(dataclasses.replace(recipe, epochs=3, seed=1), run_dir, resume=True)
    assert error.value.differences == {"epochs": ("2", "3"), "seed": ("0", "1")}
    assert str(error.value).endswith("epochs was 2 and is 3, seed was 0 and is 1")
    copied = pickle.loads(pickle.dumps(error.value))
    assert (copied.differences, copied.run_dir, copied.argument) == (error.value.differences, run_dir, "run_dir")


def test_fields_that_the_version_of_a_run_did_not_have_keep_their_default(capsys):
    settings = SMOKE.settings()
    assert newer_fields(settings) == ()
    del settings["validation_limit"]
    assert newer_fields(settings) == ("validation_limit",)
    assert without_newer_fields(SMOKE, newer_fields(settings)).validation_limit is None
    assert "validation_limit=128 is not used" in capsys.readouterr().out
    without_newer_fields(dataclasses.replace(SMOKE, validation_limit=None), newer_fields(settings))
    assert not capsys.readouterr().out


def _digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_run_goes_on_with_its_own_images_alone(short, tmp_path, capsys):
    def add(name, i):
        (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), "uint8")
        (tmp_path / "photos" / name / f"{i}.png").write_bytes(tf.io.encode_png(pixels).numpy())

    for i in range(40):
        add("cat" if i % 2 else "dog", i)
    folder = dataclasses.replace(short, dataset="folder", data_dir=tmp_path / "photos", batch_size=8)
    run(folder, tmp_path / "run")
    (tmp_path / "run" / "report.json").unlink()
    run(dataclasses.replace(folder, data_dir=f"{tmp_path}/run/../photos/"), tmp_path / "run", resume=True)
    (tmp_path / "run" / "report.json").unlink()
    add("cat", 40)
    report = run(folder, tmp_path / "run", resume=True)
    differences = f"images differ from those of {tmp_path}/run: 1 new. New ones are left out."
    assert differences in report.data_warnings
    assert f"WARNING: {differences}" in capsys.readouterr().err
    (tmp_path / "run" / "report.json").unlink()
    images = ImageRecord.read(tmp_path / "run" / "images.csv").images
    path = next(path for path in (tmp_path / "photos").rglob("*.png") if images.get(_digest(path), ("",))[0] == "train")
    path.unlink()
    with pytest.raises(RecipeError) as error:
        run(folder, tmp_path / "run", resume=True)
    assert error.value.argument == "data_dir"
    assert f"number of train images was {report.train_images} and is {report.train_images - 1}" in error.value.summary
    shutil.copytree(tmp_path / "photos", tmp_path / "others")
    with pytest.raises(DifferentRunError) as error:
        run(dataclasses.replace(folder, data_dir=tmp_path / "others"), tmp_path / "run", resume=True)
    assert list(error.value.differences) == ["data_dir"]


def test_the_weights_of_a_run_are_the_same_where_they_were_moved(tmp_path):
    here, there = tmp_path / "a" / "model.keras", tmp_path / "b" / "model.keras"
    there.parent.mkdir()
    there.touch()
    assert same_weights(str(here), str(there))  # from where there is nothing
    assert not same_weights(str(there), str(here))
    assert not same_weights(str(here), str(there.with_name("other.keras")))
    here.parent.mkdir()
    here.touch()
    assert not same_weights(str(here), str(there))
    assert not same_weights("microsoft/cvt-13", "me/cvt-13")
    assert same_weights("microsoft/cvt-13", "microsoft/cvt-13")
    assert same_weights(str(here), f"{tmp_path}/b/../a/model.keras")
    assert not same_weights(None, str(here))


# === Broken files ===


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"epochs": 0}', '{"epoch": 1}'])
def test_a_broken_recipe_of_a_run_is_named(short, tmp_path, content):
    (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(RunError) as error:
        run(short, tmp_path, resume=True)
    assert f"{tmp_path}/recipe.json" in error.value.summary
    assert "--run-dir" in error.value.hint


@pytest.mark.parametrize("content", ["{", "{}"])
def test_a_broken_report_is_named(finished, recipe, tmp_path, content):
    _, run_dir = finished
    shutil.copytree(run_dir, tmp_path / "run")
    path = tmp_path / "run" / "report.json"
    path.write_text(content)
    with pytest.raises(RunError) as error:
        run(recipe, tmp_path / "run", resume=True)
    assert str(path) in error.value.summary
