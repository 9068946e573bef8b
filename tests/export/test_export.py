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
import numpy as np
import pytest
import tensorflow as tf

from cvt_keras import Preprocessing, cli, runs
from cvt_keras.data import sources
from cvt_keras.data.images import fit
from cvt_keras.errors import ArgumentError, BusyError, DataError, ExportError, NoRunError, RunError
from cvt_keras.export import artifacts, export, verify
from cvt_keras.export.verify import BOUNDS, DEFAULT_FORMATS, Artifact

ROOT = Path(__file__).parent.parent.parent
OLD_RUNS = ROOT / "tests" / "golden" / "old_runs"


@pytest.fixture
def verified_in_process(monkeypatch):
    """Runs artifacts in this process and hardly times them, which saves seconds per file."""

    def in_process(name, file, path, images, labels, expected, bounds, **options):
        return verify.compare(name, file, path, labels, expected, verify.answer(file, np.load(images), **options), bounds)

    monkeypatch.setattr(artifacts, "verify", in_process)
    monkeypatch.setattr(verify, "TIMED", 1)
    monkeypatch.setattr(verify, "WARM_UP", 0)
    for name in ("set_intra_op_parallelism_threads", "set_inter_op_parallelism_threads"):
        monkeypatch.setattr(tf.config.threading, name, lambda threads: None)  # TensorFlow has started already


@pytest.fixture
def written_before(exported, monkeypatch):
    """Takes the files of `exported` in place of new ones, which are the same."""
    folder = exported / "export"
    monkeypatch.setattr(artifacts.tflite, "convert", lambda *args: (folder / "tflite" / f"{args[2]}.tflite").read_bytes())
    monkeypatch.setattr(artifacts.saved_model, "write", lambda *args: shutil.copytree(folder / "saved_model" / "1", args[-1]))


def _copy(trained, tmp_path):
    """A copy of the run without its export."""
    run_dir = tmp_path / "run"
    shutil.copytree(trained, run_dir, ignore=shutil.ignore_patterns("export"))
    return run_dir


def _save_another_network(run_dir):
    keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Flatten()]).save(run_dir / "model.keras")


def test_every_default_format_is_exported_and_reported(exported):
    folder = exported / "export"
    report = json.loads((folder / "report.json").read_text())
    assert [row["name"] for row in report["artifacts"]] == list(DEFAULT_FORMATS)
    fields = {field.name for field in dataclasses.fields(Artifact)}
    for row in report["artifacts"]:
        assert set(row) == fields
        assert row["passed"] and row["images"] == 256
        assert (exported / row["path"]).exists()
        assert 0.5 < row["agreement"] <= 1 and row["milliseconds"] > 0
        assert row["runtime"].startswith("TensorFlow" if row["name"] == "saved_model" else "LiteRT")
    rows = {row["name"]: row for row in report["artifacts"]}
    assert rows["int8"]["float_tensors"] == {}
    assert rows["float32"]["top1"] == pytest.approx(
        json.loads((exported / "report.json").read_text())["test"]["top1"], abs=0.01
    )
    assert (folder / "labels.txt").read_text().splitlines()[:2] == ["airplane", "automobile"]
    assert not list(folder.glob(".*"))
    page = (exported / "report.html").read_text()
    assert "<h2>Exports</h2>" in page and "dynamic int8" in page


def test_a_run_that_crops_is_calibrated_and_verified_on_middles(trained, cifar10_dir, tmp_path, monkeypatch):
    run_dir, used = _copy(trained, tmp_path), {}
    real = artifacts.preprocessing_of
    resizing = {"resize": "crop", "crop_pct": 0.6, "interpolation": "bicubic"}
    monkeypatch.setattr(artifacts, "preprocessing_of", lambda classifier: real(classifier).replace(**resizing))
    recipe = json.loads((run_dir / "recipe.json").read_text())
    (run_dir / "recipe.json").write_text(json.dumps({**recipe, **resizing}))

    def write(classifier, class_names, name, calibration, file):
        used["calibration"] = calibration
        file.touch()

    def verify(name, file, path, images, labels, expected, bounds, **options):
        used.update(images=np.load(images), frame=options["frame"])
        raise ExportError("enough")

    monkeypatch.setattr(artifacts, "_write", write)
    monkeypatch.setattr(artifacts, "verify", verify)
    with pytest.raises(ExportError, match="enough"):
        export(run_dir, "int8", verify_images=5)
    test = sources.load("cifar10", str(cifar10_dir)).test.images[:5]
    crop = Preprocessing(image_size=(24, 40), **resizing)
    np.testing.assert_array_equal(used["images"], fit(test, crop))
    assert used["calibration"].shape[1:] == (24, 40, 3)
    assert used["frame"] == (40, 66)


@pytest.mark.parametrize("name", ["plain", "qat"])
def test_a_run_of_version_0_1_is_exported_outside_the_checkout(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with tarfile.open(OLD_RUNS / f"{name}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    [artifact] = export(name, "int8", verify_images=64)
    assert (artifact.name, artifact.passed, artifact.images) == ("int8", True, 64)
    report = json.loads((tmp_path / name / "export" / "report.json").read_text())
    assert report["artifacts"] == [dataclasses.asdict(artifact)]
    assert set(report) == {
        *("artifacts", "calibration", "calibration_images", "data_note", "dataset", "held_out", "held_out_note", "versions"),
    }
    assert (report["held_out"], report["held_out_note"]) == ("verified", "")  # a set with fixed splits
    assert (report["dataset"], report["calibration_images"]) == ("digits", 0 if name == "qat" else 99)  # of 128
    assert (tmp_path / name / artifact.path).stat().st_size == artifact.bytes


@pytest.mark.usefixtures("verified_in_process", "written_before")
def test_a_second_export_adds_a_version_and_keeps_the_other_rows(exported, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(exported, run_dir)
    assert cli.main(["export", str(run_dir), "--formats", "saved_model", "--verify-images", "20"]) == 0
    assert sorted(path.name for path in (run_dir / "export" / "saved_model").iterdir()) == ["1", "2"]
    rows = json.loads((run_dir / "export" / "report.json").read_text())["artifacts"]
    assert [row["name"] for row in rows] == list(DEFAULT_FORMATS)
    assert [row["images"] for row in rows] == [20, 256, 256, 256, 256]
    assert rows[0]["path"] == "export/saved_model/2"


@pytest.mark.usefixtures("verified_in_process", "written_before")
def test_a_file_that_exceeds_its_bounds_fails_and_is_not_written(trained, tmp_path, monkeypatch, capsys):
    run_dir = _copy(trained, tmp_path)
    monkeypatch.setitem(BOUNDS, "float16", dataclasses.replace(BOUNDS["float16"], max_abs_diff=0.0))
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    assert cli.main(["export", str(run_dir), "--formats", "float16", "float32", "--verify-images", "20"]) == 1
    out, err = capsys.readouterr()
    [line] = err.strip().splitlines()[-1:]
    rows = {row["name"]: row for row in json.loads((run_dir / "export" / "report.json").read_text())["artifacts"]}
    assert "float16 exceeds its bounds for max_abs_diff (at most 0.0) and was not written to " in line
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
        (_save_another_network, {}, RunError, None, "model.keras can't be read: `model` must be a `CvT`"),
        (lambda run_dir: (run_dir / "recipe.json").write_text("{"), {}, RunError, None, "recipe.json is damaged"),
        (lambda run_dir: (run_dir / "recipe.json").write_text('{"epoch": 1}'), {}, RunError, None, "Received: epoch"),
        (lambda run_dir: None, {"data_dir": "nowhere"}, DataError, "data_dir", "nowhere"),
        (lambda run_dir: None, {"verify_images": 0}, ArgumentError, "verify_images", "verify_images=0"),
        (lambda run_dir: None, {"formats": ["coreml"]}, ArgumentError, "formats", "saved_model, float32"),
        (lambda run_dir: None, {"formats": ()}, ArgumentError, "formats", "formats=[]"),
    ],
)
def test_bad_input_raises_and_writes_nothing(damage, arguments, kind, argument, part, trained, tmp_path):
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


def test_the_command_reports_bad_input_in_one_line(tmp_path, capsys):
    assert cli.main(["export", str(tmp_path)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("cvt-keras export: `run` must be a run folder. ")


@pytest.mark.usefixtures("verified_in_process", "written_before")
def test_a_full_disk_leaves_nothing_half_written(trained, tmp_path, monkeypatch, capsys):
    def place(written, path):
        raise OSError(28, "No space left on device", str(path))

    run_dir = _copy(trained, tmp_path)
    monkeypatch.setattr(runs, "place", place)
    assert cli.main(["export", str(run_dir), "--formats", "float32", "--verify-images", "20"]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert str(run_dir / "export") in line and "No space left on device" in line
    assert not list((run_dir / "export").iterdir())


def test_a_run_that_is_being_exported_is_busy(trained, tmp_path):
    run_dir = _copy(trained, tmp_path)
    (run_dir / "export").mkdir()
    with runs.lock(run_dir / "export"), pytest.raises(BusyError):
        export(run_dir, ["float32"], verify_images=20)


def test_another_backend_is_refused_in_one_line(trained):
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
    converted = []

    def convert(*_):
        signal.raise_signal(number)
        converted.append(True)
        return b"complete"

    run_dir = _copy(trained, tmp_path)
    monkeypatch.setattr(artifacts.tflite, "convert", convert)
    assert cli.main(["export", str(run_dir), "--formats", "float32"]) == code
    assert converted
    assert "stopped" in capsys.readouterr().err
    assert [path.name for path in (run_dir / "export").iterdir()] == ["labels.txt"]


def test_a_disk_that_is_full_for_tensorflow_leaves_nothing_half_written(exported, tmp_path):
    """A limit on the size of files makes TensorFlow's own writes fail, not Python's."""
    run_dir = tmp_path / "run"
    shutil.copytree(exported, run_dir)
    files = sorted(path for path in (run_dir / "export").rglob("*"))
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(ExportError) as raised:
            export(run_dir, ["saved_model"], verify_images=5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "saved_model" in raised.value.summary
    assert sorted(path for path in (run_dir / "export").rglob("*")) == files


@pytest.mark.usefixtures("verified_in_process", "written_before")
def test_a_failure_keeps_the_earlier_files_in_the_report(trained, tmp_path, monkeypatch):
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


@pytest.mark.usefixtures("written_before")
def test_ctrl_c_leaves_nothing_half_written(trained, tmp_path, monkeypatch, capsys):
    def stop(*_, **options):
        raise KeyboardInterrupt

    run_dir = _copy(trained, tmp_path)
    monkeypatch.setattr(artifacts, "verify", stop)
    assert cli.main(["export", str(run_dir), "--formats", "float32"]) == 130
    assert "stopped" in capsys.readouterr().err
    assert [path.name for path in (run_dir / "export").iterdir()] == ["labels.txt"]
