"""Where labelled images come from."""

import base64
import dataclasses
import http.client
import importlib
import json
import queue
import re
import socket
import textwrap
import threading
import time
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from cvt_keras.data.split import Source, Split
from cvt_keras.errors import DataError, UnavailableError

NAMES = ("auto", "cifar10", "cifar100", "tfds:NAME", "folder", "digits")
# Of the 50,000 training images, their original pixels in 0..1.
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
# Written out, as a prepared folder may lack the file that TFDS keeps the names in.
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
VALIDATION_IMAGES = 5_000
CIFAR10_HOST = "www.cs.toronto.edu"  # and CIFAR-100's
PROBE_SECONDS = 5
# TensorFlow also reads .bmp, but takes the numbers of a palette for colours.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif")
# Pictures that must not be passed over without a word. Listed, as what `mimetypes` knows differs from machine to machine.
OTHER_IMAGE_SUFFIXES = {
    *(".apng", ".avif", ".bmp", ".dib", ".eps", ".exr", ".hdr", ".heic"),
    *(".heif", ".ico", ".j2k", ".jp2", ".jpf", ".jpx", ".jxl"),
    *(".pbm", ".pcx", ".pgm", ".pnm", ".ppm", ".psd", ".svg", ".tga", ".tif", ".tiff", ".webp", ".xbm", ".xpm"),
    *(".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"),  # cameras' raw ones
}
SPLIT_FOLDERS = {"test": ("test",), "validation": ("validation", "valid", "val")}
# Of TFDS: a mirrored letter or digit is another one, or none.
CHARACTERS = {"binary_alpha_digits", "cmaterdb", "emnist", "kmnist", "mnist", "mnist_corrupted", "omniglot", "svhn_cropped"}

_PORTS = {"http": 80, "ftp": 21, "https": 443}
_READ_BATCH = 256  # images; reading one by one takes four times as long


def check_name(dataset):
    """Raises ValueError unless `load` knows a data set of this name; what TFDS has is found out by `load` alone."""
    if dataset not in NAMES and not re.match("tfds:.", str(dataset)):
        raise ValueError(f"`dataset` must be one of {', '.join(NAMES)}. Received: dataset={dataset!r}")


def load(dataset, data_dir=None, image_size=32):
    """The data set of a name.

    Args:
        dataset: one of `NAMES`; `tfds:NAME` as TFDS spells it, with a config or version if need be.
        data_dir: for `folder` the folder of images; for the others TFDS' folder, see `cifar10`; `digits` needs none.
        image_size: side of the square, in pixels, that images of another size are stretched to. A set of TFDS with small
            images, all of one size, is kept at that, as CIFAR-10 at 224 pixels would take 50 times its memory: the pipeline
            stretches its batches.

    Raises:
        ValueError: if `dataset` is no name.
        DataError: if the images are missing or broken.
    """
    check_name(dataset)
    try:
        if dataset == "digits":
            return digits(image_size)
        if dataset.startswith("tfds:"):
            return from_tfds(dataset.removeprefix("tfds:"), data_dir, image_size)
        loaders = {"auto": auto, "cifar10": cifar10, "cifar100": cifar100, "folder": folder}
        return loaders[dataset](data_dir, image_size)
    except OSError as error:
        raise DataError(f"{dataset} can't be read: {_reason(error)}") from error
    except Exception as error:
        if not _out_of_memory(error):
            raise
        way_out = f"Choose a smaller --image-size than {image_size}"
        raise DataError(f"{dataset} does not fit into memory: {_reason(error)}. {way_out}") from error


def auto(data_dir=None, image_size=32):
    """CIFAR-10 if it is on disk or can be downloaded, else the digits, with the reason in `Source.fallback`.

    Raises:
        DataError: if `data_dir` is no folder or holds a broken CIFAR-10, which to pass over would hide.
    """
    try:
        return cifar10(data_dir, image_size)
    except UnavailableError as error:
        try:
            return dataclasses.replace(digits(image_size), fallback=f"scikit-learn's digits stand in for CIFAR-10: {error}")
        except DataError as second:
            raise DataError(f"{error}. Nor are there digits to stand in for it: {second}") from second


# === tensorflow-datasets ===


def cifar10(data_dir=None, image_size=32):
    """CIFAR-10 through tensorflow-datasets, which downloads it (162 MB) where it is not on disk.

    The last 5,000 training images are the validation split. TFDS stores the images shuffled, so they are a fair sample.

    Args:
        data_dir: TFDS' folder; `None` means `TFDS_DATA_DIR`, or `~/tensorflow_datasets`.
        image_size: side of the square, in pixels, that larger images are stretched to; see `load`.

    Raises:
        DataError: if the data set can be neither read nor downloaded.
    """
    source = _cifar("cifar10", "CIFAR-10", data_dir, image_size)
    return dataclasses.replace(source, class_names=CIFAR10_CLASSES, mean=CIFAR10_MEAN, std=CIFAR10_STD)


def cifar100(data_dir=None, image_size=32):
    """CIFAR-100 with its 100 fine labels; else as `cifar10`.

    Where a prepared folder lacks the file of the class names, they are numbers.
    """
    return _cifar("cifar100", "CIFAR-100", data_dir, image_size)


def _cifar(name, title, data_dir, image_size):
    builder, keys = _builder(name, title, data_dir)
    _prepare(builder, title, {(CIFAR10_HOST, 443)})
    train, validation = _cut(_read(builder, title, "train", keys, image_size), VALIDATION_IMAGES, title)
    return _source(
        name=name,
        train=train,
        validation=validation,
        test=_read(builder, title, "test", keys, image_size),
        class_names=builder.info.features[keys[1]].names,
        note=_copy_note(builder, keys),
    )


def _copy_note(builder, keys):
    """What to know of a CIFAR whose pixels are not the original ones, which TFDS packs as PNG."""
    [first] = _encoded(builder, "train[:1]", keys)
    lossy = first[0].numpy().startswith(b"\xff\xd8")
    return "JPEG copy: the pixels went through JPEG, which costs a little accuracy" if lossy else ""


def from_tfds(name, data_dir=None, image_size=32):
    """Any image classification set of tensorflow-datasets, downloaded where it is not on disk.

    The test split is `test`, else `validation`, else a tenth of `train`; another tenth of `train`, at most 5,000 images, is the
    validation split. Some sets are stored class by class, so what is held out comes from a fixed shuffle.

    Args:
        name: as TFDS spells it: `imagenette/160px-v2`, `mnist:3.0.1`.
        data_dir, image_size: see `cifar10`.

    Raises:
        DataError: if there is no such set, it has no image and label, or it can be neither read nor downloaded.
    """
    builder, keys = _builder(name, name, data_dir)
    _prepare(builder, name)
    splits = builder.info.splits
    if "train" not in splits:
        raise DataError(f"{name} has no split to train on: it has {', '.join(splits)}. Choose another data set")
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
    return _source(
        name=f"tfds:{name}",
        train=train,
        validation=validation,
        test=test,
        class_names=builder.info.features[keys[1]].names,
        note=note,
        mirror=builder.name not in CHARACTERS,
    )


def _builder(name, title, data_dir):
    """TFDS' builder of a data set of images and labels -> it, and the two features' names."""
    tfds = _import_tfds()
    where = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    if data_dir is not None and not where.is_dir():
        raise DataError(f"`data_dir` is no folder: {data_dir}. Leave it out to download {title}, or name TFDS' folder")
    family = re.split("[/:]", name)[0]
    catalog = "https://www.tensorflow.org/datasets/catalog"
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        features = dict(builder.info.features.items())
    except tfds.core.DatasetNotFoundError as error:
        raise DataError(f"tensorflow-datasets knows no {name}, nor is it in {where}. The names: {catalog}/overview") from error
    except Exception as error:  # TFDS raises dozens of types for what a user sees as one thing
        if broken := _broken_info(where / family):
            way_out = f"Remove {broken.parent} to download it again"
            raise DataError(f"{title} can't be read: {broken} is broken ({_reason(error)}). {way_out}") from error
        raise DataError(f"{title} can't be set up in {where}: {_reason(error)}. See {catalog}/{family}") from error
    for keys in (builder.info.supervised_keys, ("image", "label")):
        kinds = [type(features[key]) for key in keys or () if isinstance(key, str) and key in features]
        # TFDS hides floats in the bytes of an image.
        if kinds == [tfds.features.Image, tfds.features.ClassLabel] and features[keys[0]].np_dtype != np.float32:
            return builder, keys
    raise DataError(f"{title} has no images with a class each, but {', '.join(features)}. Choose another data set")


def _broken_info(folder):
    """The first dataset_info.json under `folder` that can't be, or `None`: TFDS does not say which file it stumbled on."""
    for path in sorted(folder.rglob("dataset_info.json")):
        try:
            json.loads(path.read_bytes())["version"]
        except (ValueError, LookupError, TypeError):
            return path
    return None


def _prepare(builder, title, hosts=None):
    """Downloads what is not on disk, from `hosts`, or those that TFDS knows of."""
    folder = Path(builder.data_path)
    if folder.exists():
        if not builder.is_prepared():
            raise DataError(f"{title} can't be read: {folder} has no dataset_info.json. Remove it to download it again")
        return
    try:
        _probe(hosts or _hosts(builder))
        builder.download_and_prepare()
    except Exception as error:
        where = Path(builder.data_dir_root)
        raise UnavailableError(
            f"{title} is not in {where} (as {folder.relative_to(where)}/dataset_info.json and its records), and the download "
            f"failed: {_reason(error)}. Name the folder that holds {builder.name}/ with --data-dir or TFDS_DATA_DIR, or connect"
        ) from error


def _hosts(builder):
    """Where TFDS downloads from -> a set of (host, port); empty where it doesn't tell, or leaves the download to the user."""
    urls = [] if builder.MANUAL_DOWNLOAD_INSTRUCTIONS else map(urllib.parse.urlsplit, builder.url_infos or ())
    return {(url.hostname, url.port or _PORTS.get(url.scheme, 443)) for url in urls if url.hostname}


def _probe(hosts):
    """Fails within seconds where TFDS would try again for minutes.

    One host that answers is enough: TFDS lists those of all configs of a data set.
    """
    answers = queue.SimpleQueue()

    def knock(address):
        try:
            _knock(*address)
            answers.put(None)
        except (OSError, ValueError, http.client.HTTPException) as error:
            answers.put(error)

    deadline = time.monotonic() + PROBE_SECONDS
    for address in hosts:
        # Threads that nobody waits for: looking a name up knows no timeout.
        threading.Thread(target=knock, args=(address,), daemon=True).start()
    error = None
    for _ in hosts:
        try:
            error = answers.get(timeout=max(0, deadline - time.monotonic()))
        except queue.Empty:
            error = error or TimeoutError(f"no answer within {PROBE_SECONDS} seconds")
            break
        if error is None:
            return
    if hosts:
        ways = {proxy.netloc.rpartition("@")[2] for host, port in hosts if (proxy := _proxy(host, port))}
        through = f" through the proxy {', '.join(sorted(ways))}" if ways else ""
        raise ConnectionError(f"no connection to {', '.join(sorted(host for host, _ in hosts))}{through} ({error})") from error


def _knock(host, port):
    """Connects to a host, by its proxy if it has one.

    Raises:
        OSError: if the host can't be reached, or the proxy lets nobody through to it.
        HTTPException: if the proxy does not answer as one.
    """
    proxy = _proxy(host, port)
    if proxy is None:
        socket.create_connection((host, port), timeout=PROBE_SECONDS).close()
        return
    address = proxy.hostname, proxy.port or (443 if proxy.scheme == "https" else 80)
    if proxy.scheme != "http" or port != 443:  # only this pair is asked for a tunnel, and in the clear
        socket.create_connection(address, timeout=PROBE_SECONDS).close()
        return
    connection = http.client.HTTPConnection(*address, timeout=PROBE_SECONDS)
    headers = {}
    if proxy.username:
        account = f"{urllib.parse.unquote(proxy.username)}:{urllib.parse.unquote(proxy.password or '')}"
        headers["Proxy-Authorization"] = f"Basic {base64.b64encode(account.encode()).decode()}"
    connection.set_tunnel(host, port, headers)
    try:
        connection.connect()
    finally:
        connection.close()


def _proxy(host, port):
    """The proxy that a download from a host goes through -> its split URL, or `None`. It may reach a host that we can't."""
    proxies = urllib.request.getproxies()
    url = proxies.get(next((scheme for scheme, usual in _PORTS.items() if usual == port), "https")) or proxies.get("all")
    if not url or urllib.request.proxy_bypass(host):
        return None
    return urllib.parse.urlsplit(url if "://" in url else f"http://{url}")


def _read(builder, title, split, keys, image_size, shuffle=False):
    """A split of TFDS -> `Split`.

    Args:
        keys: names of the image and the label.
        shuffle: into an order that is fixed; else the order on disk.
    """
    tf = _import("tensorflow")
    height, width = builder.info.features[keys[0]].shape[:2]
    small = None not in (height, width) and max(height, width) <= image_size
    shape = (height, width, 3) if small else (image_size, image_size, 3)

    def decode(data, label):
        pixels = _decode(data)
        return (pixels if small else stretch(pixels, image_size)), label

    try:
        decoded = _encoded(builder, split, keys).map(decode, num_parallel_calls=tf.data.AUTOTUNE)
        batches = decoded.batch(_READ_BATCH).prefetch(tf.data.AUTOTUNE)
        n = builder.info.splits[split].num_examples
        # Each image goes straight to its place: to shuffle afterwards would take the memory twice.
        places = _shuffled(n) if shuffle else np.arange(n)
        images, labels = np.empty((n, *shape), "uint8"), np.empty(n, "int64")
        start = 0
        for pixels, classes in batches.as_numpy_iterator():
            chosen = places[start : start + len(classes)]
            images[chosen], labels[chosen] = pixels, classes
            start += len(classes)
    except Exception as error:
        if _out_of_memory(error):
            raise  # not the copy's fault
        denied = isinstance(error, (PermissionError, tf.errors.PermissionDeniedError))
        way_out = "Ask for the right to read it" if denied else f"Remove {builder.data_path} to download it again"
        raise DataError(f"{title} in {builder.data_dir_root} can't be read: {_reason(error)}. {way_out}") from error
    if labels.min(initial=0) < 0:
        raise DataError(f"{title} keeps the labels of its split {split} to itself. Choose another data set")
    return Split(images, labels)


def _encoded(builder, split, keys):
    """A split of TFDS -> `tf.data.Dataset` of (the image file's bytes, label)."""
    tfds = _import_tfds()
    examples = builder.as_dataset(
        split=split,
        decoders={keys[0]: tfds.decode.SkipDecoding()},
        read_config=tfds.ReadConfig(try_autocache=False),  # each is read once
    )
    return examples.map(lambda example: tuple(example[key] for key in keys))


def _cut(split, n, title):
    """Takes the last `n` off -> the rest and these."""
    kept = len(split) - n
    if kept < 1:
        raise DataError(f"{title} has too few training images to hold {n} out: {len(split)}. Choose another data set")
    return split.limit(kept), Split(split.images[kept:], split.labels[kept:])


# === A folder of images ===


def folder(data_dir, image_size=32):
    """Images in a folder for each class: `data_dir/CLASS/*`, or `data_dir/train/CLASS/*`.

    Beside them, `test` and `validation` (or `valid` or `val`) may hold the same classes. Where one is missing, a tenth of each
    class's training images is held out for it: always the same ones whatever a run's seed, so that runs can be compared.

    Args:
        data_dir: the folder.
        image_size: side of the square, in pixels, that the images are stretched to.

    Raises:
        DataError: if a folder or file is missing or broken, or a class has too few images.
    """
    if data_dir is None:
        raise DataError("`folder` needs `data_dir`: name the folder that holds a folder of images for each class (--data-dir)")
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise DataError(f"`data_dir` is no folder: {data_dir}. Name the one that holds a folder of images for each class")
    nested = bool(_folders(root / "train"))
    train = root / "train" if nested else root
    splits = _split_folders(root, nested)
    class_names = tuple(path.name for path in _folders(train) if path not in splits.values())
    if len(class_names) < 2 or set(class_names) <= {"train", *sum(SPLIT_FOLDERS.values(), ())}:
        raise DataError(
            f"{root} needs a folder for each of two classes or more, in itself or in its folder train. "
            f"Found: {', '.join(class_names) or 'none'}"
        )
    if nested and (odd := [path.name for path in _folders(root) if path not in (train, *splits.values())]):
        raise DataError(f"{root} has a folder train and others that are no split: {', '.join(odd)}. Move them into it, or away")
    files = {"train": {name: _class_files(train / name) for name in class_names}, "test": {}, "validation": {}}
    for split, path in splits.items():
        files[split] = {path.name: _class_files(path) for path in _folders(path)}
        if odd := sorted(set(files[split]) ^ set(class_names)):
            raise DataError(f"{path} and {train} must hold the same class folders. Only one has: {', '.join(odd)}")

    missing = [split for split in SPLIT_FOLDERS if not files[split]]
    for name, paths in files["train"].items():
        if len(paths) <= len(missing):
            raise DataError(
                f"{train / name} has too few images to hold out one each for {' and '.join(missing)}: {len(paths)}. "
                "Add some, or remove the folder"
            )
        share = max(1, len(paths) // 10)
        paths = [paths[place] for place in _shuffled(len(paths))]
        for split in missing:
            files[split][name], paths = paths[:share], paths[share:]
        files["train"][name] = paths
    return _source(
        name="folder",
        **{split: _read_files(classes, image_size) for split, classes in files.items()},
        class_names=class_names,
        note="tested on a tenth of the images, held out" if "test" in missing else "",
    )


def _split_folders(root, nested):
    """Which folders of `root` hold what `train` does not: `{split: folder}`.

    Where classes lie beside them, one of these may be called test: it holds images, while the split holds classes.
    """
    found = {}
    for split, names in SPLIT_FOLDERS.items():
        folders = [root / name for name in names if (root / name).is_dir() and (nested or _folders(root / name))]
        if len(folders) > 1:
            raise DataError(f"{root} must have one folder for {split}. Found: {', '.join(path.name for path in folders)}")
        if folders:
            found[split] = folders[0]
    return found


def _class_files(folder):
    """The image files in a class's folder, sorted."""
    if inner := _folders(folder):
        raise DataError(f"{inner[0]} is a folder within a class. Move its images into {folder}, or away")
    files = [file for file in _visible(folder) if file.is_file()]
    for file in files:
        if file.suffix.lower() in OTHER_IMAGE_SUFFIXES:
            raise DataError(f"{file} is none of {' '.join(IMAGE_SUFFIXES)}. Convert it to .png, or remove it")
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise DataError(f"{folder} holds no files of {' '.join(IMAGE_SUFFIXES)}. Add some, or remove the folder")
    return images


def _folders(path):
    return [folder for folder in _visible(path) if folder.is_dir()]


def _visible(path):
    return sorted(entry for entry in path.iterdir() if not entry.name.startswith(".")) if path.is_dir() else []


def _read_files(classes, image_size):
    """`{class name: its image files}` -> `Split`, in an order that is fixed."""
    tf = _import("tensorflow")
    labelled = [(path, label) for label, paths in enumerate(classes.values()) for path in paths]

    def read(path):
        try:
            with tf.device("CPU:0"):
                return stretch(_decode(path.read_bytes()), image_size).numpy()
        except (OSError, ValueError, tf.errors.OpError) as error:
            if isinstance(error, PermissionError) or _out_of_memory(error):
                raise  # not the image's fault
            raise DataError(f"{path} can't be decoded: {_reason(error)}. Mend it, or remove it") from error

    paths, labels = zip(*(labelled[place] for place in _shuffled(len(labelled))))
    images = np.empty((len(labels), image_size, image_size, 3), "uint8")
    # Several at a time, each at its final size before the next: photos would not fit into memory at theirs.
    with ThreadPoolExecutor() as pool:
        for place, image in enumerate(pool.map(read, paths)):
            images[place] = image
    return Split(images, np.array(labels, "int64"))


# === Digits ===


def digits(image_size=32):
    """The 1,797 handwritten digits that scikit-learn carries: 1,297 to train, 200 to validate, 300 to test.

    Args:
        image_size: side of the square, in pixels, that the 8x8 pixels are stretched to.

    Raises:
        DataError: if scikit-learn is not installed.
    """
    tf = _import("tensorflow")
    load_digits = _import("sklearn.datasets", "scikit-learn").load_digits
    train_test_split = _import("sklearn.model_selection", "scikit-learn").train_test_split

    data = load_digits()
    grey = np.round(data.images * (255 / 16)).astype("uint8")  # 0..16 -> 0..255
    with tf.device("CPU:0"):
        images = stretch(np.stack([grey] * 3, axis=-1), image_size).numpy()
    labels = data.target.astype("int64")
    rest, test = train_test_split(np.arange(len(labels)), test_size=300, stratify=labels, random_state=0)
    train, validation = train_test_split(rest, test_size=200, stratify=labels[rest], random_state=0)
    return _source(
        name="digits",
        **{
            split: Split(images[chosen], labels[chosen])
            for split, chosen in {"train": train, "validation": validation, "test": test}.items()
        },
        class_names=map(str, range(10)),
        note="scikit-learn's handwritten digits of 8x8 pixels, enlarged",
        mirror=False,
    )


# === Images ===


def _decode(data):
    """A file's bytes -> uint8 `(height, width, 3)`, by the operation that the exported model's server decodes with."""
    import tensorflow as tf

    return tf.io.decode_image(data, channels=3, expand_animations=False)


def stretch(images, size):
    """uint8 `(..., height, width, 3)` -> `(..., size, size, 3)`; images of that size stay as they are."""
    import tensorflow as tf

    def resize():
        return tf.saturate_cast(tf.round(tf.image.resize(images, (size, size), antialias=True)), tf.uint8)

    sides = tuple(images.shape[-3:-1])
    if None not in sides:
        return tf.convert_to_tensor(images) if sides == (size, size) else resize()
    return tf.cond(tf.reduce_all(tf.shape(images)[-3:-1] == size), lambda: tf.convert_to_tensor(images), resize)


def _shuffled(n):
    """0..n-1 in an order that depends on `n` alone; NumPy has frozen what `RandomState` draws, for all versions to come."""
    return np.random.RandomState(0).permutation(n)


def _source(*, train, class_names, **fields):
    """A `Source` with its mean and std."""
    # By counting: exact, and no image in floats.
    counts = np.zeros((3, 256), "int64")
    for start in range(0, len(train), _READ_BATCH):
        for channel in range(3):
            counts[channel] += np.bincount(train.images[start : start + _READ_BATCH, ..., channel].ravel(), minlength=256)
    share, value = counts / counts.sum(axis=1, keepdims=True), np.arange(256) / 255
    mean = share @ value
    std = np.sqrt((share * (value - mean[:, None]) ** 2).sum(axis=1))
    return Source(
        train=train,
        class_names=tuple(class_names),
        mean=tuple(round(float(number), 4) for number in mean),
        std=tuple(max(round(float(number), 4), 1 / 255) for number in std),  # images of one colour must not divide by 0
        **fields,
    )


def _import_tfds():
    return _import("tensorflow_datasets", "tensorflow-datasets importlib_resources")


def _import(module, packages=None):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnavailableError(f"{module} can't be imported ({error}): pip install {packages or module}") from error


def _out_of_memory(error):
    """Whether it is Python's error or TensorFlow's, told by its name, as this module is imported without TensorFlow."""
    return isinstance(error, MemoryError) or type(error).__name__ == "ResourceExhaustedError"


def _reason(error):
    """The first line of an error, without what TensorFlow and TFDS put around it."""
    around = r"\{\{.*?\}\}|\[Op:.*?\].*|Failed to construct dataset .*?\}\": |Here are \d+ BuilderConfigs.*"
    text = re.sub(around, "", str(error)).strip()
    [first, *rest] = (text or type(error).__name__).splitlines()
    if first.endswith(":"):  # what follows is to the point
        first = textwrap.shorten(" ".join([first, *rest]), 300, placeholder=" ...")
    return first.rstrip(".: ")
