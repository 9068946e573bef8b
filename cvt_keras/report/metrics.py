"""Logits and labels -> the numbers of report.json. No drawing."""

from dataclasses import dataclass

import numpy as np

try:
    import sklearn.metrics
    from scipy.special import log_softmax
except ImportError as error:
    raise ImportError(f"The figures of a run need scikit-learn: pip install scikit-learn ({error})") from error

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
        train_images: how many it trained on.
        parameters: trainable ones.
        macs: of one image.
        train_seconds: of `fit`, with its compilation and validations.
        train_images_per_second: of the median epoch, without validation.
        validation, test: what `evaluate` returns; `test` is `None` where the test split was not touched.
        per_class, confusion: of the test split, or `None`.
        device: the name of what trained.
        versions: package -> version.
        compression: what was found in a compressed network, or `None`.
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


def evaluate(logits, labels):
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
    return {
        "top1": float(np.mean(rank == 1)),
        "top5": float(np.mean(rank <= 5)) if logits.shape[1] > 5 else None,
        "loss": float(np.mean(_losses(logits, labels))),
        "ece": calibration_error(*reliability(logits, labels)),
        "images": len(labels),
    }


def per_class(logits, labels, class_names):
    """How each class fares.

    Returns:
        A dict for each class: its `name`, `top1` (the share of its images that are found: the recall), `precision`, `f1`, and
        `images`. A share of nothing is `None`: `top1` of a class without images, `precision` of one never predicted, `f1` of
        one that is neither.
    """
    precision, recall, f1, images = sklearn.metrics.precision_recall_fscore_support(
        labels, predictions(logits, labels), labels=range(len(class_names)), zero_division=np.nan
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
    return sklearn.metrics.confusion_matrix(labels, predictions(logits, labels), labels=range(num_classes))


def predictions(logits, labels):
    """The class with the highest logit for each image, int `(n,)`: where the label ties with another class, the other.

    Raises:
        FloatingPointError: if a logit is infinite or no number.
    """
    others = np.array(logits, np.float64)
    others[np.arange(len(labels)), labels] = -np.inf
    return np.where(_rank(logits, labels) == 1, labels, others.argmax(axis=1))


def worst(logits, labels, n):
    """The images that the network gets wrong, up to `n` of them, the highest cross-entropy first: their indices."""
    wrong = np.flatnonzero(_rank(logits, labels) > 1)
    return wrong[np.argsort(-_losses(logits, labels)[wrong], kind="stable")][:n]


def reliability(logits, labels):
    """What calibration is read off: the images, sorted into bins of equal width by the probability of their prediction.

    Returns:
        Three arrays `(CALIBRATION_BINS,)`: the mean confidence and the accuracy in each bin (no number where it is empty), and
        its count of images.
    """
    confidence = np.exp(log_softmax(np.asarray(logits, np.float64), axis=1).max(axis=1))
    correct = _rank(logits, labels) == 1
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    images = np.bincount(bins, minlength=CALIBRATION_BINS)
    filled = np.where(images, images, np.nan)
    sums = (np.bincount(bins, weights=of_image, minlength=CALIBRATION_BINS) for of_image in (confidence, correct))
    return *(total / filled for total in sums), images


def calibration_error(confidence, accuracy, images):
    """The expected calibration error of what `reliability` gives: the mean over images of how far the two are apart."""
    return float(np.nansum(images * np.abs(accuracy - confidence)) / images.sum())


def _rank(logits, labels):
    """The place of each image's label among the classes, 1 the best. A tie counts against the network: one that gives every
    class the same must not score."""
    if not np.all(np.isfinite(logits)):
        raise FloatingPointError("the network's logits are infinite or no numbers")
    of_label = logits[np.arange(len(labels)), labels]
    return np.sum(logits >= of_label[:, None], axis=1)


def _losses(logits, labels):
    # Not sklearn's log_loss: it takes probabilities, and cuts off those that a float can't tell from 0.
    return -log_softmax(np.asarray(logits, np.float64), axis=1)[np.arange(len(labels)), labels]
