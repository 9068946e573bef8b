"""The run folder: the names of its files, and atomic writes."""

import contextlib
import csv
import json
import os
import re
import shutil
from pathlib import Path

from cvt_keras.errors import ArgumentError, BusyError, NoRunError, OccupiedError, RunError

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

RECIPE = "recipe.json"
IMAGES = "images.csv"
PREDICTIONS = "predictions.csv"
HISTORY = "history.csv"
MODEL = "model.keras"
REPORT = "report.json"
PAGE = "report.html"
PLOTS = "plots"
TENSORBOARD = "tensorboard"
CHECKPOINTS = "checkpoints"
EXPORT = "export"


def require_run(run_dir, argument="run_dir"):
    """Raises unless `run_dir` holds a run.

    Args:
        run_dir: a path.
        argument: the name of the caller's argument, for the error.

    Raises:
        NoRunError: if it holds none.
    """
    if not (run_dir / RECIPE).exists():
        fault = "holds no run" if run_dir.exists() else "does not exist"
        raise NoRunError(
            f"`{argument}` must be a run folder. Received: {run_dir}, which {fault}",
            argument=argument,
            hint="Use a folder that cvt-keras train, prune, cluster or qat wrote",
        )


def require_finished(run_dir, argument="run_dir"):
    """Raises unless `run_dir` holds a finished run.

    Args:
        run_dir: a path.
        argument: the name of the caller's argument, for the error.

    Raises:
        NoRunError: if it holds no run.
        RunError: if the run is not finished.
    """
    require_run(run_dir, argument)
    if missing := [name for name in (MODEL, REPORT, HISTORY) if not (run_dir / name).exists()]:
        raise RunError(
            f"the run in {run_dir} is not finished: {missing[0]} is missing",
            argument=argument,
            hint="Resume it with the command that started it, and --resume",
        )


def require_vacant(run_dir):
    """Raises unless a new run can be written to `run_dir`.

    Raises:
        OccupiedError: if `run_dir` exists and is not an empty folder.
    """
    another = "Choose another folder with --run-dir"
    if run_dir.exists() and not run_dir.is_dir():
        raise OccupiedError(f"`run_dir` is not a folder: {run_dir}", argument="run_dir", hint=another)
    if (run_dir / RECIPE).exists():
        raise OccupiedError(
            f"`run_dir` already holds a run: {run_dir}",
            argument="run_dir",
            hint="Resume it with --resume, or choose another folder with --run-dir",
        )
    if run_dir.exists() and not all(is_unfinished(path) for path in run_dir.iterdir()):
        raise OccupiedError(f"`run_dir` is not empty and holds no run: {run_dir}", argument="run_dir", hint=another)


def require_writable(folder, argument="run_dir"):
    """Raises unless `folder` can be created and written to. Called before data is downloaded.

    Args:
        folder: a path.
        argument: the name of the caller's argument, for the error.

    Raises:
        RunError: if it can't.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        reason = f"No permission to write to {nearest}" if nearest.is_dir() else f"{nearest} is a file"
        raise RunError(
            f"`{argument}` can't be written: {folder}. {reason}",
            argument=argument,
            hint=f"Choose another place with --{argument.replace('_', '-')}",
        )


def require_writable_file(path, argument):
    """Raises unless a file can be written. Called before the work.

    Args:
        path: the file.
        argument: the name of the caller's argument, for the error.

    Raises:
        ArgumentError: if `path` is a folder.
        RunError: if its folder can't be written to.
    """
    if path.is_dir():
        raise ArgumentError(
            f"`{argument}` must be a file. Received: {path}, which is a folder", argument=argument, hint="Name a file in it"
        )
    require_writable(path.parent, argument)


@contextlib.contextmanager
def lock(folder):
    """Locks a folder for this process during the block. The lock ends with the process, even if it is killed.

    Locks the folder itself: a lock file, as of `filelock`, would stay in the run folder.

    Raises:
        BusyError: if another process holds the lock.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(
                f"another process is writing to {folder}", hint="Wait until it ends, or choose another folder"
            ) from error
        except OSError:
            pass  # a file system without locks, such as some network file systems
        yield
    finally:
        os.close(descriptor)


def sweep(run_dir):
    """Removes the unfinished files of a training that was killed. Leaves `EXPORT` alone, where an export may be running."""
    for folder in (run_dir, run_dir / CHECKPOINTS, run_dir / PLOTS):
        remove_unfinished(folder)


@contextlib.contextmanager
def whole(path):
    """Writes a file atomically: yields a temporary path in the same folder, and moves it to `path` after the block.

    If the block raises, the temporary file is removed and `path` stays as it was.
    """
    path = Path(path)
    unfinished = _unfinished(path)
    try:
        yield unfinished
        place(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path):
    """Like `whole`, for a folder that does not exist yet."""
    path = Path(path)
    unfinished = _unfinished(path)
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        place(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextlib.contextmanager
def scratch(folder):
    """Yields a temporary folder in `folder`, and removes it after the block. `place` moves a file out of it.

    Also removes the unfinished files of processes that were killed, so the caller must hold the lock of `folder`.
    """
    remove_unfinished(folder)
    temporary = _unfinished(folder / "scratch")
    try:
        temporary.mkdir()
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def place(written, path):
    """Moves a finished file or folder to its place, after an fsync. A folder must not exist there yet."""
    for part in (*(written.rglob("*") if written.is_dir() else ()), written):
        _sync(part)
    os.replace(written, path)
    _sync(path.parent)


def _unfinished(path):
    return path.with_name(f".{os.getpid()}-{path.name}")


def remove_unfinished(folder):
    """Removes the files and folders that killed processes left unfinished in a folder. Does not search its subfolders."""
    for path in filter(is_unfinished, folder.glob(".*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def is_unfinished(path):
    """Whether this is the temporary path of a file or folder that is being written."""
    return re.match(r"\.\d+-", path.name) is not None


def _sync(path):
    """Calls fsync on a file or folder, so that it survives a power cut."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return  # Windows can't open a folder
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_csv(path, rows):
    """Writes a list of dicts with the same keys atomically."""
    with whole(path) as unfinished, open(unfinished, "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, rows[0] if rows else ())
        table.writeheader()
        table.writerows(rows)


def read_history(run_dir):
    """Reads the history.csv of a run.

    Returns:
        A dict per epoch: `"epoch"` is an int from 1, the other values are floats.

    Raises:
        RunError: if the file is damaged.
    """
    path = Path(run_dir) / HISTORY
    try:
        with open(path, newline="") as file:
            rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
        return from_one([{**row, "epoch": int(row["epoch"])} for row in rows])
    except (ValueError, TypeError, LookupError) as error:
        raise RunError(f"{path} is damaged: {error}") from error


def from_one(history):
    """Renumbers the epochs of a history to start from 1. Version 0.1 started from 0."""
    first = history[0]["epoch"] if history else 1
    return [{**row, "epoch": row["epoch"] + 1 - first} for row in history]


def write_json(path, value):
    """Writes `value` atomically as JSON."""
    with whole(path) as unfinished:
        unfinished.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path):
    """Reads a JSON file.

    Raises:
        RunError: if it is damaged.
    """
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}") from error
