import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from cvt_keras import runs
from cvt_keras.errors import BusyError, OccupiedError, RunError


def test_json_survives_a_file(tmp_path):
    runs.write_json(tmp_path / "report.json", {"top1": 0.5, "test": None})
    assert runs.read_json(tmp_path / "report.json") == {"top1": 0.5, "test": None}
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_failed_write_does_not_change_the_file(tmp_path):
    path = tmp_path / "report.json"
    with pytest.raises(RuntimeError), runs.whole(path) as unfinished:
        unfinished.write_text("half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())

    path.write_text("before")
    with pytest.raises(RuntimeError), runs.whole(path) as unfinished:
        unfinished.write_text("half")
        raise RuntimeError
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_vacant_folder_does_not_exist_or_is_empty(tmp_path):
    runs.require_vacant(tmp_path / "absent")
    runs.require_vacant(tmp_path)
    (tmp_path / ".123-recipe.json").touch()  # left by a run that was killed at its start
    runs.require_vacant(tmp_path)
    (tmp_path / "file").touch()
    for folder in (tmp_path, tmp_path / "file"):
        with pytest.raises(OccupiedError) as error:
            runs.require_vacant(folder)
        assert error.value.argument == "run_dir" and "--resume" not in error.value.hint
        assert error.value.summary.endswith(str(folder))
    (tmp_path / "recipe.json").touch()
    with pytest.raises(OccupiedError) as error:
        runs.require_vacant(tmp_path)
    assert error.value.argument == "run_dir" and "--resume" in error.value.hint
    assert error.value.summary.endswith(str(tmp_path))


@pytest.mark.skipif(runs.fcntl is None, reason="Windows has no such locks")
def test_a_run_folder_is_for_one_process_at_a_time(tmp_path):
    with (
        runs.lock(tmp_path),
        pytest.raises(BusyError) as error,
        runs.lock(tmp_path),
    ):
        pass
    assert str(tmp_path) in error.value.summary
    with runs.lock(tmp_path):
        assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_accepted(tmp_path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(95, "Operation not supported")

    for fcntl in (SimpleNamespace(flock=refuse, LOCK_EX=0, LOCK_NB=0), None):
        monkeypatch.setattr(runs, "fcntl", fcntl)
        with runs.lock(tmp_path):
            pass


def test_sweep_removes_unfinished_files_only(tmp_path):
    kept = {".keep", "history.csv", "checkpoints/epoch-0001/a", "export/.7-int8.tflite"}
    unfinished = {".7-history.csv", "plots/.7-curves.png", "checkpoints/.7-epoch-0002/.7-state.json"}
    for name in kept | unfinished:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    runs.sweep(tmp_path)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == kept
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["epoch-0001"]


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe"])
def test_damaged_json_is_named(tmp_path, content):
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(RunError) as error:
        runs.read_json(tmp_path / "report.json")
    assert error.value.summary.startswith(f"{tmp_path}/report.json ")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads the path of a descriptor in Linux' /proc")
def test_files_and_folders_are_synced(tmp_path, monkeypatch):
    synced, original = [], os.fsync

    def fsync(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    unfinished = f"{tmp_path}/.{os.getpid()}-"
    runs.write_json(tmp_path / "report.json", {})
    assert synced == [f"{unfinished}report.json", str(tmp_path)]
    synced.clear()
    with runs.whole_folder(tmp_path / "folder") as folder:
        (folder / "one").touch()
    assert synced == [f"{unfinished}folder/one", f"{unfinished}folder", str(tmp_path)]


def test_a_folder_appears_complete_or_not_at_all(tmp_path):
    with runs.whole_folder(tmp_path / "folder") as unfinished:
        (unfinished / "one").write_text("1")
        assert not (tmp_path / "folder").exists()
    assert (tmp_path / "folder" / "one").read_text() == "1"
    with pytest.raises(RuntimeError), runs.whole_folder(tmp_path / "other") as unfinished:
        (unfinished / "one").write_text("1")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_table_has_a_column_for_each_key(tmp_path):
    runs.write_csv(tmp_path / "history.csv", [{"epoch": 0, "loss": 0.5}, {"epoch": 1, "loss": 0.25}])
    assert (tmp_path / "history.csv").read_text().split() == ["epoch,loss", "0,0.5", "1,0.25"]
    assert [path.name for path in tmp_path.iterdir()] == ["history.csv"]


def test_scratch_removes_everything_that_is_not_placed(tmp_path):
    (tmp_path / ".123-scratch").mkdir()  # left by a process that was killed
    with pytest.raises(RuntimeError), runs.scratch(tmp_path) as scratch:
        assert [path.name for path in tmp_path.iterdir()] == [scratch.name]
        (scratch / "file").write_text("whole")
        (scratch / "folder" / "deep").mkdir(parents=True)
        (scratch / "folder" / "deep" / "file").write_text("whole")
        (scratch / "other").write_text("half")
        runs.place(scratch / "file", tmp_path / "file")
        runs.place(scratch / "folder", tmp_path / "folder")
        raise RuntimeError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "folder" / "deep" / "file").read_text() == "whole"


def test_epochs_of_a_history_start_from_1_even_if_version_0_1_wrote_it(tmp_path):
    for first in (0, 1):
        runs.write_csv(
            tmp_path / "history.csv", [{"epoch": first + i, "val_accuracy": 0.1 * i, "seconds": 2} for i in range(2)]
        )
        rows = runs.read_history(tmp_path)
        assert rows == [{"epoch": 1, "val_accuracy": 0.0, "seconds": 2.0}, {"epoch": 2, "val_accuracy": 0.1, "seconds": 2.0}]
        assert isinstance(rows[0]["epoch"], int)
    assert runs.from_one([]) == []


@pytest.mark.parametrize("content", ["epoch,seconds\n1,x\n", "seconds\n1\n", "epoch,seconds\n1\n"])
def test_a_damaged_history_is_named(tmp_path, content):
    (tmp_path / "history.csv").write_text(content)
    with pytest.raises(RunError) as error:
        runs.read_history(tmp_path)
    assert f"{tmp_path}/history.csv" in error.value.summary
