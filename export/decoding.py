"""Decodes a JPEG or PNG to upright RGB pixels with TensorFlow's operations only, for use inside a SavedModel.

The pixels equal those of `data/images.py` exactly. A file for which TensorFlow can't match them fails with INVALID_ARGUMENT;
the client then decodes it with `data/images.py` and sends a PNG.
"""

import functools

import tensorflow as tf

from cvt_keras.data import file_types
from cvt_keras.data.images import MAX_PIXELS

# Limit what a hostile file can cost. A photo has about 20 segments, a large PNG about 10,000 chunks.
_MOST_SEGMENTS, _MOST_CHUNKS = 1_000, 20_000
_ORIENTATION = 0x0112
_BYTE, _ASCII, _SHORT, _LONG, _UNDEFINED = 1, 2, 3, 4, 7
# Bytes per value of each TIFF type; 0 for undefined types.
_UNITS = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 0)
_GREY, _RGB, _PALETTE, _GREY_ALPHA, _RGB_ALPHA = 0, 2, 3, 4, 6  # colour types of PNG
# How to decode a PNG.
_OPAQUE, _TRANSPARENT, _GREY_OF_16_BITS = range(3)


def decode(data):
    """Decodes an image file inside a graph.

    Args:
        data: a string tensor `()`, the bytes of a JPEG or PNG.

    Returns:
        A uint8 tensor `(height, width, 3)`.

    Raises:
        tf.errors.InvalidArgumentError: when the graph runs, for other formats, broken files, and the kinds that
            docs/guides/serving.md lists.
    """
    with tf.device("CPU"):  # the decoders run there; waiting for a GPU would only cost time
        png, jpeg = _starts(data, file_types.PNG), _starts(data, file_types.JPEG)
        rule = "image_bytes must be JPEG or PNG files; cvt-keras classify re-encodes others. Received:"
        data = _require(data, png | jpeg, rule, _format(data))
        pixels, exif = tf.cond(png, lambda: _decode_png(data), lambda: _decode_jpeg(data))
        return _turn(pixels, _orientation(exif))


def _format(data):
    """The format of a file that is neither JPEG nor PNG, as text."""

    def is_any(at, *marks):
        return tf.reduce_any(
            [_starts(tf.strings.substr(data, tf.minimum(at, tf.strings.length(data)), 8), mark) for mark in marks]
        )

    formats = {
        "a WebP": _starts(data, b"RIFF") & is_any(8, b"WEBP"),
        "a GIF": is_any(0, *file_types.GIF),
        "a BMP": is_any(0, b"BM"),
        "a TIFF": is_any(0, *file_types.TIFF),
        "an AVIF": is_any(4, *(b"ftyp" + brand for brand in file_types.AVIF)),
        "a HEIC": is_any(4, *(b"ftyp" + brand for brand in file_types.HEIF)),
    }
    name = tf.constant("something else")
    for text, condition in formats.items():
        name = tf.where(condition, text, name)
    return name


# === JPEG ===


def _decode_jpeg(data):
    """Returns uint8 pixels `(height, width, 3)` and the EXIF data, an empty string if there is none."""

    def next_segment(at, frame, exif_at, exif_segments, _):
        head = _bytes(data, at, 4)
        marker, length = head[1], _number(head[2:])
        filler = (head[0] == 0xFF) & (marker == 0xFF)
        # Markers with a length: not those of a restart, nor of the start or end of an image.
        is_segment = (head[0] == 0xFF) & (marker >= 0xC0) & ((marker < 0xD0) | (marker >= 0xDA)) & (length >= 2)
        is_frame = is_segment & (marker < 0xD0) & (marker != 0xC4) & (marker != 0xC8) & (marker != 0xCC)
        is_exif = is_segment & (marker == 0xE1) & (_substr(data, at + 4, 6) == b"Exif\0\0")
        frame, exif_at = tf.where(is_frame & (frame == 0), at, frame), tf.where(is_exif, at, exif_at)
        ended = ~filler & (~is_segment | (marker == 0xDA))  # 0xDA starts the pixels
        at += tf.where(filler, one, length + 2)
        return at, frame, exif_at, exif_segments + tf.cast(is_exif, tf.int64), ended

    zero, one = tf.constant(0, tf.int64), tf.constant(1, tf.int64)
    _, frame, exif_at, exif_segments, ended = tf.while_loop(
        lambda *state: ~state[-1],
        next_segment,
        (2 * one, zero, zero, zero, tf.constant(False)),
        maximum_iterations=_MOST_SEGMENTS,
        parallel_iterations=1,
    )
    data = _require(data, ended & (frame > 0), "the header of a JPEG is broken")
    header = _bytes(data, frame + 4, 6)
    data = _require_size(data, _number(header[1:3]), _number(header[3:5]))
    # Decoders disagree on whether the colours of a CMYK file are inverted.
    readable = (header[5] == 1) | (header[5] == 3)
    data = _require(data, readable, "a JPEG must be RGB or grey. Received: channels =", header[5])
    data = _require(data, exif_segments <= 1, "a JPEG has EXIF data in several segments")
    exif = _substr(data, exif_at + 4, tf.where(exif_segments > 0, _number(_bytes(data, exif_at + 2, 2)) - 2, 0))
    # TensorFlow's default transform is fast, but up to 18 of 255 off.
    return tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE"), exif


# === PNG ===


def _decode_png(data):
    """Returns uint8 pixels `(height, width, 3)` and the EXIF data, an empty string if there is none."""
    data = _require(data, (tf.strings.length(data) >= 33) & (_substr(data, 12, 4) == b"IHDR"), "the header of a PNG is broken")
    header = _bytes(data, 16, 10)
    depth, colours = header[8], header[9]
    data = _require_size(data, _number(header[4:8]), _number(header[:4]))
    types, exif = tf.cond(  # reading chunk by chunk is slow: only if one of these may be there
        _contains(data, b"tRNS|eXIf"), lambda: _chunks(data), lambda: (tf.constant(b""), tf.constant(b""))
    )
    misplaced = _contains(types, b"IDAT.*tRNS|tRNS.*PLTE|tRNS.*tRNS|eXIf.*eXIf")
    data = _require(data, ~misplaced, "the chunks of a PNG are in the wrong order")
    keyed = _contains(types, b"tRNS")  # a colour, or entries of the palette, are transparent
    # Pillow compares the upper 8 bits of a pixel with the transparent colour's.
    data = _require(data, ~keyed | (depth < 16), "a PNG of 16 bits must not have a transparent colour")
    way = tf.where(keyed | (colours == _GREY_ALPHA) | (colours == _RGB_ALPHA), _TRANSPARENT, _OPAQUE)
    way = tf.where((colours == _GREY) & (depth == 16), _GREY_OF_16_BITS, way)
    ways = {
        _OPAQUE: lambda: tf.io.decode_png(data, channels=3),
        _TRANSPARENT: lambda: _on_white(tf.io.decode_png(data, channels=4)),
        _GREY_OF_16_BITS: lambda: _from_16_bits(tf.io.decode_png(data, channels=1, dtype=tf.uint16)),
    }
    return tf.switch_case(way, ways), exif


def _chunks(data):
    """Returns the types of a PNG's chunks, each followed by a space, consecutive IDAT once; and its EXIF data."""
    end = tf.cast(tf.strings.length(data), tf.int64)

    def next_chunk(at, types, last, exif_at):
        length, kind = _number(_bytes(data, at, 4)), _substr(data, at + 4, 4)
        types += tf.where((kind == b"IDAT") & (kind == last), b"", kind + b" ")
        return at + length + 12, types, kind, tf.where(kind == b"eXIf", at, exif_at)

    start = (tf.constant(len(file_types.PNG), tf.int64), tf.constant(b""), tf.constant(b""), tf.constant(0, tf.int64))
    at, types, last, exif_at = tf.while_loop(
        lambda at, types, last, _: (at < end) & (last != b"IEND"),
        next_chunk,
        start,
        maximum_iterations=_MOST_CHUNKS,
        parallel_iterations=1,
    )
    types = _require(types, (at >= end) | (last == b"IEND"), "a PNG has too many chunks")
    return types, _substr(data, exif_at + 8, tf.where(exif_at > 0, _number(_bytes(data, exif_at, 4)), 0))


def _on_white(rgba):
    """Lays pixels on white as `images.on_white` does: uint8 `(height, width, 4)` -> uint8 `(height, width, 3)`."""
    full, half = tf.constant(255, tf.uint16), tf.constant(127, tf.uint16)
    rgba = tf.cast(rgba, tf.uint16)
    rgb, alpha = rgba[..., :3], rgba[..., 3:]
    return tf.cast((rgb * alpha + full * (full - alpha) + half) // full, tf.uint8)


def _from_16_bits(grey):
    """Reduces grey to 8 bits as images.py does: uint16 `(height, width, 1)` -> uint8 `(height, width, 3)`."""
    shift = tf.where(tf.reduce_max(grey) < 4096, tf.constant(4, tf.uint16), tf.constant(8, tf.uint16))
    return tf.repeat(tf.cast(tf.bitwise.right_shift(grey, shift), tf.uint8), 3, axis=-1)


# === EXIF ===


def _orientation(exif):
    """Reads the orientation from EXIF data: int32, 1 (upright) to 8; 1 if it is missing or the data are broken."""
    return tf.cond(tf.strings.length(exif) == 0, lambda: tf.constant(1), lambda: _read_orientation(exif))


def _read_orientation(exif):
    for _ in range(2):  # some writers repeat the prefix
        exif = tf.where(_starts(exif, b"Exif\0\0"), _substr(exif, 6, -1), exif)
    length = tf.cast(tf.strings.length(exif), tf.int64)
    little = _starts(exif, b"II")
    tiff = tf.reduce_any([_starts(exif, mark) for mark in (b"II*\0", b"II\0*", b"MM*\0", b"MM\0*")])

    def number(raw):
        return _number(tf.where(little, raw[..., ::-1], raw))

    directory = number(_bytes(exif, 4, 4))
    entries = number(_bytes(exif, directory, 2))
    entries = tf.where(tiff, tf.clip_by_value((length - directory - 2) // 12, 0, entries), 0)
    raw = tf.io.decode_raw(_substr(exif, directory + 2, entries * 12), tf.uint8)
    raw = tf.cast(tf.reshape(raw, (-1, 12)), tf.int64)
    tag, kind, count, offset = number(raw[:, :2]), number(raw[:, 2:4]), number(raw[:, 4:8]), number(raw[:, 8:])
    short = number(raw[:, 8:10])
    size = count * tf.gather(tf.constant(_UNITS, tf.int64), tf.minimum(kind, len(_UNITS) - 1))
    # Pillow stops at an entry whose value ends behind the data, but skips a value that is larger than all the data.
    external_bytes = tf.where(size > 4, size, 0)  # of values that do not fit into their entry
    broken = (external_bytes > 0) & (tf.cumsum(external_bytes) <= length) & (offset + size > length)
    is_orientation = (tag == _ORIENTATION) & (size > 0) & (tf.cumsum(tf.cast(broken, tf.int32)) == 0)

    def value():
        first = tf.argmax(is_orientation)
        orientation = tf.where(kind[first] == _LONG, offset[first], short[first])
        known = ((kind[first] == _SHORT) & (count[first] <= 2)) | ((kind[first] == _LONG) & (count[first] == 1))
        ignored = tf.reduce_any(kind[first] == (_BYTE, _ASCII, _UNDEFINED))  # training ignores text, too
        orientation = _require(orientation, known | ignored, "the EXIF orientation of an image has an unsupported type")
        return tf.where(known & (orientation >= 1) & (orientation <= 8), tf.cast(orientation, tf.int32), 1)

    return tf.cond(tf.reduce_any(is_orientation), value, lambda: tf.constant(1))


def _turn(pixels, orientation):
    """Turns and mirrors pixels upright by their EXIF orientation."""

    def turned(transposed, reversed_axes):
        return tf.reverse(tf.transpose(pixels, (1, 0, 2)) if transposed else pixels, reversed_axes)

    # Orientations 1 to 8.
    ways = ((False, []), (False, [1]), (False, [0, 1]), (False, [0]), (True, []), (True, [1]), (True, [0, 1]), (True, [0]))
    turns = [functools.partial(turned, *way) for way in ways]
    return tf.ensure_shape(tf.switch_case(orientation - 1, turns), (None, None, 3))


# === Bytes ===


def _starts(data, mark):
    return tf.strings.substr(data, 0, len(mark)) == mark


def _substr(data, at, length):
    """Up to `length` bytes from offset `at`, fewer at the end; -1 means all."""
    end = tf.cast(tf.strings.length(data), tf.int64)
    at = tf.minimum(tf.cast(at, tf.int64), end)
    length = tf.cast(length, tf.int64)
    return tf.strings.substr(data, at, tf.where(length < 0, end, tf.minimum(length, end)))


def _bytes(data, at, n):
    """The `n` bytes from offset `at`, int64 `(n,)`, with zeros after the end."""
    raw = tf.io.decode_raw(_substr(data, at, n), tf.uint8, fixed_length=n)
    return tf.cast(tf.ensure_shape(raw, (n,)), tf.int64)


def _number(raw):
    """Big-endian bytes, int64 `(..., n)` -> int64 `(...)`."""
    n = raw.shape[-1]
    return tf.reduce_sum(raw * [256**place for place in reversed(range(n))], axis=-1)


def _contains(data, pattern):
    """Whether a string has a match of a regular expression over bytes."""
    return tf.strings.regex_full_match(data, rb"\C*(" + pattern.replace(b".", rb"\C") + rb")\C*")


def _require_size(data, height, width):
    # The product alone may overflow.
    small = (height <= MAX_PIXELS) & (width <= MAX_PIXELS) & (height * width <= MAX_PIXELS)
    return _require(data, small, f"an image may have at most {MAX_PIXELS:,} pixels; its header says", width, "x", height)


def _require(value, condition, *text):
    """Returns `value`, or fails with INVALID_ARGUMENT and this text unless the condition holds."""
    with tf.control_dependencies([tf.debugging.Assert(condition, text)]):
        return tf.identity(value)
