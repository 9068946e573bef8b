"""Keeps decoded pixels on disk, so that no command decodes an image twice, and reads them through memory maps.

A data set that is resized in one way has a folder of its own in the cache. It consists of parts, each a folder with two files:
`pixels` holds the pixels of images one after the other, and `index.npy` says where each image lies. A part appears whole or not
at all, and never changes; new images become a new part. So a command that is killed loses only the part that it was writing.
"""

import contextlib
import hashlib
import json
import re
import shutil
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cvt_keras import runs
from cvt_keras.data import packages
from cvt_keras.data.images import threads
from cvt_keras.data.pixels import INDEX_TYPE, Images, row_of_index
from cvt_keras.errors import BusyError, DataError

KINDS = ("disk", "memory", "off")
_FORMAT = 1  # of the files: another number makes a new folder
_PIXELS, _INDEX = "pixels", "index.npy"
# The part that is being written is held in memory. It is finished after so many seconds or bytes.
_PART_SECONDS, _PART_BYTES = 30, 2**27
_MIN_IMAGES_FOR_PROGRESS = 200


@dataclass(frozen=True)
class Cache:
    """Where the decoded pixels of data sets are kept.

    Args:
        kind: "disk" keeps them for later commands. "memory" keeps them for this one. "off" decodes an image each time that it
            is read, and keeps on disk only what is known about it, such as its digest.
        folder: where "disk" and "off" write; `None` means `default_folder()`.
    """

    kind: str = "disk"
    folder: str | None = None

    @contextlib.contextmanager
    def open(self, name, *identity):
        """Yields the `Store` of a data set. If another process has it open, waits until that process is done.

        Args:
            name: tells people what is in the folder.
            *identity: JSON values that tell this data set, resized in this way, from all others.

        Raises:
            DataError: if the folder can't be written.
        """
        if self.kind == "memory":
            yield Store(None)
            return
        digest = hashlib.sha256(json.dumps([_FORMAT, self.kind, *identity]).encode()).hexdigest()
        root = Path(self.folder).expanduser() if self.folder else default_folder()
        folder = root / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)[:40]}-{digest[:16]}"
        with contextlib.ExitStack() as stack:
            with _named_errors(root):
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_lock_when_free(folder))
                runs.remove_unfinished(folder)
            yield Store(folder, keeps_pixels=self.kind == "disk")


def default_folder():
    """The user's cache folder: `~/.cache/cvt-keras` on Linux."""
    return packages.require("platformdirs").user_cache_path("cvt-keras", appauthor=False)


class Store:
    """The images of a data set, resized in one way.

    Args:
        folder: the folder of the parts; `None` keeps them in memory.
        keeps_pixels: whether pixels are kept, or only the index.
    """

    def __init__(self, folder, keeps_pixels=True):
        self.folder = folder
        self.keeps_pixels = keeps_pixels
        self._parts = []  # pairs: an index, and the pixels: a flat array, a list of images in memory, or `None`
        for path in sorted(folder.glob("part-*")) if folder else ():
            if (part := self._read(path)) is not None:
                self._parts.append(part)
            else:  # its images are decoded again
                shutil.rmtree(path, ignore_errors=True)

    def index(self):
        """What is known about all images.

        Returns:
            An array of `INDEX_TYPE`, and a dict from the id of an image, as text, to its row.
        """
        index = np.concatenate([np.empty(0, INDEX_TYPE), *(index for index, _ in self._parts)])
        return index, {id.decode(): row for row, id in enumerate(index["id"])}

    def images(self, rows, read=None):
        """Returns the images at `rows` of the index, as `Images`.

        Args:
            rows: int `(n,)`.
            read: function from a row to its pixels, if this store keeps none.
        """
        index, _ = self.index()
        parts = np.repeat(np.arange(len(self._parts)), [len(part) for part, _ in self._parts])
        pixels = [pixels for _, pixels in self._parts]

        def kept(row):
            height, width, offset = (int(index[name][row]) for name in ("height", "width", "offset"))
            part = pixels[parts[row]]
            return (
                part[offset] if isinstance(part, list) else part[offset : offset + 3 * height * width].reshape(height, width, 3)
            )

        return Images(kept if self.keeps_pixels else read, index, np.asarray(rows, "int64"))

    @contextlib.contextmanager
    def adding(self):
        """Yields the function `add(id, pixels, **known)`; see `pixels.row_of_index`. After an error, keeps what was added.

        Raises:
            DataError: if the disk is full, or can't be written for another reason.
        """
        rows, pixels, size, started = [], [], 0, time.monotonic()

        def finish():
            nonlocal size, started
            if rows:
                self._parts.append(self._write(np.array(rows), list(pixels)))
                rows.clear(), pixels.clear()
            size, started = 0, time.monotonic()

        def add(id, image, **known):
            nonlocal size
            image = np.ascontiguousarray(image)
            rows.append(row_of_index(id, image, size if self.folder else len(pixels), **known))
            size += image.size
            if self.keeps_pixels:
                pixels.append(image)
            if self.folder and (size > _PART_BYTES or time.monotonic() - started > _PART_SECONDS):
                finish()

        try:
            yield add
        except BaseException:
            with contextlib.suppress(DataError):  # the first error tells more
                finish()
            raise
        finish()

    def _write(self, index, pixels):
        if self.folder is None:
            return index, pixels
        path = self.folder / f"part-{time.time_ns()}"
        with _named_errors(self.folder.parent), runs.whole_folder(path) as unfinished:
            np.save(unfinished / _INDEX, index)
            if self.keeps_pixels:
                # Not through a memory map: on a full disk that would kill the process.
                with open(unfinished / _PIXELS, "wb") as file:
                    file.writelines(image.data for image in pixels)
        return self._read(path)

    def _read(self, path):
        """Reads a part. Returns `None` if it is damaged."""
        try:
            index = np.load(path / _INDEX)
            pixels = np.memmap(path / _PIXELS, "uint8", mode="r") if self.keeps_pixels else None
            sizes = 3 * index["height"].astype("int64") * index["width"]
        except (OSError, ValueError, EOFError, IndexError):
            return None
        damaged = index.dtype != INDEX_TYPE or (pixels is not None and sizes.sum() != len(pixels))
        return None if damaged else (index, pixels)


def each(function, items, unit="images"):
    """Yields `function(item)` for each item in order, from several threads. Shows a progress bar for many items on a terminal.

    Few results wait at a time, so that they fit into memory.

    Args:
        function: called in a thread.
        items: a sequence.
        unit: what the progress bar counts.
    """
    with ThreadPoolExecutor(threads()) as pool, progress(len(items), unit) as advance:
        waiting, remaining = deque(), iter(items)
        try:
            for item in remaining:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 4 * threads():
                    yield waiting.popleft().result()
                    advance()
            while waiting:
                yield waiting.popleft().result()
                advance()
        finally:
            for future in waiting:
                future.cancel()


@contextlib.contextmanager
def progress(n, unit="images"):
    """Shows a progress bar for many items on a terminal. Yields the function that advances it."""
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None
    if tqdm is None or n < _MIN_IMAGES_FOR_PROGRESS:
        yield lambda steps=1: None
        return
    with tqdm(total=n, desc=f"reading {unit}", unit=f" {unit}", leave=False, disable=None, file=sys.stdout) as bar:
        yield bar.update


@contextlib.contextmanager
def _lock_when_free(folder):
    """Locks a folder during the block, as `runs.lock` does, but waits for other processes."""
    told = False
    while True:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(runs.lock(folder))
            except BusyError:
                if not told:
                    print(f"another command is reading the same images into {folder}: waiting for it", flush=True)
                    told = True
                time.sleep(0.2)
                continue
            yield
            return


@contextlib.contextmanager
def _named_errors(folder):
    try:
        yield
    except OSError as error:
        raise DataError(
            f"`cache_dir` can't be written: {error.strerror or error}. Received: cache_dir={folder}",
            argument="cache_dir",
            hint="Free some space, choose another folder with --cache-dir, or add --cache memory",
        ) from error
