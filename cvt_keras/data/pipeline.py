"""Source and recipe -> batches of float32 pixels in 0..255 and one-hot labels, by tf.data."""

import math
import weakref

import numpy as np
import tensorflow as tf

from cvt_keras.data import augment
from cvt_keras.data.images import fit
from cvt_keras.data.share import ALL
from cvt_keras.errors import UserError

EVALUATION_BATCH = 500  # for 32x32 pixels. Divides 5,000 and 10,000: XLA would compile again for a smaller last batch

# Each random draw has a key of its own, so that no two draws are correlated, also with those of another seed.
_ORDER, _FLIP, _CROP, _RAND_AUGMENT, _ERASE, _MIXUP, _CUTMIX, _MIXUP_OR_CUTMIX, _AREA = range(9)
_NUM_KEYS = 16  # leaves room for more; changing it would change every draw


def training_batches(split, num_classes, recipe, first_epoch=0, class_weights=None, share=ALL):
    """Augmented batches of the epochs `first_epoch` to `recipe.epochs - 1`. An incomplete last batch of an epoch is dropped.

    Whether an image is mirrored alternates from epoch to epoch, and is random in the first. So two epochs show each image both
    ways (Keller Jordan, "94% on CIFAR-10 in 3.29 seconds", arXiv 2404.00498, section 3.6).

    With `resize="crop"`, a random area of each image is shown, in place of `crop_padding`.

    The order depends only on (seed, epoch), mirroring on (seed, epoch, image), and other augmentation on (seed, step, index in
    the batch). So a resumed run that starts at `first_epoch` gets the same batches as an uninterrupted one.

    Args:
        split: a `Split`.
        num_classes: width of the one-hot labels.
        recipe: a `Recipe`; its `preprocessing`, `epochs`, `batch_size`, `seed` and augmentation are used.
        first_epoch: counted from 0.
        class_weights: a weight per class, or `None`. An image has the weight of its class.
        share: a `Share`. The batches of all processes together are those of one process, in the same order.

    Returns:
        A `tf.data.Dataset` with `batches_per_epoch` batches `(images, labels)` per epoch: float32
        `(batch, height, width, channels)` and `(batch, num_classes)`. With `class_weights`, `(images, labels, weights)`, where
        `weights` is float32 `(batch,)`: images that mixup or CutMix blended get the mean of their two weights, in the shares
        of their labels. Keras divides the sum of the weighted losses by the number of images, not by the sum of weights.
    """

    def key(draw, position):
        return tf.stack([tf.constant(recipe.seed * _NUM_KEYS + draw, tf.int64), position])

    with tf.device("CPU:0"):  # tf.data runs there, also beside a GPU
        labels = tf.constant(split.labels)
        mirrored_first = tf.random.stateless_uniform((len(split),), key(_FLIP, tf.constant(0, tf.int64))) < 0.5
    steps = batches_per_epoch(split, recipe)
    crops = recipe.preprocessing.resize == "crop"
    weights = None if class_weights is None else np.array(class_weights, "float32")
    # An image is mixed with the one before it in the batch, which may belong to another process.
    neighbour = share.processes > 1 and bool(recipe.mixup or recipe.cutmix)
    part = augment.Part(recipe.batch_size, share.rows(recipe.batch_size, neighbour)) if share.processes > 1 else None

    def epoch_batches(epoch):
        order = tf.random.experimental.stateless_shuffle(tf.range(len(split)), key(_ORDER, epoch))
        batches = tf.data.Dataset.from_tensor_slices(order).batch(recipe.batch_size, drop_remainder=True)
        if part:
            batches = batches.map(part.of)
        return batches.enumerate(start=epoch * steps)

    def load(step, indices, pixels):
        # uint8 until arithmetic begins: floats would take four times the memory.
        targets = tf.one_hot(tf.gather(labels, indices), num_classes)
        if recipe.flip:
            every_second_epoch = step // steps % 2 == 1
            pixels = augment.flip(pixels, tf.gather(mirrored_first, indices) ^ every_second_epoch)
        if recipe.crop_padding and not crops:
            pixels = augment.crop(pixels, key(_CROP, step), recipe.crop_padding, part)
        pixels = tf.cast(pixels, tf.float32)
        if recipe.rand_augment:
            operations, magnitude = recipe.rand_augment, recipe.rand_augment_magnitude
            pixels = augment.rand_augment(pixels, key(_RAND_AUGMENT, step), operations, magnitude, part)
        if recipe.erase:
            pixels = augment.erase(pixels, key(_ERASE, step), recipe.erase, part)
        pixels, targets = mix(pixels, targets, step)
        if neighbour:
            pixels, targets = pixels[1:], targets[1:]
        # Not `fit(class_weight=...)`, which would give a blended image the weight of its larger part.
        return (pixels, targets) if weights is None else (pixels, targets, tf.linalg.matvec(targets, weights))

    def mix(pixels, targets, step):
        plain = pixels, targets
        if recipe.mixup:
            pixels, targets = augment.mixup(*plain, key(_MIXUP, step), recipe.mixup, part)
        if recipe.cutmix:
            mixed = pixels, targets
            pixels, targets = augment.cutmix(*plain, key(_CUTMIX, step), recipe.cutmix, part)
            if recipe.mixup:  # each image gets one of the two
                first = tf.random.stateless_uniform((recipe.batch_size, 1), key(_MIXUP_OR_CUTMIX, step)) < 0.5
                first = part.of(first) if part else first
                pixels = tf.where(first[:, :, None, None], mixed[0], pixels)
                targets = tf.where(first, mixed[1], targets)
        return pixels, targets

    batches = tf.data.Dataset.range(first_epoch, recipe.epochs).flat_map(epoch_batches)
    if crops:
        areas = _random_areas(batches, split.images, recipe, lambda step: key(_AREA, step), part)
        dataset = areas.map(load, tf.data.AUTOTUNE)
    else:
        read = _reader(split.images)
        dataset = batches.map(
            lambda step, indices: load(step, indices, fit(read(indices), recipe.preprocessing)), tf.data.AUTOTUNE
        )
    return _keeping(split.images, dataset.prefetch(tf.data.AUTOTUNE))


def _random_areas(batches, images, recipe, seed, part):
    """Reads a random area of each image. `(step, indices)` -> `(step, indices, pixels)`, uint8 `(batch, height, width, 3)`.

    Args:
        batches: a dataset of steps and indices of images.
        images: those of a `Split`; their sizes may differ.
        recipe: a `Recipe`.
        seed: a function of the step.
        part: a `Part`, or `None` for whole batches.
    """
    size = len(part.rows) if part else recipe.batch_size
    height, width = recipe.preprocessing.image_size
    interpolation = recipe.preprocessing.interpolation
    # Relative to the network's input, so that a wide image is not squeezed into a square one.
    ratio = tuple(bound * width / height for bound in recipe.ratio)
    read = _python_reader(images)

    def draw(step, indices):
        draws = augment.area_draws(recipe.batch_size, seed(step))
        return tf.repeat(step, size), indices, part.of(draws) if part else draws

    def cut(index, draws):
        image = read(int(index))
        area = augment.random_area(*image.shape[:2], draws, recipe.scale, ratio)
        return augment.resized_area(image, area, (height, width), interpolation)

    def load(step, index, draws):
        pixels = tf.numpy_function(cut, [index, draws], tf.uint8, stateful=False)
        return step, index, tf.ensure_shape(pixels, (height, width, 3))

    areas = batches.map(draw).unbatch().map(load, num_parallel_calls=tf.data.AUTOTUNE)
    batches = areas.batch(size, drop_remainder=True)
    return batches.map(lambda steps, indices, pixels: (steps[0], indices, pixels))


def batches_per_epoch(split, recipe):
    """Whole batches in one pass over `split`."""
    return len(split) // recipe.batch_size


def evaluation_batches(split, num_classes, preprocessing, share=ALL):
    """Batches of all images of a `Split`, in order, not augmented, resized as the `Preprocessing` says.

    Several devices need batches of one size that divides among them. The last batch is filled up with images of weight 0. The
    weight of the others is such that Keras' loss, the mean over all images with their weights, is the mean over the real ones.

    Args:
        split: a `Split`.
        num_classes: width of the one-hot labels.
        preprocessing: a `Preprocessing`.
        share: a `Share`.

    Returns:
        A `tf.data.Dataset` of batches `(images, labels)`: float32 `(batch, height, width, channels)` and
        `(batch, num_classes)`. For several devices, `(images, labels, weights)`, with float32 `(batch,)` weights.
    """
    height, width = preprocessing.image_size
    size = max(1, min(EVALUATION_BATCH, EVALUATION_BATCH * 32 * 32 // (height * width)))
    indices, weights = tf.data.Dataset.range(len(split)), None
    if share.devices > 1:
        steps = math.ceil(len(split) / size)
        size = math.ceil(len(split) / steps / share.devices) * share.devices
        steps = math.ceil(len(split) / size)
        positions = np.arange(steps * size).reshape(steps, size)[:, share.rows(size)].ravel()
        weights = np.where(positions < len(split), steps * size / len(split), 0).astype("float32")
        indices = tf.data.Dataset.from_tensor_slices(np.where(positions < len(split), positions, 0))
        size //= share.processes

    def load(indices, pixels):
        return tf.cast(pixels, tf.float32), tf.one_hot(tf.gather(split.labels, indices), num_classes)

    if preprocessing.resize == "crop":  # image by image, as their sizes may differ
        read_one = _python_reader(split.images)

        def middle(index):
            image = tf.numpy_function(lambda index: read_one(int(index)), [index], tf.uint8, stateful=False)
            return index, fit(tf.ensure_shape(image, (None, None, 3)), preprocessing)

        dataset = indices.map(middle, num_parallel_calls=tf.data.AUTOTUNE).batch(size)
        dataset = dataset.map(load, num_parallel_calls=tf.data.AUTOTUNE)
    else:
        read = _reader(split.images)
        dataset = indices.batch(size).map(
            lambda indices: load(indices, fit(read(indices), preprocessing)), num_parallel_calls=tf.data.AUTOTUNE
        )
    if weights is not None:
        dataset = tf.data.Dataset.zip((dataset, tf.data.Dataset.from_tensor_slices(weights).batch(size)))
        dataset = dataset.map(lambda batch, weights: (*batch, weights))
    return _keeping(split.images, dataset.prefetch(tf.data.AUTOTUNE))


def _reader(images):
    """Returns a function that reads images inside a graph: they may lie on disk, so they are no constant of the graph.

    Args:
        images: those of a `Split`.

    Returns:
        A function from an integer tensor of indices `(n,)` to a uint8 tensor `(n, height, width, 3)`.
    """
    read, shape = _python_reader(images), (None, *images.shape[1:])
    return lambda indices: tf.ensure_shape(tf.numpy_function(read, [indices], tf.uint8, stateful=False), shape)


def _python_reader(images):
    """Returns a function from an index or an array of indices to the pixels, for `tf.numpy_function`.

    TensorFlow never releases the Python functions of a graph. So this one does not keep `images` alive: `_keeping` does.
    """
    reference = weakref.ref(images)

    def read(indices):
        images = reference()
        try:
            return np.asarray(images[indices])
        except UserError as error:
            images.errors.append(error)  # TensorFlow passes on the text only
            raise

    return read


def _keeping(images, dataset):
    """Returns `dataset`, which now keeps `images` alive. So do its iterators and the data sets that are made from it."""
    dataset.images = images
    return dataset
