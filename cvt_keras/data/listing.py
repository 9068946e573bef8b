"""Lists the files of a folder of images by class and split, without decoding any."""

import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from cvt_keras.data import file_types
from cvt_keras.errors import DataError

# Usual names for the folder of a split, compared in lower case and without `_SPLIT_ENDING`.
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
_SPLIT_ENDING = re.compile(r"[ _-]*(data ?set|set|data|images|split)$")  # training_set, test-images, ValData
# Names of image files, also with an extension that a download or a copy made longer (.jpg.1, .jpg_large, .jpg?w=3). A file with
# another name counts as an image only if its bytes say so. `mimetypes` is not used, because its list differs between machines.
IMAGE_NAME = re.compile(
    r"\.(jpe?g|jpe|jfif|png|apng|gif|bmp|dib|tiff?|webp|avif|hei[cf]|ico|j2k|jp2|jp[fx]|jxl|eps|exr|hdr|p[bgnp]m|pcx|psd|svg|"
    r"tga|xbm|xpm|arw|cr2|cr3|dng|nef|orf|raf|rw2)(\.\d+|_\w*|[^\w.].*)?$",
    re.IGNORECASE | re.DOTALL,
)
_MAX_FILES_IN_WARNING = 3
HEAD = 64  # first bytes of a file, which tell its format
_LAYOUT = "use --data-dir DIR with one folder of images per class, as in DIR/cat/1.jpg and DIR/dog/2.jpg"
RESTORE = "Restore the missing link targets (with git annex get or dvc pull, if one of them made the links)"


def holds_classes(path):
    """Whether a folder, or the folder of a split in it, holds two folders of images or more. Goes by names, reads no file."""
    folders = [entry for entry in Path(path).iterdir() if entry.is_dir()]
    n = sum(any(IMAGE_NAME.search(file.name) for file in islice(folder.iterdir(), 100)) for folder in folders)
    return n > 1 or any(_split_named(folder.name) and holds_classes(folder) for folder in folders)


@dataclass(frozen=True)
class File:
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
class Listing:
    """The files of a data set.

    Args:
        root: the folder.
        class_names: sorted, in Unicode's form NFC.
        splits: "train", and the splits that have a folder of their own.
        files: a `File` for each file in a class folder.
        left_out: reason -> number of files.
        warnings: lines for the user.
        broken_links: links whose target is missing.
    """

    root: Path
    class_names: tuple[str, ...]
    splits: tuple[str, ...]
    files: list[File]
    left_out: Counter
    warnings: list[str]
    broken_links: list[Path]


def list_files(root):
    """Lists the files of each class and split without reading them. -> `Listing`"""
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
        others = {as_text(path.name): path for path in other_folders}
        files_of |= {path: _files_below(path, Counter(), broken_links) for path in other_folders}
        _leave_out_imageless(root, {"": others}, files_of, broken_links, left_out, warnings)
        if others:
            raise data_error(
                f"{as_text(root)} has a folder {as_text(train.name)}, and folders that are not splits: "
                f"{first_names(others.values())}",
                f"Move class folders into {as_text(train.name)}, rename folders of splits to test or validation, and move the "
                f"others out of {as_text(root)}",
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
    if stray := [file for file in stray if IMAGE_NAME.search(file.name)]:
        what = counted(len(stray), "image outside the class folders is", "images outside the class folders are")
        warnings.append(f"{what} left out: {first_few(stray, root)}")
    files = []
    for split, folders in class_folders.items():
        for label, name in enumerate(class_names):
            paths, inner = files_of[folders[name]]
            if not paths and not any(folders[name] in link.parents for link in broken_links):
                raise data_error(f"the class folder {as_text(folders[name])} is empty", "Add images, or remove the folder")
            if inner:
                shown = as_text(folders[name].relative_to(root))
                warnings.append(f"images in folders within {shown} count as {name}: {first_names(inner)}")
            files += [File(path, split, label) for path in paths]
    return Listing(root, class_names, tuple(entries_of), files, left_out, warnings, broken_links)


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
            raise data_error(f"{as_text(path)} is a link to a folder that contains it", "Remove the link")
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
            raise data_error(
                f"{as_text(root)} has more than one folder for the split {split}: {first_names(paths)}",
                f"Merge them into one, or move all but one out of {as_text(root)}",
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
            raise data_error(
                f"the name of a class folder is not valid UTF-8: {as_text(path)}",
                "Rename the folder. To rename everything in DIR: convmv -r -f cp1252 -t utf8 --notest DIR",
            ) from None
        if any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in path.name):
            raise data_error(
                f"the name of a class folder contains a line break or a control character: {path.name!r}", "Rename the folder"
            )
        name = unicodedata.normalize("NFC", path.name)
        if name in by_name:
            raise data_error(
                f"{as_text(parent)} has two folders named {name}, whose names differ only in their Unicode form (NFC and NFD)",
                "Move the images of one into the other, and remove the empty folder",
            )
        by_name[name] = path
    return by_name


def _require_link_targets(links):
    """Raises if there are broken links that may stand for folders: a class or a split would be missing."""
    if links:
        lines = [f"{as_text(path)} is {broken_link_text(path)}" for path in links]
        raise DataError(
            lines[0] if len(lines) == 1 else f"{len(lines)} links in {as_text(links[0].parent)} are broken",
            argument="data_dir",
            hint=f"{RESTORE}, or remove {'the link' if len(lines) == 1 else 'the links'}",
            details=lines if len(lines) > 1 else [],
        )


def broken_link_text(path):
    return f"a broken link: {as_text(os.readlink(path))} does not exist"


def _may_be_image(path):
    return bool(IMAGE_NAME.search(path.name)) or not path.suffix


def _is_imageless(files):
    """Whether there are files, but no images, not even broken ones."""

    def is_image(path):
        try:
            with open(path, "rb") as stream:
                return file_types.is_image(stream.read(HEAD))
        except OSError:
            return True

    return bool(files) and not any(IMAGE_NAME.search(path.name) for path in files) and not any(map(is_image, files))


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
                n, shown = len(files_of[path][0]), as_text(path.relative_to(root))
                left_out[f"in a folder without images: {shown}"] += n
                warnings.append(f"{shown} holds no images and is left out: {counted(n, 'file', 'files')}")
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
        outer, within = first_names([*class_folders.values()]), ", ".join(map(as_text, *inner))
        raise data_error(
            f"it is not clear which folders in {as_text(root)} are the classes: {outer} hold no images directly, but all hold "
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
        raise data_error(
            f"{as_text(root)} has no class folders within {', '.join(sorted(class_folders))}",
            "Use one folder of images per class, as in DIR/train/cat/1.jpg and DIR/train/dog/2.jpg",
        )
    if len(class_folders) > 1:
        return
    summary = f"{'`data_dir`' if train == root else as_text(train)} must hold at least two class folders. Found: "
    summary += ", ".join(class_folders) or "none"
    if n := sum(bool(IMAGE_NAME.search(file.name)) for file in files):
        summary += f", and {counted(n, 'image', 'images')} outside class folders"
    if imageless:
        summary += f", and folders without images: {', '.join(imageless)}"
    summary += f". Received: data_dir={as_text(root)}"
    hint = _LAYOUT[0].upper() + _LAYOUT[1:]
    if len(class_folders) == 1 and train == root:
        [only] = class_folders.values()
        inner = _entries(only, Counter(), []).folders
        if splits := _split_folders(only, inner):
            hint = f"The splits {first_names([*splits.values()])} are in {as_text(only)}: use --data-dir {as_text(only)}"
        elif len(inner) > 1:
            hint = f"If {first_names(inner)} are the classes, use --data-dir {as_text(only)}. Otherwise {_LAYOUT}"
    raise data_error(summary, hint)


def _require_same_classes(root, train, class_names, path, folders):
    """Raises unless `folders`, `{class name: folder}` of the split in `path`, has the classes of the train split."""
    spelled = {name.casefold(): name for name in class_names}
    renamed = {name: spelled[name.casefold()] for name in folders if name.casefold() in spelled and name not in class_names}
    if renamed and not set(renamed.values()) & set(folders):
        raise data_error(
            f"class names in {as_text(path)} and {as_text(train)} differ in upper and lower case: "
            f"{', '.join(f'{name} and {other}' for name, other in renamed.items())}",
            f"In {as_text(path)}, rename {', '.join(f'{name} to {other}' for name, other in renamed.items())}",
        )
    if lacking := sorted(set(class_names) - set(folders)):
        raise data_error(
            f"{as_text(path)} has no folder for {', '.join(lacking)}, unlike {as_text(train)}",
            f"Move some images of each missing class from {as_text(train)} to {as_text(path)}. Or move {as_text(path.name)} "
            f"out of {as_text(root)}: about a tenth of the images of each class is then held out instead",
        )
    if extra := sorted(set(folders) - set(class_names)):
        raise data_error(
            f"{as_text(path)} has a folder for {', '.join(extra)}, unlike {as_text(train)}",
            f"Add training images of each in {as_text(train)}, move its folder out of {as_text(path)}, or correct the name if "
            "it is misspelled",
        )


# === Text for messages ===


def as_text(path):
    """A path as text that can be printed: bytes that are not UTF-8 become escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def first_names(paths, most=5):
    """The names of the first folders, and how many more there are."""
    names = [as_text(path.name) for path in paths]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def first_few(paths, root):
    """The first paths relative to `root`, and how many more there are."""
    names = [as_text(path.relative_to(root)) for path in paths[:_MAX_FILES_IN_WARNING]]
    more = len(paths) - len(names)
    return ", ".join(names) + (f" and {more:,} more" if more else "")


def counted(n, one, many):
    return f"{n:,} {one if n == 1 else many}"


def data_error(summary, hint):
    return DataError(summary, argument="data_dir", hint=hint)
