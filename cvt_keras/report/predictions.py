"""predictions.csv: the answer of a run's network for each of its test images."""

import csv
from pathlib import Path
from typing import NamedTuple

from cvt_keras import runs
from cvt_keras.errors import RunError


class Row(NamedTuple):
    """A row of predictions.csv: the answer for a test image.

    Args:
        image: the SHA-256 of its file, as in images.csv. In a data set that is not a folder: its index in the test split.
        label: the name of its class.
        prediction: the name of the predicted class.
    """

    image: str
    label: str
    prediction: str


def from_labels(digests, labels, predicted, class_names):
    """The predictions for a test split.

    Args:
        digests: those of the `Split`, or `None`.
        labels: int `(n,)`.
        predicted: int `(n,)`.
        class_names: in the order of the labels.

    Returns:
        A list of `Row`.
    """
    images = map(str, range(len(labels))) if digests is None else digests
    return [Row(*row) for row in zip(images, *([class_names[i] for i in values] for values in (labels, predicted)))]


def write(run_dir, predictions):
    """Writes predictions.csv to a run folder, atomically."""
    runs.write_csv(Path(run_dir) / runs.PREDICTIONS, [prediction._asdict() for prediction in predictions])


def read(run_dir):
    """Reads predictions.csv from a run folder.

    Returns:
        A list of `Row`, or `None` without the file, as in runs of older versions.

    Raises:
        RunError: if the file is damaged.
    """
    path = Path(run_dir) / runs.PREDICTIONS
    try:
        with open(path, encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file)
        if tuple(header) != Row._fields:
            raise ValueError(f"its columns are {', '.join(header)}")
        return [Row(*row) for row in rows]
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, csv.Error) as error:
        hint = "Remove it: the predictions are then computed from model.keras"
        raise RunError(f"{path} is damaged: {error}", hint=hint) from error
