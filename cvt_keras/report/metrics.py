"""The numbers of report.json, from logits and labels."""

import dataclasses
import math
from dataclasses import dataclass, field

import numpy as np

from cvt_keras.errors import DivergedError, MissingPackageError
from cvt_keras.preprocessing import Calibration

try:
    import sklearn.metrics
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax
    from scipy.stats import chi2
except ImportError as error:
    raise MissingPackageError(
        f"the metrics of a run need scikit-learn: {error}", hint="Install it: pip install scikit-learn"
    ) from error

CALIBRATION_BINS = 15  # Guo et al., arXiv 1706.04599
FEW_IMAGES = 30  # the 95% interval of a top-1 of 90% on 30 images reaches from 74% to 97%
TEMPERATURES = 0.05, 20.0  # the bounds of `fit_calibration`
MAX_THRESHOLD = 0.99  # the highest probability that an int8 file can give is 255/256
RESAMPLES = 200  # for the standard error of the calibration error
ADVICE = "Train again in another --run-dir, at a lower --peak-learning-rate"


@dataclass(frozen=True)
class Report:
    """The contents of report.json.

    Args:
        dataset: the data set that was used, never `auto`.
        data_note: a remark about the data; often empty.
        variant: name of the variant.
        recipe: every setting, resolved.
        epochs, seed, image_size, class_names: settings of the run.
        train_images: number of training images.
        parameters: number of trainable parameters.
        macs: multiply-accumulates per image.
        train_seconds: time in `fit`, including compilation and validation.
        train_images_per_second: throughput in the median epoch, without validation.
        validation, test: the dicts that `evaluate` returns. `test` is `None` if the test split was not evaluated. Files of
            older versions lack `macro_f1`, `balanced_accuracy` and `top1_interval`.
        per_class, confusion: metrics of the test split, or `None`. Files of older versions lack `top1_interval` of a class.
        device: name of the device that the run trained on.
        versions: package -> version.
        compression: measurements of a compressed network, or `None`.
        data_warnings: warnings about the data, a sentence each.
        left_out: reason -> number of files that were not used.
        class_weights: class name -> weight of its images in the loss, or `None` if all weights are 1.
        epochs_trained: fewer than `epochs` if early stopping ended the training. `None` in files of older versions.
        kept_epoch: the epoch, from 1, whose weights were kept. `None` in files of older versions.
        test_images: size of the test split, evaluated or not. `None` in files of older versions.
        train_images_per_class: in the order of `class_names`. Empty in files of older versions.
        calibration: what `calibration_report` returns, on the test split, or on the validation split if the test split was not
            evaluated. `None` in files of older versions.
        backend: the backend of Keras, `"tensorflow"` or `"jax"`. Older versions trained on TensorFlow only.
        devices: number of devices that the run trained on.
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
    calibration: dict | None = None
    backend: str = "tensorflow"
    devices: int = 1


def best_epoch(history, first_epoch=0):
    """The epoch whose weights a run keeps: highest validation accuracy, then lowest validation loss, then earliest.

    Args:
        history: a dict per epoch, with `val_accuracy` and `val_loss`.
        first_epoch: index into `history` of the first epoch whose weights can be kept.

    Returns:
        The dict of that epoch.
    """
    return max(history[first_epoch:], key=lambda row: merit(row["val_accuracy"], row["val_loss"]))


def merit(accuracy, loss):
    """The sort key of an epoch, higher is better: the accuracy, then the negative loss."""
    # NaN compares as neither higher nor lower: it counts as an infinite loss.
    return accuracy, -math.inf if math.isnan(loss) else -loss


def evaluate(logits, labels):
    """Computes accuracy, cross-entropy and calibration error.

    Args:
        logits: float `(n, classes)`.
        labels: int `(n,)`.

    Returns:
        A dict:
        - `top1`, `top5`: fractions of 1. Among equal logits the class with the lowest index comes first, as in `argmax`. `top5`
          is `None` for fewer than 6 classes.
        - `top1_interval`: the 95% confidence interval of `top1`, as `wilson` returns it.
        - `macro_f1`, `balanced_accuracy`: F1 and recall, averaged over the classes that have images. Rare classes count as
          much as common ones.
        - `loss`: cross-entropy in nats, without label smoothing or class weights.
        - `ece`: expected calibration error.
        - `images`: `n`.

    Raises:
        DivergedError: if a logit is NaN or infinite, or if every image has the same logit for all classes.
    """
    predicted = predictions(logits)
    _require_distinct(logits)
    # Only classes with images: by default scikit-learn also averages over classes that only occur as predictions.
    _, recall, f1, _ = sklearn.metrics.precision_recall_fscore_support(
        labels, predicted, labels=np.unique(labels), average="macro", zero_division=0
    )
    top1 = float(np.mean(predicted == labels))
    return {
        "top1": top1,
        "top1_interval": wilson(top1, len(labels)),
        "top5": _top5(logits, labels) if logits.shape[1] > 5 else None,
        "macro_f1": float(f1),
        "balanced_accuracy": float(recall),
        "loss": float(np.mean(_losses(logits, labels))),
        "ece": calibration_error(*reliability(logits, labels)),
        "images": len(labels),
    }


def per_class(logits, labels, class_names):
    """Computes the metrics of each class.

    Returns:
        A dict per class: `name`, `top1` (its recall), `top1_interval` (see `wilson`), `precision`, `f1` and `images`. A metric
        that is 0 / 0 is `None`: `top1` and its interval of a class without images, `precision` of a class that is never
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
            "top1_interval": wilson(float(row[0]), int(count)) if count else None,
            "images": int(count),
        }
        for name, row, count in zip(class_names, shares, images)
    ]


def wilson(share, images):
    """The 95% confidence interval of a share by Wilson's score, without continuity correction (Wilson, 1927).

    Unlike the usual `share +- 1.96 * sqrt(share * (1 - share) / images)`, it is sound for few images and for shares near 0 or 1
    (Brown, Cai and DasGupta, "Interval Estimation for a Binomial Proportion", 2001).

    Args:
        share: the observed share, in 0..1.
        images: the number of images, at least 1.

    Returns:
        A list of its ends, in 0..1.
    """
    z2 = 1.959964**2 / images  # of the normal distribution, squared
    centre = (share + z2 / 2) / (1 + z2)
    half = math.sqrt(z2 * share * (1 - share) + z2 * z2 / 4) / (1 + z2)
    return [0.0 if share == 0 else centre - half, 1.0 if share == 1 else centre + half]


def confusion(logits, labels, num_classes):
    """The confusion matrix, int `(num_classes, num_classes)`: labels in rows, predictions in columns."""
    return sklearn.metrics.confusion_matrix(labels, predictions(logits), labels=range(num_classes))


def predictions(logits):
    """The class with the highest logit for each image, int `(n,)`. Among equal logits the lowest index wins.

    Raises:
        DivergedError: if a logit is NaN or infinite.
    """
    if not np.all(np.isfinite(logits)):
        raise DivergedError("the network's logits are NaN or infinite", hint=ADVICE)
    return np.argmax(logits, axis=1)


def worst(logits, labels, n):
    """The indices of up to `n` misclassified images, the highest cross-entropy first."""
    wrong = np.flatnonzero(predictions(logits) != labels)
    return wrong[np.argsort(-_losses(logits, labels)[wrong], kind="stable")][:n]


def reliability(logits, labels):
    """Sorts the images into bins of equal width by confidence, the probability of the predicted class.

    Returns:
        Three arrays `(CALIBRATION_BINS,)`: mean confidence and accuracy per bin (NaN if it is empty), and number of images.
    """
    return _binned(*_confidence(logits, labels))


def _confidence(logits, labels):
    """The probability of the predicted class, and whether it is right: two arrays `(n,)`."""
    confidence = np.exp(log_softmax(np.asarray(logits, np.float64), axis=1).max(axis=1))
    return confidence, predictions(logits) == labels


def _binned(confidence, correct):
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    images = np.bincount(bins, minlength=CALIBRATION_BINS)
    filled = np.where(images, images, np.nan)
    sums = (np.bincount(bins, weights=values, minlength=CALIBRATION_BINS) for values in (confidence, correct))
    return *(total / filled for total in sums), images


def calibration_error(confidence, accuracy, images):
    """The expected calibration error: |accuracy - confidence| of the bins of `reliability`, averaged over images."""
    return float(np.nansum(images * np.abs(accuracy - confidence)) / images.sum())


def fit_calibration(logits, labels, keep):
    """Fits a `Calibration` to validation images.

    The temperature has the lowest cross-entropy. Labels are smoothed by 1 / (n + 2), as in Platt scaling, so that a few images
    that are all right do not lead to a temperature near 0. It stays 1 unless the images tell it from 1, by a likelihood-ratio
    test at 95%: that of a network no better than chance would be arbitrary. The threshold is at most `MAX_THRESHOLD`.

    Args:
        logits: float `(n, classes)`.
        labels: int `(n,)`.
        keep: the share of right answers that stay sure, more than 0 and at most 1.
    """
    logits = np.asarray(logits, np.float64)
    right = predictions(logits) == labels
    smoothing = 1 / (len(labels) + 2)

    def cross_entropy(log_temperature):
        logs = log_softmax(logits / np.exp(log_temperature), axis=1)
        return -(1 - smoothing) * logs[np.arange(len(labels)), labels].mean() - smoothing * logs.mean()

    fitted = minimize_scalar(cross_entropy, bounds=np.log(TEMPERATURES), method="bounded")
    likelihood_ratio = 2 * len(labels) * (cross_entropy(0.0) - fitted.fun)
    calibration = Calibration(float(np.exp(fitted.x)) if likelihood_ratio > chi2.ppf(0.95, df=1) else 1.0)
    confidence = calibration.probabilities(logits).max(axis=1)
    threshold = 0.0
    if right.any():
        # The highest that keeps so many: of 20 right answers and 0.95, the second lowest confidence.
        ascending = np.sort(confidence[right])
        dropped = int(len(ascending) * (1 - keep) + 1e-9)  # 20 * (1 - 0.95) is a little more than 1, or less
        threshold = min(float(ascending[min(dropped, len(ascending) - 1)]), MAX_THRESHOLD)
    return dataclasses.replace(calibration, threshold=threshold)


def calibration_report(logits, labels, fitted, keep, split):
    """Measures what a `Calibration` does to the answers for images.

    Args:
        logits, labels: as in `evaluate`.
        fitted: the `Calibration`.
        keep: as in `fit_calibration`.
        split: `"test"` or `"validation"`, the split of the images.

    Returns:
        A dict:
        - `temperature`, `threshold`, `keep`, `split`: as given.
        - `ece_before`, `ece`: the expected calibration error of the logits, and after calibration.
        - `ece_before_error`, `ece_error`: their standard errors, from `RESAMPLES` bootstrap samples of the images.
        - `loss_before`, `loss`: cross-entropy in nats.
        - `sure`: the share of answers that are sure; `sure_of_right` and `sure_of_wrong`: of the right and of the wrong ones,
          `None` without any.
    """
    sure = ~fitted.unsure(fitted.probabilities(logits))
    right = predictions(logits) == labels
    return {
        **fitted.get_config(),
        "keep": keep,
        "split": split,
        **_error_and_loss(logits, labels, "_before"),
        **_error_and_loss(fitted.scaled(logits), labels, ""),
        "sure": float(sure.mean()),
        "sure_of_right": float(sure[right].mean()) if right.any() else None,
        "sure_of_wrong": float(sure[~right].mean()) if not right.all() else None,
    }


def _error_and_loss(logits, labels, suffix):
    confidence, correct = _confidence(logits, labels)
    random = np.random.default_rng(0)
    samples = (random.integers(len(labels), size=len(labels)) for _ in range(RESAMPLES))
    errors = [calibration_error(*_binned(confidence[sample], correct[sample])) for sample in samples]
    return {
        f"ece{suffix}": calibration_error(*_binned(confidence, correct)),
        f"ece{suffix}_error": float(np.std(errors)),
        f"loss{suffix}": float(np.mean(_losses(logits, labels))),
    }


def _require_distinct(logits):
    """Raises if every image has the same logit for all classes: `argmax` would then predict the first class throughout."""
    if logits.shape[1] > 1 and np.all(logits == logits[:, :1]):
        raise DivergedError("the network gives every class the same logit, for every image", hint=ADVICE)


def _top5(logits, labels):
    # Not sklearn's top_k_accuracy_score: among equal logits it prefers the last class, `argmax` the first.
    first_five = np.argsort(-np.asarray(logits, np.float64), axis=1, kind="stable")[:, :5]
    return float(np.mean(np.any(first_five == np.asarray(labels)[:, None], axis=1)))


def _losses(logits, labels):
    # Not sklearn's log_loss: it takes probabilities, and clips those that round to 0.
    return -log_softmax(np.asarray(logits, np.float64), axis=1)[np.arange(len(labels)), labels]
