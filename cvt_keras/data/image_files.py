"""Finds the image files that a command line names, and reads their bytes. Imports no package but this one."""

import glob
import os
import sys
from pathlib import Path

from cvt_keras.data.file_types import READABLE, is_clutter, is_hidden, is_image
from cvt_keras.errors import ArgumentError, ImageError

STDIN = "-"
_HEAD = 64  # bytes that identify a file's type


def listed(paths):
    """Yields the files that the positional arguments of a command name.

    Args:
        paths: files; folders, see `within`; patterns of `glob`, which match folders too; or `STDIN` for a path per line of
            standard input, each a file or a folder.

    Yields:
        Pairs `(path, error)`: `error` is an `ImageError` if the path can't be read, else `None`.

    Raises:
        ArgumentError: if there are no paths, or one of them names no file.
    """
    if not paths:
        raise _not_images("none")
    for path in paths:
        if str(path) == STDIN:
            files = list(_from_stdin())
            if not files:
                raise _not_images(f"{path}, and nothing on standard input")
        elif _exists(path):
            files = list(_files(path))
            if not files:
                raise _not_images(f"{path}, an empty folder")
        elif glob.has_magic(str(path)):
            matches = map(Path, sorted(glob.glob(str(path), recursive=True)))
            files = list(dict(pair for match in matches for pair in _files(match)).items())
            if not files:
                raise _not_images(f"{path}, which matches no file")
        else:
            raise _not_images(f"{path}, which does not exist")
        yield from files


def _files(path):
    try:
        is_folder = path.is_dir()
    except OSError as error:  # such as a name that is too long
        return [(path, _unreadable(error))]
    return within(path) if is_folder else [(path, None)]


def _exists(path):
    try:
        return path.exists()
    except OSError:  # below a folder that can't be read, for instance: `_files` gives the reason
        return True


def _from_stdin():
    for line in sys.stdin.buffer.read().splitlines():
        if line.strip():
            yield from _files(Path(os.fsdecode(line)))


def _not_images(received):
    return ArgumentError(f"`images` must be files or folders of images. Received: {received}", argument="images")


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
