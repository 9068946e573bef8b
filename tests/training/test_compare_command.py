import csv
import dataclasses
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cvt_keras import cli, runs
from cvt_keras.errors import UserError
from cvt_keras.report import predictions
from cvt_keras.report.compare import Run
from cvt_keras.training.compare import parse
from cvt_keras.training.recomputed import predictions_of

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture
def two(finished, tmp_path):
    """Two copies of a finished run."""
    return [str(shutil.copytree(finished[1], tmp_path / name)) for name in ("one", "two")]


def test_a_run_stores_its_predictions(finished, untested):
    report, run_dir = finished
    rows = predictions.read(run_dir)
    assert [row.image for row in rows] == [f"{i}" for i in range(report.test["images"])]
    assert sum(row.label == row.prediction for row in rows) == round(report.test["top1"] * len(rows))
    assert {row.label for row in rows} <= set(report.class_names)
    assert not (untested / runs.PREDICTIONS).exists()


def test_predictions_that_a_run_lacks_are_computed_and_stored(two, finished, capsys):
    for folder in two:
        (Path(folder) / runs.PREDICTIONS).unlink()
    assert cli.main(["compare", *two, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["mcnemar"][0]["p_value"] == 1.0
    for name in ("one", "two"):
        assert f"{name} has no predictions.csv: computing the predictions from model.keras" in printed.err
    assert (Path(two[1]) / runs.PREDICTIONS).read_bytes() == (finished[1] / runs.PREDICTIONS).read_bytes()


@pytest.mark.parametrize(
    "changes, part",
    [({"images": 99}, "99 test images. Received: 100"), ({"top1": 0.9}, "test images correctly, but report.json says 90")],
)
def test_predictions_of_other_images_or_another_model_are_refused(two, capsys, changes, part):
    path = Path(two[1])
    (path / runs.PREDICTIONS).unlink()
    report = runs.read_json(path / runs.REPORT)
    runs.write_json(path / runs.REPORT, {**report, "test": {**report["test"], **changes}})
    run = Run("two", path, runs.read_json(path / runs.REPORT), {}, [], [])
    with pytest.raises(UserError) as error:
        predictions_of(run)
    assert part in error.value.summary
    assert not (path / runs.PREDICTIONS).exists()


def test_images_that_have_moved_are_looked_for_in_data_dir(two, tmp_path, capsys):
    (Path(two[0]) / runs.PREDICTIONS).unlink()
    assert cli.main(["compare", *two, "--json", "--data-dir", str(tmp_path / "moved")]) == 0
    [test] = json.loads(capsys.readouterr().out)["mcnemar"]
    assert test["reason"].startswith("the predictions of one are unknown: ") and str(tmp_path / "moved") in test["reason"]


def test_a_model_that_can_not_be_read_is_named(two, capsys):
    folder = Path(two[1])
    (folder / runs.PREDICTIONS).unlink()
    (folder / runs.MODEL).write_text("hello")
    assert cli.main(["compare", *two, "--json"]) == 0
    [test] = json.loads(capsys.readouterr().out)["mcnemar"]
    assert test["reason"].startswith(f"the predictions of two are unknown: {folder / runs.MODEL} is damaged")


def test_the_command_prints_a_table_and_writes_a_page(two, tmp_path, monkeypatch, capsys):
    recipe = runs.read_json(Path(two[1]) / runs.RECIPE)
    runs.write_json(Path(two[1]) / runs.RECIPE, {**recipe, "seed": 7})
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", *two]) == 0
    printed = capsys.readouterr().out
    top1 = runs.read_json(Path(two[0]) / runs.REPORT)["test"]["top1"]
    for part in ("run 1: one", "run 2: two", f"{top1:.2%}", "1.000", f"  seed: {recipe['seed']}, 7", "page is in compare.html"):
        assert part in printed, part
    assert max(map(len, printed.splitlines())) <= 80
    assert "2 runs compared" in (tmp_path / "compare.html").read_text()
    out = tmp_path / "new" / "page.html"
    assert cli.main(["compare", *two, "--out", str(out)]) == 0
    assert out.exists()


def test_csv_has_a_row_per_run_and_no_page_unless_asked(two, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", *two, "--csv"]) == 0
    first, second = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert (first["name"], second["name"], first["p_value"], second["p_value"]) == ("one", "two", "", "1.0")
    assert not (tmp_path / "compare.html").exists()
    assert cli.main(["compare", *two, "--csv", "--out", "page.html"]) == 0
    assert (tmp_path / "page.html").exists()


def test_a_run_without_test_images_shows_its_validation(two, untested, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", two[0], str(untested)]) == 0
    printed = capsys.readouterr().out
    assert "%*" in printed and "* on the validation images" in printed
    assert "run 2 can't be tested against run 1: untested was not evaluated on its test images" in printed


def test_runs_of_the_same_name_are_told_apart_by_their_paths(two, tmp_path, capsys):
    other = shutil.copytree(two[0], tmp_path / "other" / "one")
    assert cli.main(["compare", *two, str(other), "--json"]) == 0
    assert [run["name"] for run in json.loads(capsys.readouterr().out)["runs"]] == [two[0], "two", str(other)]


def test_exports_are_read_from_their_report(two, capsys):
    (Path(two[1]) / runs.EXPORT).mkdir()
    artifact = {"name": "int8", "bytes": 1000, "milliseconds": 0.5, "top1": 0.25}
    runs.write_json(Path(two[1]) / runs.EXPORT / runs.REPORT, {"artifacts": [artifact]})
    assert cli.main(["compare", *two, "--json"]) == 0
    assert [run["exports"] for run in json.loads(capsys.readouterr().out)["runs"]] == [[], [artifact]]


@pytest.mark.parametrize(
    "argv, part",
    [
        (["{one}"], "`runs` must be two or more run folders. Received: 1"),
        (["{one}", "{two}", "{one}/../one"], "`runs` must be different folders. Received twice: {one}/../one"),
        (["{one}", "{two}", "--csv", "--json"], "`csv` can't be combined with `json`. Use --csv or --json"),
        (["{one}", "{two}", "--out", "{one}"], "`out` must be a file. Received: {one}, which is a folder. Name a file in it"),
        (["{one}", "nowhere"], "`runs` must be a run folder. Received: nowhere, which does not exist"),
    ],
)
def test_wrong_arguments_end_with_2_and_one_line(two, argv, part, capsys):
    names = {"one": two[0], "two": two[1]}
    assert cli.main(["compare", *(word.format(**names) for word in argv)]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert part.format(**names) in line


def test_an_unfinished_run_ends_with_1(two, capsys):
    (Path(two[1]) / runs.REPORT).unlink()
    assert cli.main(["compare", *two]) == 1
    assert f"the run in {two[1]} is not finished: report.json is missing" in capsys.readouterr().err


def test_every_flag_is_read():
    arguments = parse(["a", "b", "--out", "c.html", "--csv", "--data-dir", "d"])
    assert {**dataclasses.asdict(arguments), "out": str(arguments.out)} == {
        **{"runs": (Path("a"), Path("b")), "out": "c.html", "csv": True, "json": False, "data_dir": "d"}
    }


# Loading Keras takes seconds.
def test_stored_predictions_are_compared_without_keras(two):
    code = "import sys; from cvt_keras import cli; print(cli.main(sys.argv[1:]), 'keras' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "compare", *two, "--csv"], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr
