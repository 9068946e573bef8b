"""A folder of images, with a folder for each class."""

import errno
import hashlib
import os
import re
import sys
import tempfile
import unicodedata
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from cvt_keras.data import file_types, images, packages
from cvt_keras.data.split import SPLITS, Source, Split, hold_out
from cvt_keras.errors import ArgumentError, DataError, ImageError

# What people call the folder of a split, compared without regard to case and to what `_SPLIT_ENDING` describes.
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
_SPLIT_ENDING = re.compile(r"[ _-]*(data ?set|set|data|images|split)$")  # training_set, test-images, ValData
# A name that promises an image: by its ending, or by one that a download or a copy made longer (.jpg.1, .jpg_large, .jpg?w=3).
# Files with other names are known by their bytes alone. The list is written out, because what `mimetypes` knows differs from
# machine to machine.
_IMAGE_NAME = re.compile(
    r"\.(jpe?g|jpe|jfif|png|apng|gif|bmp|dib|tiff?|webp|avif|hei[cf]|ico|j2k|jp2|jp[fx]|jxl|eps|exr|hdr|p[bgnp]m|pcx|psd|svg|"
    r"tga|xbm|xpm|arw|cr2|cr3|dng|nef|orf|raf|rw2)(\.\d+|_\w*|[^\w.].*)?$",
    re.IGNORECASE | re.DOTALL,
)
_LISTED = 10  # the broken files that an error names itself
_NAMED = 3  # the files that a warning names
_DIGEST_ROWS = 64  # of a photo, at least, that its pixels are known by
_HEAD = 64  # bytes that show what a file is
_LONG_READING = 200  # files from which on a bar shows the progress
_EXPECTED = "Name the folder that holds a folder of images for each class, with --data-dir"
_LAYOUT = "Lay the images out as DIR/cat/1.jpg and DIR/dog/2.jpg, with a folder for each class, and name DIR with --data-dir"
BROKEN = "broken: "  # begins a key of `Source.left_out`
_LFS_POINTER, _WEB_PAGE = "a pointer of git-lfs, not the image itself", "a web page (HTML), not an image"
_KINDS_OF_BROKEN = (_LFS_POINTER, _WEB_PAGE, "the file is empty", os.strerror(errno.EACCES))
_SKIP = "or add --skip-broken to leave them out"


def load(data_dir, image_size=32, skip_broken=False, record=None):
    """Loads images from a folder for each class: `data_dir/CLASS/*`, or `data_dir/train/CLASS/*`.

    Beside them, `test` and `validation` (or a usual synonym, such as `test_set`, in any case) may hold the same classes. Where
    one is missing, about a tenth of the training images is held out for it. Which ones depends on the bytes of each file, not
    on a run's seed, so that adding, removing or renaming files moves no other image. See `split.hold_out`.

    Files are read by their bytes, not by their names. Folders within a class are read as part of it. No pixels are in two
    splits: a validation image with those of a training image is left out, and a test image with those of either.

    Args:
        data_dir: the folder.
        image_size: side of the square, in pixels, that the images are stretched to.
        skip_broken: whether to leave out files that can't be read, and count them; otherwise they are an error.
        record: the `ImageRecord` of a run, whose images go into its splits. No others are then held out, and a split may lack
            images.

    Returns:
        A `Source`, with digests.

    Raises:
        ArgumentError: if `data_dir` is `None`.
        DataError: if a folder is missing, files can't be read (`details` names them), or a class has too few images.
    """
    if data_dir is None:
        raise ArgumentError(
            "the data set `folder` needs `data_dir`. Received: None",
            argument="data_dir",
            hint=_EXPECTED,
        )
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise DataError(
            f"`data_dir` is not a folder. Received: data_dir={data_dir}",
            argument="data_dir",
            hint=_EXPECTED,
        )
    listing = _list(root)
    pixels = np.empty((len(listing.files), image_size, image_size, 3), "uint8")
    found = _read_all(listing.files, pixels, image_size)
    _sort_out(listing, found, skip_broken)
    if record is None:
        _require_images(listing, found)
    return _source(listing, found, pixels, record)


def holds_classes(path):
    """Whether a folder holds two folders of images or more, or a split's folder that does; by their names, without reading."""
    folders = [entry for entry in Path(path).iterdir() if entry.is_dir()]
    named = sum(any(_IMAGE_NAME.search(file.name) for file in islice(folder.iterdir(), 100)) for folder in folders)
    return named > 1 or any(_split_called(folder.name) and holds_classes(folder) for folder in folders)


# === Which files there are ===


@dataclass(frozen=True)
class _File:
    """A file in the folder of a class.

    Args:
        path: where it lies.
        split: of `SPLITS`: whose folder it lies in, "train" if the folder has no splits.
        label: the place of its class among the class names.
    """

    path: Path
    split: str
    label: int


@dataclass
class _Listing:
    """What lies in a folder.

    Args:
        root: the folder.
        class_names: in Unicode's form NFC, sorted.
        splits: the splits that have a folder of their own, and "train".
        files: a `_File` for each file in the folder of a class.
        left_out: reason -> number of files.
        warnings: lines for the user.
        dangling: links that lead nowhere.
    """

    root: Path
    class_names: tuple[str, ...]
    splits: tuple[str, ...]
    files: list[_File]
    left_out: Counter
    warnings: list[str]
    dangling: list[Path]


def _list(root):
    """Lists the files of each class and split, and reads none. -> `_Listing`"""
    left_out, dangling, warnings = Counter(), [], []
    top = _entries(root, left_out, dangling)
    split_folders = _split_folders(root, top.folders)
    train = split_folders.get("train", root)
    inside = {"train": top} if train == root else {}
    for split, path in split_folders.items():
        inside[split] = _entries(path, left_out, dangling)
    for entries in (top, *inside.values()):
        _require_linked(entries.missing)
    beside = [path for path in top.folders if path not in split_folders.values()]
    files_of = {}  # folder -> `_below` it
    if train != root:
        others = {_shown(path.name): path for path in beside}
        files_of |= {path: _below(path, Counter(), dangling) for path in beside}
        _leave_out_imageless(root, {"": others}, files_of, dangling, left_out, warnings)
        beside = list(others.values())
    if train != root and beside:
        raise _error(
            f"{_shown(root)} has a folder {_shown(train.name)} and others that are no split: {_names(beside)}",
            f"Move classes into {_shown(train.name)}, call a split test or validation, and move what is neither out of "
            f"{_shown(root)}",
        )
    classes = {}
    for split, entries in inside.items():
        folders = beside if entries is top else entries.folders
        classes[split] = _by_class_name(entries.path, folders)
    _require_classes(root, train, classes["train"], inside["train"].files)
    for folders in classes.values():
        files_of |= {path: _below(path, left_out, dangling) for path in folders.values()}
    imageless = _leave_out_imageless(root, classes, files_of, dangling, left_out, warnings)
    _require_classes(root, train, classes["train"], inside["train"].files, imageless)
    _require_outer_classes(train, classes["train"], files_of)
    class_names = tuple(sorted(classes["train"]))
    for split, folders in classes.items():
        _require_same_classes(root, train, class_names, inside[split].path, folders, split)

    loose = [*(top.files if train != root else ()), *(file for entries in inside.values() for file in entries.files)]
    if loose:
        left_out["in no folder of a class"] += len(loose)
    if loose := [file for file in loose if _IMAGE_NAME.search(file.name)]:
        what = _count(len(loose), "image in no folder of a class is", "images in no folder of a class are")
        warnings.append(f"{what} left out: {_some(loose, root)}")
    files = []
    for split in inside:
        for label, name in enumerate(class_names):
            paths, inner = files_of[classes[split][name]]
            if not paths and not any(classes[split][name] in link.parents for link in dangling):
                raise _error(f"{_shown(classes[split][name])} holds no images", "Add some, or remove the folder of this class")
            if inner:
                warnings.append(
                    f"{_shown(classes[split][name].relative_to(root))} holds folders, and all images in them count as "
                    f"{name}: {_names(inner)}"
                )
            files += [_File(path, split, label) for path in paths]
    return _Listing(root, class_names, tuple(inside), files, left_out, warnings, dangling)


@dataclass(frozen=True)
class _Entries:
    path: Path
    folders: list[Path]
    files: list[Path]
    missing: list[Path]  # links that lead nowhere and have the name of a folder


def _entries(path, left_out, dangling):
    """The folders and files in a folder, without hidden ones and clutter, sorted. What is left out is counted."""
    folders, files, missing = [], [], []
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
            dangling.append(entry)
            if not re.search(r"\.[A-Za-z]\w{0,4}$", entry.name):
                missing.append(entry)
        else:
            left_out["not a file"] += 1  # a socket, say; to open it could wait for ever
    return _Entries(path, folders, files, missing)


def _number_of_files(path):
    if path.is_dir() and not path.is_symlink():
        return sum(len(files) for _, _, files in os.walk(path))
    return 1


def _below(folder, left_out, dangling, around=()):
    """The files in a folder of a class and in the folders within it, and the latter."""
    around = (*around, os.path.realpath(folder))
    entries = _entries(folder, left_out, dangling)
    files, inner = list(entries.files), list(entries.folders)
    for path in entries.folders:
        if os.path.realpath(path) in around:
            raise _error(f"{_shown(path)} is a link to a folder that it lies in", "Remove the link")
        files += _below(path, left_out, dangling, around)[0]
    return files, inner


def _split_folders(root, folders):
    """The folders of the splits: `{split: folder}`.

    A class may be called test: its folder holds images, and that of a split holds folders. Beside a folder of training images,
    it is a split in any case.
    """
    called = {split: [path for path in folders if _split_called(path.name) == split] for split in SPLIT_FOLDERS}
    holding = {path for paths in called.values() for path in paths if any(map(_is_class_folder, _visible(path)))}
    has_train = any(path in holding for path in called["train"])
    found = {}
    for split, paths in called.items():
        paths = [path for path in paths if path in holding or (has_train and split != "train")]
        if len(paths) > 1:
            raise _error(
                f"{_shown(root)} must have one folder for {split}. Found: {_names(paths)}",
                "Merge them, or move all but one away",
            )
        if paths:
            found[split] = paths[0]
    return found


def _split_called(name):
    """The split that a folder of this name holds, by its name alone, or `None`."""
    short = _SPLIT_ENDING.sub("", name.lower())
    return next((split for split, names in SPLIT_FOLDERS.items() if short in names), None)


def _is_class_folder(path):
    return path.is_dir() and not file_types.is_clutter(path.name)


def _visible(path):
    return [entry for entry in path.iterdir() if not file_types.is_hidden(entry.name)]


def _by_class_name(parent, folders):
    """`{class name: folder}`; a name is in Unicode's form NFC, as macOS takes names apart and others do not."""
    found = {}
    for path in folders:
        try:
            path.name.encode("utf-8")
        except UnicodeEncodeError:
            raise _error(
                f"the name of a class's folder is not UTF-8: {_shown(path)}",
                "Rename it; for many, convmv -r -f cp1252 -t utf8 --notest DIR renames all that lie in DIR",
            ) from None
        if any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in path.name):
            raise _error(f"the name of a class has a line break or a control character: {path.name!r}", "Rename its folder")
        name = unicodedata.normalize("NFC", path.name)
        if name in found:
            raise _error(
                f"{_shown(parent)} has two folders of the same name, which Unicode spells in two ways: {name}",
                "Move the images of one into the other",
            )
        found[name] = path
    return found


def _require_linked(missing):
    """Raises if a link in place of a folder leads nowhere: the class or split would be missing."""
    if missing:
        lines = [f"{_shown(path)} is a link to {_shown(os.readlink(path))}, which is missing" for path in missing]
        raise DataError(
            lines[0] if len(lines) == 1 else f"{len(lines)} links in {_shown(missing[0].parent)} lead nowhere",
            argument="data_dir",
            hint="Fetch what it leads to (by git annex get or dvc pull, if one of them made the link), or remove the link",
            details=lines if len(lines) > 1 else [],
        )


def _may_be_image(path):
    return bool(_IMAGE_NAME.search(path.name)) or not path.suffix


def _is_imageless(files):
    """Whether there are files, and none of them is an image, broken or not."""

    def is_image(path):
        try:
            with open(path, "rb") as stream:
                return file_types.is_image(stream.read(_HEAD))
        except OSError:
            return True

    return bool(files) and not any(_IMAGE_NAME.search(path.name) for path in files) and not any(map(is_image, files))


def _leave_out_imageless(root, classes, files_of, dangling, left_out, warnings):
    """Takes folders of other files, such as annotations, out of `classes`, counts their files and adds a warning.

    A folder stays if it has the name of one that holds images, and if it is empty: its images may be missing.

    Args:
        classes: `{split: {name: folder}}`.
        files_of: `{folder: what _below returned}`.

    Returns:
        The names.
    """
    around = {folder for link in dangling for folder in link.parents}
    names = sorted({name for folders in classes.values() for name in folders})
    imageless = []
    for name in names:
        paths = [folders[name] for folders in classes.values() if name in folders]
        if all(path not in around and _is_imageless(files_of[path][0]) for path in paths):
            imageless.append(name)
            for path in paths:
                n = len(files_of[path][0])
                left_out[f"in a folder without images: {_shown(path.relative_to(root))}"] += n
                warnings.append(
                    f"{_shown(path.relative_to(root))} holds no image and is left out: {_count(n, 'file', 'files')}"
                )
            for folders in classes.values():
                folders.pop(name, None)
    return imageless


def _require_outer_classes(root, classes, files_of):
    """Raises if all classes hold the same folders and no images of their own: the folders within are the classes."""
    inner = set()
    for path in classes.values():
        files = [file.relative_to(path).parts for file in files_of[path][0] if _may_be_image(file)]
        if any(len(parts) == 1 for parts in files):
            return
        inner.add(tuple(sorted({unicodedata.normalize("NFC", parts[0]).casefold() for parts in files})))
    if len(inner) == 1 and len(*inner) > 1:
        outer, within = _names([*classes.values()]), ", ".join(map(_shown, *inner))
        raise _error(
            f"{outer} in {_shown(root)} hold no images of their own, but all hold the folders {within}",
            f"If {within} are the classes, merge the folders {outer}, or call them train, validation and test. If {outer} are "
            "the classes, move the images of each up into its folder",
        )


def _require_classes(root, train, classes, loose, imageless=()):
    """Raises unless there are two classes or more. `imageless`: folders that were left out."""
    in_itself = "" if train == root else f" in its folder {_shown(train.name)}"
    if classes and all(map(_split_called, classes)):
        held = sorted(classes)
        raise _error(
            f"{_shown(root)} has no folder for each class: {', '.join(held)} hold{'s' if len(held) == 1 else ''} none",
            "Lay the images out as DIR/train/cat/1.jpg and DIR/train/dog/2.jpg, with a folder for each class",
        )
    if len(classes) > 1:
        return
    loose = sum(bool(_IMAGE_NAME.search(file.name)) for file in loose)
    flat = f", but {_count(loose, 'image', 'images')} in no folder of a class" if loose else ""
    others = f"; without an image: {', '.join(imageless)}" if imageless else ""
    hint = _LAYOUT
    if len(classes) == 1 and train == root:
        [only] = classes.values()
        inner = _entries(only, Counter(), []).folders
        if splits := _split_folders(only, inner):
            hint = f"{_shown(only)} holds {_names([*splits.values()])}: name it with --data-dir {_shown(only)}"
        elif len(inner) > 1:
            hint = f"If {_names(inner)} are the classes, name the folder around them with --data-dir {_shown(only)}. {_LAYOUT}"
    raise _error(
        f"{_shown(root)} needs a folder for each of two classes or more{in_itself}. "
        f"Found: {', '.join(classes) or 'none'}{flat}{others}",
        hint,
    )


def _require_same_classes(root, train, class_names, path, folders, split):
    """Raises unless a split has the classes of the training images."""
    spelled = {name.casefold(): name for name in class_names}
    renamed = {name: spelled[name.casefold()] for name in folders if name.casefold() in spelled and name not in class_names}
    if renamed and not set(renamed.values()) & set(folders):
        raise _error(
            f"{_shown(path)} and {_shown(train)} differ in the case of a class's name: "
            f"{', '.join(f'{name} and {other}' for name, other in renamed.items())}",
            f"Rename in {_shown(path)}: {', '.join(f'{name} to {other}' for name, other in renamed.items())}",
        )
    held_out = f"move {_shown(path.name)} out of {_shown(root)}: about a tenth of the images of each class is then held out"
    if lacking := sorted(set(class_names) - set(folders)):
        raise _error(
            f"{_shown(path)} lacks a folder for {', '.join(lacking)}, which {_shown(train)} has",
            f"Move some images of each missing class from there to a folder of its name in {_shown(path)}, or {held_out}",
        )
    if more := sorted(set(folders) - set(class_names)):
        raise _error(
            f"{_shown(path)} has a folder for {', '.join(more)}, which {_shown(train)} lacks",
            f"Add training images of it, move that folder out of {_shown(path)}, or rename it if its name is misspelled",
        )


# === Reading ===


@dataclass
class _Found:
    """What a file holds.

    Args:
        file: its `_File`.
        digest: SHA-256 of its bytes, in hexadecimal digits.
        pixels: digest of its decoded pixels at their full size.
        cut_off: see `images.Picture`.
        one_colour: whether all pixels are the same.
        broken: why it can't be read, or `None`.
        no_image: whether neither its bytes nor its name are an image's.
    """

    file: _File
    digest: str = ""
    pixels: bytes = b""
    cut_off: bool = False
    one_colour: bool = False
    broken: str | None = None
    no_image: bool = False

    @property
    def usable(self):
        return self.broken is None and not self.no_image


def _read_all(files, pixels, image_size):
    """Reads all files. Each image goes to its place in `pixels`. -> a `_Found` for each"""
    tf = packages.require("tensorflow")
    room = images.Room()

    def read(place):
        with room.place() as reserve:
            contents, picture = _read(files[place], reserve)
            if picture is not None:
                with tf.device("CPU:0"):
                    pixels[place] = images.stretch(picture.pixels, image_size).numpy()
        return contents

    # Several at a time, each stretched before the next is read: photos would not fit into memory at their size.
    with ThreadPoolExecutor(images.threads()) as pool, _progress(len(files)) as advance:
        contents_of_all = []
        for contents in pool.map(read, range(len(files))):
            contents_of_all.append(contents)
            advance()
    return contents_of_all


def _read(file, reserve=None):
    """Reads a file. -> `_Found`, and a `Picture` or `None`"""
    named = bool(_IMAGE_NAME.search(file.path.name))
    try:
        with open(file.path, "rb") as stream:
            data = stream.read(_HEAD)
            if not named and not file_types.is_image(data):  # perhaps a video of gigabytes
                return _Found(file, no_image=True), None
            data += stream.read()
        picture = images.read(data, reserve)
    except OSError as error:
        return _Found(file, broken=error.strerror or str(error)), None
    except ImageError as error:
        return _Found(file, broken=_why(data) or error.summary), None
    return (
        _Found(
            file,
            digest=hashlib.sha256(data).hexdigest(),
            pixels=_pixel_digest(picture.pixels),
            cut_off=picture.cut_off,
            one_colour=_is_of_one_colour(picture.pixels),
        ),
        picture,
    )


def _pixel_digest(pixels):
    """A digest of an image's size and pixels, whatever size it is stretched to.

    A cryptographic one of a whole photo takes as long as to decode it. A checksum of all pixels is five times as fast. Those of
    two images agree once in four billion times, and that matters only if a grid of their rows is the same too.
    """
    checksum = zlib.crc32(np.ascontiguousarray(pixels))
    rows = np.ascontiguousarray(pixels[:: max(1, len(pixels) // _DIGEST_ROWS)])
    return hashlib.blake2b(rows, digest_size=16, key=repr((pixels.shape, checksum)).encode()).digest()


def _is_of_one_colour(pixels):
    """Whether all pixels are the same. In most images a row or a coarse grid tells."""
    return all(bool((part == pixels[0, 0]).all()) for part in (pixels[0], pixels[::16, ::16], pixels))


def _why(data):
    """What a file is that is no image, or `None` if it is something else."""
    head = data[:_HEAD].lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return _LFS_POINTER
    if head.startswith((b"<!doctype html", b"<html")):
        return _WEB_PAGE
    return None


@contextmanager
def _progress(n):
    """A bar for a long reading, where someone looks: yields what advances it by a file."""
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None
    if tqdm is None or n < _LONG_READING:
        yield lambda: None
        return
    with tqdm(total=n, desc="reading images", unit=" images", leave=False, disable=None, file=sys.stdout) as bar:
        yield bar.update


# === What is used ===


def _sort_out(listing, found, skip_broken):
    """Counts what is not used, or raises for what is broken."""
    broken = [(path, f"a link to {_shown(os.readlink(path))}, which is missing") for path in listing.dangling]
    broken += [(each.file.path, each.broken) for each in found if each.broken is not None]
    for each in found:
        if each.no_image:
            ending = each.file.path.suffix.lower()
            listing.left_out[f"not an image: {ending if re.fullmatch(r'[.][a-z0-9]{1,8}', ending) else 'other files'}"] += 1
    if broken:
        broken.sort(key=lambda pair: str(pair[0]))
        if not skip_broken:
            raise _broken_error(listing, broken, len(found) + len(listing.dangling))
        listing.left_out[f"{BROKEN}a link that leads nowhere"] += len(listing.dangling)
        for each in found:
            if each.broken is not None:
                kind = each.broken if each.broken in _KINDS_OF_BROKEN else "damaged, or too large"
                listing.left_out[f"{BROKEN}{kind}"] += 1
        names = _some([path for path, _ in broken], listing.root)
        what = _count(len(broken), "file that can't be read is", "files that can't be read are")
        listing.warnings.append(f"{what} left out: {names}")


def _require_images(listing, found):
    """Raises unless each split that has a folder has an image of each class."""
    for split in listing.splits:
        usable = {each.file.label for each in found if each.usable and each.file.split == split}
        if lacking := [name for label, name in enumerate(listing.class_names) if label not in usable]:
            where = "" if len(listing.splits) == 1 else f" to {'train on' if split == 'train' else split}"
            raise _error(
                f"{_shown(listing.root)} has no image that can be read{where} of {', '.join(lacking)}",
                "Add some, or remove the folder of this class",
            )


def _broken_error(listing, broken, n):
    lines = [f"{_shown(path)}: {reason}" for path, reason in broken]
    summary = f"{_count(len(broken), 'file', 'files')} of {n:,} in {_shown(listing.root)} can't be read"
    if len(lines) > _LISTED:
        handle, name = tempfile.mkstemp(prefix="cvt-keras-broken-files-", suffix=".txt")
        with open(handle, "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
        summary += f"; all are listed in {name}"
    ways = ["Mend or remove them", _SKIP]
    if any(reason == os.strerror(errno.EACCES) for _, reason in broken):
        ways.insert(0, "Ask for the right to read what is denied")
    if any("git-lfs" in reason for _, reason in broken):
        ways.insert(0, "Fetch what is missing with git lfs pull")
    if listing.dangling:
        ways.insert(0, "Fetch what the links lead to (by git annex get or dvc pull, if one of them made them)")
    return DataError(
        summary,
        argument="data_dir",
        hint=", ".join([ways[0], *(way[0].lower() + way[1:] for way in ways[1:])]),
        details=lines[:_LISTED],
    )


def _source(listing, found, pixels, record=None):
    """Decides which image goes where. `pixels` is put in that order, in place. -> `Source`"""
    sides = _sides(listing, found, record)
    held_out = [split for split in ("test", "validation") if split not in listing.splits]
    places = {split: [place for place, side in enumerate(sides) if side == split] for split in SPLITS}
    _leave_out_seen(listing, found, places)
    for chosen in places.values():
        # An order that mixes the classes, in which a new image moves no other against the rest.
        chosen.sort(key=lambda place: (found[place].digest, found[place].file.label))
    _warn(listing, found, places)

    order = [place for split in SPLITS for place in places[split]]
    used = set(order)
    _rearrange(pixels, [*order, *(place for place in range(len(pixels)) if place not in used)])
    splits, start = {}, 0
    for split, chosen in places.items():
        labels = np.array([found[place].file.label for place in chosen], "int64")
        digests = tuple(found[place].digest for place in chosen)
        decoded = tuple(found[place].pixels.hex() for place in chosen)
        splits[split] = Split(pixels[start : start + len(chosen)], labels, digests, decoded)
        start += len(chosen)
    # A record may leave nothing to train on, and so nothing to normalise by.
    mean, std = images.mean_and_std(splits["train"].images) if len(splits["train"]) else ((0.0,) * 3, (1.0,) * 3)
    return Source(
        name="folder",
        **splits,
        class_names=listing.class_names,
        mean=mean,
        std=std,
        note="tested on about a tenth of the images, held out" if "test" in held_out else "",
        warnings=tuple(listing.warnings),
        left_out={reason: n for reason, n in sorted(listing.left_out.items()) if n},
        split_folders=listing.splits,
    )


def _sides(listing, found, record=None):
    """The split of each file, or `None` if it is no image."""
    held_out = [split for split in ("test", "validation") if split not in listing.splits]
    sides = [each.file.split if each.usable else None for each in found]
    if record is not None:
        known = [side and record.split_of(each.digest, each.pixels.hex()) for each, side in zip(found, sides)]
        return [split if split in SPLITS else side for split, side in zip(known, sides)]
    if not held_out:
        return sides
    classes = {name: [] for name in listing.class_names}
    for each, side in zip(found, sides):
        if side == "train":
            classes[listing.class_names[each.file.label]].append(each.digest)
    chosen = hold_out(classes, held_out)
    return [chosen[each.digest] if side == "train" else side for each, side in zip(found, sides)]


def _leave_out_seen(listing, found, places):
    """Takes out of `places` what has the pixels of an image of a split before it, in the order train, validation, test.

    Raises:
        DataError: if that leaves no image of a split.
    """
    seen = {}  # the digest of an image's pixels -> "training" or "validation"
    for split, what in zip(SPLITS, ("training", "validation", "test")):
        copies = [place for place in places[split] if found[place].pixels in seen]
        if copies and len(copies) == len(places[split]):
            raise _error(
                f"all {_count(len(copies), f'{what} image', f'{what} images')} of {_shown(listing.root)} have the same pixels "
                f"as a {' or '.join(dict.fromkeys(seen.values()))} image",
                f"Give the {what} split images of its own, or move its folder away: some are then held out"
                if split in listing.splits
                else "Remove the copies, or add other images",
            )
        for other in ("training", "validation"):
            paths = [found[place].file.path for place in copies if seen[found[place].pixels] == other]
            if paths:
                listing.left_out[f"the same pixels as a {other} image"] += len(paths)
                listing.warnings.append(
                    f"{_count(len(paths), f'{what} image has', f'{what} images have')} the same pixels as a {other} image and "
                    f"{'is' if len(paths) == 1 else 'are'} left out: {_some(paths, listing.root)}"
                )
        places[split] = [place for place in places[split] if found[place].pixels not in seen]
        seen |= {found[place].pixels: what for place in places[split]}
    labels = {found[place].file.label for place in places["test"]}
    if lacking := [name for label, name in enumerate(listing.class_names) if label not in labels]:
        listing.warnings.append(f"no test image is left of {', '.join(lacking)}")


def _warn(listing, found, places):
    """Adds warnings of what is odd about the images that are used."""
    used = [found[place] for chosen in places.values() for place in chosen]

    def add(chosen, one, many):
        if chosen:
            paths = sorted(each.file.path for each in chosen)
            listing.warnings.append(f"{_count(len(paths), one, many)}: {_some(paths, listing.root)}")

    add(
        [each for each in used if each.cut_off],
        "image lacks its last bytes, and is read as far as it goes",
        "images lack their last bytes, and are read as far as they go",
    )
    add([each for each in used if each.one_colour], "image is of one colour", "images are of one colour")
    labels = {}
    for each in used:
        labels.setdefault(each.digest, set()).add(each.file.label)
    add(
        [each for each in used if len(labels[each.digest]) > 1],
        "file is also in another class",
        "files are the same in two classes or more",
    )


def _rearrange(pixels, order):
    """Puts the rows of an array in another order, in place: a copy would take the memory twice."""
    done = np.zeros(len(order), bool)
    for start in range(len(order)):
        if done[start] or order[start] == start:
            continue
        first, place = pixels[start].copy(), start
        while order[place] != start:
            pixels[place] = pixels[order[place]]
            done[place] = True
            place = order[place]
        pixels[place] = first
        done[place] = True


# === Words ===


def _shown(path):
    """A path as text: the bytes of a name that is not UTF-8 become escapes, which can be printed and written."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _names(paths, most=5):
    names = [_shown(path.name) for path in paths]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _some(paths, root):
    """The first paths below `root`, and how many more there are."""
    names = [_shown(path.relative_to(root)) for path in paths[:_NAMED]]
    return ", ".join(names) + (f" and {len(paths) - _NAMED:,} more" if len(paths) > _NAMED else "")


def _count(n, one, many):
    return f"{n:,} {one if n == 1 else many}"


def _error(summary, hint):
    return DataError(summary, argument="data_dir", hint=hint)
