import zlib

import numpy as np
import pytest
from labelled_images import noise

from cvt_keras.data.pixels import Images, checksum, join, mean_and_std, row_of_index


def images_of(arrays):
    index = np.array([row_of_index(str(i), array, 0) for i, array in enumerate(arrays)])
    return Images(lambda row: arrays[row], index, np.arange(len(arrays)))


@pytest.fixture
def photos():
    return noise(300, (4, 6, 3))


@pytest.fixture
def unequal():
    return [image for shape in ((3, 4, 3), (5, 2, 3), (1, 1, 3)) for image in noise(3, shape)]


def test_images_are_indexed_like_an_array(photos):
    images = images_of(photos)
    assert (len(images), images.shape, images.dtype) == (300, photos.shape, photos.dtype)
    np.testing.assert_array_equal(images, photos)
    np.testing.assert_array_equal(images[7], photos[7])
    np.testing.assert_array_equal(images[np.int64(-1)], photos[-1])
    for key in (slice(10, 20), [5, 3, 3], np.arange(300) % 7 == 0, []):
        assert isinstance(images[key], Images)
        np.testing.assert_array_equal(images[key][::-1], photos[key][::-1])


def test_only_the_images_that_are_used_are_read(photos):
    read = []
    index = np.array([row_of_index(str(i), photo, 0) for i, photo in enumerate(photos)])
    images = Images(lambda row: read.append(int(row)) or photos[row], index, np.arange(300))
    part = images[100:][[1, 5]]
    checksum(part), mean_and_std(part), join([part, part]), part.shape, len(part)
    assert read == []
    np.asarray(part)
    assert read == [101, 105]


def test_errors_are_shared_by_all_images_of_a_data_set(photos):
    images = images_of(photos)
    assert images[:9].errors is images[[1]].errors is join([images[:2], images[5:]]).errors is images.errors


def test_images_of_different_sizes_are_no_array(unequal):
    images = images_of(unequal)
    assert images.shape == (9, None, None, 3)
    assert images[3:6].shape == (3, 5, 2, 3)
    with pytest.raises(ValueError, match="shape="):
        np.asarray(images)


def test_the_checksum_is_that_of_all_pixels(photos, unequal):
    assert checksum(images_of(photos)) == checksum(photos) == zlib.crc32(photos)
    for arrays in (unequal, unequal[::-1], unequal[:1]):
        assert checksum(images_of(arrays)) == zlib.crc32(b"".join(array.tobytes() for array in arrays))
    assert checksum(images_of(photos)[:0]) == 0


def test_join_puts_one_part_after_the_other(photos):
    images = images_of(photos)
    for parts in ([images[5:9], images[2:4]], [photos[5:9], photos[2:4]]):
        np.testing.assert_array_equal(join(parts), photos[[5, 6, 7, 8, 2, 3]])


@pytest.mark.parametrize("kind", [np.asarray, images_of])
def test_mean_and_std_are_per_channel(photos, kind):
    mean, std = mean_and_std(kind(photos))
    np.testing.assert_allclose(mean, (photos / 255).mean(axis=(0, 1, 2)), atol=6e-5)
    np.testing.assert_allclose(std, (photos / 255).std(axis=(0, 1, 2)), atol=6e-5)
    assert mean == tuple(round(number, 4) for number in mean)
    assert (mean, std) == mean_and_std(photos)


@pytest.mark.parametrize("kind", [np.asarray, images_of])
def test_std_is_at_least_a_255th(kind):
    mean, std = mean_and_std(kind(np.full((3, 8, 8, 3), (0, 51, 255), "uint8")))
    assert mean == (0, 0.2, 1)
    assert std == (1 / 255,) * 3


def test_mean_and_std_count_every_pixel_of_images_of_different_sizes(unequal):
    pixels = np.concatenate([array.reshape(-1, 3) for array in unequal]) / 255
    mean, std = mean_and_std(images_of(unequal))
    np.testing.assert_allclose(mean, pixels.mean(axis=0), atol=6e-5)
    np.testing.assert_allclose(std, pixels.std(axis=0), atol=6e-5)
