import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import keras
import pytest
import tensorflow as tf

from cvt_keras import cli, runs
from cvt_keras.errors import ArgumentError, BusyError, DataError, ExportError, NoRunError, RunError
from cvt_keras.export import artifacts, export
from cvt_keras.export.verify import BOUNDS, Artifact

ROOT = Path(__file__).parent.parent.parent
OLD_RUNS = ROOT / "tests" / "golden" / "old_runs"


def _copy(trained, tmp_path):
    """A run to be damaged."""
    run_dir = tmp_path / "run"
    shutil.copytree(trained, run_dir, ignore=shutil.ignore_patterns("export"))
    return run_dir


def _another_network(run_dir):
    keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Flatten()]).save(run_dir / "model.keras")


def test_a_run_is_exported_whole(exported):
    folder = exported / "export"
    report = json.loads((folder / "report.json").read_text())
    assert [row["name"] for row in report["artifacts"]] == list(BOUNDS)
    fields = {field.name for field in dataclasses.fields(Artifact)}
    for row in report["artifacts"]:
        assert set(row) == fields
        assert row["passed"] and row["images"] == 256
        assert (exported / row["path"]).exists()
        assert 0.5 < row["agreement"] <= 1 and row["milliseconds"] > 0
        assert row["runtime"].startswith("TensorFlow" if row["name"] == "saved_model" else "LiteRT")
    kept = {row["name"]: row for row in report["artifacts"]}
    assert kept["int8"]["float_tensors"] == {}
    assert kept["float32"]["top1"] == pytest.approx(
        json.loads((exported / "report.json").read_text())["test"]["top1"], abs=0.01
    )
    assert (folder / "labels.txt").read_text().splitlines()[:2] == ["airplane", "automobile"]
    assert not list(folder.glob(".*"))
    page = (exported / "report.html").read_text()
    assert "<h2>Exports</h2>" in page and "dynamic int8" in page


@pytest.mark.parametrize("name, formats", [("plain", ("float32", "int8")), ("qat", ("int8",))])
def test_a_run_of_version_0_1_is_exported_away_from_the_checkout(name, formats, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with tarfile.open(OLD_RUNS / f"{name}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    written = export(name, formats, verify_images=64)
    assert [artifact.name for artifact in written] == list(formats)
    assert all(artifact.passed and artifact.images == 64 for artifact in written)
    report = json.loads((tmp_path / name / "export" / "report.json").read_text())
    assert report["artifacts"] == [dataclasses.asdict(artifact) for artifact in written]
    assert set(report) == {
        *("artifacts", "calibration_images", "data_note", "dataset", "held_out", "held_out_note", "versions"),
    }
    assert (report["held_out"], report["held_out_note"]) == ("verified", "")  # a set with fixed splits
    assert (report["dataset"], report["calibration_images"]) == ("digits", 0 if name == "qat" else 99)  # of 128
    assert all((tmp_path / name / artifact.path).stat().st_size == artifact.bytes for artifact in written)


def test_help_and_refused_flags_load_neither_keras_nor_tensorflow():
    for module in ("export", "export.web", "export.serving.client"):
        code = (
            "import sys\n"
            "sys.modules['keras'] = sys.modules['tensorflow'] = None  # what Python does with it: every import fails\n"
            "from cvt_keras import cli\n"
            f"from cvt_keras.{module} import __name__ as imported\n"
            "name = {'export': 'export', 'web': 'web', 'client': 'classify'}[imported.rpartition('.')[2]]\n"
            "for flags, code in (['--help'], 0), (['x', '--no-such-flag'], 2):\n"
            "    try:\n        cli.main([name, *flags])\n"
            "    except SystemExit as ended:\n        assert ended.code == code\n"
            "    else:\n        raise AssertionError(flags)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"usage: cvt-keras {'classify' if 'client' in module else module.rpartition('.')[2]} " in done.stdout


@pytest.mark.parametrize("module", ["export", "export.web", "export.serving.client"])
def test_the_modules_run_from_a_checkout(module):
    done = subprocess.run([sys.executable, "-m", module, "x", "--no-such-flag"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "--no-such-flag" in done.stderr and "cvt-keras" in done.stderr


def test_another_export_is_the_next_version_and_keeps_the_other_rows(exported, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(exported, run_dir)
    assert cli.main(["export", str(run_dir), "--formats", "saved_model", "--verify-images", "20"]) == 0
    assert sorted(path.name for path in (run_dir / "export" / "saved_model").iterdir()) == ["1", "2"]
    rows = json.loads((run_dir / "export" / "report.json").read_text())["artifacts"]
    assert [row["name"] for row in rows] == list(BOUNDS)
    assert [row["images"] for row in rows] == [20, 256, 256, 256, 256]
    assert rows[0]["path"] == "export/saved_model/2"


def test_what_is_out_of_its_bounds_fails_and_is_not_put_in_place(trained, tmp_path, monkeypatch, capsys):
    run_dir = _copy(trained, tmp_path)
    monkeypatch.setitem(BOUNDS, "float16", dataclasses.replace(BOUNDS["float16"], max_abs_diff=0.0))
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    assert cli.main(["export", str(run_dir), "--formats", "float16", "float32", "--verify-images", "20"]) == 1
    out, err = capsys.readouterr()
    [line] = err.strip().splitlines()[-1:]
    rows = {row["name"]: row for row in json.loads((run_dir / "export" / "report.json").read_text())["artifacts"]}
    assert "float16 is out of its bounds in max_abs_diff (0.0 at most)" in line
    assert f"Test image {rows['float16']['worst_image']} differs most" in line
    assert (rows["float16"]["passed"], rows["float32"]["passed"]) == (False, True)
    assert re.search(r"│ float16 .* no +│", out) and re.search(r"│ float32 .* yes +│", out)
    assert [path.name for path in (run_dir / "export" / "tflite").iterdir()] == ["float32.tflite"]
    assert "FAILED: max_abs_diff" in (run_dir / "report.html").read_text()


@pytest.mark.parametrize(
    "damage, arguments, kind, argument, part",
    [
        (shutil.rmtree, {}, NoRunError, "run_dir", "must be a run folder"),
        (
            lambda run_dir: (run_dir / "model.keras").unlink(),
            {},
            RunError,
            "run_dir",
            "is not finished: model.keras is missing",
        ),
        (
            lambda run_dir: (run_dir / "report.json").unlink(),
            {},
            RunError,
            "run_dir",
            "is not finished: report.json is missing",
        ),
        (lambda run_dir: (run_dir / "model.keras").write_text("hello"), {}, RunError, None, "model.keras is damaged"),
        (_another_network, {}, RunError, None, "model.keras can't be read: `model` must be a `CvT`"),
        (lambda run_dir: (run_dir / "recipe.json").write_text("{"), {}, RunError, None, "recipe.json is damaged"),
        (lambda run_dir: (run_dir / "recipe.json").write_text('{"epoch": 1}'), {}, RunError, None, "Received: epoch"),
        (lambda run_dir: None, {"data_dir": "nowhere"}, DataError, "data_dir", "nowhere"),
        (lambda run_dir: None, {"verify_images": 0}, ArgumentError, "verify_images", "verify_images=0"),
        (lambda run_dir: None, {"formats": ["onnx"]}, ArgumentError, "formats", "saved_model, float32"),
        (lambda run_dir: None, {"formats": ()}, ArgumentError, "formats", "formats=[]"),
    ],
)
def test_bad_input_raises_and_leaves_nothing(damage, arguments, kind, argument, part, trained, tmp_path):
    run_dir = _copy(trained, tmp_path)
    damage(run_dir)
    with pytest.raises(kind) as raised:
        export(run_dir, **arguments)
    assert raised.value.argument == argument and part in raised.value.summary
    assert not (run_dir / "export").exists()


def test_images_of_other_classes_are_refused(trained, tmp_path):
    run_dir = _copy(trained, tmp_path)
    recipe = json.loads((run_dir / "recipe.json").read_text())
    (run_dir / "recipe.json").write_text(json.dumps({**recipe, "dataset": "digits"}))
    with pytest.raises(RunError) as raised:
        export(run_dir)
    assert raised.value.argument == "data_dir" and "digits" in raised.value.summary
    assert not (run_dir / "export").exists()


def test_the_command_tells_bad_input_in_a_line(tmp_path, capsys):
    assert cli.main(["export", str(tmp_path)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("cvt-keras export: `run` must be a run folder. ")


def test_a_full_disk_leaves_nothing_half_written(trained, tmp_path, monkeypatch, capsys):
    def full(written, path):
        raise OSError(28, "No space left on device", str(path))

    run_dir = _copy(trained, tmp_path)
    monkeypatch.setattr(runs, "place", full)
    assert cli.main(["export", str(run_dir), "--formats", "float32", "--verify-images", "20"]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert str(run_dir / "export") in line and "No space left on device" in line
    assert not list((run_dir / "export").iterdir())


def test_another_export_at_work_is_told(trained, tmp_path):
    run_dir = _copy(trained, tmp_path)
    (run_dir / "export").mkdir()
    with runs.lock(run_dir / "export"), pytest.raises(BusyError):
        export(run_dir, ["float32"], verify_images=20)


def test_another_backend_is_told_in_a_line(trained):
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    done = subprocess.run(
        [sys.executable, "-m", "export", str(trained)], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("cvt-keras export: ") and line.endswith("Set KERAS_BACKEND=tensorflow")


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_waits_until_a_file_is_written_and_leaves_nothing_half_written(
    number, code, heard, trained, tmp_path, monkeypatch, capsys
):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    written = []

    def convert(*_):
        signal.raise_signal(number)
        written.append("whole")
        return b"whole"

    run_dir = _copy(trained, tmp_path)
    monkeypatch.setattr(artifacts.tflite, "convert", convert)
    assert cli.main(["export", str(run_dir), "--formats", "float32"]) == code
    assert written == ["whole"]
    assert "stopped" in capsys.readouterr().err
    assert [path.name for path in (run_dir / "export").iterdir()] == ["labels.txt"]


def test_a_file_that_can_not_grow_leaves_nothing_half_written(trained, tmp_path):
    """Of TensorFlow's own writes, as on a full disk: not Python's errors."""
    run_dir = _copy(trained, tmp_path)
    export(run_dir, ["float32"], verify_images=5)  # what comes before the write is loaded
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(ExportError) as raised:
            export(run_dir, ["saved_model"], verify_images=5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "saved_model" in raised.value.summary
    assert sorted(path.name for path in (run_dir / "export").iterdir()) == ["labels.txt", "report.json", "tflite"]


def test_what_was_done_before_a_failure_stands_in_the_report(trained, tmp_path, monkeypatch):
    def fail(*_):
        raise tf.errors.ResourceExhaustedError(None, None, "No space left on device\nmore")

    run_dir = _copy(trained, tmp_path)
    monkeypatch.setattr(artifacts.saved_model, "write", fail)
    with pytest.raises(ExportError) as raised:
        export(run_dir, ["float32", "saved_model"], verify_images=5)
    assert "saved_model" in raised.value.summary and raised.value.summary.endswith("No space left on device")
    report = json.loads((run_dir / "export" / "report.json").read_text())
    assert [row["name"] for row in report["artifacts"]] == ["float32"]
    assert "calibration_images" not in report  # no int8 was made
    assert "float32" in (run_dir / "report.html").read_text()
    assert (run_dir / "export" / "labels.txt").exists()


def test_ctrl_c_leaves_nothing_half_written(trained, tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    run_dir = _copy(trained, tmp_path)
    monkeypatch.setattr(artifacts, "verify", stop)
    assert cli.main(["export", str(run_dir), "--formats", "float32"]) == 130
    assert "stopped" in capsys.readouterr().err
    assert [path.name for path in (run_dir / "export").iterdir()] == ["labels.txt"]
