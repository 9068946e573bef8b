"""A folder of images, with a folder for each class."""

import errno
import hashlib
import os
import re
import tempfile
import unicodedata
import zlib
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from cvt_keras.data import file_types, images, packages
from cvt_keras.data.cache import Digests, each
from cvt_keras.data.pixels import mean_and_std
from cvt_keras.data.split import SPLITS, Source, Split, hold_out
from cvt_keras.errors import ArgumentError, DataError, ImageError

# Usual names for the folder of a split, compared in lower case and without `_SPLIT_ENDING`.
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
_ADJECTIVES = {"train": "training", "validation": "validation", "test": "test"}
_SPLIT_ENDING = re.compile(r"[ _-]*(data ?set|set|data|images|split)$")  # training_set, test-images, ValData
# Names of image files, also with an extension that a download or a copy made longer (.jpg.1, .jpg_large, .jpg?w=3). A file with
# another name counts as an image only if its bytes say so. `mimetypes` is not used, because its list differs between machines.
_IMAGE_NAME = re.compile(
    r"\.(jpe?g|jpe|jfif|png|apng|gif|bmp|dib|tiff?|webp|avif|hei[cf]|ico|j2k|jp2|jp[fx]|jxl|eps|exr|hdr|p[bgnp]m|pcx|psd|svg|"
    r"tga|xbm|xpm|arw|cr2|cr3|dng|nef|orf|raf|rw2)(\.\d+|_\w*|[^\w.].*)?$",
    re.IGNORECASE | re.DOTALL,
)
_MAX_FILES_IN_ERROR = 10  # an error with more broken files lists all of them in a text file
_MAX_FILES_IN_WARNING = 3
_MIN_DIGEST_ROWS = 64  # rows of an image that go into the digest of its pixels, if it has as many
_HEAD = 64  # first bytes of a file, which tell its format
_PASS_FOLDER = "Use --data-dir DIR, with one folder of images per class"
_LAYOUT = "use --data-dir DIR with one folder of images per class, as in DIR/cat/1.jpg and DIR/dog/2.jpg"
BROKEN = "broken: "  # prefix of a key of `Source.left_out`
_LFS_POINTER, _WEB_PAGE = "a Git LFS pointer, not the image itself", "a web page (HTML), not an image"
_DENIED = os.strerror(errno.EACCES)
_RESTORE = "Restore the missing link targets (with git annex get or dvc pull, if one of them made the links)"
_KINDS_OF_BROKEN = (_LFS_POINTER, _WEB_PAGE, "the file is empty", _DENIED)  # counted under their own keys


def load(data_dir, preprocessing, cache, skip_broken=False, record=None):
    """Loads images from a folder for each class: `data_dir/CLASS/*`, or `data_dir/train/CLASS/*`.

    Folders named `test` and `validation` beside them may hold the same classes. Usual synonyms, such as `test_set`, are
    understood, in upper or lower case. For a split without a folder, about a tenth of the training images is held out. A file's
    bytes decide whether it is held out, not the run's seed, so adding, removing or renaming files moves no other image. See
    `split.hold_out`.

    The bytes of a file decide its format, not its name. Images in folders within a class belong to that class. No two
    splits share pixels: a validation image with the pixels of a training image is left out, and so is a test image with the
    pixels of a training or validation image.

    Args:
        data_dir: the folder.
        preprocessing: a `Preprocessing`: how images are resized. With crop, their sizes still differ; see `images.shrink`.
        cache: a `Cache`: where decoded images are kept.
        skip_broken: whether to leave out and count files that can't be read, instead of raising an error.
        record: the `ImageRecord` of a run. Its images go into the splits that they had there, no others are held out, and a
            split may lack images.

    Returns:
        A `Source`, with digests.

    Raises:
        ArgumentError: if `data_dir` is `None`.
        DataError: if a folder is missing, files can't be read (`details` names them), or a class has too few images.
    """
    if data_dir is None:
        raise ArgumentError(
            "`data_dir` is required for the data set `folder`. Received: data_dir=None", argument="data_dir", hint=_PASS_FOLDER
        )
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        reason = "is not a folder" if root.exists() else "does not exist"
        is_zip = root.exists() and root.suffix.lower() == ".zip"
        hint = "Unzip it first, and use --data-dir with the new folder" if is_zip else _PASS_FOLDER
        raise _error(f"`data_dir` {reason}. Received: data_dir={data_dir}", hint)
    if cache.root is not None and root.resolve() in (cache.root.resolve(), *cache.root.resolve().parents):
        raise DataError(
            f"`cache_dir` must not be in the folder of images. Received: cache_dir={cache.root}, data_dir={data_dir}",
            argument="cache_dir",
            hint="Choose another folder with --cache-dir",
        )
    listing = _list(root)
    contents, kept = _read_all(listing, preprocessing, cache)
    _require_readable(listing, contents, skip_broken)
    if record is None:
        _require_images(listing, contents)
    return _source(listing, contents, kept, record)


def holds_classes(path):
    """Whether a folder, or the folder of a split in it, holds two folders of images or more. Goes by names, reads no file."""
    folders = [entry for entry in Path(path).iterdir() if entry.is_dir()]
    n = sum(any(_IMAGE_NAME.search(file.name) for file in islice(folder.iterdir(), 100)) for folder in folders)
    return n > 1 or any(_split_named(folder.name) and holds_classes(folder) for folder in folders)


# === Listing files ===


@dataclass(frozen=True)
class _File:
    """A file in a class folder.

    Args:
        path: its path.
        split: the split whose folder it is in; "train" if there are no folders for splits.
        label: index of its class in the class names.
    """

    path: Path
    split: str
    label: int


@dataclass
class _Listing:
    """The files of a data set.

    Args:
        root: the folder.
        class_names: sorted, in Unicode's form NFC.
        splits: "train", and the splits that have a folder of their own.
        files: a `_File` for each file in a class folder.
        left_out: reason -> number of files.
        warnings: lines for the user.
        broken_links: links whose target is missing.
    """

    root: Path
    class_names: tuple[str, ...]
    splits: tuple[str, ...]
    files: list[_File]
    left_out: Counter
    warnings: list[str]
    broken_links: list[Path]


def _list(root):
    """Lists the files of each class and split without reading them. -> `_Listing`"""
    left_out, broken_links, warnings = Counter(), [], []
    top = _entries(root, left_out, broken_links)
    split_folders = _split_folders(root, top.folders)
    train = split_folders.get("train", root)
    entries_of = {"train": top} if train == root else {}  # split -> `_Entries` of its folder
    for split, path in split_folders.items():
        entries_of[split] = _entries(path, left_out, broken_links)
    for entries in (top, *entries_of.values()):
        _require_link_targets(entries.broken_folder_links)
    other_folders = [path for path in top.folders if path not in split_folders.values()]
    files_of = {}  # folder -> what `_files_below` returns for it
    if train != root:
        others = {_shown(path.name): path for path in other_folders}
        files_of |= {path: _files_below(path, Counter(), broken_links) for path in other_folders}
        _leave_out_imageless(root, {"": others}, files_of, broken_links, left_out, warnings)
        if others:
            raise _error(
                f"{_shown(root)} has a folder {_shown(train.name)}, and folders that are not splits: {_names(others.values())}",
                f"Move class folders into {_shown(train.name)}, rename folders of splits to test or validation, and move the "
                f"others out of {_shown(root)}",
            )
    class_folders = {}  # split -> {class name: folder}
    for split, entries in entries_of.items():
        folders = other_folders if entries is top else entries.folders
        class_folders[split] = _by_class_name(entries.path, folders)
    _require_classes(root, train, class_folders["train"], entries_of["train"].files)
    for folders in class_folders.values():
        files_of |= {path: _files_below(path, left_out, broken_links) for path in folders.values()}
    imageless = _leave_out_imageless(root, class_folders, files_of, broken_links, left_out, warnings)
    _require_classes(root, train, class_folders["train"], entries_of["train"].files, imageless)
    _require_unambiguous_classes(train, class_folders["train"], files_of)
    class_names = tuple(sorted(class_folders["train"]))
    for split, folders in class_folders.items():
        _require_same_classes(root, train, class_names, entries_of[split].path, folders)

    stray = [*(top.files if train != root else ()), *(file for entries in entries_of.values() for file in entries.files)]
    if stray:
        left_out["outside the class folders"] += len(stray)
    if stray := [file for file in stray if _IMAGE_NAME.search(file.name)]:
        what = _count(len(stray), "image outside the class folders is", "images outside the class folders are")
        warnings.append(f"{what} left out: {_first_few(stray, root)}")
    files = []
    for split, folders in class_folders.items():
        for label, name in enumerate(class_names):
            paths, inner = files_of[folders[name]]
            if not paths and not any(folders[name] in link.parents for link in broken_links):
                raise _error(f"the class folder {_shown(folders[name])} is empty", "Add images, or remove the folder")
            if inner:
                shown = _shown(folders[name].relative_to(root))
                warnings.append(f"images in folders within {shown} count as {name}: {_names(inner)}")
            files += [_File(path, split, label) for path in paths]
    return _Listing(root, class_names, tuple(entries_of), files, left_out, warnings, broken_links)


@dataclass(frozen=True)
class _Entries:
    path: Path
    folders: list[Path]
    files: list[Path]
    broken_folder_links: list[Path]  # links without a target, whose name has no extension


def _entries(path, left_out, broken_links):
    """Lists a folder, sorted. Hidden files and system files are counted in `left_out`. -> `_Entries`"""
    folders, files, broken_folder_links = [], [], []
    for entry in sorted(path.iterdir()):
        hidden = file_types.is_hidden(entry.name)
        if hidden or file_types.is_clutter(entry.name):
            reason = "hidden" if hidden else f"in {entry.name}" if entry.is_dir() else entry.name
            if n := _number_of_files(entry):
                left_out[reason] += n
        elif entry.is_dir():
            folders.append(entry)
        elif entry.is_file():
            files.append(entry)
        elif entry.is_symlink():
            broken_links.append(entry)
            if not re.search(r"\.[A-Za-z]\w{0,4}$", entry.name):
                broken_folder_links.append(entry)
        else:
            left_out["not a file"] += 1  # such as a named pipe: opening it could block forever
    return _Entries(path, folders, files, broken_folder_links)


def _number_of_files(path):
    if path.is_dir() and not path.is_symlink():
        return sum(len(files) for _, _, files in os.walk(path))
    return 1


def _files_below(folder, left_out, broken_links, ancestors=()):
    """Returns all files below a folder, and the folders directly in it."""
    ancestors = (*ancestors, os.path.realpath(folder))
    entries = _entries(folder, left_out, broken_links)
    files = list(entries.files)
    for path in entries.folders:
        if os.path.realpath(path) in ancestors:
            raise _error(f"{_shown(path)} is a link to a folder that contains it", "Remove the link")
        files += _files_below(path, left_out, broken_links, ancestors)[0]
    return files, entries.folders


def _split_folders(root, folders):
    """Returns `{split: folder}`.

    A folder with the name of a split is one if it holds folders; if it holds images only, it is a class called, say, test.
    Beside the folder of the train split, the names of the other splits always mean splits.
    """
    candidates = {split: [path for path in folders if _split_named(path.name) == split] for split in SPLIT_FOLDERS}
    with_folders = {path for paths in candidates.values() for path in paths if any(map(_is_class_folder, _visible(path)))}
    has_train = any(path in with_folders for path in candidates["train"])
    split_folders = {}
    for split, paths in candidates.items():
        paths = [path for path in paths if path in with_folders or (has_train and split != "train")]
        if len(paths) > 1:
            raise _error(
                f"{_shown(root)} has more than one folder for the split {split}: {_names(paths)}",
                f"Merge them into one, or move all but one out of {_shown(root)}",
            )
        if paths:
            split_folders[split] = paths[0]
    return split_folders


def _split_named(name):
    """The split that a folder of this name may hold, or `None`."""
    short = _SPLIT_ENDING.sub("", name.lower())
    return next((split for split, names in SPLIT_FOLDERS.items() if short in names), None)


def _is_class_folder(path):
    return path.is_dir() and not file_types.is_clutter(path.name)


def _visible(path):
    return [entry for entry in path.iterdir() if not file_types.is_hidden(entry.name)]


def _by_class_name(parent, folders):
    """Returns `{class name: folder}`. Names are converted to Unicode's form NFC: macOS may store NFD, other systems don't."""
    by_name = {}
    for path in folders:
        try:
            path.name.encode("utf-8")
        except UnicodeEncodeError:
            raise _error(
                f"the name of a class folder is not valid UTF-8: {_shown(path)}",
                "Rename the folder. To rename everything in DIR: convmv -r -f cp1252 -t utf8 --notest DIR",
            ) from None
        if any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in path.name):
            raise _error(
                f"the name of a class folder contains a line break or a control character: {path.name!r}", "Rename the folder"
            )
        name = unicodedata.normalize("NFC", path.name)
        if name in by_name:
            raise _error(
                f"{_shown(parent)} has two folders named {name}, whose names differ only in their Unicode form (NFC and NFD)",
                "Move the images of one into the other, and remove the empty folder",
            )
        by_name[name] = path
    return by_name


def _require_link_targets(links):
    """Raises if there are broken links that may stand for folders: a class or a split would be missing."""
    if links:
        lines = [f"{_shown(path)} is {_broken_link(path)}" for path in links]
        raise DataError(
            lines[0] if len(lines) == 1 else f"{len(lines)} links in {_shown(links[0].parent)} are broken",
            argument="data_dir",
            hint=f"{_RESTORE}, or remove {'the link' if len(lines) == 1 else 'the links'}",
            details=lines if len(lines) > 1 else [],
        )


def _broken_link(path):
    return f"a broken link: {_shown(os.readlink(path))} does not exist"


def _may_be_image(path):
    return bool(_IMAGE_NAME.search(path.name)) or not path.suffix


def _is_imageless(files):
    """Whether there are files, but no images, not even broken ones."""

    def is_image(path):
        try:
            with open(path, "rb") as stream:
                return file_types.is_image(stream.read(_HEAD))
        except OSError:
            return True

    return bool(files) and not any(_IMAGE_NAME.search(path.name) for path in files) and not any(map(is_image, files))


def _leave_out_imageless(root, class_folders, files_of, broken_links, left_out, warnings):
    """Removes folders without images, such as annotations, from `class_folders`, counts their files and adds a warning.

    A folder stays if another split has images under its name. An empty one stays as well: its images may be missing.

    Args:
        class_folders: `{split: {name: folder}}`.
        files_of: `{folder: what _files_below returned}`.

    Returns:
        The names of the removed folders.
    """
    link_parents = {folder for link in broken_links for folder in link.parents}
    names = sorted({name for folders in class_folders.values() for name in folders})
    imageless = []
    for name in names:
        paths = [folders[name] for folders in class_folders.values() if name in folders]
        if all(path not in link_parents and _is_imageless(files_of[path][0]) for path in paths):
            imageless.append(name)
            for path in paths:
                n, shown = len(files_of[path][0]), _shown(path.relative_to(root))
                left_out[f"in a folder without images: {shown}"] += n
                warnings.append(f"{shown} holds no images and is left out: {_count(n, 'file', 'files')}")
            for folders in class_folders.values():
                folders.pop(name, None)
    return imageless


def _require_unambiguous_classes(root, class_folders, files_of):
    """Raises if all class folders hold the same folders and no images directly: the inner folders may be the classes."""
    inner = set()
    for path in class_folders.values():
        files = [file.relative_to(path).parts for file in files_of[path][0] if _may_be_image(file)]
        if any(len(parts) == 1 for parts in files):
            return
        inner.add(tuple(sorted({unicodedata.normalize("NFC", parts[0]).casefold() for parts in files})))
    if len(inner) == 1 and len(*inner) > 1:
        outer, within = _names([*class_folders.values()]), ", ".join(map(_shown, *inner))
        raise _error(
            f"it is not clear which folders in {_shown(root)} are the classes: {outer} hold no images directly, but all hold "
            f"the folders {within}",
            f"If {within} are the classes, merge {outer}, or rename them to train, validation and test. If {outer} are the "
            f"classes, move the images in {within} up into them",
        )


def _require_classes(root, train, class_folders, files, imageless=()):
    """Raises unless the train split has two classes or more.

    Args:
        root: the folder.
        train: the folder of the train split, or `root`.
        class_folders: `{class name: folder}` in `train`.
        files: the files directly in `train`.
        imageless: names of folders that were left out.
    """
    if class_folders and all(map(_split_named, class_folders)):
        raise _error(
            f"{_shown(root)} has no class folders within {', '.join(sorted(class_folders))}",
            "Use one folder of images per class, as in DIR/train/cat/1.jpg and DIR/train/dog/2.jpg",
        )
    if len(class_folders) > 1:
        return
    summary = f"{'`data_dir`' if train == root else _shown(train)} must hold at least two class folders. Found: "
    summary += ", ".join(class_folders) or "none"
    if n := sum(bool(_IMAGE_NAME.search(file.name)) for file in files):
        summary += f", and {_count(n, 'image', 'images')} outside class folders"
    if imageless:
        summary += f", and folders without images: {', '.join(imageless)}"
    summary += f". Received: data_dir={_shown(root)}"
    hint = _LAYOUT[0].upper() + _LAYOUT[1:]
    if len(class_folders) == 1 and train == root:
        [only] = class_folders.values()
        inner = _entries(only, Counter(), []).folders
        if splits := _split_folders(only, inner):
            hint = f"The splits {_names([*splits.values()])} are in {_shown(only)}: use --data-dir {_shown(only)}"
        elif len(inner) > 1:
            hint = f"If {_names(inner)} are the classes, use --data-dir {_shown(only)}. Otherwise {_LAYOUT}"
    raise _error(summary, hint)


def _require_same_classes(root, train, class_names, path, folders):
    """Raises unless `folders`, `{class name: folder}` of the split in `path`, has the classes of the train split."""
    spelled = {name.casefold(): name for name in class_names}
    renamed = {name: spelled[name.casefold()] for name in folders if name.casefold() in spelled and name not in class_names}
    if renamed and not set(renamed.values()) & set(folders):
        raise _error(
            f"class names in {_shown(path)} and {_shown(train)} differ in upper and lower case: "
            f"{', '.join(f'{name} and {other}' for name, other in renamed.items())}",
            f"In {_shown(path)}, rename {', '.join(f'{name} to {other}' for name, other in renamed.items())}",
        )
    if lacking := sorted(set(class_names) - set(folders)):
        raise _error(
            f"{_shown(path)} has no folder for {', '.join(lacking)}, unlike {_shown(train)}",
            f"Move some images of each missing class from {_shown(train)} to {_shown(path)}. Or move {_shown(path.name)} out "
            f"of {_shown(root)}: about a tenth of the images of each class is then held out instead",
        )
    if extra := sorted(set(folders) - set(class_names)):
        raise _error(
            f"{_shown(path)} has a folder for {', '.join(extra)}, unlike {_shown(train)}",
            f"Add training images of each in {_shown(train)}, move its folder out of {_shown(path)}, or correct the name if it "
            "is misspelled",
        )


# === Reading ===


@dataclass
class _Content:
    """The content of a file.

    Args:
        file: its `_File`.
        digest: SHA-256 of its bytes, in hexadecimal digits.
        pixel_digest: digest of its decoded pixels at full size, in hexadecimal digits.
        cut_off: see `images.Picture`.
        one_colour: whether all pixels are the same.
        broken: why it can't be read, or `None`.
        not_an_image: whether neither its bytes nor its name say that it is an image.
    """

    file: _File
    digest: str = ""
    pixel_digest: str = ""
    cut_off: bool = False
    one_colour: bool = False
    broken: str | None = None
    not_an_image: bool = False

    @property
    def usable(self):
        return self.broken is None and not self.not_an_image


def _read_all(listing, preprocessing, cache):
    """Reads all files that are not in the cache.

    Returns:
        A list of `_Content`; and the `Images` of those that are usable, in their order.
    """
    packages.require("tensorflow")
    room = images.Room()
    with cache.open(listing.root.resolve().name, images.resizing(preprocessing)) as store:
        index, row_of = store.index, store.row_of()
        digests = Digests(store.folder, listing.root)

        def examine(file):
            with room.place() as reserve:
                content, picture = _read(file, index, row_of, reserve)
                # Resized before the next file is read: photos at full size would not fit into memory.
                pixels = None if picture is None else images.shrink(picture.pixels, preprocessing).numpy()
            return content, pixels

        contents, unknown, added = {}, [], set()
        for file in listing.files:
            digest = digests.of(file.path)
            if digest in row_of:
                contents[file] = _known(file, digest, index[row_of[digest]])
            else:
                unknown.append(file)
        with store.adding() as add:
            for content, pixels in each(examine, unknown, len(unknown)):
                contents[content.file] = content
                if pixels is not None and content.digest not in added:
                    known = {"original": content.pixel_digest, "cut_off": content.cut_off, "one_colour": content.one_colour}
                    add(content.digest, pixels, **known)
                    added.add(content.digest)
        contents = [contents[file] for file in listing.files]
        usable = [content for content in contents if content.usable]
        digests.keep({content.file.path: content.digest for content in usable})
        if added and any(content.digest in row_of for content in usable):
            print(f"decoded {_count(len(added), 'new image', 'new images')}; the others are in {store.folder}", flush=True)
        index, row_of = store.index, store.row_of()
        paths = {row_of[content.digest]: content.file.path for content in usable}

        def read(row):
            with room.place() as reserve:
                return _read_again(paths[row], index["id"][row].decode(), preprocessing, reserve)

        return contents, store.images([row_of[content.digest] for content in usable], read)


def _known(file, digest, row):
    """The `_Content` of a file that is in the cache, from its row of the index."""
    return _Content(
        file,
        digest=digest,
        pixel_digest=row["original"].decode(),
        cut_off=bool(row["cut_off"]),
        one_colour=bool(row["one_colour"]),
    )


def _read(file, index, row_of, reserve=None):
    """Reads a file. -> `_Content`; and a `Picture`, or `None` if it is broken or in the cache"""
    has_image_name = bool(_IMAGE_NAME.search(file.path.name))
    try:
        with open(file.path, "rb") as stream:
            data = stream.read(_HEAD)
            if not has_image_name and not file_types.is_image(data):  # may be a video of many gigabytes: don't read it
                return _Content(file, not_an_image=True), None
            data += stream.read()
        digest = hashlib.sha256(data).hexdigest()
        if digest in row_of:  # moved, copied or touched
            return _known(file, digest, index[row_of[digest]]), None
        picture = images.read(data, reserve)
    except OSError as error:
        return _Content(file, broken=error.strerror or str(error)), None
    except ImageError as error:
        return _Content(file, broken=_kind_of_text(data) or error.summary), None
    return (
        _Content(
            file,
            digest=digest,
            pixel_digest=_pixel_digest(picture.pixels),
            cut_off=picture.cut_off,
            one_colour=_has_one_colour(picture.pixels),
        ),
        picture,
    )


def _read_again(path, digest, preprocessing, reserve):
    """Reads and resizes an image that an earlier pass over all files found usable.

    Raises:
        DataError: if it has changed since.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{_shown(path)} can't be read any more: {error.strerror or error}", argument="data_dir") from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise DataError(
            f"{_shown(path)} has changed since this command began",
            argument="data_dir",
            hint="Start the command again. With --cache disk, images are read only once",
        )
    return images.shrink(images.decode(data, reserve), preprocessing).numpy()


def _pixel_digest(pixels):
    """A digest of an image's size and pixels, before it is resized.

    Hashing a whole photo cryptographically takes as long as decoding it; a CRC-32 is five times as fast. Two different images
    have the same CRC-32 once in four billion times, and are confused only if the hashed rows are also the same.
    """
    checksum = zlib.crc32(np.ascontiguousarray(pixels))
    rows = np.ascontiguousarray(pixels[:: max(1, len(pixels) // _MIN_DIGEST_ROWS)])
    return hashlib.blake2b(rows, digest_size=16, key=repr((pixels.shape, checksum)).encode()).hexdigest()


def _has_one_colour(pixels):
    """Whether all pixels are the same. A row or a coarse grid rules out most images before all pixels are compared."""
    return all(bool((part == pixels[0, 0]).all()) for part in (pixels[0], pixels[::16, ::16], pixels))


def _kind_of_text(data):
    """Names a text file that often stands in place of an image, or returns `None`."""
    head = data[:_HEAD].lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return _LFS_POINTER
    if head.startswith((b"<!doctype html", b"<html")):
        return _WEB_PAGE
    return None


# === Checks, splits and warnings ===


def _require_readable(listing, contents, skip_broken):
    """Counts files that are not images. Raises if files are broken, or counts those too and adds a warning."""
    for content in contents:
        if content.not_an_image:
            extension = content.file.path.suffix.lower()
            kind = extension if re.fullmatch(r"[.][a-z0-9]{1,8}", extension) else "other files"
            listing.left_out[f"not an image: {kind}"] += 1
    broken = [(path, _broken_link(path)) for path in listing.broken_links]
    broken += [(content.file.path, content.broken) for content in contents if content.broken is not None]
    if not broken:
        return
    broken.sort(key=lambda pair: str(pair[0]))
    if not skip_broken:
        raise _broken_error(listing, broken, len(contents) + len(listing.broken_links))
    listing.left_out[f"{BROKEN}a link whose target is missing"] += len(listing.broken_links)
    for content in contents:
        if content.broken is not None:
            kind = content.broken if content.broken in _KINDS_OF_BROKEN else "damaged or too large"
            listing.left_out[f"{BROKEN}{kind}"] += 1
    what = _count(len(broken), "file that can't be read is", "files that can't be read are")
    listing.warnings.append(f"{what} left out: {_first_few([path for path, _ in broken], listing.root)}")


def _broken_error(listing, broken, n):
    """The error for broken files.

    Args:
        listing: a `_Listing`.
        broken: pairs of a path and the reason.
        n: the number of all files.
    """
    lines = [f"{_shown(path)}: {reason}" for path, reason in broken]
    summary = f"{len(broken):,} of {_count(n, 'file', 'files')} in {_shown(listing.root)} can't be read"
    if len(lines) > _MAX_FILES_IN_ERROR:
        handle, name = tempfile.mkstemp(prefix="cvt-keras-broken-files-", suffix=".txt")
        with open(handle, "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
        summary += f"; all are listed in {name}"
    reasons = {reason for _, reason in broken}
    remedies = []
    if listing.broken_links:
        remedies.append(_RESTORE)
    if _LFS_POINTER in reasons:
        remedies.append("Run git lfs pull to fetch the images that Git LFS holds")
    if _DENIED in reasons:
        remedies.append("Ask for read permission where it is denied")
    remedies.append("Replace or remove these files, or add --skip-broken to leave them out")
    return DataError(summary, argument="data_dir", hint=". ".join(remedies), details=lines[:_MAX_FILES_IN_ERROR])


def _require_images(listing, contents):
    """Raises unless each split that has a folder has an image of each class."""
    for split in listing.splits:
        usable = {content.file.label for content in contents if content.usable and content.file.split == split}
        if lacking := [name for label, name in enumerate(listing.class_names) if label not in usable]:
            kind = "" if len(listing.splits) == 1 else f"{_ADJECTIVES[split]} "
            raise _error(
                f"{_shown(listing.root)} has no readable {kind}images of {', '.join(lacking)}",
                "Add some, or remove the folder of this class",
            )


def _source(listing, contents, kept, record=None):
    """Assigns the images to splits. -> `Source`

    Args:
        listing: a `_Listing`.
        contents: list of `_Content`.
        kept: the `Images` of those that are usable, in their order.
        record: as in `load`.
    """
    assigned = _assigned_splits(listing, contents, record)
    members = {split: [i for i, name in enumerate(assigned) if name == split] for split in SPLITS}
    _leave_out_duplicates(listing, contents, members)
    for indices in members.values():
        # Sorting by digest mixes the classes, and a new image does not change the order of the others.
        indices.sort(key=lambda i: (contents[i].digest, contents[i].file.label))
    _warn_of_odd_images(listing, [contents[i] for indices in members.values() for i in indices])

    row_of = np.cumsum([content.usable for content in contents]) - 1
    splits = {}
    for split, indices in members.items():
        labels = np.array([contents[i].file.label for i in indices], "int64")
        digests = tuple(contents[i].digest for i in indices)
        originals = tuple(contents[i].pixel_digest for i in indices)
        splits[split] = Split(kept[row_of[np.array(indices, "int64")]], labels, digests, originals)
    # With a record, the train split may be empty, which has no mean.
    mean, std = mean_and_std(splits["train"].images) if len(splits["train"]) else ((0.0,) * 3, (1.0,) * 3)
    return Source(
        name="folder",
        **splits,
        class_names=listing.class_names,
        mean=mean,
        std=std,
        note="" if "test" in listing.splits else "tested on about a tenth of the images, held out",
        warnings=tuple(listing.warnings),
        left_out={reason: n for reason, n in sorted(listing.left_out.items()) if n},
        split_folders=listing.splits,
    )


def _assigned_splits(listing, contents, record=None):
    """The split of each file; `None` for files that are not usable."""
    by_folder = [content.file.split if content.usable else None for content in contents]
    if record is not None:
        recorded = [
            split and record.split_of(content.digest, content.pixel_digest) for content, split in zip(contents, by_folder)
        ]
        return [old if old in SPLITS else split for old, split in zip(recorded, by_folder)]
    held_out_splits = [split for split in ("test", "validation") if split not in listing.splits]
    if not held_out_splits:
        return by_folder
    digests_of = {name: [] for name in listing.class_names}
    for content, split in zip(contents, by_folder):
        if split == "train":
            digests_of[listing.class_names[content.file.label]].append(content.digest)
    by_digest = hold_out(digests_of, held_out_splits)
    return [by_digest[content.digest] if split == "train" else split for content, split in zip(contents, by_folder)]


def _leave_out_duplicates(listing, contents, members):
    """Removes from `members` each image with the pixels of one in an earlier split; in the order train, validation, test.

    Args:
        listing: a `_Listing`. The images are counted, and warnings added.
        contents: list of `_Content`.
        members: `{split: indices of contents}`.

    Raises:
        DataError: if that leaves no image in a split.
    """
    earlier = {}  # pixel digest -> "training" or "validation"
    for split in SPLITS:
        kind = _ADJECTIVES[split]
        copies = [i for i in members[split] if contents[i].pixel_digest in earlier]
        if copies and len(copies) == len(members[split]):
            raise _error(
                f"every {kind} image in {_shown(listing.root)} has the same pixels as a "
                f"{' or '.join(dict.fromkeys(earlier.values()))} image. Number of {kind} images: {len(copies):,}",
                f"Put other images into the folder of the {kind} images. Or move it out of {_shown(listing.root)}: some "
                "training images are then held out instead"
                if split in listing.splits
                else "Remove the copies, or add other images",
            )
        for other in ("training", "validation"):
            paths = [contents[i].file.path for i in copies if earlier[contents[i].pixel_digest] == other]
            if paths:
                listing.left_out[f"the same pixels as a {other} image"] += len(paths)
                listing.warnings.append(
                    f"{_count(len(paths), f'{kind} image has', f'{kind} images have')} the same pixels as a {other} image and "
                    f"{'is' if len(paths) == 1 else 'are'} left out: {_first_few(paths, listing.root)}"
                )
        members[split] = [i for i in members[split] if contents[i].pixel_digest not in earlier]
        earlier |= {contents[i].pixel_digest: kind for i in members[split]}
    labels = {contents[i].file.label for i in members["test"]}
    if lacking := [name for label, name in enumerate(listing.class_names) if label not in labels]:
        listing.warnings.append(f"no test images are left of {', '.join(lacking)}")


def _warn_of_odd_images(listing, used):
    """Adds warnings about images that are used; `used` is a list of `_Content`."""

    def warn(odd, one, many):
        if odd:
            paths = sorted(content.file.path for content in odd)
            listing.warnings.append(f"{_count(len(paths), one, many)}: {_first_few(paths, listing.root)}")

    warn(
        [content for content in used if content.cut_off],
        "image lacks its last bytes and is used without them",
        "images lack their last bytes and are used without them",
    )
    warn([content for content in used if content.one_colour], "image has only one colour", "images have only one colour")
    labels = {}
    for content in used:
        labels.setdefault(content.digest, set()).add(content.file.label)
    copies = [content for content in used if len(labels[content.digest]) > 1]
    warn(copies, "", "files are copies of a file in another class")


# === Text for messages ===


def _shown(path):
    """A path as text that can be printed: bytes that are not UTF-8 become escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _names(paths, most=5):
    """The names of the first folders, and how many more there are."""
    names = [_shown(path.name) for path in paths]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _first_few(paths, root):
    """The first paths relative to `root`, and how many more there are."""
    names = [_shown(path.relative_to(root)) for path in paths[:_MAX_FILES_IN_WARNING]]
    more = len(paths) - len(names)
    return ", ".join(names) + (f" and {more:,} more" if more else "")


def _count(n, one, many):
    return f"{n:,} {one if n == 1 else many}"


def _error(summary, hint):
    return DataError(summary, argument="data_dir", hint=hint)
