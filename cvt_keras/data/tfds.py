"""Data sets of tensorflow-datasets (TFDS): CIFAR-10, CIFAR-100, and any other with an image and a class."""

import dataclasses
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from cvt_keras.data import failures, images, packages, probe
from cvt_keras.data.split import Source, Split, fixed_order
from cvt_keras.errors import DataError, UnavailableError

CATALOG = "https://www.tensorflow.org/datasets/catalog"
# Of the 50,000 training images, their original pixels in 0..1.
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
# Written out, as a prepared folder may lack the file that TFDS keeps the names in.
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
VALIDATION_IMAGES = 5_000  # held out of the training images, at most
# Sets of characters: a mirrored letter or digit is another one, or none.
CHARACTERS = {"binary_alpha_digits", "cmaterdb", "emnist", "kmnist", "mnist", "mnist_corrupted", "omniglot", "svhn_cropped"}

_READ_BATCH = 256  # images; reading one by one takes four times as long


def cifar10(data_dir=None, image_size=32):
    """Loads CIFAR-10, which TFDS downloads (162 MB) if it is not on disk.

    The last 5,000 training images are the validation split. TFDS stores the images shuffled, so they are a fair sample.

    Args:
        data_dir: TFDS' folder; defaults to `TFDS_DATA_DIR`, or `~/tensorflow_datasets`.
        image_size: side of the square, in pixels, that larger images are stretched to; see `sources.load`.

    Returns:
        A `Source`.

    Raises:
        UnavailableError: if the data set is not on disk and can't be downloaded.
        DataError: if it can't be read.
    """
    source = _cifar("cifar10", "CIFAR-10", data_dir, image_size)
    return dataclasses.replace(source, class_names=CIFAR10_CLASSES, mean=CIFAR10_MEAN, std=CIFAR10_STD)


def cifar100(data_dir=None, image_size=32):
    """Loads CIFAR-100 with its 100 fine labels; otherwise like `cifar10`.

    If a prepared folder lacks the file of the class names, they are numbers.
    """
    return _cifar("cifar100", "CIFAR-100", data_dir, image_size)


def _cifar(name, title, data_dir, image_size):
    builder, keys = _builder(name, title, data_dir)
    _prepare(builder, title)
    train, validation = _cut(_read(builder, title, "train", keys, image_size), VALIDATION_IMAGES, title)
    test = _read(builder, title, "test", keys, image_size)
    return _source(builder, keys, name, train, validation, test, note=_copy_note(builder, keys))


def load(name, data_dir=None, image_size=32):
    """Loads any image classification set of TFDS, which downloads it if it is not on disk.

    The test split is `test`, else `validation`, else a tenth of `train`; another tenth of `train`, at most 5,000 images, is the
    validation split. Some sets are stored class by class, so what is held out comes from a fixed shuffle.

    Args:
        name: as TFDS spells it: `imagenette/160px-v2`, `mnist:3.0.1`.
        data_dir, image_size: see `cifar10`.

    Returns:
        A `Source`.

    Raises:
        UnavailableError: if the data set is not on disk and can't be downloaded.
        DataError: if there is no such set, it has no image and label, or it can't be read.
    """
    builder, keys = _builder(name, name, data_dir)
    _prepare(builder, name)
    splits = builder.info.splits
    if "train" not in splits:
        raise DataError(
            f"{name} has no split to train on: it has {', '.join(splits)}",
            argument="dataset",
            hint="Choose another --dataset",
        )
    train = _read(builder, name, "train", keys, image_size, shuffle=True)
    tenth = max(1, len(train) // 10)
    test_split = next((split for split in ("test", "validation") if split in splits), None)
    if test_split:
        test = _read(builder, name, test_split, keys, image_size, shuffle=True)
        note = "" if test_split == "test" else "tested on its validation split, as it has no test split"
        if builder.name in ("cifar10", "cifar100"):
            note = _copy_note(builder, keys)
    else:
        train, test = _cut(train, tenth, name)
        note = "tested on a tenth of the training images, held out, as it has no test split"
    train, validation = _cut(train, min(VALIDATION_IMAGES, tenth), name)
    mirror = builder.name not in CHARACTERS
    return _source(builder, keys, f"tfds:{name}", train, validation, test, note=note, mirror=mirror)


def _source(builder, keys, name, train, validation, test, **fields):
    mean, std = images.mean_and_std(train.images)
    class_names = tuple(builder.info.features[keys[1]].names)
    return Source(name, train, validation, test, class_names, mean, std, **fields)


def _copy_note(builder, keys):
    """What to know about a CIFAR whose pixels are not the original ones, which TFDS packs as PNG."""
    [first] = _encoded(builder, "train[:1]", keys)
    lossy = first[0].numpy().startswith(b"\xff\xd8")
    return "JPEG copy: the pixels went through JPEG, which costs a little accuracy" if lossy else ""


def _builder(name, title, data_dir):
    """Sets up TFDS' builder of a data set of images and labels.

    Args:
        name: as TFDS spells it.
        title: what errors call the data set.
        data_dir: TFDS' folder or `None`.

    Returns:
        The builder, and the names of its two features, image and label.
    """
    tfds = _tfds()
    root = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    if data_dir is not None and not root.is_dir():
        raise DataError(
            f"`data_dir` is not a folder. Received: data_dir={data_dir}",
            argument="data_dir",
            hint=f"Name TFDS' folder with --data-dir, or leave it out to download {title}",
        )
    family = re.split("[/:]", name)[0]
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        features = dict(builder.info.features.items())
    except tfds.core.DatasetNotFoundError as error:
        raise DataError(
            f"tensorflow-datasets knows no {name}, nor is it in {root}",
            argument="dataset",
            hint=f"The names: {CATALOG}/overview",
        ) from error
    except Exception as error:  # TFDS raises dozens of types for what a user sees as one thing
        if broken := _broken_info(root / family):
            raise DataError(
                f"{title} can't be read: {broken} is broken ({failures.reason(error)})",
                argument="data_dir",
                hint=f"Remove {broken.parent} to download it again",
            ) from error
        raise DataError(
            f"{title} can't be set up in {root}: {failures.reason(error)}", argument="dataset", hint=f"See {CATALOG}/{family}"
        ) from error
    for keys in (builder.info.supervised_keys, ("image", "label")):
        kinds = [type(features[key]) for key in keys or () if isinstance(key, str) and key in features]
        # TFDS hides floats in the bytes of an image.
        if kinds == [tfds.features.Image, tfds.features.ClassLabel] and features[keys[0]].np_dtype != np.float32:
            return builder, keys
    raise DataError(
        f"{title} has no images with a class each, but {', '.join(features)}",
        argument="dataset",
        hint="Choose another --dataset",
    )


def _broken_info(folder):
    """The first broken dataset_info.json under `folder`, or `None`: TFDS does not say which file it stumbled on."""
    for path in sorted(folder.rglob("dataset_info.json")):
        try:
            json.loads(path.read_bytes())["version"]
        except (ValueError, LookupError, TypeError):
            return path
    return None


def _prepare(builder, title):
    """Downloads a data set that is not on disk.

    Raises:
        UnavailableError: if that fails.
        DataError: if there is a broken copy.
    """
    folder = Path(builder.data_path)
    if folder.exists():
        if not builder.is_prepared():
            raise DataError(
                f"{title} can't be read: {folder} has no dataset_info.json",
                argument="data_dir",
                hint=f"Remove {folder} to download it again",
            )
        return
    try:
        if not builder.MANUAL_DOWNLOAD_INSTRUCTIONS:  # else it is the user who has to download
            probe.require_reachable(builder.url_infos or [])
        builder.download_and_prepare()
    except Exception as error:  # TFDS raises dozens of types for what a user sees as one thing
        root = Path(builder.data_dir_root)
        raise UnavailableError(
            f"{title} is not in {root} (as {folder.relative_to(root)}/dataset_info.json and its records), and the download "
            f"failed: {failures.reason(error)}",
            argument="data_dir",
            hint=f"Name the folder that holds {builder.name}/ with --data-dir or TFDS_DATA_DIR, or connect to the network",
        ) from error


def _read(builder, title, split, keys, image_size, shuffle=False):
    """Reads a split.

    Args:
        builder: of a data set that is on disk.
        title: what errors call the data set.
        split: the name of the split.
        keys: the names of the features image and label.
        image_size: side of the square that larger images are stretched to.
        shuffle: whether to bring the images into a fixed order that is not the one on disk.

    Returns:
        A `Split`.
    """
    tf = packages.require("tensorflow")
    height, width = builder.info.features[keys[0]].shape[:2]
    small = None not in (height, width) and max(height, width) <= image_size
    shape = (height, width, 3) if small else (image_size, image_size, 3)

    room = images.Room()

    def decode(data):
        if small:
            return images.decode(data)
        with room.place() as reserve, tf.device("CPU:0"):
            return images.stretch(images.decode(data, reserve), image_size).numpy()

    try:
        batches = _encoded(builder, split, keys).batch(_READ_BATCH).prefetch(1)
        n = builder.info.splits[split].num_examples
        # Each image goes straight to its place: to shuffle afterwards would take twice the memory.
        places = fixed_order(n) if shuffle else np.arange(n)
        pixels, labels = np.empty((n, *shape), "uint8"), np.empty(n, "int64")
        start = 0
        with ThreadPoolExecutor(images.threads()) as pool:
            for files, batch_labels in batches.as_numpy_iterator():
                chosen = places[start : start + len(files)]
                labels[chosen] = batch_labels
                for place, image in zip(chosen, pool.map(decode, files)):
                    pixels[place] = image
                start += len(files)
    except Exception as error:
        if failures.is_out_of_memory(error):
            raise  # the copy is sound
        denied = isinstance(error, (PermissionError, tf.errors.PermissionDeniedError))
        raise DataError(
            f"{title} in {builder.data_dir_root} can't be read: {failures.reason(error)}",
            argument="data_dir",
            hint="Ask for the right to read it" if denied else f"Remove {builder.data_path} to download it again",
        ) from error
    if labels.min(initial=0) < 0:
        raise DataError(
            f"{title} does not publish the labels of its split {split}", argument="dataset", hint="Choose another --dataset"
        )
    return Split(pixels, labels)


def _encoded(builder, split, keys):
    """A `tf.data.Dataset` of a split: the bytes of an image file, and a label."""
    tfds = _tfds()
    examples = builder.as_dataset(
        split=split,
        decoders={keys[0]: tfds.decode.SkipDecoding()},
        read_config=tfds.ReadConfig(try_autocache=False),  # each is read once
    )
    return examples.map(lambda example: tuple(example[key] for key in keys))


def _cut(split, n, title):
    """Cuts the last `n` images off, and returns the rest and these."""
    kept = len(split) - n
    if kept < 1:
        raise DataError(
            f"{title} has too few training images to hold out {n}: {len(split)}",
            argument="dataset",
            hint="Choose another --dataset",
        )
    return split.limit(kept), Split(split.images[kept:], split.labels[kept:])


def _tfds():
    return packages.require("tensorflow_datasets", "tensorflow-datasets importlib_resources")
