"""The run folder: what lies in it, and writes that are whole or absent."""

import contextlib
import csv
import json
import os
import re
import shutil
from pathlib import Path

from cvt_keras.errors import BusyError, NoRunError, OccupiedError, RunError

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

RECIPE = "recipe.json"
IMAGES = "images.csv"
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
        argument: the name of the argument that it came from.

    Raises:
        NoRunError: if it does not.
    """
    if not (run_dir / RECIPE).exists():
        raise NoRunError(
            f"`{argument}` must be a run folder. Received: {run_dir}",
            argument=argument,
            hint="RUN is a folder that cvt-keras train has written",
        )


def require_finished(run_dir, argument="run_dir"):
    """Raises unless `run_dir` holds a run that was trained to its end.

    Args:
        run_dir: a path.
        argument: the name of the argument that it came from.

    Raises:
        NoRunError: if it holds no run.
        RunError: if its training is not finished.
    """
    require_run(run_dir, argument)
    if missing := [name for name in (MODEL, REPORT, HISTORY) if not (run_dir / name).exists()]:
        raise RunError(
            f"the run in {run_dir} is not finished: it has no {missing[0]}",
            argument=argument,
            hint="Finish its training with --resume",
        )


def require_vacant(run_dir):
    """Raises unless a new run can be written to `run_dir`.

    Raises:
        OccupiedError: if `run_dir` exists and is not an empty folder.
    """
    another = "Name another with --run-dir"
    if run_dir.exists() and not run_dir.is_dir():
        raise OccupiedError(f"`run_dir` is not a folder: {run_dir}", argument="run_dir", hint=another)
    if (run_dir / RECIPE).exists():
        raise OccupiedError(
            f"`run_dir` already holds a run: {run_dir}",
            argument="run_dir",
            hint="Continue it with --resume, or name another with --run-dir",
        )
    if run_dir.exists() and not all(is_aside(path) for path in run_dir.iterdir()):
        raise OccupiedError(f"`run_dir` holds something that is not a run: {run_dir}", argument="run_dir", hint=another)


def require_writable(folder, argument="run_dir"):
    """Raises unless `folder` can be created and written to. Called before data is downloaded for it.

    Args:
        folder: a path.
        argument: the name of the argument that it came from.

    Raises:
        RunError: if it can't be.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise RunError(
            f"`{argument}` can't be written: {folder}, as nothing may be written to {nearest}",
            argument=argument,
            hint=f"Name another with --{argument.replace('_', '-')}",
        )


@contextlib.contextmanager
def lock(folder):
    """Keeps other processes out of a folder during the block. A process that is killed leaves no lock behind.

    By hand, as `filelock` locks a file, which would stay in the run folder; this locks the folder itself.

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
                f"another process is writing to {folder}", hint="Wait until it ends, or work in another folder"
            ) from error
        except OSError:
            pass  # a file system without locks, as of some networks
        yield
    finally:
        os.close(descriptor)


def sweep(run_dir):
    """Removes what a training that was killed left half-written; an export may be at work in its own folder."""
    for folder in (run_dir, run_dir / CHECKPOINTS, run_dir / PLOTS):
        remove_asides(folder)


@contextlib.contextmanager
def whole(path):
    """Gives a path beside `path` to write to, and puts the file in its place once it is whole.

    If the block raises, nothing is left at either.
    """
    path = Path(path)
    aside = _aside(path)
    try:
        yield aside
        place(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path):
    """The same for a folder that is not there yet: it appears with all its files or not at all."""
    path = Path(path)
    aside = _aside(path)
    try:
        aside.mkdir(parents=True)
        yield aside
        place(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def scratch(folder):
    """Gives a folder in `folder` to write to; what is not moved out of it by `place` is gone at the end.

    What a process that was killed left of its own is removed too: enter it with a lock on `folder`.
    """
    remove_asides(folder)
    aside = _aside(folder / "scratch")
    try:
        aside.mkdir()
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def place(written, path):
    """Moves a file, or a folder that is not there yet, to where readers look for it: it appears whole."""
    for part in (*(written.rglob("*") if written.is_dir() else ()), written):
        _sync(part)
    os.replace(written, path)
    _sync(path.parent)


def _aside(path):
    return path.with_name(f".{os.getpid()}-{path.name}")


def remove_asides(folder):
    """Removes what a process that was killed left half-written in a folder; not in the folders of it."""
    for path in filter(is_aside, folder.glob(".*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def is_aside(path):
    """Whether it is something half-written."""
    return re.match(r"\.\d+-", path.name) is not None


def _sync(path):
    """Calls fsync on a file, or on a folder's list of files, so that it survives a power cut."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_csv(path, rows):
    """Writes a list of dicts with the same keys, whole or not at all."""
    with whole(path) as aside, open(aside, "w", newline="") as file:
        table = csv.DictWriter(file, rows[0] if rows else ())
        table.writeheader()
        table.writerows(rows)


def read_history(run_dir):
    """The epochs of a run, from its history.csv.

    Returns:
        A dict per epoch: `"epoch"`, an int from 1, and floats.

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
    """A history with epochs that count from 1; version 0.1 counted from 0."""
    first = history[0]["epoch"] if history else 1
    return [{**row, "epoch": row["epoch"] + 1 - first} for row in history]


def write_json(path, value):
    """Writes `value` whole or not at all."""
    with whole(path) as aside:
        aside.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path):
    """Reads what `write_json` wrote.

    Raises:
        RunError: if it is no JSON.
    """
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}") from error
