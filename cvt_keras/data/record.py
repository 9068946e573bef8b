"""images.csv: which images a run trained, validated and tested on, so that no later figure is of images that it has seen."""

import csv
import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cvt_keras.data import images as pictures
from cvt_keras.data.split import SPLITS, Split
from cvt_keras.errors import RunError

# What the weights that a run started from were trained on, and what the run itself did not find.
EARLIER = "earlier"
COLUMNS = ("digest", "split", "label", "pixels")


class Image(NamedTuple):
    """What a record knows of an image.

    Args:
        split: of `SPLITS`, or `EARLIER`.
        label: the name of its class.
        pixels: the digest of its decoded pixels; see `Split`.
    """

    split: str
    label: str
    pixels: str


@dataclass(frozen=True)
class Comparison:
    """How the images that are found differ from those of a record. Copies of a file count once.

    Args:
        missing: images of the record that are not found.
        new: images that are found, and that the run did not have.
        relabelled: images that lie in the folder of another class than before.
        moved: images that lie in the folder of another split than the record gives them.
    """

    missing: int
    new: int
    relabelled: int
    moved: int = 0

    def __bool__(self):
        return bool(self.missing or self.new or self.relabelled or self.moved)

    def __str__(self):
        counts = {
            "missing": self.missing,
            "new": self.new,
            "of another class than before": self.relabelled,
            "in another split than their folder says": self.moved,
        }
        return ", ".join(f"{n:,} {what}" for what, n in counts.items() if n)


@dataclass(frozen=True)
class ImageRecord:
    """The images of a run.

    Args:
        images: the SHA-256 of an image's file -> its `Image`.
    """

    images: dict[str, Image]

    def __post_init__(self):
        # A file whose metadata was edited is the same image. What was trained on comes last, and so counts.
        order = ("test", "validation", EARLIER, "train")
        ordered = sorted(self.images.values(), key=lambda image: order.index(image.split))
        object.__setattr__(self, "_splits", {image.pixels: image.split for image in ordered})

    @classmethod
    def of(cls, splits, class_names):
        """The record of a run.

        Args:
            splits: `{name: Split}` with names of `SPLITS`, each with its digests. Of all images of the folder, also of those
                that a limit leaves out: what is not recorded could change its side later.
            class_names: in the order of the labels.
        """
        images = {}
        for name, split in splits.items():
            for digest, label, pixels in zip(split.digests, split.labels, split.pixels):
                images[digest] = Image(name, class_names[label], pixels)
        return cls(images)

    @classmethod
    def of_source(cls, source):
        """The record of a `Source`, as it is split."""
        return cls.of({name: getattr(source, name) for name in SPLITS}, source.class_names)

    def after(self, earlier):
        """This record with the training images of the run before it that are gone: the weights have still seen them.

        Args:
            earlier: the `ImageRecord` of the run that the weights come from.
        """
        gone = {
            digest: image._replace(split=EARLIER)
            for digest, image in earlier.images.items()
            if image.split in ("train", EARLIER) and self.split_of(digest, image.pixels) is None
        }
        return ImageRecord(gone | self.images)

    def split_of(self, digest, pixels):
        """The split of an image, by its file or else by its pixels; `None` if the record does not have it."""
        image = self.images.get(digest)
        return image.split if image else self._splits.get(pixels)

    def write(self, path):
        """Writes the record as CSV."""
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows((digest, *image) for digest, image in sorted(self.images.items()))

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
            images = {digest: Image(split, label, pixels) for digest, split, label, pixels in rows}
            if unknown := {image.split for image in images.values()} - {*SPLITS, EARLIER}:
                raise ValueError(f"it has a split {min(unknown)}")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, csv.Error) as error:
            raise RunError(f"{path} is damaged: {error}", hint="Remove it: held-out images are then not verified") from error
        return cls(images)

    def apply(self, source, keep_new=True):
        """Gives each image of a source the split that it has in the record.

        Args:
            source: a `Source` whose splits have digests, and no pixels in two of them.
            keep_new: whether to keep an image that the run did not have, or to leave it out. One that the weights before the
                run were trained on is trained on; others stay in their split.

        Returns:
            The `Source`, with mean and std of its training images; and a `Comparison`.
        """
        taken = {name: [] for name in SPLITS}  # pairs of the split where an image lies, and its place there
        for name in SPLITS:
            split = getattr(source, name)
            for place, known in enumerate(map(self.split_of, split.digests, split.pixels)):
                if known in SPLITS:
                    taken[known].append((name, place))
                elif keep_new:
                    taken["train" if known == EARLIER else name].append((name, place))
        changed = {
            name: _gather(source, places)
            for name, places in taken.items()
            if places != [(name, place) for place in range(len(getattr(source, name)))]
        }
        if "train" in changed and len(changed["train"]):
            changed["mean"], changed["std"] = pictures.mean_and_std(changed["train"].images)
        return dataclasses.replace(source, **changed), self._compare(source)

    def _compare(self, source):
        labels, folders, new = {}, {}, set()  # by digest and by pixels: no key is both
        for name in SPLITS:
            split = getattr(source, name)
            for digest, label, pixels in zip(split.digests, split.labels, split.pixels):
                if self.split_of(digest, pixels) not in SPLITS:
                    new.add(digest)
                for key in {digest, pixels}:
                    labels.setdefault(key, set()).add(source.class_names[label])
                    folders.setdefault(key, set()).add(_folder(source, name))
        missing = relabelled = moved = 0
        for digest, image in self.images.items():
            key = digest if digest in labels else image.pixels
            if image.split == EARLIER:
                continue
            if key not in labels:
                missing += 1
                continue
            relabelled += image.label not in labels[key]
            moved += _folder(source, image.split) not in folders[key]
        return Comparison(missing, len(new), relabelled, moved)


def _folder(source, split):
    """The split in whose folder the images of a split lie: those that are held out lie among the training images."""
    return split if split in source.split_folders else "train"


def _gather(source, places):
    """The images at `places`, pairs of a split's name and a place in it, as a `Split` in the order of their digests."""
    splits = {name: getattr(source, name) for name in SPLITS}

    def key(where):  # the order of a folder's images: it must not depend on where they lay
        name, place = where
        return splits[name].digests[place], splits[name].labels[place]

    places = sorted(places, key=key)
    images = np.empty((len(places), *source.train.images.shape[1:]), "uint8")
    for row, (name, place) in enumerate(places):
        images[row] = splits[name].images[place]
    labels = np.array([splits[name].labels[place] for name, place in places], "int64")
    digests = tuple(splits[name].digests[place] for name, place in places)
    return Split(images, labels, digests, tuple(splits[name].pixels[place] for name, place in places))
