"""The predictions of a finished run. For a run of an older version they are computed again, from its model and images."""

import contextlib
import sys

from cvt_keras import environment, runs
from cvt_keras.data import verified
from cvt_keras.errors import DataError, RunError
from cvt_keras.report import metrics, predictions
from cvt_keras.training.recipes import read_recipe

MOST_CHANGED = 0.002  # share of the test images; another device rounds differently


def predictions_of(run, data_dir=None):
    """The predictions of a run for its test images.

    Args:
        run: a `Run`.
        data_dir: the folder of the run's data set; `None` means the folder in its recipe.

    Returns:
        A list of `Row`. If the run has no predictions.csv, as of older versions, they are computed, which is said on
        standard error, and written to it.

    Raises:
        RunError: if a file of the run is damaged, or its model gives another top-1 than its report.
        DataError: if the images are missing or differ.
        And what `verified.load` raises.
    """
    stored = predictions.read(run.folder)
    if stored is not None:
        return stored
    computed = _computed(run, data_dir)
    with contextlib.suppress(OSError):  # such as a folder that is read only
        predictions.write(run.folder, computed)
    return computed


def _computed(run, data_dir):
    print(f"{run.name} has no {runs.PREDICTIONS}: computing the predictions from {runs.MODEL}", file=sys.stderr, flush=True)
    environment.start()
    from cvt_keras.data.pipeline import evaluation_batches
    from cvt_keras.model import load_classifier

    recipe, expected = read_recipe(run.folder), run.report["test"]
    images_of_run = verified.load(
        run.folder / runs.IMAGES, run.report["dataset"], data_dir or recipe.data_dir, recipe.preprocessing, recipe.pixel_cache
    )
    source = images_of_run.source
    for warning in images_of_run.warnings:
        print(f"WARNING: {warning}", file=sys.stderr, flush=True)
    test = source.test.limit(recipe.test_limit)
    if len(test) != expected["images"] or list(source.class_names) != run.report["class_names"]:
        raise DataError(
            f"`data_dir` must hold the images and classes of {run.folder}, with {expected['images']:,} test images. "
            f"Received: {len(test):,} test images",
            argument="data_dir",
        )
    classifier = load_classifier(run.folder / runs.MODEL)
    with contextlib.redirect_stdout(sys.stderr):  # the progress bar
        logits = classifier.predict(evaluation_batches(test, len(source.class_names), recipe.preprocessing))
    predicted = metrics.predictions(logits)
    correct, expected_correct = int((predicted == test.labels).sum()), round(expected["top1"] * len(test))
    if abs(correct - expected_correct) > max(1, MOST_CHANGED * len(test)):
        raise RunError(
            f"{run.folder / runs.MODEL} classifies {correct:,} of {len(test):,} test images correctly, "
            f"but {runs.REPORT} says {expected_correct:,}"
        )
    return predictions.from_labels(test.digests, test.labels, predicted, source.class_names)
