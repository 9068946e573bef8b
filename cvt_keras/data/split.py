"""A data set in memory: its splits, and what they are called."""

import dataclasses
import zlib
from dataclasses import dataclass

import numpy as np

from cvt_keras.errors import DataError

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """Images and their labels.

    Args:
        images: uint8 `(n, height, width, 3)`: as small as they came, or stretched to the size asked for; see `load`.
        labels: int64 `(n,)`.
        digests: the SHA-256 of each image's file in hexadecimal digits, `(n,)`; `None` for a data set that is no folder.
        pixels: a digest of each image's decoded pixels, at their full size, in hexadecimal digits, `(n,)`; `None` likewise.
    """

    images: np.ndarray
    labels: np.ndarray
    digests: tuple[str, ...] | None = None
    pixels: tuple[str, ...] | None = None

    def __len__(self):
        return len(self.labels)

    def limit(self, n):
        """The first `n`, or all if `n` is `None`."""
        return Split(self.images[:n], self.labels[:n], self.digests and self.digests[:n], self.pixels and self.pixels[:n])


@dataclass(frozen=True)
class Source:
    """A data set, whole in memory.

    Args:
        name: the real one, never `auto`.
        train, validation, test: disjoint `Split`s, the same whatever a run's seed; the first images of each are a fair sample.
        class_names: in the order of the labels.
        mean, std: of the training pixels in 0..1, a number a channel; CIFAR-10's, the usual ones, of those held out too.
        note: what a reader of a figure must know about the data; empty if nothing.
        mirror: whether a mirrored image keeps its label.
        fallback: if this stands in for what was asked for: why, and how to get that; else empty.
        warnings: what a user must see at the start and in the report, a sentence each.
        left_out: why files of a folder were not used -> how many.
        split_folders: the splits that have a folder of their own in a folder of images.
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
        """What tells these images and labels from others: a dict of numbers and strings, as JSON keeps them."""
        parts = {"class names": ", ".join(self.class_names), "note": self.note}
        for name in SPLITS:
            split = getattr(self, name)
            parts[f"number of {name} images"] = len(split)
            parts[f"checksum of {name} images"] = zlib.crc32(split.labels, zlib.crc32(split.images))
        return parts


# The first 64 bits of an image's digest, as a fraction in 0..1, decide whether it is held out: from a to b, b itself excluded.
_SHARES = {"test": (0, 0.1), "validation": (0.1, 0.2)}


def hold_out(classes, splits):
    """Chooses the images to hold out by what their files are, so that to add, remove or rename files moves no other image.

    A class that would lack a split gives it the training image with the lowest digest. If too few are left to train on, the
    held-out ones with the highest digests are trained on.

    Args:
        classes: `{class name: digests}`: SHA-256 in hexadecimal digits. Copies of a file, in whichever class, go the same way.
        splits: the splits to hold out for: "test", "validation", both or none.

    Returns:
        `{digest: split}`.

    Raises:
        DataError: if a class has too few different images.
    """
    splits = [split for split in _SHARES if split in splits]
    different = {name: sorted(set(digests)) for name, digests in classes.items()}
    sides = {digest: _share_of(digest, splits) for digests in different.values() for digest in digests}
    for digests in different.values():
        if len(digests) > len(splits):
            _keep_for_training(digests, splits, sides)
    for split in splits:
        for digests in different.values():
            training = [digest for digest in digests if sides[digest] == "train"]
            if training and all(sides[digest] != split for digest in digests):
                sides[training[0]] = split
    for name, digests in different.items():
        if {"train", *splits} - {sides[digest] for digest in digests}:
            shared = sum(digest in others for other, others in different.items() if other != name for digest in digests)
            raise DataError(
                f"the class {name} has too few different images to train on one and to hold out one each for "
                f"{' and '.join(splits)}: {len(digests)}" + (f", {shared} of which lie in other classes too" if shared else ""),
                argument="data_dir",
                hint="Add images of it, or remove its folder",
            )
    return sides


def _share_of(digest, splits):
    share = int(digest[:16], 16) / 2**64
    return next((split for split in splits if _SHARES[split][0] <= share < _SHARES[split][1]), "train")


def _keep_for_training(digests, splits, sides):
    """Leaves one image of a class to train on, and one for each split that lacks one. `sides` is changed."""
    held_out = {split: [digest for digest in digests if sides[digest] == split] for split in splits}
    needed = 1 + sum(not found for found in held_out.values())
    missing = needed - (len(digests) - sum(map(len, held_out.values())))
    for split in reversed(splits):
        while missing > 0 and len(held_out[split]) > 1:
            sides[held_out[split].pop()] = "train"
            missing -= 1


def fixed_order(n):
    """0..n-1 in an order that depends on `n` alone. NumPy has frozen what `RandomState` draws, for all versions to come."""
    return np.random.RandomState(0).permutation(n)
