"""The run folder: what lies in it, and writes that are whole or absent."""

import contextlib
import csv
import json
import os
import re
import shutil
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None

RECIPE = "recipe.json"
HISTORY = "history.csv"
MODEL = "model.keras"
REPORT = "report.json"
PAGE = "report.html"
PLOTS = "plots"
TENSORBOARD = "tensorboard"
CHECKPOINTS = "checkpoints"
EXPORT = "export"


class RunError(Exception):
    """A run folder that can't be read or written, or is in use. The message is one line: which file, and the way out."""


class BusyError(RunError):
    """A folder at which another process is at work."""


class NoRunError(RunError):
    """A folder that is no run's."""


def require_run(run_dir):
    """Told before a run is read.

    Raises:
        NoRunError: if there is no run in `run_dir`.
    """
    if not (run_dir / RECIPE).exists():
        raise NoRunError(f"`RUN` must be a run folder, which train.py writes. Received: {run_dir}")


def require_finished(run_dir):
    """Told before a run's model is used.

    Raises:
        NoRunError: if there is no run in `run_dir`.
        RunError: if it was not trained to its end.
    """
    require_run(run_dir)
    if missing := [name for name in (MODEL, REPORT, HISTORY) if not (run_dir / name).exists()]:
        raise RunError(f"{run_dir} has no {missing[0]} yet: finish its training by --resume")


def require_vacant(run_dir):
    """A run is never overwritten.

    Raises:
        FileExistsError: if `run_dir` is there and anything but an empty folder.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise FileExistsError(f"`run_dir` is no folder: {run_dir}. Name another with --run-dir")
    if (run_dir / RECIPE).exists():
        raise FileExistsError(
            f"`run_dir` already holds a run: {run_dir}. Go on with it by --resume, or name another with --run-dir"
        )
    if run_dir.exists() and not all(is_aside(path) for path in run_dir.iterdir()):
        raise FileExistsError(f"`run_dir` holds something, but no run: {run_dir}. Name another with --run-dir")


def require_writable(folder, flag="--run-dir"):
    """Told before data is downloaded for a run.

    Raises:
        RunError: if `folder`, as `flag` named it, can't be made or written to.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        name = flag.strip("-").replace("-", "_")
        raise RunError(f"`{name}` can't be {folder}: nothing may be written to {nearest}. Name another with {flag}")


@contextlib.contextmanager
def lock(folder):
    """Keeps other processes out of a folder of a run during the block; one that is killed leaves no lock behind.

    Raises:
        BusyError: if another process is in it.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(f"another process is at work in {folder}: wait for its end, or work in another folder") from error
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
    """Waits until a file, or a folder's list of files, is on the disk: a power cut takes it no more."""
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
        raise RunError(f"{path} is broken ({error})") from error
