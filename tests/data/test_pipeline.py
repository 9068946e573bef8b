import dataclasses

import numpy as np
import pytest

from cvt_keras.data.pipeline import batches_per_epoch, evaluation_batches, training_batches
from cvt_keras.data.sources import Split
from cvt_keras.training.recipes import SMOKE

PLAIN = dataclasses.replace(SMOKE, epochs=2, batch_size=16, flip=False, crop_padding=0)


@pytest.fixture
def split():
    """Images whose first pixel tells which they are."""
    images = np.random.default_rng(0).integers(0, 256, (100, 8, 8, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(100)
    return Split(images, np.arange(100) % 10)


def _order(split, recipe):
    batches = list(training_batches(split, 10, recipe).as_numpy_iterator())
    return np.concatenate([images[:, 0, 0, 0] for images, _ in batches]).reshape(recipe.epochs, -1)


def test_an_epoch_is_whole_batches_of_different_images(split):
    order = _order(split, PLAIN)
    assert batches_per_epoch(split, PLAIN) == 6
    assert order.shape == (2, 96)
    for epoch in order:
        assert len(set(epoch)) == 96


def test_order_is_a_function_of_seed_and_epoch(split):
    first, again = _order(split, PLAIN), _order(split, PLAIN)
    other = _order(split, dataclasses.replace(PLAIN, seed=1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0], other[0])
    # A longer run begins like a shorter one.
    np.testing.assert_array_equal(_order(split, dataclasses.replace(PLAIN, epochs=3))[:2], first)


def test_batches_are_float_pixels_and_one_hot_labels(split):
    images, labels = next(training_batches(split, 10, PLAIN).as_numpy_iterator())
    assert images.dtype == labels.dtype == np.float32
    assert images.shape == (16, 8, 8, 3)
    indices = images[:, 0, 0, 0].astype(int)
    np.testing.assert_array_equal(images, split.images[indices])
    np.testing.assert_array_equal(labels, np.eye(10)[indices % 10])


@pytest.mark.parametrize("change", [{"flip": True}, {"crop_padding": 2}])
def test_augmentation_is_a_function_of_seed_epoch_and_batch(split, change):
    # One batch of all images, so that each epoch shows each image once.
    recipe = dataclasses.replace(PLAIN, batch_size=100, **change)

    def epochs(recipe):
        shown = [images for images, _ in training_batches(split, 10, recipe).as_numpy_iterator()]
        return [images[np.argsort(images.sum(axis=(1, 2, 3)), kind="stable")] for images in shown]

    first, again = epochs(recipe), epochs(recipe)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[0], first[1])
    plain = epochs(dataclasses.replace(PLAIN, batch_size=100))
    assert not np.array_equal(first[0], plain[0])


def test_evaluation_takes_every_image_in_order(split):
    batches = list(evaluation_batches(split, 10).as_numpy_iterator())
    np.testing.assert_array_equal(np.concatenate([images for images, _ in batches]), split.images)
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in batches]), np.eye(10)[split.labels])
