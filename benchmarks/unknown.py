"""Measures what "unsure" is worth: trains on some classes of CIFAR-10, and shows others. python benchmarks/unknown.py --help

A classifier knows no answer for an image of none of its classes. This measures how often it then says that it is unsure, and
how well its highest probability tells such images from the others.
"""

import dataclasses
from pathlib import Path

import numpy as np
import tyro
from sklearn.metrics import roc_auc_score

from cifar10 import fit
from cvt_keras import environment
from cvt_keras.data import sources
from cvt_keras.data.images import stretch
from cvt_keras.data.pipeline import evaluation_batches
from cvt_keras.data.split import SPLITS
from cvt_keras.model import load_classifier, preprocessing_of
from cvt_keras.preprocessing import Calibration
from cvt_keras.report.metrics import calibration_report, evaluate, fit_calibration
from cvt_keras.training import RECIPES
from cvt_keras.training.plan import resolve

NOISE_IMAGES = 2_000


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Trains on CIFAR-10 without some classes, and prints what the calibrated network says of images that it does not know."""

    recipe: str = "cifar10"
    """The recipe: its network, and how to train."""
    unknown: tuple[str, ...] = ("cat", "truck")
    """The classes to leave out of the training."""
    epochs: int | None = None
    """Overrides the recipe's epochs."""
    train_limit: int | None = None
    """Train on the first N images only."""
    seed: int = 0
    """Seed for training."""
    model: Path | None = None
    """Save the trained classifier to this .keras file; if it exists, load it instead of training."""
    data_dir: str | None = None
    """TFDS' folder; defaults to TFDS_DATA_DIR, or else ~/tensorflow_datasets."""


def without(source, unknown):
    """Splits a data set by its classes.

    Args:
        source: a `Source`.
        unknown: names of classes.

    Returns:
        A `Source` of the other classes, and the test images of the unknown ones, uint8 `(n, height, width, 3)`.

    Raises:
        ValueError: if a class is not in the data set, or fewer than two remain.
    """
    missing = set(unknown) - set(source.class_names)
    if missing or not unknown or len(source.class_names) - len(unknown) < 2:
        raise ValueError(
            f"`unknown` must leave two or more of {', '.join(source.class_names)}. Received: unknown={', '.join(unknown)}"
        )
    names = tuple(name for name in source.class_names if name not in unknown)
    new_labels = np.array([names.index(name) if name in names else -1 for name in source.class_names])
    splits = {}
    for name in SPLITS:
        split = getattr(source, name)
        labels = new_labels[split.labels]
        known = split.take(np.flatnonzero(labels >= 0))
        splits[name] = dataclasses.replace(known, labels=labels[labels >= 0])
    images = source.test.take(np.flatnonzero(new_labels[source.test.labels] < 0)).images
    return dataclasses.replace(source, class_names=names, **splits), np.asarray(images)


def rows(known, unknown, calibration):
    """Compares the confidence in images of known classes with that in others.

    Args:
        known: logits of the test images of known classes `(n, classes)`.
        unknown: name -> logits `(n, classes)`.
        calibration: a `Calibration`.

    Returns:
        For each of `unknown` its name, number of images, area under the ROC curve of the highest probability before and after
        calibration, and the share of unsure answers.
    """

    def area(logits, calibration):
        parts = [calibration.probabilities(part).max(axis=1) for part in (known, logits)]
        return roc_auc_score(np.repeat([1, 0], [len(known), len(logits)]), np.concatenate(parts))

    return [
        (
            name,
            len(logits),
            area(logits, Calibration()),
            area(logits, calibration),
            calibration.unsure(calibration.probabilities(logits)).mean(),
        )
        for name, logits in unknown.items()
    ]


def main(arguments):
    recipe = dataclasses.replace(RECIPES[arguments.recipe], dataset="cifar10", data_dir=arguments.data_dir, seed=arguments.seed)
    changes = {name: value for name in ("epochs", "train_limit") if (value := getattr(arguments, name)) is not None}
    recipe = resolve(dataclasses.replace(recipe, **changes))
    source, unknown = without(
        sources.load("cifar10", recipe.data_dir, recipe.preprocessing, recipe.pixel_cache), arguments.unknown
    )
    source = dataclasses.replace(source, train=source.train.limit(recipe.train_limit))
    if arguments.model and arguments.model.exists():
        classifier = load_classifier(arguments.model)
        if preprocessing_of(classifier).class_names != source.class_names:
            raise ValueError(
                f"`model` must have been trained on {', '.join(source.class_names)}. Received: model={arguments.model}"
            )
    else:
        classifier, *_ = fit("recipe", "", recipe, source)
        if arguments.model:
            classifier.save(arguments.model)

    def logits(images):
        return classifier.predict(images.astype("float32"), batch_size=500, verbose=0)

    def of_split(split):
        batches = evaluation_batches(split, len(source.class_names), recipe.preprocessing)
        return classifier.predict(batches, verbose=0), split.labels

    validation, test = of_split(source.validation), of_split(source.test)
    calibration = fit_calibration(*validation, recipe.keep)
    report = calibration_report(*test, calibration, recipe.keep, "test")
    size = recipe.preprocessing.image_size
    digits = sources.load("digits", None, recipe.preprocessing).train.images
    others = {
        " and ".join(arguments.unknown): unknown,
        "handwritten digits": stretch(np.asarray(digits), size).numpy(),
        "noise": np.random.default_rng(0).integers(0, 256, (NOISE_IMAGES, *size, 3), dtype=np.uint8),
    }
    print(
        f"{evaluate(*test)['top1']:.2%} top-1 on {len(source.test):,} test images of {len(source.class_names)} classes; "
        f"temperature {calibration.temperature:.3f}, threshold {calibration.threshold:.3f}; "
        f"ECE {report['ece_before']:.3f} ± {report['ece_before_error']:.3f} before, "
        f"{report['ece']:.3f} ± {report['ece_error']:.3f} after"
    )
    print("| images | n | AUROC before calibration | AUROC | unsure |\n| --- | --- | --- | --- | --- |")
    for kind in ("right", "wrong"):
        sure = report[f"sure_of_{kind}"]
        print(f"| known classes, {kind} answers | | | | {'none' if sure is None else f'{1 - sure:.1%}'} |")
    measured = rows(test[0], {name: logits(images) for name, images in others.items()}, calibration)
    for name, count, before, after, unsure in measured:
        print(f"| {name} | {count:,} | {before:.3f} | {after:.3f} | {unsure:.1%} |")
    print(f"{environment.device()}, {environment.versions()}, {source.note}")
    return measured


if __name__ == "__main__":
    main(tyro.cli(Arguments))
