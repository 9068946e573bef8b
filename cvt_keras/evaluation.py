"""Logits and labels -> the numbers of report.json. No drawing."""

from dataclasses import dataclass

import numpy as np

CALIBRATION_BINS = 15  # Guo et al., arXiv 1706.04599


@dataclass(frozen=True)
class Report:
    """What report.json holds.

    Args:
        dataset: the real one, never `auto`.
        data_note: what a reader of the figures must know about the data; empty if nothing.
        variant: its name.
        recipe: every setting as it really was.
        epochs, seed, image_size, class_names: of the run.
        parameters: trainable ones.
        macs: of one image.
        train_seconds: of `fit`, with its compilation and validations.
        train_images_per_second: of the median epoch, without validation.
        validation, test: `metrics`; `test` is `None` where the test split was not touched.
        per_class: of the test split, or `None`.
        device: the name of what trained.
        versions: package -> version.
    """

    dataset: str
    data_note: str
    variant: str
    recipe: dict
    epochs: int
    seed: int
    image_size: list[int]
    class_names: list[str]
    parameters: int
    macs: int
    train_seconds: float
    train_images_per_second: float
    validation: dict
    test: dict | None
    per_class: list[dict] | None
    device: str
    versions: dict[str, str]


def metrics(logits, labels):
    """Accuracy, cross-entropy and calibration.

    Args:
        logits: float `(n, classes)`.
        labels: int `(n,)`.

    Returns:
        A dict: `top1` and `top5` (fractions of 1, a tie counting as a miss; `top5` is `None` under 6 classes), `loss` (plain
        cross-entropy, in nats), `ece` (expected calibration error), `images`.

    Raises:
        FloatingPointError: if a logit is infinite or no number.
    """
    rank = _rank(logits, labels)
    correct = rank == 1
    log_probabilities = _log_softmax(np.asarray(logits, np.float64))
    of_label = log_probabilities[np.arange(len(labels)), labels]
    return {
        "top1": float(np.mean(correct)),
        "top5": float(np.mean(rank <= 5)) if log_probabilities.shape[1] > 5 else None,
        "loss": float(-np.mean(of_label)),
        "ece": _calibration_error(np.exp(log_probabilities.max(axis=1)), correct),
        "images": len(labels),
    }


def per_class(logits, labels, class_names):
    """The top-1 of each class's images: a list of `{"name", "top1", "images"}`, `top1` being `None` where there are none."""
    correct = _rank(logits, labels) == 1
    rows = []
    for index, name in enumerate(class_names):
        of_class = correct[labels == index]
        rows.append({"name": name, "top1": float(np.mean(of_class)) if len(of_class) else None, "images": len(of_class)})
    return rows


def _rank(logits, labels):
    """The place of each image's label among the classes, 1 the best. A tie counts against the network: one that gives every
    class the same must not score."""
    if not np.all(np.isfinite(logits)):
        raise FloatingPointError("the network's logits are infinite or no numbers")
    of_label = logits[np.arange(len(labels)), labels]
    return np.sum(logits >= of_label[:, None], axis=1)


def _log_softmax(logits):
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _calibration_error(confidence, correct):
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(confidence))
