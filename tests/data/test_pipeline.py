import dataclasses
import gc
import weakref

import keras
import numpy as np
import pytest

from cvt_keras.data import pipeline
from cvt_keras.data.images import fit, stretch
from cvt_keras.data.pipeline import batches_per_epoch, evaluation_batches, training_batches
from cvt_keras.data.share import Share
from cvt_keras.data.split import Split
from cvt_keras.preprocessing import Preprocessing
from cvt_keras.training.recipes import SMOKE

PLAIN = dataclasses.replace(SMOKE, image_size=8, epochs=2, batch_size=16, flip=False, crop_padding=0)
ALL = {"flip": True, "crop_padding": 2, "rand_augment": 1, "erase": 0.5, "mixup": 1.0, "cutmix": 1.0}


@pytest.fixture
def split():
    """100 images whose first pixel is their index."""
    images = np.random.default_rng(0).integers(0, 256, (100, 8, 8, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(100)
    return Split(images, np.arange(100) % 10)


def _order(split, recipe):
    batches = list(training_batches(split, 10, recipe).as_numpy_iterator())
    return np.concatenate([images[:, 0, 0, 0] for images, _ in batches]).reshape(recipe.epochs, -1)


@pytest.mark.parametrize("make", [training_batches, evaluation_batches])
def test_batches_keep_their_images_only_as_long_as_they_are_used(split, make):
    split = Split(split.images.copy(), split.labels)  # the fixture lives longer
    batches = make(split, 10, PLAIN if make is training_batches else PLAIN.preprocessing)
    images = weakref.ref(split.images)
    iterator = iter(batches.take(2))
    del split, batches
    gc.collect()
    assert len(list(iterator)) >= 1
    del iterator
    gc.collect()
    assert images() is None


def test_an_epoch_has_whole_batches_and_no_image_twice(split):
    order = _order(split, PLAIN)
    assert batches_per_epoch(split, PLAIN) == 6
    assert order.shape == (2, 96)
    for epoch in order:
        assert len(set(epoch)) == 96


def test_the_order_depends_only_on_seed_and_epoch(split):
    first, again = _order(split, PLAIN), _order(split, PLAIN)
    other = _order(split, dataclasses.replace(PLAIN, seed=1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0], other[0])
    # The number of epochs does not change it.
    np.testing.assert_array_equal(_order(split, dataclasses.replace(PLAIN, epochs=3))[:2], first)


def test_class_weights_are_mixed_like_labels(split):
    weights = tuple(np.arange(1.0, 11.0))
    for change in ({}, {"mixup": 1.0, "cutmix": 1.0}):
        recipe = dataclasses.replace(PLAIN, **change)
        plain = list(training_batches(split, 10, recipe).as_numpy_iterator())
        weighted = list(training_batches(split, 10, recipe, class_weights=weights).as_numpy_iterator())
        assert all(len(batch) == 2 for batch in plain)
        for (images, labels), (same_images, same_labels, image_weights) in zip(plain, weighted, strict=True):
            np.testing.assert_array_equal(images, same_images)
            np.testing.assert_array_equal(labels, same_labels)
            assert (image_weights.dtype, image_weights.shape) == (np.float32, (16,))
            np.testing.assert_allclose(image_weights, (labels * weights).sum(axis=1), rtol=1e-6)


def test_keras_divides_a_weighted_loss_by_the_number_of_images():
    logits, labels = np.array([[2.0, 0.0], [1.0, 0.0]], "float32"), np.eye(2, dtype="float32")
    plain, weighted = (
        keras.losses.CategoricalCrossentropy(from_logits=True, reduction=kind) for kind in ("none", "sum_over_batch_size")
    )
    expected = np.mean(np.array([3.0, 0.5]) * plain(labels, logits))
    np.testing.assert_allclose(weighted(labels, logits, np.array([3.0, 0.5], "float32")), expected, rtol=1e-6)


def _joined(parts):
    """The whole batches, from those of each process."""
    return [[np.concatenate(values) for values in zip(*batches)] for batches in zip(*parts, strict=True)]


@pytest.mark.parametrize("change", [{}, ALL, {"mixup": 1.0}, {"cutmix": 1.0}, {"resize": "crop", "mixup": 0.5}])
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_together_see_the_batches_of_one(split, processes, change):
    recipe, weights = dataclasses.replace(PLAIN, **change), tuple(np.arange(1.0, 11.0))
    whole = list(training_batches(split, 10, recipe, 1, weights).as_numpy_iterator())
    parts = [
        training_batches(split, 10, recipe, 1, weights, Share(process, processes, processes)).as_numpy_iterator()
        for process in range(processes)
    ]
    joined = _joined(parts)
    assert len(joined) == len(whole) == 6
    for batch, expected in zip(joined, whole):
        for values, expected_values in zip(batch, expected, strict=True):
            np.testing.assert_array_equal(values, expected_values)


@pytest.mark.parametrize(("images", "devices", "processes", "size"), [(100, 4, 1, 100), (99, 4, 2, 100), (70, 6, 3, 72)])
def test_evaluation_batches_for_several_devices_are_filled_up_with_weight_0(split, images, devices, processes, size):
    split = split.limit(images)
    parts = [
        evaluation_batches(split, 10, PLAIN.preprocessing, Share(process, processes, devices)).as_numpy_iterator()
        for process in range(processes)
    ]
    [(pixels, labels, weights)] = _joined(parts)
    assert len(pixels) == size
    np.testing.assert_array_equal(pixels[:images, 0, 0, 0], np.arange(images))
    np.testing.assert_array_equal(labels[:images].argmax(axis=1), split.labels)
    np.testing.assert_array_equal(weights[images:], 0)
    np.testing.assert_allclose(weights[:images], size / images)  # so that Keras' mean over all is that over the images


def test_evaluation_batches_for_several_devices_have_one_size(split, monkeypatch):
    monkeypatch.setattr(pipeline, "EVALUATION_BATCH", 32)
    batches = list(evaluation_batches(split, 10, PLAIN.preprocessing, Share(devices=3)).as_numpy_iterator())
    assert {len(images) for images, _, _ in batches} == {27}
    assert sum((weights > 0).sum() for _, _, weights in batches) == 100


def test_a_later_first_epoch_gives_the_same_batches(split):
    recipe = dataclasses.replace(PLAIN, epochs=3, **ALL)
    steps = batches_per_epoch(split, recipe)
    whole, later = (list(training_batches(split, 10, recipe, first).as_numpy_iterator()) for first in (0, 2))
    assert len(whole) == 3 * steps
    assert len(later) == steps
    for (images, labels), (later_images, later_labels) in zip(whole[2 * steps :], later):
        np.testing.assert_array_equal(images, later_images)
        np.testing.assert_array_equal(labels, later_labels)


def test_batches_are_float_pixels_and_one_hot_labels(split):
    images, labels = next(training_batches(split, 10, PLAIN).as_numpy_iterator())
    assert images.dtype == labels.dtype == np.float32
    assert images.shape == (16, 8, 8, 3)
    indices = images[:, 0, 0, 0].astype(int)
    np.testing.assert_array_equal(images, split.images[indices])
    np.testing.assert_array_equal(labels, np.eye(10)[indices % 10])


@pytest.mark.parametrize("change", [{name: value} for name, value in ALL.items()])
def test_augmentation_depends_only_on_seed_epoch_and_batch(split, change):
    # One batch of all images per epoch.
    recipe = dataclasses.replace(PLAIN, batch_size=100, **change)

    def epochs(recipe):
        shown = [images for images, _ in training_batches(split, 10, recipe).as_numpy_iterator()]
        return [images[np.argsort(images.sum(axis=(1, 2, 3)), kind="stable")] for images in shown]

    first, again = epochs(recipe), epochs(recipe)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[0], first[1])
    plain = epochs(dataclasses.replace(PLAIN, batch_size=100))
    assert not np.array_equal(first[0], plain[0])


def _mirrored(split, **change):
    """Whether each image is mirrored in each epoch: bool `(epochs, images)`."""
    recipe = dataclasses.replace(PLAIN, **{"epochs": 3, "batch_size": 20, "flip": True, **change})
    known = {image.tobytes(): (i, False) for i, image in enumerate(split.images)}
    known |= {image[:, ::-1].tobytes(): (i, True) for i, image in enumerate(split.images)}
    batches = list(training_batches(split, 10, recipe).as_numpy_iterator())
    shown = np.concatenate([images for images, _ in batches]).astype(np.uint8).reshape(recipe.epochs, len(split), 8, 8, 3)
    return np.array([[mirror for _, mirror in sorted(known[image.tobytes()] for image in epoch)] for epoch in shown])


def test_each_image_is_mirrored_in_every_second_epoch(split):
    first, second, third = _mirrored(split)
    assert 0.35 < np.mean(first) < 0.65
    np.testing.assert_array_equal(second, ~first)
    np.testing.assert_array_equal(third, first)
    np.testing.assert_array_equal(_mirrored(split, batch_size=50), [first, second, third])
    other = _mirrored(split, seed=1)[0]
    assert 0.35 < np.mean(other) < 0.65 and 0.3 < np.mean(other != first) < 0.7
    assert not _mirrored(split, flip=False).any()


def test_each_batch_of_each_epoch_has_draws_of_its_own(split):
    # 100 copies of one image, so that only the draws differ.
    copies = Split(np.repeat(split.images[:1], 100, axis=0), split.labels)
    recipe = dataclasses.replace(PLAIN, batch_size=50, erase=1.0)
    batches = [images.tobytes() for images, _ in training_batches(copies, 10, recipe).as_numpy_iterator()]
    assert len(set(batches)) == len(batches) == 4


@pytest.mark.parametrize("change", [{"mixup": 0.5}, {"cutmix": 0.5}, {"mixup": 0.5, "cutmix": 0.5}])
def test_mixup_and_cutmix_change_the_labels(split, change):
    recipe = dataclasses.replace(PLAIN, batch_size=100, epochs=1, **change)
    [(_, labels)] = training_batches(split, 10, recipe).as_numpy_iterator()
    np.testing.assert_allclose(labels.sum(axis=1), 1, atol=1e-5)
    assert np.mean(labels.max(axis=1) < 0.99) > 0.5


def test_mixup_and_cutmix_share_the_images(split):
    flat = Split(np.repeat(np.repeat(split.images[:, :1, :1], 8, axis=1), 8, axis=2), split.labels)  # one colour each
    recipe = dataclasses.replace(PLAIN, batch_size=100, epochs=1, mixup=1.0, cutmix=1.0)
    [(images, _)] = training_batches(flat, 10, recipe).as_numpy_iterator()
    blended = np.ptp(images, axis=(1, 2)).max(axis=1) == 0  # a pasted box would show
    assert 0.3 < np.mean(blended) < 0.8


def test_rand_augment_magnitude_is_used(split):
    shown = []
    for magnitude in (0.0, 10.0):
        recipe = dataclasses.replace(PLAIN, batch_size=100, epochs=1, rand_augment=1, rand_augment_magnitude=magnitude)
        shown.append(next(training_batches(split, 10, recipe).as_numpy_iterator())[0])
    assert not np.array_equal(*shown)


def test_evaluation_batches_are_smaller_for_large_images():
    images = np.zeros((40, 224, 224, 3), np.uint8)
    for stored in (images, images[:, :32, :32]):
        [first, *_] = evaluation_batches(Split(stored, np.zeros(40, int)), 10, Preprocessing(image_size=(224, 224)))
        assert len(first[0]) == 10


def test_small_images_are_stretched_in_batches(split):
    recipe = dataclasses.replace(PLAIN, image_size=20, epochs=1)
    [(images, _), *_] = training_batches(split, 10, recipe).as_numpy_iterator()
    whole = stretch(split.images, (20, 20)).numpy()
    for image in images:
        assert np.any(np.all(whole == image, axis=(1, 2, 3)))
    batches = evaluation_batches(split, 10, Preprocessing(image_size=(20, 20))).as_numpy_iterator()
    shown = np.concatenate([images for images, _ in batches])
    np.testing.assert_array_equal(shown, whole)


def test_interpolation_is_used_to_stretch(split):
    recipe = dataclasses.replace(PLAIN, image_size=20, epochs=1, batch_size=100, interpolation="bicubic")
    [(shown, _)] = training_batches(split, 10, recipe).as_numpy_iterator()
    whole = stretch(split.images, (20, 20), "bicubic").numpy()
    for batch in (shown, *(images for images, _ in evaluation_batches(split, 10, recipe.preprocessing).as_numpy_iterator())):
        assert {image.tobytes() for image in batch.astype("uint8")} <= {image.tobytes() for image in whole}


def test_evaluation_batches_hold_every_image_in_order(split):
    batches = list(evaluation_batches(split, 10, Preprocessing(image_size=(8, 8))).as_numpy_iterator())
    np.testing.assert_array_equal(np.concatenate([images for images, _ in batches]), split.images)
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in batches]), np.eye(10)[split.labels])


# === Crops ===

CROP = dataclasses.replace(PLAIN, resize="crop", batch_size=10, scale=(0.3, 0.8))


class Photos(list):
    """Photos of different sizes."""

    def __getitem__(self, item):
        return Photos(super().__getitem__(item)) if isinstance(item, slice) else super().__getitem__(item)


@pytest.fixture
def photos():
    """40 photos of different sizes. Their first two channels hold the row and the column of each pixel, the third the index."""
    sides = np.random.default_rng(0).integers(20, 60, (40, 2))
    grids = [np.stack(np.broadcast_arrays(*np.ogrid[:height, :width], i), axis=-1) for i, (height, width) in enumerate(sides)]
    return Split(Photos(grid.astype("uint8") for grid in grids), np.arange(40) % 10)


def _batches(split, recipe, first_epoch=0):
    return [images for images, _ in training_batches(split, 10, recipe, first_epoch).as_numpy_iterator()]


def test_training_sees_random_areas_of_single_images(photos):
    batches = _batches(photos, CROP)
    assert [batch.shape for batch in batches] == [(10, 8, 8, 3)] * 8
    shown = np.concatenate(batches)
    for epoch in shown.reshape(2, 40, 8, 8, 3):
        assert sorted(epoch[:, 0, 0, 2]) == list(range(40))
    heights, widths = np.array([image.shape[:2] for image in photos.images]).T
    indices = shown[:, 0, 0, 2].astype(int)
    # The first and the last pixel show the area: each is the mean of an eighth of it.
    tall, wide = (np.ptp(shown[..., channel], axis=(1, 2)) * 8 / 7 for channel in (0, 1))
    shares = tall * wide / (heights * widths)[indices]
    assert 0.2 < shares.min() < 0.45 and 0.65 < shares.max() < 0.9
    assert len(np.unique(shown[:, 0, 0, :2], axis=0)) > 60
    # The same image has another area in the next epoch.
    assert not np.array_equal(shown[:40][np.argsort(indices[:40])], shown[40:][np.argsort(indices[40:])])


def test_random_areas_depend_only_on_seed_step_and_index_in_the_batch(photos):
    recipe = dataclasses.replace(CROP, epochs=3, flip=True)
    whole = _batches(photos, recipe)
    np.testing.assert_array_equal(whole, _batches(photos, recipe))
    np.testing.assert_array_equal(whole[8:], _batches(photos, recipe, first_epoch=2))
    assert not np.array_equal(whole, _batches(photos, dataclasses.replace(recipe, seed=1)))


@pytest.mark.parametrize(
    "change", [{"scale": (0.9, 1.0)}, {"ratio": (0.4, 0.5)}, {"interpolation": "bicubic"}, {"resize": "auto"}]
)
def test_each_setting_of_random_areas_is_used(split, change):
    recipe = dataclasses.replace(CROP, epochs=1)
    assert not np.array_equal(_batches(split, recipe), _batches(split, dataclasses.replace(recipe, **change)))


def test_crop_padding_has_no_effect_with_crop(split):
    np.testing.assert_array_equal(_batches(split, CROP), _batches(split, dataclasses.replace(CROP, crop_padding=4)))


def test_the_aspect_ratio_is_relative_to_the_networks_input(photos):
    recipe = dataclasses.replace(CROP, epochs=1, image_size=(8, 32), scale=(0.05, 0.1), ratio=(0.99, 1.01))
    shown = np.concatenate(_batches(photos, recipe))
    tall, wide = (np.ptp(shown[..., channel], axis=(1, 2)) for channel in (0, 1))
    aspects = (wide * 32 / 31) / (tall * 8 / 7)
    assert np.median(aspects) == pytest.approx(4, rel=0.15)


@pytest.mark.parametrize("first_epoch", [0, 1])
def test_other_augmentation_is_that_of_stretched_images(split, first_epoch):
    whole = dataclasses.replace(PLAIN, **{**ALL, "crop_padding": 0, "scale": (1.0, 1.0), "ratio": (1.0, 1.0)})
    for (images, labels), (same_images, same_labels) in zip(
        training_batches(split, 10, whole, first_epoch).as_numpy_iterator(),
        training_batches(split, 10, dataclasses.replace(whole, resize="crop"), first_epoch).as_numpy_iterator(),
        strict=True,
    ):
        np.testing.assert_array_equal(images, same_images)
        np.testing.assert_array_equal(labels, same_labels)


def test_validation_sees_the_middle(photos):
    preprocessing = Preprocessing(image_size=(12, 18), resize="crop", crop_pct=0.75, interpolation="bicubic")
    batches = list(evaluation_batches(photos, 10, preprocessing).as_numpy_iterator())
    shown, labels = (np.concatenate(parts) for parts in zip(*batches))
    assert shown.dtype == np.float32
    np.testing.assert_array_equal(shown, [fit(image, preprocessing) for image in photos.images])
    np.testing.assert_array_equal(labels, np.eye(10)[photos.labels])
