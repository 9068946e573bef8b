"""Keeps decoded pixels on disk, so that no command decodes an image twice, and reads them through memory maps.

A data set that is resized in one way has a folder of its own in the cache, with two files. `pixels` holds the pixels of images
one after the other, and `index` says where each image lies. An image belongs to the cache once its row of the index is written,
which happens after its pixels are safe on disk. So a command that is killed loses only what it still held in memory. Later
commands append: what another command may have mapped never changes.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cvt_keras import runs, terminal
from cvt_keras.data import packages
from cvt_keras.data.images import in_threads
from cvt_keras.data.pixels import INDEX_TYPE, Images, row_of_index
from cvt_keras.errors import BusyError, DataError, RunError

_FORMAT = 1  # of the files, and of how images are decoded and resized: another number makes a new folder
_PIXELS, _INDEX = "pixels", "index"
# Images are held in memory until they are written together, after so many seconds or bytes.
_BATCH_SECONDS, _BATCH_BYTES = 30, 2**27
_MIN_IMAGES_FOR_PROGRESS = 200
# A file that is being written may keep its times. So files that changed a moment ago are read again by the next command.
_SETTLED_NS = 10**9


@dataclass(frozen=True)
class Cache:
    """Where the decoded pixels of data sets are kept.

    Args:
        kind: "disk" keeps them for later commands. "memory" keeps them for this one. "off" decodes an image each time that it
            is read, and keeps on disk only what is known about it, such as its digest. If the folder can't be opened, it keeps
            nothing.
        folder: where "disk" and "off" write; `None` means `default_folder()`.
    """

    kind: str = "disk"
    folder: str | None = None

    @property
    def root(self):
        """The folder that is written to, or `None`."""
        if self.kind == "memory":
            return None
        return Path(self.folder).expanduser() if self.folder else default_folder()

    @contextlib.contextmanager
    def open(self, name, resizing, *identity):
        """Yields the `Store` of a data set. If another process has it open, waits until that process is done.

        Args:
            name: tells people what is in the folder.
            resizing: how the images were resized, see `images.resizing`; `None` if they are as they were.
            *identity: JSON values that tell these images from all others of the same name.

        Raises:
            DataError: if the folder can't be written.
        """
        root = self.root
        if root is None:
            yield Store(None)
            return
        pillow = packages.require("PIL").__version__  # another one may decode to other pixels
        digest = hashlib.sha256(json.dumps([_FORMAT, pillow, self.kind, name, resizing, *identity]).encode()).hexdigest()
        shown = re.sub(r"[^\w.]+", "-", name).strip("-.")[:40] or "images"
        folder = root / "-".join([shown, *map(str, resizing or ()), digest[:16]])
        with contextlib.ExitStack() as stack:
            try:
                with _named_errors(root):
                    folder.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(_lock_when_free(folder))
                    runs.remove_unfinished(folder)
                    (folder / _INDEX).touch()
                    store = Store(folder, keeps_pixels=self.kind == "disk")
            except DataError:
                if self.kind == "disk":
                    raise
                store = Store(None, keeps_pixels=False)
            yield store


def default_folder():
    """The user's cache folder: `~/.cache/cvt-keras` on Linux."""
    return packages.require("platformdirs").user_cache_path("cvt-keras", appauthor=False)


class Store:
    """The images of a data set, resized in one way.

    Args:
        folder: where the files lie; `None` keeps the images in memory.
        keeps_pixels: whether pixels are kept, or only the index.
    """

    def __init__(self, folder, keeps_pixels=True):
        self.folder = folder
        self.keeps_pixels = keeps_pixels
        self.index = np.empty(0, INDEX_TYPE)  # what is known about each image
        self._in_memory = []  # the pixels, without a folder
        if folder is not None:
            self._read_index()

    def row_of(self):
        """A dict from the id of an image, as text, to its row of the index."""
        return {id.decode(): row for row, id in enumerate(self.index["id"])}

    def images(self, rows, read=None):
        """Returns the images at `rows` of the index, as `Images`.

        Args:
            rows: int `(n,)`.
            read: function from a row to its pixels, if this store keeps none.
        """
        rows = np.asarray(rows, "int64")
        if not self.keeps_pixels:
            return Images(read, self.index, rows)
        if self.folder is None or not len(self.index):
            return Images(self._in_memory.__getitem__, self.index, rows)
        with _named_errors(self.folder.parent):
            pixels = np.asarray(np.memmap(self.folder / _PIXELS, "uint8", mode="r", shape=(_end(self.index),)))
        heights, widths, starts = (self.index[name].astype("int64") for name in ("height", "width", "offset"))

        def kept(row):
            height, width, start = int(heights[row]), int(widths[row]), int(starts[row])
            return pixels[start : start + 3 * height * width].reshape(height, width, 3)

        same_size = len(np.unique(heights)) == len(np.unique(widths)) == 1
        array = pixels.reshape(-1, heights[0], widths[0], 3) if same_size else None
        return Images(kept, self.index, rows, array)

    @contextlib.contextmanager
    def adding(self):
        """Yields the function `add(id, pixels, **known)`; see `pixels.row_of_index`. After an error, keeps what was added.

        Raises:
            DataError: if the disk is full, or can't be written for another reason.
        """
        rows, pixels, size, started = [], [], 0, time.monotonic()
        end = _end(self.index)

        def write():
            nonlocal size, started
            written, images = rows[:], pixels[:]
            rows.clear(), pixels.clear()  # first: after an error they are not written again
            size, started = 0, time.monotonic()
            if written:
                self._append(np.array(written), images)

        def add(id, image, **known):
            nonlocal size, end
            image = np.ascontiguousarray(image)
            rows.append(row_of_index(id, image, end, **known))
            end += image.size
            if self.keeps_pixels:
                pixels.append(image)
                size += image.size
            if self.folder and (size > _BATCH_BYTES or time.monotonic() - started > _BATCH_SECONDS):
                write()

        try:
            yield add
        except BaseException:
            with contextlib.suppress(DataError):  # the first error tells more
                write()
            raise
        write()

    def _append(self, index, pixels):
        if self.folder is None:
            self._in_memory += pixels
            self.index = np.concatenate([self.index, index])
            return
        with _named_errors(self.folder.parent):
            if self.keeps_pixels:
                # Not through a memory map: on a full disk that would kill the process.
                _extend(self.folder / _PIXELS, _end(self.index), (image.data for image in pixels))
            _extend(self.folder / _INDEX, self.index.nbytes, [index.tobytes()])
            self._read_index()

    def _read_index(self):
        """Reads the rows of the index that are whole, and whose pixels are there."""
        path = self.folder / _INDEX
        n = path.stat().st_size // INDEX_TYPE.itemsize if path.exists() else 0
        self.index = np.memmap(path, INDEX_TYPE, mode="r", shape=(n,)) if n else np.empty(0, INDEX_TYPE)
        sizes = 3 * self.index["height"].astype("int64") * self.index["width"]
        ends = np.cumsum(sizes)
        intact = (sizes > 0) & (self.index["offset"] == ends - sizes)
        if self.keeps_pixels:
            pixels = self.folder / _PIXELS
            intact &= ends <= (pixels.stat().st_size if pixels.exists() else 0)
        if not intact.all():
            self._repair(int(np.argmin(intact)))

    def _repair(self, n):
        """Keeps the first `n` rows of a damaged store, in new files: other commands may have mapped the old ones."""
        self.index = np.array(self.index[:n])
        for name, size in ((_PIXELS, _end(self.index)), (_INDEX, self.index.nbytes)):
            path = self.folder / name
            if path.exists():
                with runs.whole(path) as whole, open(path, "rb") as old, open(whole, "wb") as new:
                    for start in range(0, size, _BATCH_BYTES):
                        new.write(old.read(min(_BATCH_BYTES, size - start)))


def _end(index):
    """The number of bytes of all pixels in an index."""
    return int(index["offset"][-1]) + 3 * int(index["height"][-1]) * int(index["width"][-1]) if len(index) else 0


def _extend(path, size, parts):
    """Truncates a file to `size` bytes, appends `parts` and calls fsync. Beyond `size` lies what a killed command wrote."""
    with open(path, "ab") as file:
        if file.tell() < size:
            raise OSError(errno.ESTALE, "another program has changed the cache")
        file.truncate(size)
        try:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            with contextlib.suppress(OSError):
                os.truncate(path, size)
            raise


class Digests:
    """The digests of files that did not change since an earlier command, by their size, times and inode.

    Args:
        folder: the folder that keeps them for later commands, or `None`.
        root: the folder of the files.
    """

    def __init__(self, folder, root):
        name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
        self.path = folder and folder / f"files-{name}.json"
        self.root = root
        self.latest = time.time_ns() - _SETTLED_NS
        self.states = {}
        try:
            self.stored = runs.read_json(self.path) if self.path else {}
        except (OSError, RunError):
            self.stored = {}

    def of(self, path):
        """The SHA-256 of a file in hexadecimal digits, or `None` if it may have changed."""
        name = str(path.relative_to(self.root))
        try:
            state = os.stat(path)
        except OSError:
            return None
        self.states[name] = [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]
        digest, *stored = self.stored.get(name, [None])
        return digest if stored == self.states[name] else None

    def keep(self, digests):
        """Keeps digests for later commands.

        Args:
            digests: a dict from the paths of files, which were passed to `of`, to their digests.
        """
        if self.path is None:
            return
        known = {}
        for path, digest in digests.items():
            name = str(path.relative_to(self.root))
            if (state := self.states.get(name)) and max(state[1], state[2]) < self.latest:
                known[name] = [digest, *state]
        if known != self.stored:
            with contextlib.suppress(OSError), runs.whole(self.path) as unfinished:  # without it, files are read again
                unfinished.write_text(json.dumps(known))


def each(function, items, n):
    """As `images.in_threads`, with a progress bar for many items on a terminal.

    Args:
        function, items: as there.
        n: the number of items.
    """
    with _progress(n) as advance:
        for result in in_threads(function, items):
            yield result
            advance()


@contextlib.contextmanager
def _progress(n):
    """Shows a progress bar for many images on a terminal. Yields the function that advances it by one image."""
    try:
        bar = terminal.progress(n, "reading images", shown=n >= _MIN_IMAGES_FOR_PROGRESS)
    except ImportError:  # of tqdm
        yield lambda: None
        return
    with bar:
        yield bar.update


@contextlib.contextmanager
def _lock_when_free(folder):
    """Locks a folder during the block, as `runs.lock` does, but waits for other processes."""
    announced = False
    while True:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(runs.lock(folder))
            except BusyError:
                if not announced:
                    print(f"another command is reading the same images into {folder}: waiting for it", flush=True)
                    announced = True
                time.sleep(0.2)
                continue
            yield
            return


@contextlib.contextmanager
def _named_errors(folder):
    try:
        yield
    except OSError as error:
        hint = "Choose another folder with --cache-dir, or add --cache memory"
        if error.errno == errno.ENOSPC:
            hint = "Free some space, choose another folder with --cache-dir, or add --cache memory"
        raise DataError(
            f"`cache_dir` can't be used: {error.strerror or error}. Received: cache_dir={folder}",
            argument="cache_dir",
            hint=hint,
        ) from error
