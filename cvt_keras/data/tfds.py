"""Data sets of tensorflow-datasets (TFDS): CIFAR-10, CIFAR-100, and any other for image classification."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np

from cvt_keras.data import failures, images, packages, probe
from cvt_keras.data.cache import each
from cvt_keras.data.pixels import mean_and_std
from cvt_keras.data.split import Source, Split, fixed_order
from cvt_keras.errors import ArgumentError, DataError, UnavailableError

CATALOG = "https://www.tensorflow.org/datasets/catalog"
# Of the 50,000 original training images, with pixels in 0..1.
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
# A folder that TFDS prepared may lack its file of class names.
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
VALIDATION_IMAGES = 5_000  # maximum held out of the training images
# Data sets of characters: mirroring turns a letter or digit into another one, or none.
CHARACTERS = {"binary_alpha_digits", "cmaterdb", "emnist", "kmnist", "mnist", "mnist_corrupted", "omniglot", "svhn_cropped"}

_READ_BATCH = 256  # images; reading them one by one takes four times as long


def cifar10(data_dir, preprocessing, cache):
    """Loads CIFAR-10, which TFDS downloads (162 MB) if it is not on disk.

    The last 5,000 training images become the validation split. They are a fair sample, as TFDS stores the images shuffled.

    Args:
        data_dir: TFDS' folder; defaults to `TFDS_DATA_DIR`, or `~/tensorflow_datasets`.
        preprocessing: a `Preprocessing`: how larger images are resized; see `sources.load`.
        cache: a `Cache`: where decoded images are kept.

    Returns:
        A `Source`.

    Raises:
        ArgumentError: if `cache` is off.
        UnavailableError: if the data set is not on disk and can't be downloaded.
        DataError: if it can't be read.
    """
    source = _cifar("cifar10", "CIFAR-10", data_dir, preprocessing, cache)
    return dataclasses.replace(source, class_names=CIFAR10_CLASSES, mean=CIFAR10_MEAN, std=CIFAR10_STD)


def cifar100(data_dir, preprocessing, cache):
    """Loads CIFAR-100 with its 100 fine labels; otherwise like `cifar10`.

    If the prepared folder lacks the file of class names, the classes are named by numbers.
    """
    return _cifar("cifar100", "CIFAR-100", data_dir, preprocessing, cache)


def _cifar(name, title, data_dir, preprocessing, cache):
    _require_order(cache, title)
    builder, keys = _builder(name, title, data_dir)
    _prepare(builder, title)
    train, validation = _cut(_read(builder, title, "train", keys, preprocessing, cache), VALIDATION_IMAGES, title)
    test = _read(builder, title, "test", keys, preprocessing, cache)
    return _source(builder, keys, name, train, validation, test, note=_copy_note(builder, keys))


def load(name, data_dir, preprocessing, cache):
    """Loads any image classification data set of TFDS, which downloads it if it is not on disk.

    The test split is TFDS' `test`, else `validation`, else a tenth of `train`. Another tenth of `train`, at most 5,000 images,
    becomes the validation split. A fixed shuffle chooses the held-out images, as some data sets are stored class by class.

    Args:
        name: TFDS' name, such as `imagenette/160px-v2` or `mnist:3.0.1`.
        data_dir, preprocessing, cache: see `cifar10`.

    Returns:
        A `Source`.

    Raises:
        ArgumentError: if `cache` is off.
        UnavailableError: if the data set is not on disk and can't be downloaded.
        DataError: if TFDS has no such data set, if it is not for image classification, or if it can't be read.
    """
    _require_order(cache, name)
    builder, keys = _builder(name, name, data_dir)
    _prepare(builder, name)
    splits = builder.info.splits
    if "train" not in splits:
        raise DataError(
            f"{name} has no split named train. Its splits: {', '.join(splits)}",
            argument="dataset",
            hint="Choose another --dataset",
        )
    train = _read(builder, name, "train", keys, preprocessing, cache, shuffle=True)
    tenth = max(1, len(train) // 10)
    test_split = next((split for split in ("test", "validation") if split in splits), None)
    if test_split:
        test = _read(builder, name, test_split, keys, preprocessing, cache, shuffle=True)
        note = "" if test_split == "test" else "tested on its validation split, as it has no test split"
        if builder.name in ("cifar10", "cifar100"):
            note = _copy_note(builder, keys)
    else:
        train, test = _cut(train, tenth, name)
        note = "tested on a tenth of the training images, held out, as it has no test split"
    train, validation = _cut(train, min(VALIDATION_IMAGES, tenth), name)
    mirror = builder.name not in CHARACTERS
    return _source(builder, keys, f"tfds:{name}", train, validation, test, note=note, mirror=mirror)


def _require_order(cache, title):
    """Raises if images would have to be read in any order. Called before a download."""
    if cache.kind == "off":
        raise ArgumentError(
            f"`cache` can't be off for {title}: TFDS reads its images in their order on disk only. Received: cache=off",
            argument="cache",
            hint="Use --cache disk or --cache memory",
        )


def _source(builder, keys, name, train, validation, test, **fields):
    mean, std = mean_and_std(train.images)
    class_names = tuple(builder.info.features[keys[1]].names)
    return Source(name, train, validation, test, class_names, mean, std, **fields)


def _copy_note(builder, keys):
    """The note of a CIFAR whose images were converted to JPEG; TFDS stores the original pixels as PNG."""
    [first] = _encoded(builder, "train[:1]", keys)
    lossy = first[0].numpy().startswith(b"\xff\xd8")
    return "JPEG copy: the pixels went through JPEG, which costs a little accuracy" if lossy else ""


def _builder(name, title, data_dir):
    """Returns TFDS' builder of a data set, and the names of its features for the image and the label.

    Args:
        name: TFDS' name.
        title: name for errors.
        data_dir: TFDS' folder or `None`.
    """
    tfds = _tfds()
    root = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    if data_dir is not None and not root.is_dir():
        raise DataError(
            f"`data_dir` {'is not a folder' if root.exists() else 'does not exist'}. Received: data_dir={data_dir}",
            argument="data_dir",
            hint=f"Use --data-dir with the tensorflow-datasets folder, or leave it out to download {title}",
        )
    family = re.split("[/:]", name)[0]
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        features = dict(builder.info.features.items())
    except tfds.core.DatasetNotFoundError as error:
        raise DataError(
            f"unknown data set: {name} is neither in tensorflow-datasets nor in {root}",
            argument="dataset",
            hint=f"For all names, see {CATALOG}/overview",
        ) from error
    except Exception as error:  # TFDS raises dozens of types
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
        # TFDS stores float images as the bytes of PNGs, which would be decoded to wrong pixels.
        if kinds == [tfds.features.Image, tfds.features.ClassLabel] and features[keys[0]].np_dtype != np.float32:
            return builder, keys
    raise DataError(
        f"{title} is not for image classification, which needs an image and one label. Its features: {', '.join(features)}",
        argument="dataset",
        hint="Choose another --dataset",
    )


def _broken_info(folder):
    """The first broken dataset_info.json below `folder`, or `None`. TFDS' own error does not name the file."""
    for path in sorted(folder.rglob("dataset_info.json")):
        try:
            json.loads(path.read_bytes())["version"]
        except (ValueError, LookupError, TypeError):
            return path
    return None


def _prepare(builder, title):
    """Downloads a data set unless it is on disk.

    Raises:
        UnavailableError: if the download fails.
        DataError: if a broken copy is on disk.
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
        if not builder.MANUAL_DOWNLOAD_INSTRUCTIONS:  # otherwise the user has to download the files
            probe.require_reachable(builder.url_infos or [])
        builder.download_and_prepare()
    except Exception as error:  # TFDS raises dozens of types
        root = Path(builder.data_dir_root)
        raise UnavailableError(
            f"{title} is not in {root} (expected: {folder.relative_to(root)}/dataset_info.json and its records), and the "
            f"download failed: {failures.reason(error)}",
            argument="data_dir",
            hint=f"Set --data-dir or TFDS_DATA_DIR to the folder that holds {builder.name}/, or connect to the network",
        ) from error


def _read(builder, title, split, keys, preprocessing, cache, shuffle=False):
    """Reads a split, except for images that are in the cache.

    Args:
        builder: builder of a data set that is on disk.
        title: name for errors.
        split: TFDS' name of the split.
        keys: names of the features for the image and the label.
        preprocessing: a `Preprocessing`: how larger images are resized.
        cache: a `Cache`.
        shuffle: whether to apply `fixed_order` instead of keeping the order on disk.

    Returns:
        A `Split`.
    """
    tf = packages.require("tensorflow")
    height, width = builder.info.features[keys[0]].shape[:2]
    size = preprocessing.image_size
    small = None not in (height, width) and height <= size[0] and width <= size[1]
    room = images.Room()

    def decode(example):
        data, label = example
        if small:
            return images.decode(data), label
        with room.place() as reserve:
            return images.shrink(images.decode(data, reserve), preprocessing).numpy(), label

    n = builder.info.splits[split].num_examples
    resizing = None if small else images.resizing(preprocessing)
    with cache.open(f"{builder.name}-{split}", resizing, _state(builder)) as store:
        first = len(store.index)  # less than n if a command was killed: images are stored in their order on disk
        try:
            # Not the slice [first:] of TFDS, which mixes the shards in another order.
            batches = _encoded(builder, split, keys).skip(first).batch(_READ_BATCH).prefetch(1)
            examples = (example for batch in batches.as_numpy_iterator() for example in zip(*batch)) if first < n else ()
            with store.adding() as add:
                for image, label in each(decode, examples, n - first):
                    add("", image, label=label)
        except Exception as error:
            if failures.is_out_of_memory(error) or isinstance(error, DataError):
                raise  # the copy on disk is intact
            denied = isinstance(error, (PermissionError, tf.errors.PermissionDeniedError))
            raise DataError(
                f"{title} in {builder.data_dir_root} can't be read: {failures.reason(error)}",
                argument="data_dir",
                hint="Ask for read permission" if denied else f"Remove {builder.data_path} to download it again",
            ) from error
        rows = np.argsort(fixed_order(n)) if shuffle else np.arange(n)
        labels = store.index["label"][rows].astype("int64")
        if labels.min(initial=0) < 0:
            raise DataError(
                f"{title} has no labels for its split {split}: they are not public",
                argument="dataset",
                hint="Choose another --dataset",
            )
        return Split(store.images(rows), labels)


def _state(builder):
    """Tells the files of a data set from those of another, and from files that replaced them: a list of JSON values."""
    folder = Path(builder.data_path)
    states = [(path.name, path.stat()) for path in sorted(folder.iterdir())]
    return [str(folder.resolve()), *([name, state.st_size, state.st_mtime_ns] for name, state in states)]


def _encoded(builder, split, keys):
    """A `tf.data.Dataset` of a split, with pairs of an image file's bytes and a label."""
    tfds = _tfds()
    examples = builder.as_dataset(
        split=split,
        decoders={keys[0]: tfds.decode.SkipDecoding()},
        read_config=tfds.ReadConfig(try_autocache=False),  # each image is read once
    )
    return examples.map(lambda example: tuple(example[key] for key in keys))


def _cut(split, n, title):
    """Splits off the last `n` images. Returns the others first."""
    rest = len(split) - n
    if rest < 1:
        raise DataError(
            f"{title} has too few training images to hold out {n}. Found: {len(split)}",
            argument="dataset",
            hint="Choose another --dataset",
        )
    return split.limit(rest), split.take(slice(rest, None))


def _tfds():
    return packages.require("tensorflow_datasets", "tensorflow-datasets importlib_resources")
