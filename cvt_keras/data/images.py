"""From the bytes of an image file to upright RGB pixels, and from those to a square.

The one decoder: training, the client and the checks of every export go through it. TensorFlow is imported to resize alone.
"""

import functools
import io
from dataclasses import dataclass

import numpy as np

from cvt_keras.data.file_types import AVIF, HEIF, READABLE, is_image
from cvt_keras.errors import ImageError

# 8192 x 8192. What a header claims is checked before anything is decoded: a few kilobytes can claim to be gigabytes.
MAX_PIXELS = 67_108_864
# What Pillow calls the formats. AVIF and HEIF are read where it has a plugin for them.
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "HEIF")
# Under this a grey pixel fits 12 bits, as scanners, depth cameras and microscopes store them in 16.
_TWELVE_BITS = 4096
# The largest share of its pixels that a JPEG may lack.
_MISSING = 0.05
_BLOCK = 8  # pixels along a side of a JPEG's block


@dataclass(frozen=True)
class Picture:
    """A decoded image file.

    Args:
        pixels: uint8 `(height, width, 3)`.
        cut_off: whether the file, a JPEG, lacks its last bytes: a few pixels at the end may be grey, or a progressive one lacks
            detail.
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
        data: the `bytes` of a JPEG, PNG, GIF, BMP, TIFF or WebP file; or of AVIF or HEIC, where Pillow has a plugin for it
            (`pillow-heif`).

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
        bits = data[24] if image.format == "PNG" else 8
        return Picture(_rgb(_upright(image), bits), cut_off)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # the warning where it is made an error
        raise _too_large(_reason(error)) from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises a dozen types for a broken file
        raise ImageError(f"the image is broken: {_reason(error)}") from error


@functools.cache
def _formats():
    """The names of the formats that this Pillow reads."""
    from PIL import Image

    try:
        import pillow_heif

        pillow_heif.register_heif_opener()
    except ImportError:
        pass
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _open(data):
    """A Pillow image, its header read alone."""
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise ImageError("the file is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
    except UnidentifiedImageError as error:
        brand = data[8:12] if data[4:8] == b"ftyp" else b""
        if brand in HEIF and "HEIF" not in _formats():
            raise ImageError(f"not a readable {READABLE}: install pillow-heif to read HEIC") from error
        if brand in AVIF and "AVIF" not in _formats():
            raise ImageError(f"not a readable {READABLE}: this build of Pillow does not read AVIF") from error
        if is_image(data):
            raise ImageError("the image is broken: its header can't be read") from error
        raise ImageError(f"not a readable {READABLE}") from error
    if image.format == "TIFF" and _is_preview(image, data):
        raise ImageError("a camera's raw file, of which only a small preview could be read")
    # Pillow also takes an orientation from XMP, which browsers ignore; a TIFF is turned as it is loaded.
    for key in ("xmp", "XML:com.adobe.xmp"):
        image.info.pop(key, None)
    return image


def _is_preview(image, data):
    """Whether the first picture of a TIFF stands for a larger one, as in DNG, NEF, ARW and CR2."""
    return data[8:10] == b"CR" or bool(image.tag_v2.get(254, 0) & 1)


def _too_large(size):
    return ImageError(f"the image is too large: at most {MAX_PIXELS:,} pixels are read, and its header says {size}")


def _reason(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".: ")


def _mended(data):
    """A JPEG without its last bytes -> a Pillow image, or `None` if more of its pixels are missing than may be.

    A decoder fills what is missing with the grey of an empty block. So the picture is compared with one that lacks the whole
    last scan: the pixels at the end that are equal in both are those that the scan never reached.
    """
    from PIL import Image

    end = b"\xff\xd9"
    scan = data.rfind(b"\xff\xda")
    if scan < 0 or data.endswith(end):
        return None
    header = scan + 2 + int.from_bytes(data[scan + 2 : scan + 4], "big")
    try:
        image, without = (Image.open(io.BytesIO(part + end), formats=["JPEG"]) for part in (data, data[:header]))
        changed = (np.asarray(image) != np.asarray(without)).reshape(*image.size[::-1], -1).any(axis=2)
    except (OSError, ValueError, SyntaxError):
        return None
    reached = changed[:, -_BLOCK:].any(axis=1)  # whole rows
    missing = np.count_nonzero(~changed[len(reached) - reached[::-1].argmax() if reached.any() else 0 :])
    return image if missing <= _MISSING * changed.size else None


def _upright(image):
    """Turns a Pillow image as its EXIF orientation says; broken EXIF data says nothing. Pillow has turned a TIFF already."""
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
    exif = Image.Exif()  # not `image.getexif()`, which may hold what XMP says
    try:
        exif.load(image.info.get("exif", b""))
        orientation = exif.get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises a dozen types for broken EXIF data
        orientation = None
    return image.transpose(by_orientation[orientation]) if orientation in by_orientation else image


def _rgb(image, bits=8):
    """A Pillow image of any mode -> uint8 `(height, width, 3)`.

    Args:
        image: the image.
        bits: of a pixel's channel in the file, if it is a PNG.
    """
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        pixels = _from_16_bits(grey)
        transparent = image.info.get("transparency")
        return pixels if transparent is None else on_white(pixels, np.where(grey == transparent, 0, 255)[..., None])
    if image.mode == "F":
        raise ImageError("its pixels are 32-bit floats, whose range is not known")
    if not image.has_transparency_data:
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    if image.mode in ("L", "RGB") and bits != 8:
        # Pillow has stretched the pixels to 8 bits, but not the number of the one that is transparent.
        numbers = [int(n) >> 8 if bits == 16 else int(n) * 255 // (2**bits - 1) for n in np.ravel(image.info["transparency"])]
        image.info["transparency"] = tuple(numbers) if image.mode == "RGB" else numbers[0]
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
