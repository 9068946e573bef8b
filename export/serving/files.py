"""Image files for a server: as they are if it reads their kind as training does, and otherwise as a PNG of their pixels.

Neither Keras nor TensorFlow is imported, and Pillow and NumPy only for a file that has to be decoded.
"""

import io
import os
import re
from pathlib import Path

from cvt_keras.data.file_types import JPEG, PNG, READABLE, is_clutter, is_hidden, is_image
from cvt_keras.errors import ImageError

_HEAD = 64  # bytes that show what a file is
# In the compressed pixels of a JPEG: what ends them. A zero or a restart behind 0xFF does not.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)
_END_OF_IMAGE, _START_OF_SCAN = 0xD9, 0xDA


# === What to send ===


def for_server(data):
    """The bytes to send first for an image file. A server may still refuse an odd one, which `as_png` mends.

    Args:
        data: the bytes of a file that `data.images.read` reads.

    Returns:
        The same object, or the bytes of a PNG.

    Raises:
        ImageError: if it has to be decoded, and can't be.
    """
    return data if _is_plain_jpeg(data) or _is_plain_png(data) else as_png(data)


def as_png(data):
    """The bytes of a PNG with the pixels that training has of an image file.

    Raises:
        ImageError: if it can't be read.
    """
    from PIL import Image

    from cvt_keras.data import images

    png = io.BytesIO()
    Image.fromarray(images.decode(data)).save(png, "PNG", compress_level=1)  # six times faster than by default
    return png.getvalue()


def _is_plain_jpeg(data):
    """Whether it is RGB or grey, whole, and with EXIF data in one place. What a camera or a phone writes is."""
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
    """Whether it is whole, and has no transparent colour among those of 16 bits."""
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


# === What a folder holds ===


def within(folder):
    """Yields what lies in a folder at any depth, sorted, without hidden files and what programs leave behind.

    Yields:
        Pairs of a `Path` and the `ImageError` that says why it can't be read; or `None`, if it seems that it can.
    """
    seen = set()

    def entries(path):
        if (identity := os.path.realpath(path)) in seen:  # a link to a folder above it
            return
        seen.add(identity)
        try:
            found = sorted(path.iterdir())
        except OSError as error:
            yield path, _unreadable(error)
            return
        for entry in found:
            if is_hidden(entry.name) or is_clutter(entry.name):
                continue
            if entry.is_dir():
                yield from entries(entry)
            elif entry.is_file():
                yield entry, None
            else:
                yield entry, ImageError("a dangling link" if entry.is_symlink() and not entry.exists() else "not a file")

    yield from entries(Path(folder))


def read(file):
    """The bytes of an image file.

    Raises:
        ImageError: if it is no image, or can't be read.
    """
    try:
        with open(file, "rb") as stream:
            head = stream.read(_HEAD)
            if not head:
                raise ImageError("the file is empty")
            if not is_image(head):  # which may be a film of gigabytes
                raise ImageError(f"not a {READABLE}")
            return head + stream.read()
    except OSError as error:
        raise _unreadable(error) from error


def _unreadable(error):
    return ImageError(f"can't be read: {error.strerror or error}")
