"""Source and recipe -> batches of float32 pixels in 0..255 and one-hot labels, by tf.data."""

import tensorflow as tf

from cvt_keras.data import augment

EVALUATION_BATCH = 500  # divides 5,000 and 10,000: XLA compiles a remainder of another size anew

# One purpose's draws must not repeat another's: each has a key of its own beside the recipe's seed.
_ORDER, _FLIP, _CROP = range(3)


def training_batches(split, num_classes, recipe):
    """Augmented batches, epoch after epoch for `recipe.epochs`; an epoch leaves out what does not fill its last batch.

    The order is a function of (seed, epoch), the augmentation of (seed, epoch, batch).

    Args:
        split: a `Split` of uint8 images.
        num_classes: width of the one-hot labels.
        recipe: its `epochs`, `batch_size`, `seed`, `flip` and `crop_padding` are read.

    Returns:
        A `tf.data.Dataset` of `(images, labels)`: float32 `(batch, height, width, channels)` and `(batch, num_classes)`,
        `batches_per_epoch` of them an epoch.
    """
    with tf.device("CPU:0"):  # where the pipeline works, also beside a GPU
        images, labels = tf.constant(split.images), tf.constant(split.labels)
    steps = batches_per_epoch(split, recipe)

    def key(purpose, position):
        return tf.stack([tf.constant(recipe.seed * 16 + purpose, tf.int64), position])

    def epoch_batches(epoch):
        order = tf.random.experimental.stateless_shuffle(tf.range(len(split)), key(_ORDER, epoch))
        batches = tf.data.Dataset.from_tensor_slices(order).batch(recipe.batch_size, drop_remainder=True)
        return batches.enumerate(start=epoch * steps)

    def load(step, chosen):
        pixels = tf.gather(images, chosen)
        if recipe.flip:
            pixels = augment.flip(pixels, key(_FLIP, step))
        if recipe.crop_padding:
            pixels = augment.crop(pixels, key(_CROP, step), recipe.crop_padding)
        return tf.cast(pixels, tf.float32), tf.one_hot(tf.gather(labels, chosen), num_classes)

    dataset = tf.data.Dataset.range(recipe.epochs).flat_map(epoch_batches)
    return dataset.map(load, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)


def batches_per_epoch(split, recipe):
    """Whole batches in one pass over `split`."""
    return len(split) // recipe.batch_size


def evaluation_batches(split, num_classes):
    """All images of a `Split`, in their order and as they are."""
    dataset = tf.data.Dataset.from_tensor_slices((split.images, split.labels)).batch(EVALUATION_BATCH)
    dataset = dataset.map(lambda images, labels: (tf.cast(images, tf.float32), tf.one_hot(labels, num_classes)))
    return dataset.prefetch(tf.data.AUTOTUNE)
