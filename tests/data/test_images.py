import numpy as np
import pytest
import tensorflow as tf
from labelled_images import noise, resized

from cvt_keras.data import images


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_decoding_gives_three_channels(channels):
    pixels = noise(1, (6, 5, channels))[0]
    decoded = images.decode(tf.io.encode_png(pixels).numpy())
    assert decoded.dtype == tf.uint8
    np.testing.assert_array_equal(decoded, np.repeat(pixels, 3, axis=-1) if channels == 1 else pixels[..., :3])


def test_decoding_works_within_a_graph():
    pixels = noise(1, (6, 5, 3))[0]
    [decoded] = tf.data.Dataset.from_tensors(tf.io.encode_png(pixels)).map(images.decode)
    np.testing.assert_array_equal(decoded, pixels)


def test_bytes_that_are_not_an_image_are_an_error():
    with pytest.raises(tf.errors.OpError):
        images.decode(b"no image")


def test_stretching_antialiases_and_ignores_the_aspect_ratio():
    photos = noise(2, (30, 20, 3))
    for size in (8, 40):
        stretched = images.stretch(photos, size)
        assert (stretched.dtype, stretched.shape) == (tf.uint8, (2, size, size, 3))
        np.testing.assert_array_equal(stretched, [resized(photo, size) for photo in photos])


def test_images_of_the_size_are_not_touched():
    photos = noise(2, (8, 8, 3))
    np.testing.assert_array_equal(images.stretch(photos, 8), photos)


@pytest.mark.parametrize("shape", [(8, 8, 3), (30, 20, 3)])
def test_a_size_that_is_known_late_changes_nothing(shape):
    [photo] = noise(1, shape)
    late = tf.function(lambda image: images.stretch(image, 8), input_signature=[tf.TensorSpec((None, None, 3), tf.uint8)])
    np.testing.assert_array_equal(late(photo), images.stretch(photo, 8))


def test_mean_and_std_are_those_of_the_pixels():
    photos = noise(300, (4, 4, 3))
    mean, std = images.mean_and_std(photos)
    np.testing.assert_allclose(mean, (photos / 255).mean(axis=(0, 1, 2)), atol=6e-5)
    np.testing.assert_allclose(std, (photos / 255).std(axis=(0, 1, 2)), atol=6e-5)
    assert mean == tuple(round(number, 4) for number in mean)


def test_images_of_one_colour_do_not_divide_by_zero():
    mean, std = images.mean_and_std(np.full((3, 8, 8, 3), (0, 51, 255), "uint8"))
    assert mean == (0, 0.2, 1)
    assert std == (1 / 255,) * 3
