import dataclasses
import hashlib
import pickle
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from cvt_keras import VARIANTS, preprocessing_of, runs
from cvt_keras.data import sources
from cvt_keras.data.record import ImageRecord
from cvt_keras.errors import (
    DifferentRunError,
    OccupiedError,
    RecipeError,
    RunError,
)
from cvt_keras.training import flags, loop
from cvt_keras.training.__main__ import Arguments
from cvt_keras.training.plan import settle
from cvt_keras.training.recipes import SMOKE
from cvt_keras.training.resume import StoredRun, newer_fields, same_weights, without_newer_fields

pytestmark = pytest.mark.usefixtures("eager")


def run(*args, **kwargs):
    """Trains and returns the report."""
    return loop.run(*args, **kwargs).report


@pytest.fixture(scope="module")
def tested_result(short, untested_result, tmp_path_factory):
    """The `RunResult` of `short` with test images, to be read only."""
    run_dir = shutil.copytree(untested_result.run_dir, tmp_path_factory.mktemp("runs") / "tested")
    return loop.run(short, run_dir, resume=True)


def test_a_finished_run_is_not_changed(finished, recipe, capsys):
    report, run_dir = finished
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    assert run(recipe, run_dir, resume=True) == report
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before
    assert "finished" in capsys.readouterr().out


def test_skip_broken_may_change_before_a_resume(tmp_path):
    stored = StoredRun(tmp_path, SMOKE, newer_fields=())
    stored.require_same(dataclasses.replace(SMOKE, skip_broken=True))
    with pytest.raises(DifferentRunError):
        stored.require_same(dataclasses.replace(SMOKE, early_stopping=3))


def test_a_finished_run_does_not_need_its_images(finished, recipe, monkeypatch):
    report, run_dir = finished
    monkeypatch.setattr(sources, "load", None)
    assert run(recipe, run_dir, resume=True) == report


def test_resume_starts_a_new_run_if_there_is_none_and_refuses_a_folder_of_other_files(short, untested, tmp_path, capsys):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "letter.txt").touch()
    with pytest.raises(OccupiedError) as error:
        run(short, tmp_path / "letters", resume=True)
    assert error.value.argument == "run_dir"
    assert "letters" in error.value.summary
    assert not settle(short, tmp_path / "run", resume=True).resumed
    assert "no run to resume" in capsys.readouterr().out
    for name in ("checkpoints", "plots"):
        shutil.rmtree(untested / name)
    assert run(short, untested, resume=True, evaluate_test=False).epochs_trained == 1
    assert f"no finished epoch to resume from in {untested}" in capsys.readouterr().out


def test_a_folder_with_unfinished_files_only_is_vacant_and_is_cleaned(short, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / ".7-recipe.json").write_text("{")
    with loop._occupied(settle(short, run_dir)):
        assert not list(run_dir.iterdir())


@pytest.mark.parametrize(
    "names",
    [("model.keras", "report.json", "report.html", "history.csv"), ("report.html",), ("model.keras",), ("history.csv",)],
)
def test_files_missing_after_the_last_epoch_are_written_again(short, tested_result, tmp_path, names):
    run_dir = shutil.copytree(tested_result.run_dir, tmp_path / "run")
    for name in names:
        (run_dir / name).unlink()
    assert run(short, run_dir, resume=True) == tested_result.report
    for name in names:
        assert (run_dir / name).exists()
    assert len(runs.read_history(run_dir)) == 1


def test_a_finished_run_can_be_tested_later(short, untested_result, tested_result):
    assert untested_result.report.test is None
    assert tested_result.report.test["images"] == 100
    assert tested_result.history == untested_result.history
    assert run(short, tested_result.run_dir, resume=True, evaluate_test=False) == tested_result.report


def _stop_in_second_epoch(recipe, run_dir, monkeypatch):
    class Stopped(loop.Stopwatch):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                raise KeyboardInterrupt
            super().on_epoch_begin(epoch, logs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "Stopwatch", Stopped)
        run(recipe, run_dir, evaluate_test=False)


def test_fine_tuning_is_resumed_without_the_file_of_the_weights(short, weights, tmp_path, monkeypatch):
    recipe = dataclasses.replace(short, weights=weights, variant=None, epochs=2, layer_decay=0.5)
    whole = run(recipe, tmp_path / "whole", evaluate_test=False)
    _stop_in_second_epoch(recipe, tmp_path / "run", monkeypatch)
    for other in ({"weights": None, "variant": "cvt_cifar"}, {"weights": str(Path(weights).with_name("other.keras"))}):
        with pytest.raises(DifferentRunError) as error:
            run(dataclasses.replace(recipe, **other), tmp_path / "run", resume=True)
        assert error.value.differences == {"weights": (repr(weights), repr(other["weights"]))}
    moved = tmp_path / Path(weights).name
    shutil.copy(weights, moved)
    with pytest.raises(DifferentRunError) as error:  # while both files exist, they may differ
        run(dataclasses.replace(recipe, weights=str(moved)), tmp_path / "run", resume=True)
    assert list(error.value.differences) == ["weights"]
    # The checkpoint of the first epoch is enough: the file of the weights may be moved or deleted.
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


def test_a_run_is_resumed_with_its_own_settings_only(finished, recipe):
    _, run_dir = finished
    with pytest.raises(DifferentRunError) as error:
        run(dataclasses.replace(recipe, epochs=3, seed=1), run_dir, resume=True)
    assert error.value.differences == {"epochs": ("2", "3"), "seed": ("0", "1")}
    assert str(error.value).endswith("epochs: 2 in the run, now 3; seed: 0 in the run, now 1")
    copied = pickle.loads(pickle.dumps(error.value))
    assert (copied.differences, copied.run_dir, copied.argument) == (error.value.differences, run_dir, "run_dir")


def test_a_run_of_another_network_names_its_parts_and_the_command_that_resumes_it(tmp_path):
    first, last = VARIANTS["cvt_tiny"].stages
    stages = (first, dataclasses.replace(last, pool=True))
    network = dataclasses.replace(VARIANTS["cvt_tiny"], stages=stages, stem=(32, 32), whitening=2)
    stored = StoredRun(tmp_path, dataclasses.replace(SMOKE, variant=network), newer_fields=())
    with pytest.raises(DifferentRunError) as error:
        stored.require_same(SMOKE)
    assert error.value.differences == {"variant": ("a network that differs in stem, whitening, pool of stage 1", "'cvt_tiny'")}
    command = f"cvt-keras train --recipe-file {tmp_path}/recipe.json --run-dir {tmp_path} --resume"
    assert command in error.value.hint
    assert pickle.loads(pickle.dumps(error.value)).hint == error.value.hint
    runs.write_json(tmp_path / "recipe.json", stored.recipe.settings())
    _, arguments = flags.parse(command.split()[2:], Arguments, "cvt-keras train", "Train a network.")
    stored.require_same(arguments.recipe)


def test_fields_that_an_older_version_did_not_have_get_their_defaults(capsys):
    settings = SMOKE.settings()
    assert newer_fields(settings) == ()
    del settings["validation_limit"]
    assert newer_fields(settings) == ("validation_limit",)
    assert without_newer_fields(SMOKE, newer_fields(settings)).validation_limit is None
    assert "validation_limit=128 is ignored" in capsys.readouterr().out
    without_newer_fields(dataclasses.replace(SMOKE, validation_limit=None), newer_fields(settings))
    assert not capsys.readouterr().out


def _digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_run_is_resumed_with_its_own_images_only(short, tmp_path, capsys):
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
    assert f"number of train images: {report.train_images} in the run, now {report.train_images - 1}" in error.value.summary
    shutil.copytree(tmp_path / "photos", tmp_path / "others")
    with pytest.raises(DifferentRunError) as error:
        run(dataclasses.replace(folder, data_dir=tmp_path / "others"), tmp_path / "run", resume=True)
    assert list(error.value.differences) == ["data_dir"]


def test_weights_stay_the_same_when_their_file_is_moved(tmp_path):
    old, new = tmp_path / "a" / "model.keras", tmp_path / "b" / "model.keras"
    new.parent.mkdir()
    new.touch()
    assert same_weights(str(old), str(new))
    assert not same_weights(str(new), str(old))
    assert not same_weights(str(old), str(new.with_name("other.keras")))
    old.parent.mkdir()
    old.touch()
    assert not same_weights(str(old), str(new))
    assert not same_weights("microsoft/cvt-13", "me/cvt-13")
    assert same_weights("microsoft/cvt-13", "microsoft/cvt-13")
    assert same_weights(str(old), f"{tmp_path}/b/../a/model.keras")
    assert not same_weights(None, str(old))


# === Damaged files ===


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"epochs": 0}', '{"epoch": 1}'])
def test_a_damaged_recipe_of_a_run_is_named(short, tmp_path, content):
    (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(RunError) as error:
        run(short, tmp_path, resume=True)
    assert f"{tmp_path}/recipe.json" in error.value.summary
    assert "--run-dir" in error.value.hint


@pytest.mark.parametrize("content", ["{", "{}"])
def test_a_damaged_report_is_named(finished, recipe, tmp_path, content):
    _, run_dir = finished
    shutil.copytree(run_dir, tmp_path / "run")
    path = tmp_path / "run" / "report.json"
    path.write_text(content)
    with pytest.raises(RunError) as error:
        run(recipe, tmp_path / "run", resume=True)
    assert str(path) in error.value.summary
