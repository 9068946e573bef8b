"""Decodes image files to upright RGB pixels, and resizes them.

Training, the client and the checks of every export use this decoder. TensorFlow is imported only to resize.
"""

import functools
import io
import logging
import os
import re
import threading
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from cvt_keras.data.file_types import AVIF, HEIF, READABLE, is_image
from cvt_keras.errors import ImageError

# 8192 x 8192. Checked against the header before decoding: a file of a few kilobytes can decode to gigabytes.
MAX_PIXELS = 67_108_864
# Pillow's names of the formats. AVIF and HEIF can be read only if Pillow has a plugin for them.
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "HEIF")
_AVIF_OR_HEIF = (b"mif1", b"msf1")  # brands that both formats use
# Scanners, depth cameras and microscopes store 12-bit greys in 16 bits: all pixels are below this.
_TWELVE_BITS = 4096
# The largest share of its blocks that a JPEG may lack.
_MAX_MISSING = 0.05
_END = b"\xff\xd9"  # end marker of a JPEG
_FILL = bytes(512)  # an interrupted copy may be padded with zeros; a whole JPEG rarely has so many in a row
_NOISE = bytes(range(254, 0, -1))  # has no 0xff, with which a marker begins
# A JPEG marker, except those within a scan.
_MARKER = re.compile(rb"\xff[^\0\xd0-\xd7\xff]")
_FRAMES = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
_MAX_THREADS = 8
_STRIP = 256  # rows per copy


@dataclass(frozen=True)
class Picture:
    """A decoded image file.

    Args:
        pixels: uint8 `(height, width, 3)`.
        cut_off: whether the file is a JPEG without its last bytes. At most the last twentieth of the picture is grey; in a
            progressive JPEG, the picture lacks detail instead.
    """

    pixels: np.ndarray
    cut_off: bool = False


class Room:
    """Limits how many pixels are decoded at the same time, whatever the number of threads.

    Args:
        limit: number of pixels. A larger image waits until no other is being decoded.
    """

    def __init__(self, limit=2 * MAX_PIXELS):  # about 1 GB: a pixel takes seven bytes while it is copied
        self.limit = limit
        self.used = 0
        self._changed = threading.Condition()

    @contextmanager
    def place(self):
        """Yields the argument `reserve` for one call of `read`. The pixels are released when the block ends."""
        reserved = 0

        def reserve(n):
            nonlocal reserved
            with self._changed:
                self._changed.wait_for(lambda: not self.used or self.used + n <= self.limit)
                self.used += n
                reserved = n

        try:
            yield reserve
        finally:
            with self._changed:
                self.used -= reserved
                self._changed.notify_all()


def threads():
    """Number of threads that read images: one per core, at most eight."""
    return min(os.cpu_count() or 1, _MAX_THREADS)


def in_threads(function, items, ahead=0):
    """Yields `function(item)` for each item in order, from several threads.

    Few items are taken and few results wait at a time, so that they fit into memory.

    Args:
        function: called in a thread.
        items: an iterable.
        ahead: how many results may wait; at least four per thread.
    """
    ahead = max(ahead, 4 * threads())
    with ThreadPoolExecutor(threads()) as pool:
        waiting = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def decode(data, reserve=None):
    """Returns the pixels of an image file; see `read`."""
    return read(data, reserve).pixels


def read(data, reserve=None):
    """Decodes the bytes of an image file.

    Photos are rotated to their EXIF orientation. Transparent pixels are blended with white. Animations give their first frame.
    16-bit greys keep their upper 8 bits, or bits 4 to 11 if all pixels fit into 12 bits. Colour profiles are ignored.

    A JPEG without its last bytes is read if only the end marker is missing, if at most a twentieth of the picture is missing,
    or if it is progressive and has the first, coarse scan of each colour component. A JPEG with an end marker never counts as
    cut off: if bytes before the marker are missing or damaged, its pixels may be wrong.

    Args:
        data: the `bytes` of a JPEG, PNG, GIF, BMP, TIFF, WebP or AVIF file; or of a HEIC file, if `pillow-heif` is installed.
        reserve: called with the number of pixels before they are decoded; may block. See `Room`.

    Returns:
        A `Picture`.

    Raises:
        ImageError: if the format is another one, the file is broken, or the image has more than `MAX_PIXELS`.
    """
    from PIL import Image

    try:
        image = _open(data)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise _too_large(f"{width} x {height} pixels")
        if reserve is not None:
            reserve(width * height)
        first_frame = image.tile[0][1] if image.format == "GIF" and image.tile else None
        jpeg = image.format in ("JPEG", "MPO")
        try:
            image.load()
            frame = _frame(data) if jpeg and data.endswith(_FILL) else None  # zeros decode to wrong pixels without an error
        except OSError:
            frame = _frame(data) if jpeg else None
            if frame is None:
                raise
        if frame is not None:
            image = _mended(data, frame)
        if image is None:
            raise ImageError("the image is broken: the file is cut off, and too much of the image is missing")
        bits = data[24] if image.format == "PNG" else 8
        pixels = _rgb(_upright(image), bits)
        return Picture(pixels if first_frame is None else _around_white(pixels, first_frame), frame is not None)
    except ImageError:
        raise
    except (
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:  # a warning, if Python raises warnings as errors
        raise _too_large(_reason(error)) from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises a dozen types for broken files
        raise ImageError(f"the image is broken: {_reason(error)}") from error


def pixels_of(image):
    """Converts a Pillow image to pixels as `read` does for a file: rotated to its EXIF orientation, without transparency.

    Returns:
        uint8 `(height, width, 3)`.

    Raises:
        ImageError: if it can't be read, or its pixels have no known range.
    """
    try:
        image.load()
    except (OSError, ValueError) as error:  # ValueError: it was closed
        raise ImageError(f"the image is broken: {_reason(error)}") from error
    return _rgb(_upright(image))


def _kind(data):
    """Returns "AVIF" or "HEIF" if the file begins as one, even if it is broken; else `None`."""
    brand = data[8:12] if data[4:8] == b"ftyp" else b""
    if brand in _AVIF_OR_HEIF:
        end = min(int.from_bytes(data[:4], "big"), len(data), 256)
        if any(data[i : i + 4] in AVIF for i in range(16, end, 4)):
            return "AVIF"
    return "AVIF" if brand in AVIF else "HEIF" if brand in HEIF else None


@functools.cache
def _formats():
    """Those of `FORMATS` that the installed Pillow reads."""
    from PIL import Image

    _quiet()
    try:
        import pillow_heif

        pillow_heif.register_heif_opener()
    except ImportError:
        pass
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _quiet():
    """Silences Pillow's warnings about broken metadata for the whole process: they don't affect pixels.

    `warnings.catch_warnings` around each image would not be thread-safe.
    """
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    logging.getLogger("PIL").addHandler(logging.NullHandler())


def _open(data):
    """Opens a Pillow image, which reads its header only."""
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise ImageError("the file is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
    except UnidentifiedImageError as error:
        kind = _kind(data)
        if kind == "HEIF" and "HEIF" not in _formats():
            raise ImageError(f"not a readable {READABLE}: install pillow-heif to read HEIC") from error
        if kind == "AVIF" and "AVIF" not in _formats():
            raise ImageError(f"not a readable {READABLE}: this build of Pillow does not read AVIF") from error
        if is_image(data):
            raise ImageError("the image is broken: its header can't be read") from error
        raise ImageError(f"not a readable {READABLE}") from error
    if image.format == "TIFF" and _is_preview(image, data):
        raise ImageError("a camera's raw file, of which only a small preview could be read: convert it to JPEG or TIFF")
    if image.format in ("JPEG", "MPO"):
        image.decodermaxblock = len(data)  # decode in one go: chunks of 64 kB take half as long again
    # Pillow would also take the orientation from XMP, which browsers ignore; for a TIFF, as soon as it is loaded.
    for key in ("xmp", "XML:com.adobe.xmp"):
        image.info.pop(key, None)
    return image


def _is_preview(image, data):
    """Whether the first picture of a TIFF is the preview of a larger one, as in DNG, NEF, ARW and CR2."""
    return data[8:10] == b"CR" or bool(image.tag_v2.get(254, 0) & 1)


def _too_large(size):
    return ImageError(f"the image is too large: at most {MAX_PIXELS:,} pixels are read, and its header says {size}")


def _reason(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".: ")


def _mended(data, frame):
    """Decodes a JPEG without its last bytes. -> a Pillow image, or `None` if too much is missing; see `read`

    A decoder fills missing parts with invented pixels. So the picture is decoded twice, once with noise in place of the missing
    bytes: the first block in which the two results differ is where the bytes ended.
    """
    from PIL import Image

    if data.endswith(_FILL):
        stripped = data.rstrip(b"\0")
        data = stripped + b"\0" if stripped.endswith(b"\xff") else stripped  # 0xff, 0 encodes a byte of the picture
    elif data.endswith(b"\xff"):
        data = data[:-1]  # the first half of a marker
    image, noisy = (Image.open(io.BytesIO(data + end), formats=["JPEG"]) for end in (_END, _NOISE + _END))
    if frame.progressive:
        return image if frame.coarse else None
    differs = (_array(image) != _array(noisy)).reshape(*image.size[::-1], -1).any(axis=2)
    width, height = frame.block
    for border in (differs[::height], differs[height - 1 :: height], differs[:, ::width], differs[:, width - 1 :: width]):
        border[...] = False  # colours are smoothed, so a missing neighbour changes the borders of whole blocks
    across, down = -(-image.width // width), -(-image.height // height)
    rows, columns = np.nonzero(differs)
    decoded = (rows // height * across + columns // width).min(initial=across * down)  # number of blocks
    return image if frame.complete and decoded >= (1 - _MAX_MISSING) * across * down else None


@dataclass
class _Frame:
    """Facts from the markers of a JPEG without an end marker.

    Args:
        progressive: whether later scans refine the picture.
        block: width and height in pixels of a minimum coded unit (MCU).
        complete: whether at least one scan of each colour component has begun.
        coarse: whether the first scan of each component, its mean values, is complete; for a progressive JPEG.
    """

    progressive: bool
    block: tuple[int, int]
    complete: bool
    coarse: bool


def _frame(data):
    """Parses the markers of a JPEG. -> `_Frame`, or `None` if it has an end marker or no scan"""
    components, progressive, block = set(), False, None
    started, finished, last = set(), set(), set()  # components
    position = 2
    while (marker := _MARKER.search(data, position)) is not None:
        kind, position = marker[0][1], marker.end()
        if kind == 0xD9:
            return None
        finished |= last
        last = set()
        segment = data[position + 2 : position + int.from_bytes(data[position : position + 2], "big")]
        if kind in (*_FRAMES, 0xDA) and len(segment) < 6:  # damaged
            return None
        if kind in _FRAMES:
            factors = segment[7::3]
            components, progressive = set(segment[6::3]), kind in (0xC2, 0xCA)
            block = 8 * max(n >> 4 for n in factors), 8 * max(n & 15 for n in factors)
        elif kind == 0xDA:
            names = segment[1 : 1 + 2 * segment[0] : 2]
            started.update(names)
            if segment[-3] == 0 and segment[-1] >> 4 == 0:  # the first scan of mean values
                last = set(names)
        position += 2 + len(segment)
    return _Frame(progressive, block, components <= started, components <= finished) if block and started else None


def _upright(image):
    """Rotates a Pillow image to its EXIF orientation, ignoring broken EXIF data. Pillow has already rotated a TIFF."""
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
    exif = Image.Exif()  # not `image.getexif()`, which may take values from XMP
    try:
        exif.load(image.info.get("exif", b""))
        orientation = exif.get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises a dozen types for broken EXIF data
        orientation = None
    return image.transpose(by_orientation[orientation]) if orientation in by_orientation else image


def _rgb(image, bits=8):
    """Converts a Pillow image of any mode to uint8 `(height, width, 3)`.

    Args:
        image: the image.
        bits: bits per channel in the file, if it is a PNG; else 8.
    """
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        pixels = _from_16_bits(grey)
        transparent = image.info.get("transparency")
        return pixels if transparent is None else on_white(pixels, np.where(grey == transparent, 0, 255)[..., None])
    if image.mode == "F":
        raise ImageError("its pixels are 32-bit floats, whose range is unknown: save it with 8 or 16 bits")
    if not image.has_transparency_data:
        return _array(image if image.mode == "RGB" else image.convert("RGB"))
    if image.mode in ("L", "RGB") and bits != 8:
        # Pillow has scaled the pixels to 8 bits, but not the value that stands for transparent.
        numbers = [int(n) >> 8 if bits == 16 else int(n) * 255 // (2**bits - 1) for n in np.ravel(image.info["transparency"])]
        image.info["transparency"] = tuple(numbers) if image.mode == "RGB" else numbers[0]
    rgba = _array(image.convert("RGBA"))
    return on_white(rgba[..., :3], rgba[..., 3:])


def _array(image):
    """`numpy.asarray` of a Pillow image, but in strips: Pillow copies twice, which for a large image takes time and memory."""
    if image.height <= _STRIP:
        return np.asarray(image)
    pixels = np.empty((image.height, image.width, *([len(image.getbands())] if len(image.getbands()) > 1 else [])), "uint8")
    for top in range(0, image.height, _STRIP):
        bottom = min(top + _STRIP, image.height)
        pixels[top:bottom] = np.asarray(image.crop((0, top, image.width, bottom)))
    return pixels


def _around_white(pixels, box):
    """Sets the pixels outside a box (left, upper, right, lower) to white."""
    left, upper, right, lower = box
    if (right - left, lower - upper) == pixels.shape[1::-1]:
        return pixels
    white = np.full_like(pixels, 255)
    white[upper:lower, left:right] = pixels[upper:lower, left:right]
    return white


def _from_16_bits(grey):
    if grey.min(initial=0) < 0 or grey.max(initial=0) > 65535:
        raise ImageError("its pixels are 32-bit integers, whose range is unknown: save it with 8 or 16 bits")
    # Not Pillow's conversion, which clips values above 255.
    shift = 4 if grey.max(initial=0) < _TWELVE_BITS else 8
    return np.repeat((grey >> shift).astype("uint8")[..., None], 3, axis=-1)


def on_white(rgb, alpha):
    """Blends transparent pixels with white.

    Args:
        rgb: uint8 `(..., 3)`.
        alpha: uint8 `(..., 1)`; 0 is transparent.

    Returns:
        uint8, in the shape of `rgb`.
    """
    alpha = alpha.astype("uint16")
    return ((rgb * alpha + 255 * (255 - alpha) + 127) // 255).astype("uint8")


def fit(images, preprocessing):
    """Brings images to the network's size, as validation, `predict` and every export do.

    Args:
        images: uint8 `(..., height, width, 3)`, with at most one leading dimension. In a graph, the size may be unknown.
        preprocessing: a `Preprocessing`; its `image_size`, `resize`, `crop_pct` and `interpolation` are used.

    Returns:
        A uint8 tensor, `(..., *image_size, 3)`.
    """
    import tensorflow as tf

    images = tf.convert_to_tensor(images)
    height, width = preprocessing.image_size
    if preprocessing.resize == "stretch":
        fitted = stretch(images, (height, width), preprocessing.interpolation)
    else:
        scaled, is_enlarged = _covering(images, preprocessing)

        def cut():
            top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
            whole = stretch(images, scaled, preprocessing.interpolation)
            return whole[..., top : top + height, left : left + width, :]

        fitted = _choose(is_enlarged, lambda: _enlarged_middle(images, scaled, preprocessing), cut)
    return tf.ensure_shape(fitted, (*images.shape[:-3], height, width, 3))


def shrink(images, preprocessing):
    """Returns what a cache stores of images: no more pixels than training and `fit` need. `fit` gives the same for both.

    With `resize="stretch"`, these are images of the network's size. With `"crop"`, they just cover `crop_from`, so that
    training can draw areas of them; images that would have to be enlarged are returned unchanged.

    Args, returns: as `fit`, but for the size.
    """
    import tensorflow as tf

    with tf.device("CPU:0"):  # also beside a GPU: the same pixels everywhere, and no copies
        if preprocessing.resize == "stretch":
            return stretch(images, preprocessing.image_size, preprocessing.interpolation)
        images = tf.convert_to_tensor(images)
        scaled, is_enlarged = _covering(images, preprocessing)
        return _choose(is_enlarged, lambda: images, lambda: stretch(images, scaled, preprocessing.interpolation))


def resizing(preprocessing):
    """What the result of `shrink` depends on, besides the images: a list of JSON values."""
    size = preprocessing.image_size if preprocessing.resize == "stretch" else preprocessing.crop_from
    return [preprocessing.resize, *size, preprocessing.interpolation]


def stretch(images, size, interpolation="bilinear"):
    """Resizes images with antialiasing, ignoring their aspect ratio. Images of that size are returned unchanged.

    Args:
        images: uint8 `(..., height, width, 3)`.
        size: `(height, width)` in pixels.
        interpolation: `"bilinear"` or `"bicubic"`.

    Returns:
        A uint8 tensor, `(..., *size, 3)`.
    """
    import tensorflow as tf

    def resize():
        return _to_bytes(tf.image.resize(images, size, interpolation, antialias=True))

    sides = tuple(images.shape[-3:-1])
    if tf.is_tensor(size):
        size = tf.cast(size, tf.int32)
    elif None not in sides:
        return tf.convert_to_tensor(images) if sides == tuple(size) else resize()
    return tf.cond(tf.reduce_all(tf.shape(images)[-3:-1] == size), lambda: tf.convert_to_tensor(images), resize)


def _to_bytes(pixels):
    import tensorflow as tf

    return tf.saturate_cast(tf.round(pixels), tf.uint8)


def _enlarged_middle(images, scaled, preprocessing):
    """The middle of images enlarged to the size `scaled`. Does not compute the rest: that of a strip can take gigabytes."""
    import tensorflow as tf

    size = tf.constant(preprocessing.image_size, tf.int64)
    start = (tf.convert_to_tensor(scaled, tf.int64) - size) // 2  # of the middle, in the enlarged image
    sides = tf.shape(images, tf.int64)[-3:-1]
    scale = tf.cast(scaled, tf.float64) / tf.cast(sides, tf.float64)
    # The pixels that the middle depends on: the kernels reach two pixels beyond.
    first = tf.maximum(tf.cast(tf.cast(start, tf.float64) / scale, tf.int64) - 3, 0)
    last = tf.minimum(tf.cast(tf.cast(start + size, tf.float64) / scale, tf.int64) + 4, sides)
    part = images[..., first[0] : last[0], first[1] : last[1], :]
    pixels = tf.raw_ops.ScaleAndTranslate(
        images=part if images.shape.rank == 4 else part[None],
        size=preprocessing.image_size,
        scale=tf.cast(scale, tf.float32),
        translation=tf.cast(tf.cast(first, tf.float64) * scale - tf.cast(start, tf.float64), tf.float32),
        kernel_type={"bilinear": "triangle", "bicubic": "keyscubic"}[preprocessing.interpolation],
    )
    return _to_bytes(pixels if images.shape.rank == 4 else pixels[0])


def _covering(images, preprocessing):
    """The size at which images just cover `crop_from`, and whether that enlarges them.

    Returns:
        `(height, width)` and a bool. Both are tensors in a graph that does not know the size of the images. The size is then
        int64, as an enlarged strip can be too long for int32.
    """
    import tensorflow as tf

    tall, wide = preprocessing.crop_from
    height, width = images.shape[-3:-1]
    if None not in (height, width):
        scaled = max(tall, wide * height // width), max(wide, tall * width // height)
        return scaled, scaled[0] > height or scaled[1] > width
    sides = tf.shape(images, tf.int64)[-3:-1]
    height, width = tf.unstack(sides)
    scaled = tf.stack([tf.maximum(wide * height // width, tall), tf.maximum(tall * width // height, wide)])
    return scaled, tf.reduce_any(scaled > sides)


def _choose(condition, then, otherwise):
    """`tf.cond` that also takes a Python bool, and then adds only one of the two to a graph."""
    import tensorflow as tf

    if isinstance(condition, bool):
        return then() if condition else otherwise()
    return tf.cond(condition, then, otherwise)
