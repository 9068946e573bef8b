"""A data set with its splits, and which images are held out."""

import dataclasses
import itertools
import zlib
from dataclasses import dataclass

import numpy as np

from cvt_keras.data.pixels import Images, checksum, join
from cvt_keras.errors import DataError

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """Images and their labels.

    Args:
        images: uint8 `(n, height, width, 3)`, or `Images`, which are read when they are indexed. For their size see
            `sources.load`.
        labels: int64 `(n,)`.
        digests: SHA-256 of each image's file in hexadecimal digits, `(n,)`; `None` if the data set is not a folder.
        pixels: digest of each image's decoded pixels at full size, in hexadecimal digits, `(n,)`; `None` if `digests` is.
    """

    images: np.ndarray | Images
    labels: np.ndarray
    digests: tuple[str, ...] | None = None
    pixels: tuple[str, ...] | None = None

    def __len__(self):
        return len(self.labels)

    def limit(self, n):
        """The first `n` images, or all if `n` is `None`."""
        return self.take(slice(n))

    def take(self, rows):
        """The images at `rows`, in this order.

        Args:
            rows: int `(n,)`, or a slice.
        """
        indices = np.arange(len(self))[rows]
        digests, pixels = (values and tuple(values[i] for i in indices) for values in (self.digests, self.pixels))
        return Split(self.images[rows], self.labels[rows], digests, pixels)

    def followed_by(self, *others):
        """These images, then those of each of `others`, which must be of the same data set."""
        parts = (self, *others)
        digests, pixels = (
            None if None in values else tuple(itertools.chain(*values))
            for values in ([part.digests for part in parts], [part.pixels for part in parts])
        )
        return Split(join([part.images for part in parts]), np.concatenate([part.labels for part in parts]), digests, pixels)


@dataclass(frozen=True)
class Source:
    """A data set.

    Args:
        name: name of the data set; never `auto`.
        train, validation, test: disjoint `Split`s, independent of a run's seed. The first images of each are a fair sample.
        class_names: in the order of the labels.
        mean, std: of the training pixels in 0..1, per channel. For CIFAR-10 the usual ones, of all 50,000 images.
        note: what a reader of the results must know about the data, or empty.
        mirror: whether a mirrored image keeps its label.
        fallback: empty, unless this replaces the data set that was asked for: then why, and how to get the other.
        warnings: one line each, shown at the start and in the report.
        left_out: reason why files of a folder are not used -> number of files.
        split_folders: the splits that have a folder of their own, and "train"; only for a folder of images.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    note: str = ""
    mirror: bool = True
    fallback: str = ""
    warnings: tuple[str, ...] = ()
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)
    split_folders: tuple[str, ...] = ()

    def fingerprint(self):
        """Identifies the images and labels: a dict of numbers and strings that survives JSON."""
        parts = {"class names": ", ".join(self.class_names), "note": self.note}
        for name in SPLITS:
            split = getattr(self, name)
            parts[f"number of {name} images"] = len(split)
            parts[f"checksum of {name} images"] = zlib.crc32(split.labels, checksum(split.images))
        return parts


# The first 64 bits of an image's digest, as a fraction in [0, 1), decide whether it is held out: if it lies in [low, high).
_SHARES = {"test": (0, 0.1), "validation": (0.1, 0.2)}


def hold_out(classes, splits):
    """Chooses the images to hold out by their digests, so that adding, removing or renaming files moves no other image.

    Each class has at least one image in each split. If a split would have none, it gets the training image with the lowest
    digest. If too few images remain to train on, held-out ones with the highest digests become training images.

    Args:
        classes: `{class name: digests}`: SHA-256 in hexadecimal digits. Copies of a file are in the same split, even if they
            are in different classes.
        splits: the splits to hold out: "test", "validation", both or none.

    Returns:
        `{digest: split}`.

    Raises:
        DataError: if a class has too few different images.
    """
    splits = [split for split in _SHARES if split in splits]
    unique = {name: sorted(set(digests)) for name, digests in classes.items()}
    assigned = {digest: _split_by_digest(digest, splits) for digests in unique.values() for digest in digests}
    for digests in unique.values():
        if len(digests) > len(splits):
            _return_to_training(digests, splits, assigned)
    for split in splits:
        for digests in unique.values():
            training = [digest for digest in digests if assigned[digest] == "train"]
            if training and all(assigned[digest] != split for digest in digests):
                assigned[training[0]] = split
    for name, digests in unique.items():
        if {"train", *splits} - {assigned[digest] for digest in digests}:
            shared = sum(digest in others for other, others in unique.items() if other != name for digest in digests)
            raise DataError(
                f"the class {name} has too few different images for one each in {', '.join(['train', *splits])}: {len(digests)}"
                + (f", of which {shared} are also in other classes" if shared else ""),
                argument="data_dir",
                hint="Add images of this class, or remove its folder",
            )
    return assigned


def _split_by_digest(digest, splits):
    share = int(digest[:16], 16) / 2**64
    return next((split for split in splits if _SHARES[split][0] <= share < _SHARES[split][1]), "train")


def _return_to_training(digests, splits, assigned):
    """Moves images of a class to "train" in `assigned`, until it has one there and one more for each empty split."""
    held_out = {split: [digest for digest in digests if assigned[digest] == split] for split in splits}
    needed = 1 + sum(not members for members in held_out.values())
    missing = needed - (len(digests) - sum(map(len, held_out.values())))
    for split in reversed(splits):
        while missing > 0 and len(held_out[split]) > 1:
            assigned[held_out[split].pop()] = "train"
            missing -= 1


def fixed_order(n):
    """A permutation of 0..n-1 that depends only on `n`. NumPy guarantees that `RandomState` never changes."""
    return np.random.RandomState(0).permutation(n)
