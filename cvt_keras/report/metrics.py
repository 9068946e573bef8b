"""The numbers of report.json, from logits and labels."""

import math
from dataclasses import dataclass, field

import numpy as np

from cvt_keras.errors import DivergedError, MissingPackageError

try:
    import sklearn.metrics
    from scipy.special import log_softmax
except ImportError as error:
    raise MissingPackageError(
        f"the metrics of a run need scikit-learn: {error}", hint="Install it: pip install scikit-learn"
    ) from error

CALIBRATION_BINS = 15  # Guo et al., arXiv 1706.04599
ADVICE = "Train again in another --run-dir, at a lower --peak-learning-rate"


@dataclass(frozen=True)
class Report:
    """What report.json holds.

    Args:
        dataset: the one that was used, never `auto`.
        data_note: what a reader must know about the data; often empty.
        variant: its name.
        recipe: every setting as resolved.
        epochs, seed, image_size, class_names: of the run.
        train_images: how many it trained on.
        parameters: trainable ones.
        macs: multiply-accumulates per image.
        train_seconds: of `fit`, with compilation and validation.
        train_images_per_second: of the median epoch, without validation.
        validation, test: what `evaluate` returns; `test` is `None` where the test split was not touched. Older files lack
            `macro_f1` and `balanced_accuracy`.
        per_class, confusion: of the test split, or `None`.
        device: the name of the device that trained.
        versions: package -> version.
        compression: measurements of a compressed network, or `None`.
        data_warnings: lines about the data that a reader must see.
        left_out: reason -> the number of files that were not used.
        class_weights: class name -> weight of its images in the loss, or `None` where all weigh the same.
        epochs_trained: fewer than `epochs` where early stopping ended the training. `None` in files of older versions.
        kept_epoch: the epoch, from 1, whose weights were kept. `None` in files of older versions.
        test_images: how many the test split has, evaluated or not. `None` in files of older versions.
        train_images_per_class: in the order of `class_names`. Empty in files of older versions.
    """

    dataset: str
    data_note: str
    variant: str
    recipe: dict
    epochs: int
    seed: int
    image_size: list[int]
    train_images: int
    class_names: list[str]
    parameters: int
    macs: int
    train_seconds: float
    train_images_per_second: float
    validation: dict
    test: dict | None
    per_class: list[dict] | None
    confusion: list[list[int]] | None
    device: str
    versions: dict[str, str]
    compression: dict | None = None
    # Files of older versions lack these.
    data_warnings: list[str] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    class_weights: dict[str, float] | None = None
    epochs_trained: int | None = None
    kept_epoch: int | None = None
    test_images: int | None = None
    train_images_per_class: list[int] = field(default_factory=list)


def best_epoch(history, first_epoch=0):
    """The epoch whose weights a run keeps: the highest validation accuracy, and among equals the lowest validation loss.

    If the losses are equal too, it is the earliest.

    Args:
        history: a dict per epoch, with `val_accuracy` and `val_loss`.
        first_epoch: index into `history` of the first epoch whose weights can be kept.

    Returns:
        The dict of that epoch.
    """
    return max(history[first_epoch:], key=lambda row: merit(row["val_accuracy"], row["val_loss"]))


def merit(accuracy, loss):
    """The sort key of an epoch, higher is better: the accuracy, and among equals the lower loss."""
    # A loss that is NaN would compare as neither higher nor lower.
    return accuracy, -math.inf if math.isnan(loss) else -loss


def evaluate(logits, labels):
    """Accuracy, cross-entropy and calibration.

    Args:
        logits: float `(n, classes)`.
        labels: int `(n,)`.

    Returns:
        A dict:
        - `top1`, `top5`: fractions of 1. Among equal logits the class with the lowest index comes first, as in `argmax`. `top5`
          is `None` under 6 classes.
        - `macro_f1`, `balanced_accuracy`: means over the classes that have images, of F1 and of recall. Rare classes count as
          much as common ones.
        - `loss`: the plain cross-entropy, in nats.
        - `ece`: the expected calibration error.
        - `images`: `n`.

    Raises:
        DivergedError: if a logit is NaN or infinite, or if the logits of each image are the same for all classes.
    """
    predicted = predictions(logits)
    _require_distinct(logits)
    # Over classes with images only: by default scikit-learn also averages over classes that are only predicted.
    _, recall, f1, _ = sklearn.metrics.precision_recall_fscore_support(
        labels, predicted, labels=np.unique(labels), average="macro", zero_division=0
    )
    return {
        "top1": float(np.mean(predicted == labels)),
        "top5": _top5(logits, labels) if logits.shape[1] > 5 else None,
        "macro_f1": float(f1),
        "balanced_accuracy": float(recall),
        "loss": float(np.mean(_losses(logits, labels))),
        "ece": calibration_error(*reliability(logits, labels)),
        "images": len(labels),
    }


def per_class(logits, labels, class_names):
    """The metrics of each class.

    Returns:
        A dict for each class: its `name`, `top1` (the share of its images that are predicted right: the recall), `precision`,
        `f1`, and `images`. A share of nothing is `None`: `top1` of a class without images, `precision` of a class that is never
        predicted, `f1` of a class with neither.
    """
    precision, recall, f1, images = sklearn.metrics.precision_recall_fscore_support(
        labels, predictions(logits), labels=range(len(class_names)), zero_division=np.nan
    )
    shares = np.stack([recall, precision, f1], axis=1)
    return [
        {
            "name": name,
            **{key: None if np.isnan(share) else float(share) for key, share in zip(("top1", "precision", "f1"), row)},
            "images": int(count),
        }
        for name, row, count in zip(class_names, shares, images)
    ]


def confusion(logits, labels, num_classes):
    """Counts of images, int `(num_classes, num_classes)`: a row for each label, a column for each prediction."""
    return sklearn.metrics.confusion_matrix(labels, predictions(logits), labels=range(num_classes))


def predictions(logits):
    """The class with the highest logit for each image, int `(n,)`; among equal logits the one with the lowest index.

    Raises:
        DivergedError: if a logit is NaN or infinite.
    """
    if not np.all(np.isfinite(logits)):
        raise DivergedError("the network's logits are NaN or infinite", hint=ADVICE)
    return np.argmax(logits, axis=1)


def worst(logits, labels, n):
    """The indices of up to `n` images that the network gets wrong, the highest cross-entropy first."""
    wrong = np.flatnonzero(predictions(logits) != labels)
    return wrong[np.argsort(-_losses(logits, labels)[wrong], kind="stable")][:n]


def reliability(logits, labels):
    """Sorts the images into bins of equal width by the probability of their prediction.

    Returns:
        Three arrays `(CALIBRATION_BINS,)`: the mean confidence and the accuracy in each bin (NaN where it is empty), and its
        count of images.
    """
    correct = predictions(logits) == labels
    confidence = np.exp(log_softmax(np.asarray(logits, np.float64), axis=1).max(axis=1))
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    images = np.bincount(bins, minlength=CALIBRATION_BINS)
    filled = np.where(images, images, np.nan)
    sums = (np.bincount(bins, weights=values, minlength=CALIBRATION_BINS) for values in (confidence, correct))
    return *(total / filled for total in sums), images


def calibration_error(confidence, accuracy, images):
    """The expected calibration error, from the bins of `reliability`: the mean over images of |accuracy - confidence|."""
    return float(np.nansum(images * np.abs(accuracy - confidence)) / images.sum())


def _require_distinct(logits):
    """Raises if each image has the same logit for all classes: by `argmax` such a network would score as one that always
    answers the first class."""
    if logits.shape[1] > 1 and np.all(logits == logits[:, :1]):
        raise DivergedError("the network gives every class the same logit, for each image", hint=ADVICE)


def _top5(logits, labels):
    # Not sklearn's top_k_accuracy_score: among equal logits it prefers the last class, and `argmax` the first.
    first_five = np.argsort(-np.asarray(logits, np.float64), axis=1, kind="stable")[:, :5]
    return float(np.mean(np.any(first_five == np.asarray(labels)[:, None], axis=1)))


def _losses(logits, labels):
    # Not sklearn's log_loss: it takes probabilities, and clips those that a float can't tell from 0.
    return -log_softmax(np.asarray(logits, np.float64), axis=1)[np.arange(len(labels)), labels]
