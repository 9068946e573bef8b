import numpy as np
import pytest
import tensorflow as tf

from cvt_keras.data import augment


def _images(n=64, height=8, width=12):
    return tf.constant(np.random.default_rng(0).integers(0, 256, (n, height, width, 3)), tf.uint8)


def test_a_seed_gives_the_same_crop_again():
    images = _images()
    first, again, other = (augment.crop(images, seed, 2).numpy() for seed in ((0, 0), (0, 0), (0, 1)))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.dtype == np.uint8
    assert first.shape == images.shape


def test_flip_mirrors_the_chosen_images_left_to_right():
    images = _images(n=3)
    flipped = augment.flip(images, tf.constant([True, False, True])).numpy()
    np.testing.assert_array_equal(flipped[::2], images.numpy()[::2, :, ::-1])
    np.testing.assert_array_equal(flipped[1], images[1])


def test_crop_takes_each_image_from_its_reflection_at_a_position_of_its_own():
    images = _images(n=500).numpy()
    cropped = augment.crop(images, (0, 0), 2).numpy()
    padded = np.pad(images, [(0, 0), (2, 2), (2, 2), (0, 0)], mode="reflect")
    positions = []
    for i in range(len(images)):
        matches = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if np.array_equal(cropped[i], padded[i, top : top + 8, left : left + 12])
        ]
        assert len(matches) == 1
        positions += matches
    assert set(positions) == {(top, left) for top in range(5) for left in range(5)}


FLOAT = {
    "erase": lambda images, seed: augment.erase(images, seed, 1.0),
    "rand_augment": lambda images, seed: augment.rand_augment(images, seed, 2, 9.0),
    "mixup": lambda images, seed: augment.mixup(images, tf.eye(len(images)), seed, 1.0)[0],
    "cutmix": lambda images, seed: augment.cutmix(images, tf.eye(len(images)), seed, 1.0)[0],
}


@pytest.mark.parametrize("name", FLOAT)
def test_draws_differ_between_images(name):
    # Copies of one image, so that only the draws differ; and between them another image, as mixing needs two.
    one, other = _images(n=2).numpy().astype("float32")
    images = np.stack([one, other] * 32)
    first, again, reseeded = (FLOAT[name](tf.constant(images), seed).numpy() for seed in ((0, 0), (0, 0), (0, 1)))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, reseeded)
    assert len(np.unique(first[::2].reshape(32, -1), axis=0)) > 20
    assert first.shape == images.shape
    assert first.min() >= 0 and first.max() <= 255


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
@pytest.mark.parametrize("alpha", [0.01, 0.2, 1.0])
def test_labels_are_mixed_in_the_shares_of_the_pixels(name, alpha):
    # All pixels of image i are i, and its class is i: pixels and labels both show the share.
    n = 100
    images = tf.tile(tf.range(n, dtype=tf.float32)[:, None, None, None], (1, 8, 12, 3))
    mixed, labels = (value.numpy() for value in getattr(augment, name)(images, tf.eye(n), (0, 0), alpha))
    neighbour = np.roll(np.arange(n), 1)
    measured = (mixed.mean(axis=(1, 2, 3)) - neighbour) / (np.arange(n) - neighbour)
    np.testing.assert_allclose(labels[np.arange(n), np.arange(n)], measured, atol=3e-5)
    np.testing.assert_allclose(labels.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(labels[np.arange(n), neighbour], 1 - measured, atol=3e-5)
    assert np.all(np.isfinite(mixed))
    # Beta(a, a) has mean 1 / 2 and variance 1 / (4 (2 a + 1)).
    assert np.mean(measured) == pytest.approx(0.5, abs=0.15)
    assert np.var(measured) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.3)


def test_cutmix_pastes_one_box():
    n = 50
    images = tf.tile(tf.range(n, dtype=tf.float32)[:, None, None, None], (1, 8, 12, 3))
    mixed = augment.cutmix(images, tf.eye(n), (0, 0), 1.0)[0].numpy()
    for i in range(n):
        pasted = mixed[i, :, :, 0] != i
        rows, columns = pasted.any(axis=1), pasted.any(axis=0)
        assert pasted.sum() == rows.sum() * columns.sum()
        assert set(np.unique(mixed[i])) <= {i, (i - 1) % n}


def test_erase_fills_a_box_of_the_chosen_images_with_noise():
    n = 400
    images = tf.fill((n, 32, 32, 3), -1.0)
    erased = augment.erase(images, (0, 0), 0.25).numpy()[..., 0] >= 0
    assert np.mean(erased.any(axis=(1, 2))) == pytest.approx(0.25, abs=0.07)
    shares = erased.mean(axis=(1, 2))[erased.any(axis=(1, 2))]
    assert 0.01 < shares.min() < 0.08
    assert 0.3 < shares.max() < 0.43
    assert not augment.erase(images, (0, 0), 0.0).numpy().max() >= 0


def test_a_box_reaches_every_position_inside_the_image():
    half = tf.fill((300,), 0.5)
    boxes = augment._box(tf.constant(8), tf.constant(12), half, half, (0, 0)).numpy()[..., 0]
    assert (boxes.sum(axis=(1, 2)) == 4 * 6).all()
    positions = {(int(box.any(axis=1).argmax()), int(box.any(axis=0).argmax())) for box in boxes}
    assert positions == {(top, left) for top in range(5) for left in range(7)}


def _colour(operation, images, level=1.0):
    return operation(tf.constant(images, tf.float32), tf.fill((len(images), 1, 1, 1), level)).numpy()


@pytest.mark.parametrize(
    "name", ["autocontrast", "equalize", "solarize", "posterize", "brightness", "contrast", "color", "sharpness"]
)
def test_colour_operations_match_pillow(name):
    from PIL import Image, ImageEnhance, ImageOps

    images = np.random.default_rng(0).integers(40, 200, (4, 64, 48, 3)).astype("uint8")
    theirs = {
        "autocontrast": ImageOps.autocontrast,
        "equalize": ImageOps.equalize,
        "solarize": lambda image: ImageOps.solarize(image, 128),
        "posterize": lambda image: ImageOps.posterize(image, 6),
        **{
            name: lambda image, name=name: getattr(ImageEnhance, name.capitalize())(image).enhance(1.45)
            for name in ("brightness", "contrast", "color", "sharpness")
        },
    }[name]
    operation = getattr(augment, f"_{'saturation' if name == 'color' else name}")
    ours = _colour(operation, images, 0.5)
    expected = np.stack([np.asarray(theirs(Image.fromarray(image))) for image in images])
    # Pillow rounds intermediate results, such as contrast's mean and greys, to integers.
    np.testing.assert_allclose(ours, expected, atol=1.6)


@pytest.mark.parametrize("name", ["autocontrast", "equalize"])
def test_images_of_one_colour_stay_unchanged(name):
    images = np.full((2, 8, 8, 3), 7.0, "float32")
    np.testing.assert_array_equal(_colour(getattr(augment, f"_{name}"), images), images)


def _moved(name, level, image):
    number = len(augment._POINTWISE) + augment._GEOMETRIC.index(name)
    return augment._move(tf.constant(image[None], tf.float32), tf.constant([number]), tf.constant([level])).numpy()[0]


def test_translate_moves_by_ten_of_32_pixels():
    image = np.random.default_rng(0).uniform(0, 255, (32, 32, 3)).astype("float32")
    right = _moved("translate_x", 1.0, image)
    np.testing.assert_allclose(right[:, :22], image[:, 10:], atol=1e-3)
    np.testing.assert_array_equal(right[:, 22:], 128)
    np.testing.assert_allclose(_moved("translate_y", -0.5, image)[5:], image[:27], atol=1e-3)


def test_rotate_and_shear_are_about_the_centre():
    image = np.zeros((33, 33, 3), "float32")
    image[:, 16] = 255  # a vertical line
    turned = _moved("rotate", 1.0, image)[:, :, 0]
    assert turned[16, 16] == pytest.approx(255)
    # At 30 degrees, the line is 8 tan(30) = 4.6 columns from the centre in the eighth row from it.
    assert abs(int(np.argmax(turned[8])) - 16) == pytest.approx(4.6, abs=0.6)
    sheared = _moved("shear_x", 1.0, image)[:, :, 0]
    assert abs(int(np.argmax(sheared[6])) - 16) == pytest.approx(3, abs=0.1)  # 0.3 of ten rows
    across = np.swapaxes(image, 0, 1)
    np.testing.assert_allclose(_moved("shear_y", 1.0, across)[:, :, 0], sheared.T, atol=1e-3)


def test_rand_augment_draws_every_operation_and_uses_its_magnitude():
    images = tf.tile(tf.cast(_images(n=1, height=16, width=16), tf.float32), (300, 1, 1, 1))
    assert len(np.unique(augment.rand_augment(images, (0, 0), 1, 10.0).numpy().reshape(300, -1), axis=0)) >= 14
    change = [
        float(tf.reduce_mean(tf.abs(augment.rand_augment(images, (0, 0), operations, magnitude) - images)))
        for operations, magnitude in ((0, 10.0), (1, 2.0), (1, 8.0), (3, 8.0))
    ]
    assert change[0] == 0
    assert change == sorted(change)
