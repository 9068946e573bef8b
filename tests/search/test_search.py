import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_search import SMOKE, SPACE
from small_sources import small_source

from cvt_keras import cli, runs
from cvt_keras.data import sources, tfds
from cvt_keras.data.record import ImageRecord
from cvt_keras.errors import (
    ArgumentError,
    DivergedError,
    OccupiedError,
    OutOfMemoryError,
    RecipeError,
    SearchError,
    UnavailableError,
    UserError,
)
from cvt_keras.preprocessing import Preprocessing
from cvt_keras.search import distributed, folder, results, search, study, tuner
from cvt_keras.search.__main__ import Arguments, main
from cvt_keras.search.options import Options
from cvt_keras.search.space import Choice
from cvt_keras.training import callbacks, flags

ROOT = Path(__file__).parent.parent.parent


def _search(words):
    """Runs the command, and returns its exit code."""
    return cli.main(["search", *words])


def _error_of(words):
    """Runs the command, and returns the error that it raises."""
    with pytest.raises(UserError) as error:
        main(words)
    return error.value


@pytest.fixture
def command(tmp_path, space_file):
    """The arguments of a small search in `tmp_path / "search"`."""
    search_dir = tmp_path / "search"
    return ["smoke", "--dataset", "digits", "--space", str(space_file), "--search-dir", str(search_dir), "--trials", "3"]


@pytest.mark.parametrize("algorithm", ["random", "hyperband"])
def test_a_search_writes_a_table_a_recipe_and_a_page(algorithm, command, tmp_path, quick_run, no_pictures, table, capsys):
    search_dir = tmp_path / "search"
    words = [*command, "--algorithm", algorithm, "--train-limit", "100", "--max-macs", "1.3e6", "--trials", "9"]
    words += ["--epochs", "3", "--test-limit", "50"]
    assert _search(words) == 0
    rows = table(search_dir)
    assert [row["trial"] for row in rows] == [f"{i}" for i in range(9)] and {row["status"] for row in rows} == {"completed"}
    assert max(int(row["macs"]) for row in rows) <= 1.3e6
    assert all(float(row["seconds"]) == 1.5 * int(row["epochs"]) and row["epoch"] == row["epochs"] for row in rows)
    best = max(rows, key=lambda row: float(row["val_accuracy"]))
    written = json.loads((search_dir / "best.json").read_text())
    assert written["peak_learning_rate"] == float(best["peak_learning_rate"])
    assert written["variant"]["stages"][0]["depth"] == int(best["stage0_depth"])
    # For all images, and the epochs of the search.
    assert written["train_limit"] is None and written["test_limit"] is None and written["epochs"] == 3
    words = ["--recipe-file", str(search_dir / "best.json"), "--search-dir", "another"]
    assert flags.parse(words, Arguments, "", "")[1].recipe.settings() == written
    page = (search_dir / "report.html").read_text()
    for part in (
        "Parallel coordinates",
        "Best trials",
        "Importance",
        f"Best recipe, trial {best['trial']}",
        "multiply-adds per image, maximum",
    ):
        assert part in page, part
    assert page.count("data:image/png") == 3 and "The other trials are grey" in page
    assert (">repeats<" in page) == (">epochs per trial, maximum<" in page) == (algorithm == "hyperband")
    assert "was not tried" not in page
    output = capsys.readouterr().out
    assert "trial 0 (1 of 9): the recipe itself: peak_learning_rate 0.002" in output
    assert f"best: trial {best['trial']}, {float(best['val_accuracy']):.2%} top-1" in output
    assert "best so far: trial" in output and "cvt-keras train --recipe-file" in output
    assert all(recipe.train_limit == 100 for recipe in quick_run)


def test_the_same_command_resumes_a_search_and_more_trials_extend_it(command, tmp_path, quick_run, no_pictures, table, capsys):
    assert _search(command) == 0
    assert _search(command) == 0
    assert len(quick_run) == 3 and "3 trials are done" in capsys.readouterr().out
    assert "are grey" not in (tmp_path / "search" / "report.html").read_text()
    assert _search([*command, "--trials", "5"]) == 0
    assert len(quick_run) == 5 and len(table(tmp_path / "search")) == 5


def test_a_candidate_that_can_not_be_trained_fails_its_trial(
    command, tmp_path, quick_run, no_pictures, table, monkeypatch, capsys
):
    quick = tuner.run

    def run(recipe, run_dir, **flags):
        if recipe.peak_learning_rate != 0.002:
            raise DivergedError("the loss is NaN: at step 1", hint="Train in another --run-dir")
        return quick(recipe, run_dir, **flags)

    monkeypatch.setattr(tuner, "run", run)
    assert _search([*command, "--trials", "9"]) == 1
    rows = table(tmp_path / "search")
    assert [row["status"] for row in rows] == ["completed"] + ["failed"] * 3
    assert rows[1]["val_accuracy"] == "" and [row["reason"] for row in rows] == [""] + ["the loss is NaN: at step 1"] * 3
    output = capsys.readouterr()
    assert "failed (the loss is NaN: at step 1)" in output.out
    assert "the search stopped early: the last 3 trials failed" in output.err
    assert "best: trial 0" in output.out
    page = (tmp_path / "search" / "report.html").read_text()
    assert ">3</b><span>trials failed<" in page and page.count("failed: the loss is NaN: at step 1<") == 3


def test_a_search_fails_if_no_trial_can_be_trained(command, tmp_path, quick_run, no_pictures, monkeypatch, capsys):
    def run(*_, **__):
        raise OutOfMemoryError("the memory is too small", hint="Train at a smaller --batch-size")

    monkeypatch.setattr(tuner, "run", run)
    assert _search(command) == 1
    assert capsys.readouterr().err.endswith("no trial could be trained. The first failed: the memory is too small\n")
    assert not (tmp_path / "search" / "best.json").exists()


def test_a_full_disk_loses_no_trial(command, tmp_path, quick_run, no_pictures, table, monkeypatch, capsys):
    quick = tuner.run

    def run(recipe, run_dir, **flags):
        if len(quick_run) == 2:
            raise OSError("No space left on device")
        return quick(recipe, run_dir, **flags)

    monkeypatch.setattr(tuner, "run", run)
    assert _search(command) == 1
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0 and error.endswith(shlex.join(["cvt-keras", "search", *command]))
    assert [row["status"] for row in table(tmp_path / "search")] == ["completed", "completed", "running"]
    monkeypatch.setattr(tuner, "run", quick)
    assert _search(command) == 0
    assert len(quick_run) == 3 and len(table(tmp_path / "search")) == 3


def test_ctrl_c_prints_the_command_that_resumes(command, quick_run, no_pictures, monkeypatch, capsys):
    def run(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(tuner, "run", run)
    assert _search([*command, "--fresh", "--yes"]) == 130
    error = capsys.readouterr().err
    assert error.endswith(shlex.join(["cvt-keras", "search", *command]) + "\n")  # without --fresh and --yes
    typed = ["python", "-m", "cvt_keras.search"]
    monkeypatch.setattr(sys, "orig_argv", [*typed, *command, "--fresh", "--yes"])
    assert _search([*command, "--fresh", "--yes"]) == 130
    assert capsys.readouterr().err.endswith(shlex.join([*typed, *command]) + "\n")


def test_fresh_asks_before_it_deletes(command, tmp_path, quick_run, no_pictures, monkeypatch, capsys):
    search_dir = tmp_path / "search"
    assert _search(command) == 0
    assert _search([*command, "--seed", "1"]) == 2
    assert _search([*command, "--fresh"]) == 2
    assert "must be confirmed" in (error := capsys.readouterr().err) and "--yes" in error
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    asked = []
    monkeypatch.setattr("builtins.input", lambda prompt: asked.append(prompt) or "n")
    (search_dir / "trials" / "0").mkdir(exist_ok=True)
    assert _search([*command, "--fresh"]) == 1
    assert "the runs of 3 trials" in asked[0] and len(quick_run) == 3
    monkeypatch.setattr("builtins.input", lambda prompt: (_ for _ in ()).throw(EOFError))  # Ctrl-D
    assert _search([*command, "--fresh"]) == 1 and "nothing was deleted" in capsys.readouterr().err
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    assert _search([*command, "--seed", "1", "--fresh"]) == 0
    assert len(quick_run) == 6 and json.loads((search_dir / "search.json").read_text())["recipe"]["seed"] == 1
    monkeypatch.setattr("builtins.input", None)
    assert _search([*command, "--fresh", "--yes"]) == 0
    assert len(quick_run) == 9


@pytest.mark.parametrize(
    "words, argument",
    [
        (["--trials", "0"], "trials"),
        (["--max-macs", "0"], "max_macs"),
        (["--max-macs", "1e3"], "max_macs"),
        (["--worker-timeout", "14"], "worker_timeout"),
        (["--fresh", "--yes", "--batch-size", "5000"], "batch_size"),
        (["--chief", "--worker"], "worker"),
        (["--worker", "--fresh"], "fresh"),
        (["--address", "nowhere"], "address"),
        (["--address", "here:70000"], "address"),
        (["--weights", "some.keras", "--max-macs", "1e6"], "max_macs"),
        (["--space", "none.json"], "space"),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_is_written(words, argument, command, tmp_path, quick_run):
    error = _error_of([*command, *words])
    assert error.exit_code == 2 and error.argument == argument
    assert "\n" not in cli.message(error) and "--" not in error.summary
    assert not quick_run and not (tmp_path / "search").exists()


def test_a_wrong_argument_and_help_are_answered_without_keras(command):
    code = (
        "import sys\n"
        "from cvt_keras import cli\n"
        f"command = {command}\n"
        "for words in (['--trials', '0'], ['--space', 'none.json'], ['--address', 'nowhere'], ['--search-dir', 'train.py']):\n"
        "    assert cli.main(['search', *command, *words]) == 2\n"
        "for words in (['--help'], ['--nonsense']):\n"
        "    try:\n"
        "        cli.main(['search', *command, *words])\n"
        "    except SystemExit as stop:\n"
        "        assert stop.code == (0 if words == ['--help'] else 2)\n"
        "heavy = {'keras', 'tensorflow', 'keras_tuner', 'grpc', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_search_returns_the_best_recipe_and_the_rows(tmp_path, quick_run, no_pictures, capsys):
    recipe = dataclasses.replace(SMOKE, train_limit=100)
    space = {"mixup": [0.0, 0.2], "peak_learning_rate": {"low": 1e-3, "high": 8e-3}, "stage0_depth": Choice((1, 2))}
    result = search(recipe, str(tmp_path / "search"), trials=4, algorithm="random", space=space)
    assert [row["trial"] for row in result.rows] == ["0", "1", "2", "3"] and result.best in result.rows
    assert result.best["val_accuracy"] == max(row["val_accuracy"] for row in result.rows)
    assert result.recipe.peak_learning_rate == result.best["peak_learning_rate"] and result.recipe.train_limit is None
    assert json.loads(result.recipe_file.read_text()) == result.recipe.settings()
    assert result.stopped is None and not result.failing
    again = search(recipe, tmp_path / "search", trials=4, algorithm="random", space=space)
    assert again == dataclasses.replace(result, search_dir=tmp_path / "search") and len(quick_run) == 4
    with pytest.raises(RecipeError) as error:
        search(recipe, tmp_path / "search", trials=4, space=space)
    assert error.value.argument == "search_dir"
    assert "algorithm: 'random' in the search, now 'bayesian'" in error.value.summary
    assert len(search(recipe, tmp_path / "search", trials=2, space=space, fresh=True).rows) == 2


def test_search_raises_errors_that_name_arguments(tmp_path, quick_run, no_pictures, monkeypatch):
    with pytest.raises(ArgumentError) as error:
        search(SMOKE, tmp_path / "search", algorithm="grid")
    assert error.value.argument == "algorithm"
    with pytest.raises(RecipeError) as error:
        search(SMOKE, tmp_path / "search", space={"width": [1, 2]})
    assert error.value.argument == "space"
    (tmp_path / "thesis.txt").write_text("all of it")
    for search_dir in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(OccupiedError) as error:
            search(SMOKE, search_dir, fresh=True)
        assert error.value.argument == "search_dir"

    def run(*_, **__):
        raise DivergedError("the loss is NaN")

    monkeypatch.setattr(tuner, "run", run)
    with pytest.raises(SearchError) as error:
        search(SMOKE, tmp_path / "search", trials=3)
    assert "the loss is NaN" in error.value.summary


def test_a_recipe_without_a_network_is_refused(tmp_path, capsys):
    error = _error_of(["finetune", "--search-dir", str(tmp_path / "search")])
    assert error.exit_code == 2 and error.argument == "weights"


def test_a_search_dir_is_required(capsys):
    with pytest.raises(SystemExit) as stop:
        _search(["smoke"])
    assert stop.value.code == 2 and "--search-dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, part",
    [
        (["--algorithm", "random"], "algorithm: 'bayesian' in the search, now 'random'"),
        (["--max-macs", "1e6"], "max_macs: None in the search, now 1000000"),
        (["--epochs", "3"], "epochs: 2 in the search, now 3"),
        (["--variant", "cvt_cifar"], "variant differs"),
    ],
)
def test_a_different_search_is_refused(change, part, command, tmp_path, quick_run, no_pictures, capsys):
    assert _search([*command, "--trials", "1"]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "search").rglob("*") if path.is_file()}
    assert _search([*command, *change]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "holds a different search" in error and part in error and "--fresh" in error
    assert before == {path: path.read_bytes() for path in (tmp_path / "search").rglob("*") if path.is_file()}


def test_a_folder_of_something_else_is_refused(command, tmp_path, capsys):
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "thesis.txt").write_text("all of it")
    assert not folder.holds_search(tmp_path / "search")
    for words in ([], ["--fresh", "--yes"]):
        assert _search([*command, *words]) == 2
        assert "contains files, but no search" in capsys.readouterr().err
    assert (tmp_path / "search" / "thesis.txt").read_text() == "all of it"


def test_fresh_deletes_only_the_search_and_only_if_another_can_start(command, tmp_path, quick_run, no_pictures, table):
    search_dir = tmp_path / "search"
    assert _search(command) == 0
    (search_dir / "final").mkdir()
    assert _search([*command, "--fresh", "--yes", "--max-macs", "1e3"]) == 2
    assert _search([*command, "--fresh", "--yes", "--batch-size", "5000"]) == 2
    assert _search([*command, "--fresh", "--yes", "--dataset", "folder", "--data-dir", "nowhere"]) == 1
    assert len(table(search_dir)) == 3
    assert _search([*command, "--fresh", "--yes", "--trials", "1"]) == 0
    assert len(table(search_dir)) == 1 and (search_dir / "final").exists()
    assert [path.name for path in (search_dir / "trials").iterdir()] == ["0"]


def test_a_search_killed_while_it_starts_or_deletes_starts_over(command, tmp_path, quick_run, no_pictures, table, monkeypatch):
    search_dir = tmp_path / "search"
    search_dir.mkdir()
    (search_dir / ".7-search.json").write_text("{")
    assert _search(command) == 0
    rename, renames_left = Path.rename, [0]

    def killed(self, target):
        renames_left[0] -= 1
        if renames_left[0] < 0:
            raise KeyboardInterrupt
        return rename(self, target)

    # After the table, the runs, and keras-tuner's state; before the settings.
    for renames in (1, 4, 6):
        renames_left[0] = renames
        monkeypatch.setattr(Path, "rename", killed)
        assert _search([*command, "--fresh", "--yes"]) == 130
        monkeypatch.setattr(Path, "rename", rename)
        assert _search(command) == 0
        assert len(table(search_dir)) == 3


def test_a_damaged_search_is_named_and_fresh_replaces_it(command, tmp_path, quick_run, no_pictures, capsys):
    command += ["--trials", "1"]
    assert _search(command) == 0
    for text in ("[]", "{}", "{"):
        (tmp_path / "search" / "search.json").write_text(text)
        assert _search(command) == 1
        assert "search.json is damaged" in (error := capsys.readouterr().err) and "--fresh" in error
    assert _search([*command, "--fresh", "--yes"]) == 0


def test_a_resumed_search_keeps_the_data_set_that_auto_chose(command, tmp_path, quick_run, no_pictures, monkeypatch, capsys):
    monkeypatch.setattr(tfds, "cifar10", lambda *_: (_ for _ in ()).throw(UnavailableError("no network")))
    words = [word if word != "digits" else "auto" for word in command]
    assert _search(words) == 0
    assert "WARNING" in capsys.readouterr().err
    monkeypatch.setattr(tfds, "cifar10", None)  # must not be called
    assert _search([*words, "--trials", "4"]) == 0
    assert {recipe.dataset for recipe in quick_run} == {"digits"} and len(quick_run) == 4


def test_a_search_of_version_0_1_is_resumed(tmp_path, space_file, quick_run, no_pictures, table, capsys):
    with tarfile.open(ROOT / "tests" / "golden" / "old_runs" / "search.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    search_dir = tmp_path / "search"
    before = table(search_dir)
    # Its search.json has no `validation_limit`, which the recipe smoke has now.
    assert SMOKE.validation_limit and "validation_limit" not in runs.read_json(search_dir / "search.json")["recipe"]
    words = ["smoke", "--dataset", "digits", "--no-flip", "--space", str(space_file), "--search-dir", str(search_dir)]
    assert _search([*words, "--trials", "3"]) == 0
    assert "2 trials are done" in capsys.readouterr().out
    [trained] = quick_run
    assert trained.validation_limit is None  # so that its accuracy compares with the earlier trials
    after = table(search_dir)
    assert len(after) == 3 and [row["val_accuracy"] for row in after[:2]] == [row["val_accuracy"] for row in before]
    # Other differences are still refused.
    assert _search([*words, "--trials", "3", "--epochs", "3"]) == 2
    assert "epochs: 2 in the search, now 3" in capsys.readouterr().err


def test_a_space_that_does_not_fit_the_images_is_refused(command, tmp_path, quick_run, capsys):
    (tmp_path / "space.json").write_text('{"batch_size": [32, 4096]}')
    error = _error_of([*command, "--train-limit", "64"])
    assert error.exit_code == 2 and error.argument == "space"
    assert "batch_size=4096: `batch_size` must not exceed the 64 training images" in error.summary
    assert not (tmp_path / "search").exists()


def test_a_search_dir_that_is_not_writable_is_refused(command, tmp_path, quick_run, capsys):
    (tmp_path / "thesis.txt").write_text("all of it")
    error = _error_of([*command, "--search-dir", str(tmp_path / "thesis.txt" / "search")])
    assert error.exit_code == 2 and error.argument == "search_dir" and "--search-dir" in error.hint


def test_a_worker_looks_for_its_chief_before_it_loads_images(command, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "NO_CHIEF_SECONDS", 0.2)
    monkeypatch.setattr(sources, "load", None)
    assert _search([*command, "--worker", "--address", "127.0.0.1:9"]) == 1
    assert "no chief answers at 127.0.0.1:9" in capsys.readouterr().err


def test_hyperband_prints_the_epochs_of_the_best(command, quick_run, no_pictures, capsys):
    assert _search([*command, "--algorithm", "hyperband", "--epochs", "9", "--trials", "3"]) == 0
    assert "top-1 on the validation images after 1 of 9 epochs; page" in capsys.readouterr().out


def test_epochs_have_an_axis_if_they_differ():
    assert results._axes([{"epochs": 3}, {"epochs": 3}], SPACE) == SPACE
    axes = results._axes([{"epochs": 1}, {"epochs": 9}], SPACE)
    assert list(axes) == [*SPACE, "epochs"] and axes["epochs"].ends == (1, 9)


def test_missing_weights_are_named_before_the_search_is_created(command, tmp_path, quick_run, capsys):
    words = ["finetune", "--weights", "none.keras", "--dataset", "digits", "--search-dir", str(tmp_path / "search")]
    assert _search(words) == 2
    assert "`weights` must be a file" in capsys.readouterr().err and not (tmp_path / "search").exists()


def test_the_network_of_weights_is_not_varied(tmp_path, quick_run, no_pictures, monkeypatch):
    monkeypatch.setattr(
        study, "read_weights", lambda recipe: SimpleNamespace(variant="cvt_tiny", preprocessing=Preprocessing())
    )
    words = ["finetune", "--weights", "some.keras", "--image-size", "32", "--crop-padding", "4", "--dataset", "digits"]
    assert _search([*words, "--search-dir", str(tmp_path / "search"), "--trials", "2"]) == 0
    assert {recipe.variant for recipe in quick_run} == {None} and len({recipe.layer_decay for recipe in quick_run}) == 2


CROPS = SimpleNamespace(variant="cvt_tiny", preprocessing=Preprocessing(resize="crop", crop_pct=0.75, interpolation="bicubic"))


@pytest.mark.parametrize("chief", [False, True])
def test_all_trials_resize_as_the_weights_were_trained(chief, monkeypatch):
    loaded = []

    def load_images(recipe):
        loaded.append(recipe.preprocessing)
        return recipe, small_source("1a 2b 3a", "4b 5a", "6a 7b")

    monkeypatch.setattr(study, "load_images", load_images)
    monkeypatch.setattr(study, "read_weights", lambda recipe: CROPS)
    recipe = dataclasses.replace(SMOKE, weights="some.keras", batch_size=2, train_limit=None)
    oracle, settings = study._settle(recipe, {}, Options(chief=chief))
    assert loaded == [oracle.candidates.recipe.preprocessing]
    assert loaded == [CROPS.preprocessing.replace(image_size=(32, 32))]
    assert (settings["recipe"]["resize"], settings["recipe"]["crop_pct"]) == ("crop", 0.75)
    with pytest.raises(RecipeError) as error:
        study._settle(recipe, {"crop_padding": Choice((0, 4))}, Options(chief=chief))
    assert error.value.argument == "space" and "crop_padding" in error.value.summary
    study._settle(dataclasses.replace(recipe, resize="stretch"), {"crop_padding": Choice((0, 4))}, Options(chief=chief))


def test_a_resumed_search_resizes_as_before(command, tmp_path, quick_run, no_pictures, monkeypatch, capsys):
    monkeypatch.setattr(study, "read_weights", lambda recipe: CROPS)
    words = ["finetune", "--weights", "some.keras", "--image-size", "32", "--crop-padding", "4", "--dataset", "digits"]
    words += ["--search-dir", str(tmp_path / "search"), "--trials"]
    assert _search([*words, "1"]) == 0
    path = tmp_path / "search" / "search.json"
    settings = runs.read_json(path)
    assert settings["recipe"]["resize"] == "crop"
    for name in ("resize", "crop_pct", "interpolation"):  # as version 0.4 wrote it
        del settings["recipe"][name]
    settings["data"] = sources.load("digits").fingerprint()
    runs.write_json(path, settings)
    assert _search([*words, "2"]) == 0
    assert [recipe.resize for recipe in quick_run] == ["crop", "stretch"]


def test_the_fit_is_checked_with_the_images_that_a_trial_trains_on(tmp_path, monkeypatch, capsys):
    recipe = dataclasses.replace(SMOKE, dataset="folder", weights=str(tmp_path / "model.keras"), batch_size=3, train_limit=None)
    source = dataclasses.replace(small_source("1a 2b 3a", "4b 5a", "6a 7b"), warnings=("a warning",))
    monkeypatch.setattr(study, "load_images", lambda recipe: (recipe, source))
    weights = SimpleNamespace(variant="cvt_tiny", preprocessing=Preprocessing(class_names=("a", "b")))
    monkeypatch.setattr(study, "read_weights", lambda recipe: weights)
    study._settle(recipe, {}, Options())
    output = capsys.readouterr().err
    assert output.startswith("WARNING: a warning\nWARNING: held-out images not verified: ")
    ImageRecord.of_source(small_source("1a 2b", "3a 4b", "5a 6a 7b")).write(tmp_path / "images.csv")
    with pytest.raises(RecipeError) as error:
        study._settle(recipe, {}, Options())
    assert error.value.argument == "batch_size"


def test_a_chief_listens_on_the_address_and_has_no_gpu(command, monkeypatch, quick_run):
    called, hidden = [], []

    def lead(oracle, address, patience, refresh):
        assert "KERASTUNER_ORACLE_IP" not in os.environ
        called.append((address, patience))

    monkeypatch.setattr(distributed, "lead", lead)
    monkeypatch.setattr(study.tf.config, "set_visible_devices", lambda *arguments: hidden.append(arguments))
    monkeypatch.setenv("KERASTUNER_ORACLE_IP", "nowhere")
    assert _search([*command, "--chief", "--address", "127.0.0.1:9", "--worker-timeout", "77"]) == 1  # no trial was run
    assert called == [("127.0.0.1:9", 77.0)] and hidden == [([], "GPU")]
    assert os.environ["KERASTUNER_ORACLE_IP"] == "nowhere"  # a notebook's environment is as it was


def test_a_folder_that_another_search_writes_to_is_refused(command, tmp_path, quick_run, no_pictures, capsys):
    assert _search([*command, "--trials", "1"]) == 0
    with runs.lock(tmp_path / "search"):
        assert _search(command) == 1
        assert _search([*command, "--fresh", "--yes"]) == 1
    assert "another process is writing to" in capsys.readouterr().err and len(quick_run) == 1


def test_a_recipe_outside_the_space_is_not_tried(command, tmp_path, quick_run, no_pictures, capsys):
    assert _search([*command, "--peak-learning-rate", "0.5"]) == 0
    assert "not trying the recipe itself: its peak_learning_rate is outside the space" in capsys.readouterr().out
    assert "The recipe itself was not tried: its peak_learning_rate" in (tmp_path / "search" / "report.html").read_text()
    assert all(recipe.peak_learning_rate <= 8e-3 for recipe in quick_run)


def test_a_trial_that_ends_while_the_page_is_written_is_on_the_next(command, tmp_path, quick_run, no_pictures, monkeypatch):
    """On a chief, whose workers do not wait for the page."""
    assert _search([*command, "--trials", "3"]) == 0
    pages, write_csv = [], runs.write_csv

    def late(path, rows):
        if path.name == results.TRIALS:
            row = max(rows, key=lambda row: row["val_accuracy"])
            row |= {"status": "running", "val_accuracy": None, "epoch": None, "seconds": None}
            pages.append(row)
        write_csv(path, rows)

    monkeypatch.setattr(runs, "write_csv", late)
    assert _search([*command, "--trials", "3"]) == 0
    assert pages and ">running<" in (tmp_path / "search" / "report.html").read_text()


def test_importance_is_highest_for_the_name_that_changes_the_accuracy():
    rows = [
        {"status": "completed", "epochs": 2, "val_accuracy": 0.5 + 0.01 * i, "peak_learning_rate": 1e-3 * 1.1**i}
        | {"decay": ("linear", "cosine")[i % 2]}
        | {"stage0_depth": 1 + i * 7 % 3, "mixup": 0.1 * (i * 5 % 4)}
        for i in range(20)
    ]
    shares, fit = results.importance(rows, SPACE | {"decay": Choice(("linear", "cosine"))})
    assert set(shares) == {*SPACE, "decay"}
    assert next(iter(shares)) == "peak_learning_rate" and shares["peak_learning_rate"][0] > 10 * shares["mixup"][0]
    assert 0.5 < fit <= 1
    assert results.importance(rows[:7], SPACE) == (None, None)
    assert results.importance([{**row, "val_accuracy": 0.5} for row in rows], SPACE) == (None, None)
    halves = [{**row, "epochs": 1 + i % 2} for i, row in enumerate(rows)]
    assert "epochs" in results.importance(halves, SPACE)[0]


def test_a_search_resumes_in_the_middle_of_a_trial(command, tmp_path, no_pictures, table, monkeypatch, capsys):
    """With a real training; the folder is copied as a kill after its first epoch would leave it."""
    search_dir, killed_dir = tmp_path / "search", tmp_path / "killed"
    command += ["--trials", "1", "--train-limit", "64", "--validation-limit", "32"]
    write_checkpoint = callbacks.Checkpoints.on_epoch_end

    def write_and_copy(self, epoch, logs=None):
        write_checkpoint(self, epoch, logs)
        if epoch == 0:
            shutil.copytree(search_dir, killed_dir)

    monkeypatch.setattr(callbacks.Checkpoints, "on_epoch_end", write_and_copy)
    assert _search(command) == 0
    monkeypatch.setattr(callbacks.Checkpoints, "on_epoch_end", write_checkpoint)
    assert not (killed_dir / "trials.csv").exists()  # written at the end of a trial
    capsys.readouterr()
    assert _search([*command, "--search-dir", str(killed_dir)]) == 0
    assert "resuming after epoch 1" in capsys.readouterr().out
    [row], [expected] = table(killed_dir), table(search_dir)
    assert row["status"] == "completed" and [row[name] for name in SPACE] == [expected[name] for name in SPACE]
    report = runs.read_json(killed_dir / "trials" / "0" / "report.json")
    assert report["test"] is None  # the test images are not used
    assert float(row["val_accuracy"]) == pytest.approx(report["validation"]["top1"], abs=5e-5)


@pytest.mark.slow
def test_a_search_resumes_after_sigkill(command, tmp_path, table, capsys):
    search_dir = tmp_path / "search"
    words = [*command, "--trials", "2", "--epochs", "4", "--train-limit", "320", "--algorithm", "random"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cvt_keras.search", *words],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    second = search_dir / "trials" / "1" / "checkpoints"
    deadline = time.monotonic() + 300
    while not (second.exists() and any(path.name.startswith("epoch-") for path in second.iterdir())):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = (search_dir / "trials" / "0" / "report.json").stat().st_mtime_ns
    assert not (search_dir / "trials" / "1" / "report.json").exists()
    assert _search(words) == 0
    output = capsys.readouterr().out
    assert "1 trial is done" in output and "resuming after epoch" in output
    assert (search_dir / "trials" / "0" / "report.json").stat().st_mtime_ns == first
    assert [row["status"] for row in table(search_dir)] == ["completed", "completed"]
