"""The handwritten digits that come with scikit-learn, so nothing has to be downloaded."""

import numpy as np

from cvt_keras.data import images, packages
from cvt_keras.data.pixels import mean_and_std
from cvt_keras.data.split import Source, Split


def load(preprocessing):
    """Loads the 1,797 digits: 1,297 to train, 200 to validate, 300 to test.

    Args:
        preprocessing: a `Preprocessing`: how the images of 8x8 pixels are resized.

    Returns:
        A `Source`.

    Raises:
        UnavailableError: if scikit-learn is not installed.
    """
    packages.require("tensorflow")
    load_digits = packages.require("sklearn.datasets", "scikit-learn").load_digits
    train_test_split = packages.require("sklearn.model_selection", "scikit-learn").train_test_split

    data = load_digits()
    grey = np.round(data.images * (255 / 16)).astype("uint8")  # 0..16 -> 0..255
    pixels = images.shrink(np.stack([grey] * 3, axis=-1), preprocessing).numpy()
    labels = data.target.astype("int64")
    rest, test = train_test_split(np.arange(len(labels)), test_size=300, stratify=labels, random_state=0)
    train, validation = train_test_split(rest, test_size=200, stratify=labels[rest], random_state=0)
    mean, std = mean_and_std(pixels[train])
    return Source(
        name="digits",
        train=Split(pixels[train], labels[train]),
        validation=Split(pixels[validation], labels[validation]),
        test=Split(pixels[test], labels[test]),
        class_names=tuple(map(str, range(10))),
        mean=mean,
        std=std,
        note="scikit-learn's handwritten digits of 8x8 pixels, enlarged",
        mirror=False,
    )
