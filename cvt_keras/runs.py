"""The run folder: what lies in it, and writes that are whole or absent."""

import contextlib
import csv
import json
import os
import shutil
from pathlib import Path

RECIPE = "recipe.json"
HISTORY = "history.csv"
MODEL = "model.keras"
REPORT = "report.json"
PAGE = "report.html"
PLOTS = "plots"
TENSORBOARD = "tensorboard"
CHECKPOINTS = "checkpoints"
EXPORT = "export"


def require_vacant(run_dir):
    """A run is never overwritten.

    Raises:
        FileExistsError: if `run_dir` is there and anything but an empty folder.
    """
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise FileExistsError(
            f"`run_dir` already holds something: {run_dir}. Go on with it by --resume, or name another with --run-dir"
        )


@contextlib.contextmanager
def whole(path):
    """Gives a path beside `path` to write to, and puts the file in its place once it is whole.

    If the block raises, nothing is left at either.
    """
    path = Path(path)
    aside = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield aside
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path):
    """The same for a folder that is not there yet: it appears with all its files or not at all."""
    path = Path(path)
    aside = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        aside.mkdir(parents=True)
        yield aside
        for file in aside.iterdir():
            with open(file, "rb+") as written:
                os.fsync(written.fileno())
        os.rename(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


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
    """Reads what `write_json` wrote."""
    return json.loads(Path(path).read_text())
