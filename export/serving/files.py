"""Prepares image files for a server: unchanged if the server reads them as training does, else as a PNG of their pixels.

Imports neither Keras nor TensorFlow, and Pillow and NumPy only to decode a file.
"""

import io
import re

from cvt_keras.data.file_types import JPEG, PNG

# Ends the compressed pixels of a JPEG. 0xFF with a zero or a restart marker behind it does not.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)
_END_OF_IMAGE, _START_OF_SCAN = 0xD9, 0xDA


def for_server(data):
    """Returns the bytes to send for an image file. If the server refuses them, send `as_png` instead.

    Args:
        data: the bytes of a file that `data.images.read` reads.

    Returns:
        `data` itself, or the bytes of a PNG.

    Raises:
        ImageError: if it must be decoded and can't be.
    """
    return data if _is_plain_jpeg(data) or _is_plain_png(data) else as_png(data)


def as_png(data):
    """Decodes an image file as training does, and returns the bytes of a PNG.

    Raises:
        ImageError: if it can't be read.
    """
    from PIL import Image

    from cvt_keras.data import images

    png = io.BytesIO()
    Image.fromarray(images.decode(data)).save(png, "PNG", compress_level=1)  # six times faster than the default
    return png.getvalue()


def _is_plain_jpeg(data):
    """Whether a file is a complete RGB or grey JPEG with at most one EXIF segment, as cameras and phones write."""
    if not data.startswith(JPEG):
        return False
    channels, exif, at = None, 0, 2
    while len(data) >= at + 2 and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a filler
            at += 1
            continue
        if marker == _END_OF_IMAGE:
            return channels in (1, 3) and exif <= 1
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            channels = data[at + 9] if len(data) > at + 9 else None
        exif += marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0"
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == _START_OF_SCAN:
            end = _MARKER.search(data, at)
            if end is None:
                return False
            at = end.start()
    return False


def _is_plain_png(data):
    """Whether a file is a complete PNG, and not one of 16 bits with a transparent colour."""
    if not data.startswith(PNG):
        return False
    at, types = len(PNG), set()
    while len(data) >= at + 12:
        kind = data[at + 4 : at + 8]
        types.add(kind)
        if kind == b"IEND":
            return b"IHDR" in types and not (b"tRNS" in types and data[24] == 16)
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return False
