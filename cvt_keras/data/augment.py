"""Augmentation of whole batches, drawn for each image: stateless, so the same seed draws the same again."""

import tensorflow as tf


def flip(images, seed):
    """Mirrors half of the images left to right.

    Args:
        images: `(batch, height, width, channels)` of any dtype.
        seed: two integers.
    """
    chosen = tf.random.stateless_uniform((tf.shape(images)[0], 1, 1, 1), seed) < 0.5
    return tf.where(chosen, tf.reverse(images, axis=[2]), images)


def crop(images, seed, padding):
    """Pads by reflection, then cuts the original size out, at a place of its own for each image.

    Args:
        images: `(batch, height, width, channels)` of any dtype.
        seed: two integers.
        padding: pixels on each of the four sides; under the image's sides.
    """
    batch, height, width = tf.unstack(tf.shape(images)[:3])
    padded = tf.pad(images, [(0, 0), (padding, padding), (padding, padding), (0, 0)], "REFLECT")
    top, left = tf.unstack(tf.random.stateless_uniform((2, batch, 1), seed, 0, 2 * padding + 1, tf.int32))
    rows = tf.gather(padded, top + tf.range(height), axis=1, batch_dims=1)
    return tf.ensure_shape(tf.gather(rows, left + tf.range(width), axis=2, batch_dims=1), images.shape)
