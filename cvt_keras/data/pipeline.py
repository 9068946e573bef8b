"""Source and recipe -> batches of float32 pixels in 0..255 and one-hot labels, by tf.data."""

import numpy as np
import tensorflow as tf

from cvt_keras.data import augment
from cvt_keras.data.images import stretch

EVALUATION_BATCH = 500  # of 32x32; divides 5,000 and 10,000: XLA compiles a remainder of another size anew

# One purpose's draws must not repeat another's, of this seed or the next: each has a key of its own.
_ORDER, _FLIP, _CROP, _RAND_AUGMENT, _ERASE, _MIXUP, _CUTMIX, _MIXUP_OR_CUTMIX = range(8)
_PURPOSES = 16  # with room for more: another number would change every draw


def training_batches(split, num_classes, recipe, first_epoch=0, class_weights=None):
    """Augmented batches, epoch after epoch up to `recipe.epochs`; an epoch leaves out what does not fill its last batch.

    The order is a function of (seed, epoch), the augmentation of (seed, epoch, place in the order): a run that starts at
    `first_epoch` sees what one from the start sees there.

    Args:
        split: a `Split` of uint8 images.
        num_classes: width of the one-hot labels.
        recipe: its `image_size`, `epochs`, `batch_size`, `seed` and augmentation are read.
        first_epoch: counted from 0.
        class_weights: a number per class, which makes each image weigh as much as its class; `None` for no weights.

    Returns:
        A `tf.data.Dataset` of `(images, labels)`: float32 `(batch, height, width, channels)` and `(batch, num_classes)`,
        `batches_per_epoch` of them an epoch. With `class_weights` of `(images, labels, weights)`, with weights `(batch,)`: a
        blend of two images, by mixup or CutMix, has the mean of their weights in the same shares. Keras divides the sum of the
        weighted losses by the number of images, not by the sum of the weights.
    """
    with tf.device("CPU:0"):  # where the pipeline works, also beside a GPU
        images, labels = tf.constant(split.images), tf.constant(split.labels)
    steps = batches_per_epoch(split, recipe)

    weights = None if class_weights is None else np.array(class_weights, "float32")

    def key(purpose, position):
        return tf.stack([tf.constant(recipe.seed * _PURPOSES + purpose, tf.int64), position])

    def epoch_batches(epoch):
        order = tf.random.experimental.stateless_shuffle(tf.range(len(split)), key(_ORDER, epoch))
        batches = tf.data.Dataset.from_tensor_slices(order).batch(recipe.batch_size, drop_remainder=True)
        return batches.enumerate(start=epoch * steps)

    def load(step, chosen):
        # Bytes as long as they are only moved: a quarter of the memory that floats take.
        pixels, targets = tf.gather(images, chosen), tf.one_hot(tf.gather(labels, chosen), num_classes)
        pixels = stretch(pixels, recipe.image_size)
        if recipe.flip:
            pixels = augment.flip(pixels, key(_FLIP, step))
        if recipe.crop_padding:
            pixels = augment.crop(pixels, key(_CROP, step), recipe.crop_padding)
        pixels = tf.cast(pixels, tf.float32)
        if recipe.rand_augment:
            pixels = augment.rand_augment(pixels, key(_RAND_AUGMENT, step), recipe.rand_augment, recipe.rand_augment_magnitude)
        if recipe.erase:
            pixels = augment.erase(pixels, key(_ERASE, step), recipe.erase)
        pixels, targets = mix(pixels, targets, step)
        # Not `fit(class_weight=...)`, which gives a blend the weight of its larger part.
        return (pixels, targets) if weights is None else (pixels, targets, tf.linalg.matvec(targets, weights))

    def mix(pixels, targets, step):
        plain = pixels, targets
        if recipe.mixup:
            pixels, targets = augment.mixup(*plain, key(_MIXUP, step), recipe.mixup)
        if recipe.cutmix:
            mixed = pixels, targets
            pixels, targets = augment.cutmix(*plain, key(_CUTMIX, step), recipe.cutmix)
            if recipe.mixup:  # one of the two for each image
                first = tf.random.stateless_uniform((recipe.batch_size, 1), key(_MIXUP_OR_CUTMIX, step)) < 0.5
                pixels = tf.where(first[:, :, None, None], mixed[0], pixels)
                targets = tf.where(first, mixed[1], targets)
        return pixels, targets

    dataset = tf.data.Dataset.range(first_epoch, recipe.epochs).flat_map(epoch_batches)
    return dataset.map(load, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)


def batches_per_epoch(split, recipe):
    """Whole batches in one pass over `split`."""
    return len(split) // recipe.batch_size


def evaluation_batches(split, num_classes, image_size):
    """All images of a `Split`, in their order and unchanged, but stretched to squares of `image_size` pixels a side."""
    size = max(1, min(EVALUATION_BATCH, EVALUATION_BATCH * 32 * 32 // image_size**2))

    def load(images, labels):
        return tf.cast(stretch(images, image_size), tf.float32), tf.one_hot(labels, num_classes)

    dataset = tf.data.Dataset.from_tensor_slices((split.images, split.labels)).batch(size)
    return dataset.map(load, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)
