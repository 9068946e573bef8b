"""Loads a data set by its name."""

import dataclasses
import re
from pathlib import Path

import numpy as np

from cvt_keras.data import digits, failures, folder, listing, tfds
from cvt_keras.data.cache import Cache
from cvt_keras.errors import ArgumentError, DataError, UnavailableError
from cvt_keras.preprocessing import Preprocessing, size_text

_SMALL = Preprocessing(image_size=(32, 32))
_ON_DISK = Cache()


def check_name(dataset):
    """Raises unless `dataset` is one of `NAMES`. Does not check whether TFDS has a data set `NAME`: `load` does.

    Raises:
        ArgumentError: for any other name.
    """
    if dataset not in NAMES and not re.match("tfds:.", str(dataset)):
        raise ArgumentError(
            f"`dataset` must be one of {', '.join(NAMES)}. Received: dataset={dataset!r}",
            argument="dataset",
            hint=f"For your own images, use --dataset folder. For the names of tfds:NAME, see {tfds.CATALOG}/overview",
        )


def load(dataset, data_dir=None, preprocessing=_SMALL, cache=_ON_DISK, skip_broken=False, record=None):
    """Loads a data set.

    Args:
        dataset: one of `NAMES`. In `tfds:NAME`, NAME is TFDS' name, with a config or version if needed.
        data_dir: the folder of images for `folder`; TFDS' folder for its data sets, see `tfds.cifar10`; ignored for `digits`.
        preprocessing: a `Preprocessing`: how images are resized, see `images.shrink`. If all images of a TFDS data set have the
            same smaller size, they keep it, and the pipeline resizes them: CIFAR-10 at 224 pixels would take 50 times the
            space.
        cache: a `Cache`: where decoded images are kept. Ignored for `digits`.
        skip_broken, record: for `folder`, see `folder.load`; ignored for other data sets.

    Returns:
        A `Source`.

    Raises:
        ArgumentError: if `dataset` is unknown, `data_dir` is required and `None`, or `cache` is off for a TFDS data set.
        UnavailableError: if the images are not on disk and can't be downloaded, or a package is missing.
        DataError: if the images are broken or do not fit into memory.
    """
    check_name(dataset)
    kind, _, name = dataset.partition(":")
    try:
        # Otherwise TFDS would download its own data set into the user's folder of images.
        if data_dir is not None and kind not in ("folder", "digits") and _holds_classes(data_dir):
            raise DataError(
                f"`data_dir` holds folders of images, not a data set that TFDS prepared. "
                f"Received: data_dir={data_dir}, dataset={dataset}",
                argument="data_dir",
                hint="Add --dataset folder to train on these images",
            )
        np.empty((*preprocessing.image_size, 3), "float32")  # fails at once if not even one image fits into memory
        return _LOADERS[kind](name, data_dir, preprocessing, cache, skip_broken=skip_broken, record=record)
    except OSError as error:
        raise DataError(f"{dataset} can't be read: {failures.reason(error)}", argument="data_dir") from error
    except Exception as error:
        if not failures.is_out_of_memory(error):
            raise
        size = size_text(preprocessing.image_size)
        raise DataError(
            f"{dataset} does not fit into memory: {failures.reason(error)}. Received: image_size={size}",
            argument="image_size",
            hint=f"Choose a smaller --image-size than {size}",
        ) from error


def _holds_classes(data_dir):
    path = Path(data_dir).expanduser()
    return path.is_dir() and listing.holds_classes(path)


def auto(data_dir, preprocessing, cache):
    """Loads CIFAR-10 if it is on disk or can be downloaded, else the digits, with the reason in `Source.fallback`.

    Raises:
        UnavailableError: if neither can be loaded.
        DataError: if `data_dir` is not a folder, or holds a broken CIFAR-10. No fallback then, as it would hide that.
    """
    try:
        return tfds.cifar10(data_dir, preprocessing, cache)
    except UnavailableError as error:
        try:
            source = digits.load(preprocessing)
        except UnavailableError as second:
            raise UnavailableError(
                f"{error}. scikit-learn's digits can't be loaded instead: {second}",
                argument=error.argument,
                hint=". ".join(filter(None, (error.hint, second.hint))),
            ) from second
        # The report shows it, so it contains the hint as well.
        because = ". ".join(filter(None, (str(error), error.hint)))
        return dataclasses.replace(source, fallback=f"scikit-learn's digits stand in for CIFAR-10: {because}")


# Kind -> function that returns a `Source`. `name` is the NAME in tfds:NAME.
_LOADERS = {
    "auto": lambda name, data_dir, preprocessing, cache, **of_folder: auto(data_dir, preprocessing, cache),
    "cifar10": lambda name, data_dir, preprocessing, cache, **of_folder: tfds.cifar10(data_dir, preprocessing, cache),
    "cifar100": lambda name, data_dir, preprocessing, cache, **of_folder: tfds.cifar100(data_dir, preprocessing, cache),
    "tfds": lambda name, data_dir, preprocessing, cache, **of_folder: tfds.load(name, data_dir, preprocessing, cache),
    "folder": lambda name, data_dir, preprocessing, cache, **of_folder: folder.load(
        data_dir, preprocessing, cache, **of_folder
    ),
    "digits": lambda name, data_dir, preprocessing, cache, **of_folder: digits.load(preprocessing),
}
NAMES = tuple(f"{kind}:NAME" if kind == "tfds" else kind for kind in _LOADERS)
