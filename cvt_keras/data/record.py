"""images.csv: which images a run trained, validated and tested on, so that no later figure is of images that it has seen."""

import csv
import dataclasses
from dataclasses import dataclass

import numpy as np

from cvt_keras.data.split import Split
from cvt_keras.errors import RunError

SPLITS = ("train", "validation", "test")
COLUMNS = ("digest", "split", "label")


@dataclass(frozen=True)
class Comparison:
    """How the images that are found differ from those of a record.

    Args:
        missing: images of the record that are not found.
        new: images that are found and not in the record.
        relabelled: images that lie in the folder of another class than before.
    """

    missing: int
    new: int
    relabelled: int

    def __bool__(self):
        return bool(self.missing or self.new or self.relabelled)

    def __str__(self):
        counts = {"missing": self.missing, "new": self.new, "of another class than before": self.relabelled}
        return ", ".join(f"{n:,} {what}" for what, n in counts.items() if n)


@dataclass(frozen=True)
class ImageRecord:
    """The images of a run.

    Args:
        images: the SHA-256 of an image's file -> its split, of `SPLITS`, and the name of its class.
    """

    images: dict[str, tuple[str, str]]

    @classmethod
    def of(cls, splits, class_names):
        """The record of a run.

        Args:
            splits: `{name: Split}` with names of `SPLITS`, of the images that are used, each with its digests.
            class_names: in the order of the labels.
        """
        images = {}
        for name in reversed(SPLITS):  # an image that also lies in train/ counts as trained on
            split = splits.get(name)
            if split is not None:
                images |= {digest: (name, class_names[label]) for digest, label in zip(split.digests, split.labels)}
        return cls(images)

    def write(self, path):
        """Writes the record as CSV."""
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows((digest, *where) for digest, where in sorted(self.images.items()))

    @classmethod
    def read(cls, path):
        """Reads what `write` wrote, or returns `None` if there is no such file, as in the run of an older version.

        Raises:
            RunError: if it is damaged.
        """
        try:
            with open(path, encoding="utf-8", newline="") as file:
                header, *rows = csv.reader(file)
            if tuple(header) != COLUMNS:
                raise ValueError(f"its columns are {', '.join(header)}")
            images = {digest: (split, label) for digest, split, label in rows}
            if unknown := {split for split, _ in images.values()} - set(SPLITS):
                raise ValueError(f"it has a split {min(unknown)}")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, csv.Error) as error:
            raise RunError(f"{path} is damaged: {error}", hint="Remove it: held-out images are then not verified") from error
        return cls(images)

    def apply(self, source, keep_new=True):
        """Gives each image of a source the split that it has in the record.

        Args:
            source: a `Source` whose splits have digests.
            keep_new: whether an image that is not in the record stays in its split, or is left out.

        Returns:
            The `Source`, and a `Comparison`.
        """
        found = [(name, place) for name in SPLITS for place in range(len(getattr(source, name)))]
        digests = [digest for name in SPLITS for digest in getattr(source, name).digests]
        labels = [source.class_names[label] for name in SPLITS for label in getattr(source, name).labels]
        sides = {name: [] for name in SPLITS}
        for index, (digest, (name, _)) in enumerate(zip(digests, found)):
            recorded = self.images.get(digest)
            if recorded is not None:
                sides[recorded[0]].append(index)
            elif keep_new:
                sides[name].append(index)
        comparison = Comparison(
            missing=len(self.images.keys() - set(digests)),
            new=sum(digest not in self.images for digest in digests),
            relabelled=sum(self.images.get(digest, (None, label))[1] != label for digest, label in zip(digests, labels)),
        )
        unmoved = all(found[index][0] == name for name, chosen in sides.items() for index in chosen)
        if unmoved and len(found) == sum(map(len, sides.values())):
            return source, comparison
        taken = {name: _gather(source, [found[index] for index in chosen]) for name, chosen in sides.items()}
        return dataclasses.replace(source, **taken), comparison


def _gather(source, places):
    """The images at `places`, pairs of a split's name and a place in it, as a `Split`."""
    splits = {name: getattr(source, name) for name in SPLITS}
    images = np.empty((len(places), *source.train.images.shape[1:]), "uint8")
    for row, (name, place) in enumerate(places):
        images[row] = splits[name].images[place]
    labels = np.array([splits[name].labels[place] for name, place in places], "int64")
    return Split(images, labels, tuple(splits[name].digests[place] for name, place in places))
