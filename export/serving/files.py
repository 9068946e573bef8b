"""Prepares image files for a server: unchanged if the server reads them as training does, else as a PNG of their pixels.

Imports neither Keras nor TensorFlow, and Pillow and NumPy only to decode a file.
"""

import io
import os
import re
from pathlib import Path

from cvt_keras.data.file_types import JPEG, PNG, READABLE, is_clutter, is_hidden, is_image
from cvt_keras.errors import ImageError

_HEAD = 64  # bytes that identify a file's type
# Ends the compressed pixels of a JPEG. 0xFF with a zero or a restart marker behind it does not.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)
_END_OF_IMAGE, _START_OF_SCAN = 0xD9, 0xDA


# === What to send ===


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


# === Files of a folder ===


def within(folder):
    """Yields the files of a folder at any depth, sorted, without hidden files and those that systems leave behind.

    Yields:
        Pairs `(path, error)`: `error` is an `ImageError` if the path can't be read, else `None`.
    """
    seen = set()

    def entries(path):
        if (identity := os.path.realpath(path)) in seen:  # a link back to a folder that was seen
            return
        seen.add(identity)
        try:
            children = sorted(path.iterdir())
        except OSError as error:
            yield path, _unreadable(error)
            return
        for child in children:
            if is_hidden(child.name) or is_clutter(child.name):
                continue
            if child.is_dir():
                yield from entries(child)
            elif child.is_file():
                yield child, None
            else:
                yield child, ImageError("a dangling link" if child.is_symlink() and not child.exists() else "not a file")

    yield from entries(Path(folder))


def read(file):
    """Reads the bytes of an image file.

    Raises:
        ImageError: if it is not an image, or can't be read.
    """
    try:
        with open(file, "rb") as stream:
            head = stream.read(_HEAD)
            if not head:
                raise ImageError("the file is empty")
            if not is_image(head):  # checked first: it may be a film of gigabytes
                raise ImageError(f"not a {READABLE}")
            return head + stream.read()
    except OSError as error:
        raise _unreadable(error) from error


def _unreadable(error):
    return ImageError(f"can't be read: {error.strerror or error}")
