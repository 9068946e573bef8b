"""Where labelled images come from."""

import re
import socket
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Of the 50,000 training images, their original pixels in 0..1.
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
# Written out, as a prepared folder may lack the file that TFDS keeps the names in.
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
VALIDATION_IMAGES = 5_000
CIFAR10_HOST = "www.cs.toronto.edu"


class DataError(Exception):
    """Data that is missing or broken. The message is one line: what is wrong, and the way out."""


@dataclass(frozen=True)
class Split:
    """Images and their labels.

    Args:
        images: uint8 `(n, height, width, 3)`.
        labels: int64 `(n,)`.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self):
        return len(self.labels)

    def limit(self, n):
        """The first `n`, or all if `n` is `None`."""
        return Split(self.images[:n], self.labels[:n])


@dataclass(frozen=True)
class Source:
    """A data set, whole in memory.

    Args:
        name: the real one.
        train, validation, test: disjoint `Split`s.
        class_names: in the order of the labels.
        mean, std: of the training pixels in 0..1, a number a channel.
        note: what a reader of a figure must know about the data; empty if nothing.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    note: str = ""


def cifar10(data_dir=None):
    """CIFAR-10 through tensorflow-datasets, which downloads it (162 MB) where it is not on disk.

    The last 5,000 training images are the validation split. TFDS stores the images shuffled, so they are a fair sample.

    Args:
        data_dir: TFDS' folder; `None` means `TFDS_DATA_DIR`, or `~/tensorflow_datasets`.

    Raises:
        DataError: if the data set can be neither read nor downloaded.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(f"CIFAR-10 comes by tensorflow-datasets: pip install tensorflow-datasets ({error})") from error

    if data_dir is not None and not Path(data_dir).is_dir():
        raise DataError(f"`data_dir` is no folder: {data_dir}. Leave it out to download CIFAR-10, or name TFDS' folder")
    where = data_dir or tfds.core.constants.DATA_DIR
    try:
        builder = tfds.builder("cifar10", data_dir=data_dir)
        if not builder.is_prepared():
            if not urllib.request.getproxies():  # through one, a connection of our own proves nothing
                _probe(CIFAR10_HOST)
            builder.download_and_prepare()
    except Exception as error:  # TFDS raises dozens of types for what a user sees as one thing
        raise DataError(
            f"CIFAR-10 is not in {where} (as cifar10/3.0.2/dataset_info.json and its records), and the download failed: "
            f"{_reason(error)}. Name the folder that holds cifar10/ with --data-dir or TFDS_DATA_DIR, or connect"
        ) from error
    try:
        train, test = (
            Split(*tfds.as_numpy(builder.as_dataset(split=split, batch_size=-1, as_supervised=True)))
            for split in ("train", "test")
        )
        [first] = builder.as_dataset(split="train[:1]", decoders={"image": tfds.decode.SkipDecoding()})
    except Exception as error:
        raise DataError(
            f"CIFAR-10 in {where} can't be read: {_reason(error)}. Remove {builder.data_path} to download it again"
        ) from error
    # TFDS packs the originals as PNG.
    lossy = first["image"].numpy().startswith(b"\xff\xd8")
    kept = len(train) - VALIDATION_IMAGES
    return Source(
        name="cifar10",
        train=train.limit(kept),
        validation=Split(train.images[kept:], train.labels[kept:]),
        test=test,
        class_names=CIFAR10_CLASSES,
        mean=CIFAR10_MEAN,
        std=CIFAR10_STD,
        note="JPEG copy: the pixels went through JPEG, which costs a little accuracy" if lossy else "",
    )


def _reason(error):
    """The first line of an error, without what TensorFlow puts around it."""
    text = re.sub(r"\{\{.*?\}\}|\[Op:.*?\].*", "", str(error)).strip()
    return (text or type(error).__name__).splitlines()[0].rstrip(". ")


def _probe(host):
    """Fails within seconds where TFDS would try again for minutes."""
    try:
        socket.create_connection((host, 443), timeout=5).close()
    except OSError as error:
        raise ConnectionError(f"no connection to {host} ({error})") from error
