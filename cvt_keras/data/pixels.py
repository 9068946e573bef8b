"""The images of a split: an array, or `Images`, which are read only when they are needed."""

import functools
import zlib

import numpy as np

# What is known about an image without its pixels. Fields that a data set does not need are zero.
INDEX_TYPE = np.dtype(
    [
        ("id", "S64"),  # for a file: its SHA-256 in hexadecimal digits
        ("height", "i4"),
        ("width", "i4"),
        ("offset", "i8"),  # where its pixels lie
        ("checksum", "u4"),  # CRC-32 of the pixels
        ("sums", "i8", 3),  # of the pixels of each channel
        ("squares", "i8", 3),  # sums of the squared pixels
        ("original", "S32"),  # digest of the pixels before they were resized, in hexadecimal digits
        ("cut_off", "?"),  # see `images.Picture`
        ("one_colour", "?"),
        ("label", "i4"),
    ]
)


class Images:
    """Images that are read when they are indexed, in place of an array `(n, height, width, 3)`.

    `images[i]` reads an image: uint8 `(height, width, 3)`. `images[rows]`, with a slice or an array of indices, is another
    `Images` and reads nothing. `numpy.asarray(images)` reads all of them; they must have the same size.

    Args:
        read: function from a row of `index` to its pixels.
        index: array of `INDEX_TYPE`.
        rows: int `(n,)`: the rows of `index` that are the images, in their order.
        array: the images of all rows, uint8 `(rows, height, width, 3)`, if they have the same size and lie together.
    """

    dtype = np.dtype("uint8")

    def __init__(self, read, index, rows, array=None):
        self._read = read
        self._index = index
        self._rows = rows
        self._array = array
        self.errors = []  # what `read` raised inside a `tf.data` pipeline, for this and all images that are taken from it

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, key):
        rows = self._rows[key]
        return self._read(rows) if np.isscalar(rows) else self._at(rows)

    def _at(self, rows):
        images = Images(self._read, self._index, rows, self._array)
        images.errors = self.errors
        return images

    def __array__(self, dtype=None, copy=None):
        if self._array is not None:
            pixels = self._array[self._rows]
        else:
            shape = self.shape
            if None in shape:
                raise ValueError(f"images of different sizes can't become an array. Received: shape={shape}")
            pixels = np.empty(shape, "uint8")
            for i, row in enumerate(self._rows):
                pixels[i] = self._read(row)
        return pixels if dtype is None else pixels.astype(dtype)

    @property
    def shape(self):
        """`(n, height, width, 3)`; a side in which the images differ is `None`."""
        index = self._index[self._rows] if len(self) else self._index
        sides = [np.unique(index[side]) for side in ("height", "width")]
        return len(self), *(int(side[0]) if len(side) == 1 else None for side in sides), 3

    def checksum(self):
        """CRC-32 of all pixels, one image after the other, equal to that of the array. Reads no pixels."""
        total = 0
        for checksum, height, width in self._index[["checksum", "height", "width"]][self._rows].tolist():
            # The CRC-32 of A + B follows from those of A and B, as it is linear in the checksum that it starts from.
            for i, table in enumerate(_checksum_tables(3 * height * width)):
                checksum ^= table[total >> 8 * i & 255]
            total = checksum
        return total

    def mean_and_variance(self):
        """Mean and variance of each channel of the pixels, float64 `(3,)` each. Reads no pixels."""
        index = self._index[self._rows]
        n = (index["height"].astype("int64") * index["width"]).sum()
        mean = index["sums"].sum(axis=0) / n
        return mean, index["squares"].sum(axis=0) / n - mean**2

    def followed_by(self, others):
        """These images, then those of each of `others`, which must be of the same data set. -> `Images`"""
        return self._at(np.concatenate([part._rows for part in (self, *others)]))


def row_of_index(id, pixels, offset, **known):
    """Returns the row of an image for an index: an array `()` of `INDEX_TYPE`.

    Args:
        id: tells the image from all others of the data set.
        pixels: uint8 `(height, width, 3)`, contiguous.
        offset: where the pixels lie.
        **known: other fields of `INDEX_TYPE`.
    """
    row = np.zeros((), INDEX_TYPE)
    row["id"], row["offset"], row["checksum"] = id, offset, zlib.crc32(pixels)
    row["height"], row["width"], _ = pixels.shape
    flat = pixels.reshape(-1, 3).astype("int64")
    row["sums"], row["squares"] = flat.sum(axis=0), (flat**2).sum(axis=0)
    for name, value in known.items():
        row[name] = value
    return row


@functools.lru_cache(maxsize=1_000)
def _checksum_tables(size):
    """What `size` zeros turn each byte of a CRC-32 into: four lists of 256, the lowest byte first."""
    zeros = bytes(size)
    bits = [zlib.crc32(zeros, 1 << bit) ^ zlib.crc32(zeros) for bit in range(32)]
    tables = [[0], [0], [0], [0]]
    for bit, value in enumerate(bits):
        table = tables[bit // 8]
        table += [value ^ lower for lower in table]
    return tables


def checksum(images):
    """CRC-32 of all pixels, one image after the other.

    Args:
        images: uint8 `(n, height, width, 3)`, or `Images`.
    """
    return images.checksum() if isinstance(images, Images) else zlib.crc32(images)


def join(parts):
    """The images of several parts, one part after the other.

    Args:
        parts: arrays `(n, height, width, 3)` of images of the same size, or `Images` of the same data set.
    """
    first, *others = parts
    return first.followed_by(others) if isinstance(first, Images) else np.concatenate(parts)


def mean_and_std(images):
    """The mean and the standard deviation of each channel, with pixels in 0..1.

    Args:
        images: uint8 `(n, height, width, 3)`, or `Images`.

    Returns:
        Two tuples of three floats, rounded to four decimals. A std is at least 1/255, to avoid a division by 0.
    """
    if isinstance(images, Images):
        mean, variance = images.mean_and_variance()
    else:
        # From a histogram: exact, and without a float copy of the images.
        counts = np.zeros((3, 256), "int64")
        for start in range(0, len(images), 256):
            for channel in range(3):
                counts[channel] += np.bincount(images[start : start + 256, ..., channel].ravel(), minlength=256)
        share, value = counts / counts.sum(axis=1, keepdims=True), np.arange(256)
        mean = share @ value
        variance = (share * (value - mean[:, None]) ** 2).sum(axis=1)
    std = np.sqrt(np.maximum(variance, 0)) / 255
    return tuple(round(float(n) / 255, 4) for n in mean), tuple(max(round(float(n), 4), 1 / 255) for n in std)
