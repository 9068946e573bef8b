"""From the bytes of an image file to upright RGB pixels, and from those to a square.

The one decoder: training, the client and the checks of every export go through it. TensorFlow is imported to resize alone.
"""

import io
from dataclasses import dataclass

import numpy as np

from cvt_keras.errors import ImageError

# 8192 x 8192. What a header claims is checked before anything is decoded: a few kilobytes can claim to be gigabytes.
MAX_PIXELS = 67_108_864
# What Pillow calls the formats. AVIF and HEIF are read where it has a plugin for them.
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "HEIF")
READABLE = "JPEG, PNG, GIF, BMP, TIFF or WebP"
# Under this a grey pixel fits 12 bits, as scanners, depth cameras and microscopes store them in 16.
_TWELVE_BITS = 4096
# The most rows that a JPEG may lack at its bottom, as a share of its height, and the least: a row of its blocks.
_MISSING_ROWS, _BLOCK_ROWS = 0.02, 16


@dataclass(frozen=True)
class Picture:
    """A decoded image file.

    Args:
        pixels: uint8 `(height, width, 3)`.
        cut_off: whether the file, a JPEG, lacks its last bytes, and a few rows at the bottom may be grey.
    """

    pixels: np.ndarray
    cut_off: bool = False


def decode(data):
    """The pixels of an image file; see `read`."""
    return read(data).pixels


def read(data):
    """Decodes the bytes of an image file.

    A photo is turned as its EXIF orientation says. Transparent pixels are laid on white. Of an animation, the first frame is
    taken. 16-bit greys keep their upper 8 bits, or bits 4 to 11 if no pixel needs more than 12. Colour profiles are ignored.

    Args:
        data: the `bytes` of a JPEG, PNG, GIF, BMP, TIFF or WebP file; of AVIF and HEIC where Pillow has a plugin (`pillow-heif`).

    Returns:
        A `Picture`.

    Raises:
        ImageError: if it is none of these, is broken, or has more than `MAX_PIXELS`.
    """
    from PIL import Image

    try:
        image = _open(data)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise _too_large(f"{width} x {height} pixels")
        try:
            image.load()
            cut_off = False
        except OSError:
            image = _mended(data) if image.format in ("JPEG", "MPO") else None
            if image is None:
                raise
            cut_off = True
        return Picture(_rgb(_upright(image)), cut_off)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise _too_large("over 170 million pixels") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises a dozen types for a broken file
        raise ImageError(f"the image is broken: {_reason(error)}") from error


def _open(data):
    """A Pillow image, its header read alone."""
    from PIL import Image, UnidentifiedImageError

    try:
        import pillow_heif

        pillow_heif.register_heif_opener()
    except ImportError:
        pass
    Image.init()
    try:
        return Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])
    except UnidentifiedImageError as error:
        if not data:
            raise ImageError("the file is empty") from error
        plugin = ": install pillow-heif to read HEIC" if data[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1") else ""
        raise ImageError(f"not a readable {READABLE}{plugin}") from error


def _too_large(size):
    return ImageError(f"the image is too large: at most {MAX_PIXELS:,} pixels are read, and its header says {size}")


def _reason(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".: ")


def _mended(data):
    """A JPEG without its last bytes -> a Pillow image, or `None` if more is missing than a row of blocks or 2% of its height.

    A decoder fills what is missing with the grey of an empty block. So the picture is compared with one that lacks the whole
    last scan: the rows at the bottom that are equal in both are those that the scan never reached.
    """
    from PIL import Image

    end = b"\xff\xd9"
    scan = data.rfind(b"\xff\xda")
    if scan < 0 or data.endswith(end):
        return None
    header = scan + 2 + int.from_bytes(data[scan + 2 : scan + 4], "big")
    try:
        image, without = (Image.open(io.BytesIO(part + end), formats=["JPEG"]) for part in (data, data[:header]))
        changed = (np.asarray(image) != np.asarray(without)).reshape(image.height, -1).any(axis=1)
    except (OSError, ValueError, SyntaxError):
        return None
    missing = changed[::-1].argmax() if changed.any() else image.height
    return image if missing <= max(_BLOCK_ROWS, _MISSING_ROWS * image.height) else None


def _upright(image):
    """Turns a Pillow image as its EXIF orientation says; broken EXIF data says nothing."""
    from PIL import ExifTags, Image

    turns = Image.Transpose
    by_orientation = {
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_270,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_90,
    }
    # Pillow also looks for an orientation in XMP, which browsers ignore.
    for key in ("xmp", "XML:com.adobe.xmp"):
        image.info.pop(key, None)
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises a dozen types for broken EXIF data
        orientation = None
    return image.transpose(by_orientation[orientation]) if orientation in by_orientation else image


def _rgb(image):
    """A Pillow image of any mode -> uint8 `(height, width, 3)`."""
    if image.mode.startswith("I"):
        return _from_16_bits(np.asarray(image))
    if image.mode == "F":
        raise ImageError("its pixels are 32-bit floats, whose range is not known")
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB"))
    rgba = np.asarray(image.convert("RGBA"))
    return on_white(rgba[..., :3], rgba[..., 3:])


def _from_16_bits(grey):
    if grey.min(initial=0) < 0 or grey.max(initial=0) > 65535:
        raise ImageError("its pixels are 32-bit integers, whose range is not known")
    # Pillow's own conversion clips what is over 255.
    shift = 4 if grey.max(initial=0) < _TWELVE_BITS else 8
    return np.repeat((grey >> shift).astype("uint8")[..., None], 3, axis=-1)


def on_white(rgb, alpha):
    """Lays transparent pixels on white.

    Args:
        rgb: uint8 `(..., 3)`.
        alpha: uint8 `(..., 1)`; 0 is transparent.

    Returns:
        uint8, as `rgb`.
    """
    alpha = alpha.astype("uint16")
    return ((rgb * alpha + 255 * (255 - alpha) + 127) // 255).astype("uint8")


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
