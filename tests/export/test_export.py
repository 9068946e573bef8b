import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import keras
import pytest
import tensorflow as tf
from cvt_keras.export import __main__ as command
from cvt_keras.export.verify import BOUNDS, Artifact

from cvt_keras import runs

ROOT = Path(__file__).parent.parent.parent


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


def test_another_export_is_the_next_version_and_keeps_the_other_rows(exported, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(exported, run_dir)
    assert command.main([str(run_dir), "--formats", "saved_model", "--verify-images", "20"]) == 0
    assert sorted(path.name for path in (run_dir / "export" / "saved_model").iterdir()) == ["1", "2"]
    rows = json.loads((run_dir / "export" / "report.json").read_text())["artifacts"]
    assert [row["name"] for row in rows] == list(BOUNDS)
    assert [row["images"] for row in rows] == [20, 256, 256, 256, 256]
    assert rows[0]["path"] == "export/saved_model/2"


def test_what_is_out_of_its_bounds_fails_and_is_not_put_in_place(trained, tmp_path, monkeypatch, capsys):
    run_dir = _copy(trained, tmp_path)
    monkeypatch.setitem(BOUNDS, "float16", dataclasses.replace(BOUNDS["float16"], max_abs_diff=0.0))
    assert command.main([str(run_dir), "--formats", "float16", "float32", "--verify-images", "20"]) == 1
    [line] = capsys.readouterr().err.strip().splitlines()[-1:]
    rows = {row["name"]: row for row in json.loads((run_dir / "export" / "report.json").read_text())["artifacts"]}
    assert "float16 is out of its bounds in max_abs_diff (0.0 at most)" in line
    assert f"Test image {rows['float16']['worst_image']} differs most" in line
    assert (rows["float16"]["passed"], rows["float32"]["passed"]) == (False, True)
    assert [path.name for path in (run_dir / "export" / "tflite").iterdir()] == ["float32.tflite"]
    assert "FAILED: max_abs_diff" in (run_dir / "report.html").read_text()


@pytest.mark.parametrize(
    "damage, flags, code, part",
    [
        (shutil.rmtree, [], 2, "`RUN` must be a run folder"),
        (lambda run_dir: (run_dir / "model.keras").unlink(), [], 1, "no model.keras yet: finish its training by --resume"),
        (lambda run_dir: (run_dir / "report.json").unlink(), [], 1, "no report.json yet"),
        (lambda run_dir: (run_dir / "model.keras").write_text("hello"), [], 1, "model.keras can't be read"),
        (_another_network, [], 1, "model.keras can't be read: `model` must be a `CvT`"),
        (lambda run_dir: (run_dir / "recipe.json").write_text("{"), [], 1, "recipe.json is broken"),
        (lambda run_dir: (run_dir / "recipe.json").write_text('{"epoch": 1}'), [], 1, "no epoch"),
        (lambda run_dir: None, ["--data-dir", "nowhere"], 1, "nowhere"),
        (lambda run_dir: None, ["--verify-images", "0"], 2, "`verify_images` must be at least 1"),
    ],
)
def test_bad_input_is_told_in_a_line_and_leaves_nothing(damage, flags, code, part, trained, tmp_path, capsys):
    run_dir = _copy(trained, tmp_path)
    damage(run_dir)
    assert command.main([str(run_dir), *flags]) == code
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("export: ") and part in line
    assert not (run_dir / "export").exists()


def test_a_full_disk_leaves_nothing_half_written(trained, tmp_path, monkeypatch, capsys):
    def full(written, path):
        raise OSError(28, "No space left on device", str(path))

    run_dir = _copy(trained, tmp_path)
    monkeypatch.setattr(runs, "place", full)
    assert command.main([str(run_dir), "--formats", "float32", "--verify-images", "20"]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{run_dir / 'export'} can't be written: " in line and "No space left on device" in line
    assert not list((run_dir / "export").iterdir())


def test_another_export_at_work_is_told(trained, tmp_path, capsys):
    run_dir = _copy(trained, tmp_path)
    (run_dir / "export").mkdir()
    with runs.lock(run_dir / "export"):
        assert command.main([str(run_dir), "--formats", "float32", "--verify-images", "20"]) == 1
    assert f"another process is at work in {run_dir / 'export'}: wait for its end" in capsys.readouterr().err


def test_another_backend_is_told_in_a_line(trained):
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    done = subprocess.run(
        [sys.executable, "-m", "export", str(trained)], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "export: exports need KERAS_BACKEND=tensorflow. Received: jax"


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
    monkeypatch.setattr(command.tflite, "convert", convert)
    assert command.main([str(run_dir), "--formats", "float32"]) == code
    assert written == ["whole"]
    assert "stopped" in capsys.readouterr().err
    assert [path.name for path in (run_dir / "export").iterdir()] == ["labels.txt"]


def test_a_file_that_can_not_grow_leaves_nothing_half_written(trained, tmp_path, capsys):
    """Of TensorFlow's own writes, as on a full disk: not Python's errors."""
    run_dir = _copy(trained, tmp_path)
    command.export(run_dir, ["float32"], verify_images=5)  # what comes before the write is loaded
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        code = command.main([str(run_dir), "--formats", "saved_model", "--verify-images", "5"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 1
    assert "export: saved_model can't be made: " in capsys.readouterr().err.strip().splitlines()[-1]
    assert sorted(path.name for path in (run_dir / "export").iterdir()) == ["labels.txt", "report.json", "tflite"]


def test_what_was_done_before_a_failure_stands_in_the_report(trained, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise tf.errors.ResourceExhaustedError(None, None, "No space left on device\nmore")

    run_dir = _copy(trained, tmp_path)
    monkeypatch.setattr(command.saved_model, "write", fail)
    assert command.main([str(run_dir), "--formats", "float32", "saved_model", "--verify-images", "5"]) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].endswith("saved_model can't be made: No space left on device")
    report = json.loads((run_dir / "export" / "report.json").read_text())
    assert [row["name"] for row in report["artifacts"]] == ["float32"]
    assert "calibration_images" not in report  # no int8 was made
    assert "float32" in (run_dir / "report.html").read_text()
    assert (run_dir / "export" / "labels.txt").exists()


def test_ctrl_c_leaves_nothing_half_written(trained, tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    run_dir = _copy(trained, tmp_path)
    monkeypatch.setattr(command, "verify", stop)
    assert command.main([str(run_dir), "--formats", "float32"]) == 130
    assert "stopped" in capsys.readouterr().err
    assert [path.name for path in (run_dir / "export").iterdir()] == ["labels.txt"]
