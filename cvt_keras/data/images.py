"""From the bytes of an image file to RGB pixels, and from those to a square: the same for training and every export."""

import numpy as np

# What `decode` reads. TensorFlow also reads .bmp, but takes the numbers of a palette for colours.
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif")
# Images that `decode` can't read. A folder that holds one is refused, as to skip it would lose it without a word. The list is
# written out, because what `mimetypes` knows differs from machine to machine.
OTHER_SUFFIXES = {
    *(".apng", ".avif", ".bmp", ".dib", ".eps", ".exr", ".hdr", ".heic"),
    *(".heif", ".ico", ".j2k", ".jp2", ".jpf", ".jpx", ".jxl"),
    *(".pbm", ".pcx", ".pgm", ".pnm", ".ppm", ".psd", ".svg", ".tga", ".tif", ".tiff", ".webp", ".xbm", ".xpm"),
    *(".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"),  # cameras' raw formats
}


def decode(data):
    """Decodes the bytes of an image file, by the operation that the exported SavedModel decodes with.

    Args:
        data: bytes, or a string tensor within a graph.

    Returns:
        A uint8 tensor, `(height, width, 3)`: of an animation the first frame, of grey pixels three equal channels.

    Raises:
        tf.errors.OpError: if it is not an image.
    """
    import tensorflow as tf

    return tf.io.decode_image(data, channels=3, expand_animations=False)


def stretch(images, size):
    """Resizes images to squares, with antialiasing and whatever their aspect ratio; images of that size are returned unchanged.

    Args:
        images: uint8 `(..., height, width, 3)`.
        size: side of the square, in pixels.

    Returns:
        A uint8 tensor, `(..., size, size, 3)`.
    """
    import tensorflow as tf

    def resize():
        return tf.saturate_cast(tf.round(tf.image.resize(images, (size, size), antialias=True)), tf.uint8)

    sides = tuple(images.shape[-3:-1])
    if None not in sides:
        return tf.convert_to_tensor(images) if sides == (size, size) else resize()
    return tf.cond(tf.reduce_all(tf.shape(images)[-3:-1] == size), lambda: tf.convert_to_tensor(images), resize)


def mean_and_std(images):
    """The mean and the standard deviation of each channel, with pixels in 0..1.

    Args:
        images: uint8 `(n, height, width, 3)`.

    Returns:
        Two tuples of three floats, rounded to four digits. A std is at least 1/255, so that nothing is divided by 0.
    """
    # By counting values: exact, and no image is held as floats.
    counts = np.zeros((3, 256), "int64")
    for start in range(0, len(images), 256):
        for channel in range(3):
            counts[channel] += np.bincount(images[start : start + 256, ..., channel].ravel(), minlength=256)
    share, value = counts / counts.sum(axis=1, keepdims=True), np.arange(256) / 255
    mean = share @ value
    std = np.sqrt((share * (value - mean[:, None]) ** 2).sum(axis=1))
    return tuple(round(float(number), 4) for number in mean), tuple(max(round(float(number), 4), 1 / 255) for number in std)
