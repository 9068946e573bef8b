"""A folder of images, with a folder for each class."""

import errno
import hashlib
import os
import re
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cvt_keras.data import file_types, images, packages
from cvt_keras.data.cache import Digests, each
from cvt_keras.data.listing import (
    HEAD,
    IMAGE_NAME,
    RESTORE,
    File,
    as_text,
    broken_link_text,
    counted,
    data_error,
    first_few,
    list_files,
)
from cvt_keras.data.pixels import mean_and_std
from cvt_keras.data.split import SPLITS, Source, Split, hold_out
from cvt_keras.errors import ArgumentError, DataError, ImageError

_ADJECTIVES = {"train": "training", "validation": "validation", "test": "test"}
_MAX_FILES_IN_ERROR = 10  # an error with more broken files lists all of them in a text file
_MIN_DIGEST_ROWS = 64  # rows of an image that go into the digest of its pixels, if it has as many
_PASS_FOLDER = "Use --data-dir DIR, with one folder of images per class"
BROKEN = "broken: "  # prefix of a key of `Source.left_out`
_LFS_POINTER, _WEB_PAGE = "a Git LFS pointer, not the image itself", "a web page (HTML), not an image"
_DENIED = os.strerror(errno.EACCES)
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
        raise data_error(f"`data_dir` {reason}. Received: data_dir={data_dir}", hint)
    if cache.root is not None and root.resolve() in (cache.root.resolve(), *cache.root.resolve().parents):
        raise DataError(
            f"`cache_dir` must not be in the folder of images. Received: cache_dir={cache.root}, data_dir={data_dir}",
            argument="cache_dir",
            hint="Choose another folder with --cache-dir",
        )
    listing = list_files(root)
    contents, kept = _read_all(listing, preprocessing, cache)
    _require_readable(listing, contents, skip_broken)
    if record is None:
        _require_images(listing, contents)
    return _source(listing, contents, kept, record)


# === Reading ===


@dataclass
class _Content:
    """The content of a file.

    Args:
        file: its `File`.
        digest: SHA-256 of its bytes, in hexadecimal digits.
        pixel_digest: digest of its decoded pixels at full size, in hexadecimal digits.
        cut_off: see `images.Picture`.
        one_colour: whether all pixels are the same.
        broken: why it can't be read, or `None`.
        not_an_image: whether neither its bytes nor its name say that it is an image.
    """

    file: File
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
            print(f"decoded {counted(len(added), 'new image', 'new images')}; the others are in {store.folder}", flush=True)
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
    has_image_name = bool(IMAGE_NAME.search(file.path.name))
    try:
        with open(file.path, "rb") as stream:
            data = stream.read(HEAD)
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
            pixel_digest=pixel_digest(picture.pixels),
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
        raise DataError(f"{as_text(path)} can't be read any more: {error.strerror or error}", argument="data_dir") from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise DataError(
            f"{as_text(path)} has changed since this command began",
            argument="data_dir",
            hint="Start the command again. With --cache disk, images are read only once",
        )
    return images.shrink(images.decode(data, reserve), preprocessing).numpy()


def pixel_digest(pixels):
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
    head = data[:HEAD].lstrip().lower()
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
    broken = [(path, broken_link_text(path)) for path in listing.broken_links]
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
    what = counted(len(broken), "file that can't be read is", "files that can't be read are")
    listing.warnings.append(f"{what} left out: {first_few([path for path, _ in broken], listing.root)}")


def _broken_error(listing, broken, n):
    """The error for broken files.

    Args:
        listing: a `Listing`.
        broken: pairs of a path and the reason.
        n: the number of all files.
    """
    lines = [f"{as_text(path)}: {reason}" for path, reason in broken]
    summary = f"{len(broken):,} of {counted(n, 'file', 'files')} in {as_text(listing.root)} can't be read"
    if len(lines) > _MAX_FILES_IN_ERROR:
        handle, name = tempfile.mkstemp(prefix="cvt-keras-broken-files-", suffix=".txt")
        with open(handle, "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
        summary += f"; all are listed in {name}"
    reasons = {reason for _, reason in broken}
    remedies = []
    if listing.broken_links:
        remedies.append(RESTORE)
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
            raise data_error(
                f"{as_text(listing.root)} has no readable {kind}images of {', '.join(lacking)}",
                "Add some, or remove the folder of this class",
            )


def _source(listing, contents, kept, record=None):
    """Assigns the images to splits. -> `Source`

    Args:
        listing: a `Listing`.
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
        listing: a `Listing`. The images are counted, and warnings added.
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
            raise data_error(
                f"every {kind} image in {as_text(listing.root)} has the same pixels as a "
                f"{' or '.join(dict.fromkeys(earlier.values()))} image. Number of {kind} images: {len(copies):,}",
                f"Put other images into the folder of the {kind} images. Or move it out of {as_text(listing.root)}: some "
                "training images are then held out instead"
                if split in listing.splits
                else "Remove the copies, or add other images",
            )
        for other in ("training", "validation"):
            paths = [contents[i].file.path for i in copies if earlier[contents[i].pixel_digest] == other]
            if paths:
                listing.left_out[f"the same pixels as a {other} image"] += len(paths)
                listing.warnings.append(
                    f"{counted(len(paths), f'{kind} image has', f'{kind} images have')} the same pixels as a {other} image and "
                    f"{'is' if len(paths) == 1 else 'are'} left out: {first_few(paths, listing.root)}"
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
            listing.warnings.append(f"{counted(len(paths), one, many)}: {first_few(paths, listing.root)}")

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
