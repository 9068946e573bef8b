"""The weight of each class in the loss, and warnings about few images and unequal classes."""

import json
import math
import unicodedata
from pathlib import Path

import numpy as np

from cvt_keras.errors import RecipeError

# Below these numbers of images a warning is printed.
FEW_IMAGES = 10  # training images per class
FEW_TEST_IMAGES = 5  # test images per class
FEW_VALIDATION_IMAGES = 50  # in all; one of 50 is 2% of the accuracy
UNEQUAL = 5  # ratio of the largest class to the smallest from which a warning is printed
_NAMED = 3  # classes that a warning names


def read(setting):
    """Reads the file in a recipe's `class_weights`. Called before the images are loaded.

    Args:
        setting: `"none"`, `"auto"` or the path of a JSON file.

    Returns:
        `"none"`, `"auto"` or the dict in the file.

    Raises:
        RecipeError: if the file can't be read, or does not hold an object of positive finite numbers.
    """
    if setting in ("none", "auto"):
        return setting
    try:
        weights = json.loads(Path(setting).expanduser().read_text(encoding="utf-8-sig"), object_pairs_hook=_distinct)
    except FileNotFoundError as error:
        raise _error(f"`class_weights` file not found: {setting}") from error
    except OSError as error:
        raise _error(f"`class_weights` must be auto, none or a file. Received: {setting}: {error.strerror}") from error
    except ValueError as error:
        raise _error(f"`class_weights` must be a JSON file. Received: {setting}: {error}") from error
    if not isinstance(weights, dict):
        raise _error(f"`class_weights` must be a JSON object {{class: weight}}. Received: {setting}")
    wrong = [f"{name}: {weight!r}" for name, weight in weights.items() if not _is_weight(weight)]
    if wrong:
        raise _error(f"`class_weights` must be positive finite numbers. Received: {setting}", wrong)
    return weights


def settle(weights, class_names, counts):
    """The weight of each class.

    Args:
        weights: what `read` returned.
        class_names: in the order of the labels.
        counts: training images of each class.

    Returns:
        A tuple of floats, or `None` for equal weights. For `"auto"` a weight is n / (classes * count): all classes contribute
        equally to the loss, and the mean weight of an image is 1. A class without images has weight 0.

    Raises:
        RecipeError: if a class has no weight, or a weight has an unknown class.
    """
    if weights == "none":
        return None
    if weights == "auto":
        counts = np.asarray(counts)
        return tuple(float(counts.sum() / (np.count_nonzero(counts) * n)) if n else 0.0 for n in counts)
    known = {_normalized(name): float(weight) for name, weight in weights.items()}
    names = [_normalized(name) for name in class_names]
    faults = [f"missing: {name}" for name in names if name not in known]
    faults += [f"unknown: {name}" for name in known if name not in names]
    if faults:
        raise _error("`class_weights` must name each class of the images once, and no other", faults)
    return tuple(known[name] for name in names)


def warnings(class_names, counts, validation_images, weighted, test_counts=None):
    """Warns about few images and unequal classes, in sentences for the console and the report.

    Args:
        class_names: in the order of the labels.
        counts: training images of each class.
        validation_images: number of validation images.
        weighted: whether the classes have weights.
        test_counts: test images of each class, or `None` if there is no test.

    Returns:
        A list of strings.
    """
    messages = []
    most, fewest = int(np.argmax(counts)), int(np.argmin(counts))
    if not weighted and counts[fewest] and counts[most] >= UNEQUAL * counts[fewest]:
        messages.append(
            f"unequal classes: {class_names[most]} has {counts[most]:,} training images and {class_names[fewest]} "
            f"{counts[fewest]:,}. --class-weights auto gives each class the same weight"
        )
    messages += _few(class_names, counts, FEW_IMAGES, "training images")
    if test_counts is not None:
        messages += _few(class_names, test_counts, FEW_TEST_IMAGES, "test images, too few for a reliable accuracy")
    if validation_images < FEW_VALIDATION_IMAGES:
        messages.append(f"only {validation_images} validation images: the choice of the best epoch is noisy")
    return messages


def _few(class_names, counts, least, what):
    few = sorted((int(n), name) for n, name in zip(counts, class_names) if n < least)
    if not few:
        return []
    named = ", ".join(f"{name} {n}" for n, name in few[:_NAMED])
    more = f" and {len(few) - _NAMED:,} more classes" if len(few) > _NAMED else ""
    return [f"classes with fewer than {least} {what}: {named}{more}"]


def _distinct(pairs):
    names = [_normalized(name) for name, _ in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{twice[0]} occurs twice")
    return dict(pairs)


def _is_weight(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _normalized(name):
    return unicodedata.normalize("NFC", name)  # as class names are; macOS decomposes accents in file names


def _error(summary, details=()):
    return RecipeError(
        summary,
        argument="class_weights",
        details=details,
        hint='Use --class-weights auto, none, or a JSON file such as {"cat": 1.0, "dog": 2.5}',
    )
