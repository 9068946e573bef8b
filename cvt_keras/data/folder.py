"""A folder of images, with a folder for each class."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from cvt_keras.data import failures, images, packages
from cvt_keras.data.split import Source, Split, fixed_order
from cvt_keras.errors import ArgumentError, DataError

SPLIT_FOLDERS = {"test": ("test",), "validation": ("validation", "valid", "val")}
_EXPECTED = "Name the folder that holds a folder of images for each class, with --data-dir"


def load(data_dir, image_size=32):
    """Loads images from a folder for each class: `data_dir/CLASS/*`, or `data_dir/train/CLASS/*`.

    Beside them, `test` and `validation` (or `valid` or `val`) may hold the same classes. If one is missing, a tenth of each
    class's training images is held out for it: always the same ones whatever a run's seed, so that runs can be compared.

    Args:
        data_dir: the folder.
        image_size: side of the square, in pixels, that the images are stretched to.

    Returns:
        A `Source`.

    Raises:
        ArgumentError: if `data_dir` is `None`.
        DataError: if a folder or file is missing or broken, or a class has too few images.
    """
    if data_dir is None:
        raise ArgumentError("the data set `folder` needs `data_dir`. Received: None", argument="data_dir", hint=_EXPECTED)
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise DataError(f"`data_dir` is not a folder. Received: data_dir={data_dir}", argument="data_dir", hint=_EXPECTED)
    class_names, files = _list(root)
    held_out = [split for split in SPLIT_FOLDERS if not files[split]]
    _hold_out(files, held_out)
    splits = {split: _read(classes, image_size) for split, classes in files.items()}
    mean, std = images.mean_and_std(splits["train"].images)
    return Source(
        name="folder",
        **splits,
        class_names=class_names,
        mean=mean,
        std=std,
        note="tested on a tenth of the images, held out" if "test" in held_out else "",
    )


def _list(root):
    """Lists the images.

    Returns:
        The class names, and `{split: {class name: paths}}`; a split without a folder is empty.
    """
    nested = bool(_folders(root / "train"))
    train = root / "train" if nested else root
    splits = _split_folders(root, nested)
    class_names = tuple(path.name for path in _folders(train) if path not in splits.values())
    if len(class_names) < 2 or set(class_names) <= {"train", *sum(SPLIT_FOLDERS.values(), ())}:
        raise _error(
            f"{root} needs a folder for each of two classes or more, in itself or in its folder train. "
            f"Found: {', '.join(class_names) or 'none'}",
            _EXPECTED,
        )
    if nested and (odd := [path.name for path in _folders(root) if path not in (train, *splits.values())]):
        raise _error(
            f"{root} has a folder train and others that are not a split: {', '.join(odd)}", "Move them into train, or away"
        )
    files = {"train": {name: _class_files(train / name) for name in class_names}, "test": {}, "validation": {}}
    for split, path in splits.items():
        files[split] = {path.name: _class_files(path) for path in _folders(path)}
        if odd := sorted(set(files[split]) ^ set(class_names)):
            raise _error(
                f"{path} and {train} must hold the same class folders. Only one has: {', '.join(odd)}",
                "Give both the same folders",
            )
    return class_names, files


def _hold_out(files, splits):
    """Moves a tenth of each class's training images to each of `splits`. `files`, as `_list` returns it, is changed."""
    for name, paths in files["train"].items():
        if len(paths) <= len(splits):
            raise _error(
                f"{paths[0].parent} has too few images to hold out one each for {' and '.join(splits)}: {len(paths)}",
                "Add some, or remove the folder",
            )
        share = max(1, len(paths) // 10)
        paths = [paths[place] for place in fixed_order(len(paths))]
        for split in splits:
            files[split][name], paths = paths[:share], paths[share:]
        files["train"][name] = paths


def _split_folders(root, nested):
    """The folders of `root` that hold the other splits: `{split: folder}`.

    If classes lie beside them, a class may be called test: its folder holds images, and that of the split holds folders.
    """
    found = {}
    for split, names in SPLIT_FOLDERS.items():
        folders = [root / name for name in names if (root / name).is_dir() and (nested or _folders(root / name))]
        if len(folders) > 1:
            raise _error(
                f"{root} must have one folder for {split}. Found: {', '.join(path.name for path in folders)}",
                "Merge them, or move all but one away",
            )
        if folders:
            found[split] = folders[0]
    return found


def _class_files(folder):
    """The image files in a class's folder, sorted."""
    if inner := _folders(folder):
        raise _error(f"{inner[0]} is a folder within a class", f"Move its images into {folder}, or away")
    files = [file for file in _visible(folder) if file.is_file()]
    for file in files:
        if file.suffix.lower() in images.OTHER_SUFFIXES:
            raise _error(f"{file} is none of {' '.join(images.SUFFIXES)}", "Convert it to .png, or remove it")
    chosen = [file for file in files if file.suffix.lower() in images.SUFFIXES]
    if not chosen:
        raise _error(f"{folder} holds no files of {' '.join(images.SUFFIXES)}", "Add some, or remove the folder")
    return chosen


def _folders(path):
    return [folder for folder in _visible(path) if folder.is_dir()]


def _visible(path):
    return sorted(entry for entry in path.iterdir() if not entry.name.startswith(".")) if path.is_dir() else []


def _read(classes, image_size):
    """Reads the images of a split.

    Args:
        classes: `{class name: paths}`.
        image_size: side of the square that they are stretched to.

    Returns:
        A `Split`, in a fixed order that mixes the classes.
    """
    tf = packages.require("tensorflow")
    labelled = [(path, label) for label, paths in enumerate(classes.values()) for path in paths]

    def read(path):
        try:
            with tf.device("CPU:0"):
                return images.stretch(images.decode(path.read_bytes()), image_size).numpy()
        except (OSError, ValueError, tf.errors.OpError) as error:
            if isinstance(error, PermissionError) or failures.is_out_of_memory(error):
                raise  # the image is sound
            raise _error(f"{path} can't be decoded: {failures.reason(error)}", "Mend it, or remove it") from error

    paths, labels = zip(*(labelled[place] for place in fixed_order(len(labelled))))
    pixels = np.empty((len(labels), image_size, image_size, 3), "uint8")
    # Several at a time, each stretched before the next is read: photos would not fit into memory at their size.
    with ThreadPoolExecutor() as pool:
        for place, image in enumerate(pool.map(read, paths)):
            pixels[place] = image
    return Split(pixels, np.array(labels, "int64"))


def _error(summary, hint):
    return DataError(summary, argument="data_dir", hint=hint)
