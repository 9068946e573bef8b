import json
import tarfile
from pathlib import Path

import numpy as np
from labelled_images import rows, sizes

from cvt_keras.data import sources
from cvt_keras.preprocessing import Preprocessing

OLD_RUN = Path(__file__).parent.parent / "golden" / "old_runs" / "stopped.tar.xz"


def test_digits():
    source = sources.load("digits")
    assert (source.name, source.mirror, source.fallback) == ("digits", False, "")
    assert sizes(source) == [1_297, 200, 300]
    assert source.train.images.shape == (1_297, 32, 32, 3)
    assert (source.train.images.dtype, source.train.labels.dtype) == (np.uint8, np.int64)
    assert source.class_names == tuple("0123456789")
    for split in (source.train, source.validation, source.test):
        counts = np.bincount(split.labels)
        assert counts.max() - counts.min() < 0.1 * len(split)
    assert "8x8" in source.note
    assert sources.load("digits").fingerprint() == source.fingerprint()


def test_the_fingerprint_is_that_of_an_old_run():
    """Otherwise that run could not be resumed."""
    with tarfile.open(OLD_RUN) as archive:
        state = json.load(archive.extractfile("stopped/checkpoints/epoch-0001/state.json"))
    assert sources.load("digits").fingerprint() == state["data"]


def test_digits_at_8_pixels_are_scikit_learns():
    from sklearn.datasets import load_digits

    source = sources.load("digits", preprocessing=Preprocessing(image_size=(8, 8)))
    pixels = rows(source.train, source.validation, source.test)
    expected = np.round(load_digits().images * 255 / 16).astype("uint8")
    expected = np.repeat(expected[..., None], 3, axis=-1).reshape(1_797, -1)
    np.testing.assert_array_equal(pixels[np.lexsort(pixels.T)], expected[np.lexsort(expected.T)])
