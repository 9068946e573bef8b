"""Augmentation of whole batches, with random draws per image. Stateless: the same seed gives the same result.

In all functions, `images` has shape `(batch, height, width, channels)` and pixels in 0..255, `labels` has shape
`(batch, classes)`, and `seed` is two integers. With a `Part`, `images` and `labels` are a part of a batch, and get the draws of
their positions in it.
"""

import math
from typing import NamedTuple

import numpy as np
import tensorflow as tf

MAX_MAGNITUDE = 10  # RandAugment's scale in its paper: 0..10
TRIES = 10  # of `random_area`
_GREY = 128.0  # fills the area that a moved image uncovers


class Part(NamedTuple):
    """The part of a batch that one of several processes augments, with the draws that a single process would make.

    Args:
        batch: number of images in the whole batch.
        rows: int `(n,)`, the positions in the batch.
    """

    batch: int
    rows: np.ndarray

    def of(self, draws, axis=0):
        """Selects the rows of draws for the whole batch, which lie along `axis`."""
        return tf.gather(draws, self.rows, axis=axis)


class _Whole(NamedTuple):
    """All images of a batch: like a `Part`, without selecting."""

    batch: tf.Tensor

    def of(self, draws, axis=0):
        return draws


def _part(images, part):
    return part or _Whole(tf.shape(images)[0])


def flip(images, mirrored):
    """Mirrors the chosen images left to right.

    Args:
        mirrored: bool `(batch,)`, whether to mirror each.
    """
    return tf.where(mirrored[:, None, None, None], tf.reverse(images, axis=[2]), images)


def crop(images, seed, padding, part=None):
    """Pads each image by reflection, then crops it to the original size at a random position.

    Args:
        padding: pixels on each of the four sides; less than the image's height and width.
        part: a `Part`, or `None` for a whole batch.
    """
    height, width = tf.unstack(tf.shape(images)[1:3])
    part = _part(images, part)
    padded = tf.pad(images, [(0, 0), (padding, padding), (padding, padding), (0, 0)], "REFLECT")
    corners = tf.random.stateless_uniform((2, part.batch, 1), seed, 0, 2 * padding + 1, tf.int32)
    top, left = tf.unstack(part.of(corners, axis=1))
    rows = tf.gather(padded, top + tf.range(height), axis=1, batch_dims=1)
    return tf.ensure_shape(tf.gather(rows, left + tf.range(width), axis=2, batch_dims=1), images.shape)


def area_draws(batch, seed):
    """The random numbers for `random_area` of each image of a batch: float32 `(batch, TRIES, 4)` in 0..1."""
    return tf.random.stateless_uniform((batch, TRIES, 4), seed)


def random_area(height, width, draws, scale, ratio):
    """Chooses an area of an image by the rule of torchvision's `RandomResizedCrop`. Plain Python, for one image.

    The first try whose area lies inside the image counts. If none does, the area is the largest in the middle whose aspect
    ratio is in range.

    Args:
        height, width: the image's sides in pixels.
        draws: a row of `area_draws`.
        scale: the smallest and the largest area, as fractions of the image's.
        ratio: the smallest and the largest width / height of the area; its logarithm is uniform.

    Returns:
        `(top, left, height, width)` in pixels.
    """
    low, high = map(math.log, ratio)
    for share, aspect, top, left in draws.tolist():
        area = height * width * (scale[0] + share * (scale[1] - scale[0]))
        aspect = math.exp(low + aspect * (high - low))
        tall, wide = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < tall <= height and 0 < wide <= width:
            return int(top * (height - tall + 1)), int(left * (width - wide + 1)), tall, wide
    tall = min(height, max(1, round(width / ratio[0])))
    wide = min(width, max(1, round(height * ratio[1])))
    return (height - tall) // 2, (width - wide) // 2, tall, wide


def resized_area(image, area, size, interpolation):
    """Cuts an area out of one image and resizes it with antialiasing.

    Args:
        image: uint8 array `(height, width, 3)`.
        area: `(top, left, height, width)`.
        size: `(height, width)` of the result.
        interpolation: `"bilinear"` or `"bicubic"`.

    Returns:
        A uint8 array `(*size, 3)`.
    """
    from PIL import Image

    # Pillow, as it takes half the time of `tf.image.resize`. Their pixels rarely differ by more than 1.
    top, left, height, width = area
    cut = Image.fromarray(image[top : top + height, left : left + width])
    return np.asarray(cut.resize(size[::-1], Image.Resampling[interpolation.upper()]))


def mixup(images, labels, seed, alpha, part=None):
    """Blends each image and its label with its neighbour's in the batch (Zhang et al., arXiv 1710.09412).

    Args:
        images: float.
        alpha: positive; the weight of each blend is drawn from Beta(alpha, alpha).
        part: a `Part`, or `None` for a whole batch. The neighbour of its first image is its last.
    """
    part = _part(images, part)
    weights = part.of(_beta(part.batch, seed, alpha))
    return tuple(
        weight * values + (1 - weight) * _neighbour(values)
        for values, weight in ((images, weights[:, None, None, None]), (labels, weights[:, None]))
    )


def cutmix(images, labels, seed, alpha, part=None):
    """Replaces a box in each image, and the same share of its label, by its neighbour's (Yun et al., arXiv 1905.04899).

    The box lies inside the image. Labels are mixed by the number of pixels that were replaced.

    Args:
        alpha: positive; the share of each image outside its box is drawn from Beta(alpha, alpha).
        part: a `Part`, or `None` for a whole batch. The neighbour of its first image is its last.
    """
    height, width = tf.unstack(tf.shape(images)[1:3])
    part = _part(images, part)
    share_seed, box_seed = _split(seed, 2)
    side = part.of(tf.sqrt(1 - _beta(part.batch, share_seed, alpha)))
    inside = _box(height, width, side, side, box_seed, part)
    weight = 1 - tf.reduce_mean(tf.cast(inside, tf.float32), axis=(1, 2))  # (B, 1)
    return tf.where(inside, _neighbour(images), images), weight * labels + (1 - weight) * _neighbour(labels)


def erase(images, seed, probability, part=None):
    """Fills a box of some images with noise (Zhong et al., arXiv 1708.04896, with its areas and aspect ratios).

    Args:
        images: float.
        probability: the probability that an image gets a box.
        part: a `Part`, or `None` for a whole batch. Noise is drawn for the whole batch.
    """
    height, width, channels = tf.unstack(tf.shape(images)[1:])
    part = _part(images, part)
    choice, sizes, position, noise = _split(seed, 4)
    chosen = part.of(tf.random.stateless_uniform((part.batch, 1, 1, 1), choice)) < probability
    area, aspect = tf.unstack(part.of(tf.random.stateless_uniform((2, part.batch), sizes), axis=1))
    area = 0.02 + area * (0.4 - 0.02)
    aspect = tf.exp(math.log(0.3) * (1 - 2 * aspect))  # 0.3 to 1 / 0.3
    inside = _box(height, width, tf.sqrt(area * aspect), tf.sqrt(area / aspect), position, part)
    fill = part.of(tf.random.stateless_uniform((part.batch, height, width, channels), noise, 0, 255))
    return tf.where(chosen & inside, fill, images)


def rand_augment(images, seed, operations, magnitude, part=None):
    """Applies random operations to each image (Cubuk et al., arXiv 1909.13719).

    Args:
        images: float `(batch, height, width, 3)`.
        operations: number of operations, applied in sequence; each is drawn from the paper's fourteen.
        magnitude: strength of every operation, 0 to 10. The code of an operation shows what it does at 10.
        part: a `Part`, or `None` for a whole batch.
    """
    part = _part(images, part)
    # Not `keras.layers.RandAugment`: it draws operations per call, not per image, and evaluates all of them. Its draws depend
    # on a state, not only on seed and step, so a resumed run would draw others.
    for layer in _split(seed, operations):
        draw, direction = _split(layer, 2)
        kinds = len(_POINTWISE) + len(_GEOMETRIC)
        drawn = part.of(tf.random.stateless_uniform((part.batch,), draw, 0, kinds, tf.int32))
        sign = tf.where(part.of(tf.random.stateless_uniform((part.batch,), direction)) < 0.5, -1.0, 1.0)
        level = sign * magnitude / MAX_MAGNITUDE  # -1..1
        images = _colour(_move(images, drawn, level), drawn, level)
    return images


def _colour(images, drawn, level):
    """Applies every operation to the batch, then selects per image: that costs less than a branch per image."""
    result = images
    for number, operation in enumerate(_POINTWISE):
        result = tf.where((drawn == number)[:, None, None, None], operation(images, level[:, None, None, None]), result)
    return tf.ensure_shape(result, images.shape)


def _autocontrast(images, level):
    low = tf.reduce_min(images, axis=(1, 2), keepdims=True)
    span = tf.reduce_max(images, axis=(1, 2), keepdims=True) - low
    return tf.where(span > 0, 255 * tf.math.divide_no_nan(images - low, span), images)


def _equalize(images, level):
    # Equalizes the histogram of each channel, with Pillow's rounding.
    batch, height, width, channels = tf.unstack(tf.shape(images))
    flat = tf.reshape(tf.transpose(images, (0, 3, 1, 2)), (batch * channels, height * width))  # (B, H, W, C) -> (B*C, H*W)
    values = tf.clip_by_value(tf.cast(tf.round(flat), tf.int32), 0, 255)
    counts = tf.math.bincount(values, minlength=256, maxlength=256, axis=-1)  # (B*C, 256)
    brightest = tf.gather(counts, tf.reduce_max(values, axis=1), batch_dims=1)
    step = ((height * width - brightest) // 255)[:, None]
    spread = (tf.cumsum(counts, axis=-1, exclusive=True) + step // 2) // tf.maximum(step, 1)
    equal = tf.cast(tf.minimum(tf.gather(spread, values, batch_dims=1), 255), tf.float32)
    flat = tf.where(step > 0, equal, flat)  # step 0: too few pixels to spread over 256 values
    return tf.transpose(tf.reshape(flat, (batch, channels, height, width)), (0, 2, 3, 1))  # (B*C, H*W) -> (B, H, W, C)


def _solarize(images, level):
    return tf.where(images < 256 * (1 - tf.abs(level)), images, 255 - images)


def _posterize(images, level):
    step = 2 ** tf.round(4 * tf.abs(level))  # 8 bits to 4
    return step * tf.floor(images / step)


def _brightness(images, level):
    return _blend(0.0, images, level)


def _contrast(images, level):
    return _blend(tf.reduce_mean(_grey(images), axis=(1, 2), keepdims=True), images, level)


def _saturation(images, level):
    return _blend(_grey(images), images, level)


def _sharpness(images, level):
    kernel = tf.constant([[1, 1, 1], [1, 5, 1], [1, 1, 1]], tf.float32)[:, :, None, None] / 13
    smooth = tf.nn.depthwise_conv2d(images, tf.tile(kernel, (1, 1, images.shape[-1], 1)), (1, 1, 1, 1), "VALID")
    # Border pixels lack neighbours and stay unchanged, as in Pillow.
    border = tf.pad(tf.ones_like(smooth, tf.bool), [(0, 0), (1, 1), (1, 1), (0, 0)])
    smooth = tf.where(border, tf.pad(smooth, [(0, 0), (1, 1), (1, 1), (0, 0)]), images)
    return _blend(smooth, images, level)


def _grey(images):
    return tf.reduce_sum(images * (0.299, 0.587, 0.114), axis=-1, keepdims=True)


def _blend(extreme, images, level):
    """Moves pixels away from `extreme` if `level` is positive, or towards it if negative; by nine tenths at level 1 or -1."""
    return tf.clip_by_value(extreme + (1 + 0.9 * level) * (images - extreme), 0, 255)


def _identity(images, level):
    return images


_POINTWISE = (
    _identity,
    _autocontrast,
    _equalize,
    _solarize,
    _posterize,
    _brightness,
    _contrast,
    _saturation,
    _sharpness,
)
_GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


def _move(images, drawn, level):
    """Rotates, shears or translates the images for which such an operation was drawn."""
    height, width = tf.unstack(tf.cast(tf.shape(images)[1:3], tf.float32))
    rotate, shear_x, shear_y, translate_x, translate_y = (
        tf.where(drawn == len(_POINTWISE) + number, level, 0.0) for number in range(len(_GEOMETRIC))
    )
    angle = rotate * math.radians(30)
    # Output pixel (x, y), relative to the centre -> input pixel (a x + b y, c x + d y), plus the translation.
    a, b = tf.cos(angle), tf.sin(angle) + 0.3 * shear_x
    c, d = -tf.sin(angle) + 0.3 * shear_y, tf.cos(angle)
    middle_x, middle_y = (width - 1) / 2, (height - 1) / 2
    right = middle_x - a * middle_x - b * middle_y + translate_x * width * 10 / 32
    down = middle_y - c * middle_x - d * middle_y + translate_y * height * 10 / 32
    zero = tf.zeros_like(a)
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=images,
        transforms=tf.stack([a, b, right, c, d, down, zero, zero], axis=1),
        output_shape=tf.shape(images)[1:3],
        fill_value=_GREY,
        interpolation="BILINEAR",
        fill_mode="CONSTANT",
    )


def _split(seed, n):
    """Derives `n` independent seeds."""
    return tf.unstack(tf.random.split(tf.convert_to_tensor(seed), n) if n else tf.zeros((0, 2), tf.int32))


def _beta(n, seed, alpha):
    """`(n,)` draws from Beta(alpha, alpha)."""
    a, b = tf.unstack(tf.random.stateless_gamma((2, n), seed, alpha))
    return tf.math.divide_no_nan(a, a + b)  # both can be too small for a float


def _neighbour(batch):
    return tf.roll(batch, 1, axis=0)


def _box(height, width, tall, wide, seed, part=None):
    """Draws the position of a box inside each image. -> bool `(batch, height, width, 1)`, true inside

    Args:
        height, width: the images' sides in pixels.
        tall, wide: `(batch,)`, the box's sides as shares of the image's; clipped to 1.
        seed: two integers.
        part: a `Part`, or `None` for a whole batch.
    """
    part = part or _Whole(tf.shape(tall)[0])
    top, left = tf.unstack(part.of(tf.random.stateless_uniform((2, part.batch), seed), axis=1))

    def inside(side, share, start):
        length = tf.round(tf.minimum(share, 1.0) * tf.cast(side, tf.float32))
        first = tf.floor(start * (tf.cast(side, tf.float32) - length + 1))
        position = tf.range(tf.cast(side, tf.float32))
        return (position >= first[:, None]) & (position < (first + length)[:, None])  # (B, side)

    rows, columns = inside(height, tall, top), inside(width, wide, left)
    return rows[:, :, None, None] & columns[:, None, :, None]
