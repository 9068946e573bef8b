"""Makes small labelled images and compares them, for the tests of `cvt_keras.data`."""

import time

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from cvt_keras.data import sources
from cvt_keras.errors import UserError


def noise(n, shape=(32, 32, 3)):
    return np.random.default_rng(0).integers(0, 256, (n, *shape), "uint8")


def labelled(images, num_classes=10, **features):
    """Examples for `write_tfds`, whose labels cycle through the classes."""
    return [{"image": image, "label": i % num_classes, **features} for i, image in enumerate(images)]


def sizes(source):
    return [len(split) for split in (source.train, source.validation, source.test)]


def rows(*splits):
    """The images of all splits, flattened: `(n, pixels)`."""
    return np.concatenate([np.asarray(split.images).reshape(len(split), -1) for split in splits])


def same_rows(a, b):
    """Whether the rows of `a` are unique, and the same as those of `b` in any order."""
    unique = np.unique(a, axis=0)
    return len(unique) == len(a) and np.array_equal(unique, np.unique(b, axis=0))


def resized(image, size):
    size = (size, size) if isinstance(size, int) else size
    return np.round(tf.image.resize(image, size, antialias=True).numpy()).astype("uint8")


def write_image(path, image=None, shape=(12, 16, 3)):
    """Writes an image in the format of its suffix, and returns the pixels; by default noise that depends on the path."""
    if image is None:
        image = np.random.default_rng(list("/".join(path.parts[-3:]).encode())).integers(0, 256, shape, "uint8")
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {".png": "PNG", ".gif": "GIF", ".webp": "WEBP", ".bmp": "BMP"}.get(path.suffix.lower(), "JPEG")
    Image.fromarray(np.squeeze(image)).save(path, format=kind)
    return image


def error_of(*arguments, **keywords):
    """The error that `sources.load` raises. Checks that it comes within seconds, in one line that names no flag."""
    started = time.monotonic()
    with pytest.raises(UserError) as raised:
        sources.load(*arguments, **keywords)
    assert time.monotonic() - started < 20
    error = raised.value
    for part in ("\n", "{{", "[Op:", " --"):  # flags belong into the hint
        assert part not in error.summary
    assert not error.summary.endswith(".") and not (error.hint or "").endswith(".")
    return error
