"""A data set in memory: its splits, and what they are called."""

import dataclasses
import zlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Split:
    """Images and their labels.

    Args:
        images: uint8 `(n, height, width, 3)`: as small as they came, or stretched to the size asked for; see `load`.
        labels: int64 `(n,)`.
        digests: the SHA-256 of each image's file in hexadecimal digits, `(n,)`; `None` for a data set that is no folder.
    """

    images: np.ndarray
    labels: np.ndarray
    digests: tuple[str, ...] | None = None

    def __len__(self):
        return len(self.labels)

    def limit(self, n):
        """The first `n`, or all if `n` is `None`."""
        return Split(self.images[:n], self.labels[:n], self.digests and self.digests[:n])

    def take(self, places):
        """The images at these places, a sequence of integers, in that order."""
        digests = self.digests and tuple(self.digests[place] for place in places)
        return Split(self.images[places], self.labels[places], digests)


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

    def fingerprint(self):
        """What tells these images and labels from others: a dict of numbers and strings, as JSON keeps them."""
        parts = {"class names": ", ".join(self.class_names), "note": self.note}
        for name in ("train", "validation", "test"):
            split = getattr(self, name)
            parts[f"number of {name} images"] = len(split)
            parts[f"checksum of {name} images"] = zlib.crc32(split.labels, zlib.crc32(split.images))
        return parts


def fixed_order(n):
    """0..n-1 in an order that depends on `n` alone. NumPy has frozen what `RandomState` draws, for all versions to come."""
    return np.random.RandomState(0).permutation(n)
