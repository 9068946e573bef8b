import numpy as np
import pytest
import tensorflow as tf

from cvt_keras.data import augment


def _images(n=64, height=8, width=12):
    return tf.constant(np.random.default_rng(0).integers(0, 256, (n, height, width, 3)), tf.uint8)


@pytest.mark.parametrize("function", [augment.flip, lambda images, seed: augment.crop(images, seed, 2)])
def test_a_seed_draws_the_same_again(function):
    images = _images()
    first, again, other = (function(images, seed).numpy() for seed in ((0, 0), (0, 0), (0, 1)))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.dtype == np.uint8
    assert first.shape == images.shape


def test_flip_mirrors_half_of_the_images_left_to_right():
    images = _images(n=1000).numpy()
    flipped = augment.flip(images, (0, 0)).numpy()
    mirrored = np.all(flipped == images[:, :, ::-1], axis=(1, 2, 3))
    kept = np.all(flipped == images, axis=(1, 2, 3))
    assert np.all(mirrored ^ kept)
    assert np.mean(mirrored) == pytest.approx(0.5, abs=0.05)


def test_crop_cuts_each_image_from_its_reflection_at_its_own_place():
    images = _images(n=500).numpy()
    cropped = augment.crop(images, (0, 0), 2).numpy()
    padded = np.pad(images, [(0, 0), (2, 2), (2, 2), (0, 0)], mode="reflect")
    places = []
    for i in range(len(images)):
        found = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if np.array_equal(cropped[i], padded[i, top : top + 8, left : left + 12])
        ]
        assert len(found) == 1
        places += found
    assert set(places) == {(top, left) for top in range(5) for left in range(5)}
