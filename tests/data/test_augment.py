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


# === Random areas ===

SCALE, RATIO = (0.3, 0.9), (0.75, 1.5)


def _areas(height, width, n=500, seed=(0, 0), scale=SCALE, ratio=RATIO):
    draws = augment.area_draws(n, seed).numpy()
    return np.array([augment.random_area(height, width, row, scale, ratio) for row in draws])


def test_random_areas_lie_inside_and_have_the_areas_and_aspect_ratios_of_the_ranges():
    height, width = 256, 341
    top, left, tall, wide = _areas(height, width).T
    assert min(*top, *left) == 0  # some touch a side
    assert np.all(top + tall <= height) and np.all(left + wide <= width)
    shares, aspects = tall * wide / (height * width), wide / tall
    for values, (low, high) in ((shares, SCALE), (aspects, RATIO)):
        assert low * 0.99 < values.min() < low * 1.05
        assert high * 0.95 < values.max() < high * 1.01
    # Every position is as likely: the middle of its range, on average.
    assert np.mean(top / np.maximum(height - tall, 1)) == pytest.approx(0.5, abs=0.05)
    assert np.mean(left / np.maximum(width - wide, 1)) == pytest.approx(0.5, abs=0.05)


def test_the_logarithm_of_the_aspect_ratio_is_uniform():
    _, _, tall, wide = _areas(1000, 1000, scale=(0.1, 0.2), ratio=(0.5, 4.0)).T
    assert np.median(wide / tall) == pytest.approx(2**0.5, rel=0.1)


def test_a_seed_gives_the_same_areas_again():
    first = _areas(100, 140)
    np.testing.assert_array_equal(first, _areas(100, 140))
    assert not np.array_equal(first, _areas(100, 140, seed=(0, 1)))
    assert len(np.unique(first, axis=0)) > 400


@pytest.mark.parametrize(
    "shape, expected",
    [((10, 1000), (0, 492, 10, 15)), ((1000, 10), (493, 0, 13, 10)), ((1, 9), (0, 3, 1, 2)), ((9, 1), (4, 0, 1, 1))],
)
def test_without_a_try_that_fits_the_area_is_in_the_middle(shape, expected):
    assert {tuple(area) for area in _areas(*shape, n=5, scale=(1.0, 1.0))} == {expected}


def test_the_fallback_has_at_least_one_pixel():
    draws = np.full((augment.TRIES, 4), 0.5)
    assert augment.random_area(1, 9, draws, (1.0, 1.0), (0.1, 0.3)) == (0, 4, 1, 1)
    assert augment.random_area(9, 1, draws, (1.0, 1.0), (4.0, 9.0)) == (4, 0, 1, 1)


def test_the_whole_image_is_the_fallback_if_its_aspect_ratio_is_in_range():
    draws = np.full((augment.TRIES, 4), 0.999)  # too wide in each try
    assert augment.random_area(100, 100, draws, (0.9, 1.0), (0.5, 2.0)) == (0, 0, 100, 100)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_an_area_is_cut_before_it_is_resized(interpolation):
    y, x = np.mgrid[:90, :120]
    photo = np.stack([y, x, 128 + 60 * np.sin(x / 9)], axis=-1).astype("uint8")
    pixels = augment.resized_area(photo, (10, 20, 60, 80), (32, 48), interpolation)
    expected = tf.image.resize(photo[10:70, 20:100], (32, 48), interpolation, antialias=True).numpy()
    assert (pixels.dtype, pixels.shape) == (np.uint8, (32, 48, 3))
    assert np.abs(pixels - expected).max() <= 2
    same = augment.resized_area(photo, (3, 4, 32, 48), (32, 48), interpolation)
    np.testing.assert_array_equal(same, photo[3:35, 4:52])
