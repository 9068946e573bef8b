"""images.csv: which images a run trained, validated and tested on, so that no later figure is of images that it has seen."""

import csv
import dataclasses
from dataclasses import dataclass

import numpy as np

from cvt_keras.data import images as pictures
from cvt_keras.data.split import Split
from cvt_keras.errors import RunError

SPLITS = ("train", "validation", "test")
COLUMNS = ("digest", "split", "label")


@dataclass(frozen=True)
class Comparison:
    """How the images that are found differ from those of a record. Copies of a file count once.

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
            splits: `{name: Split}` with names of `SPLITS`, each with its digests. Of all images of the folder, also of those
                that a limit leaves out: what is not recorded could change its side later.
            class_names: in the order of the labels.
        """
        images = {}
        for name in reversed(SPLITS):  # an image that also lies in train/ counts as trained on
            split = splits.get(name)
            if split is not None:
                images |= {digest: (name, class_names[label]) for digest, label in zip(split.digests, split.labels)}
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
        trained_on = {digest: where for digest, where in earlier.images.items() if where[0] == "train"}
        return ImageRecord(trained_on | self.images)

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

        Copies of a file in several splits are first dealt with by `without_copies`.

        Args:
            source: a `Source` whose splits have digests.
            keep_new: whether an image that is not in the record stays in its split, or is left out.

        Returns:
            The `Source`, with mean and std of its training images; and a `Comparison`.
        """
        comparison = self._compare(source)
        source, _ = without_copies(source)
        taken = {name: [] for name in SPLITS}  # pairs of the split where an image lies, and its place there
        for name in SPLITS:
            for place, digest in enumerate(getattr(source, name).digests):
                if digest in self.images:
                    taken[self.images[digest][0]].append((name, place))
                elif keep_new:
                    taken[name].append((name, place))
        changed = {
            name: _gather(source, places)
            for name, places in taken.items()
            if places != [(name, place) for place in range(len(getattr(source, name)))]
        }
        if "train" in changed and len(changed["train"]):
            changed["mean"], changed["std"] = pictures.mean_and_std(changed["train"].images)
        return dataclasses.replace(source, **changed), comparison

    def _compare(self, source):
        labels = {}
        for name in SPLITS:
            split = getattr(source, name)
            for digest, label in zip(split.digests, split.labels):
                labels.setdefault(digest, set()).add(source.class_names[label])
        return Comparison(
            missing=len(self.images.keys() - labels.keys()),
            new=len(labels.keys() - self.images.keys()),
            relabelled=sum(digest in labels and label not in labels[digest] for digest, (_, label) in self.images.items()),
        )


def without_copies(source):
    """Leaves an image out of validation and test where a copy of its file lies in training, and out of test where one lies in
    validation.

    Args:
        source: a `Source` whose splits have digests.

    Returns:
        The `Source`, and how many images were left out.
    """
    seen, changed, left_out = set(), {}, 0
    for name in SPLITS:
        split = getattr(source, name)
        places = [place for place, digest in enumerate(split.digests) if digest not in seen]
        seen.update(split.digests)
        if len(places) < len(split):
            changed[name] = split.take(places)
            left_out += len(split) - len(places)
    return dataclasses.replace(source, **changed), left_out


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
    return Split(images, labels, tuple(splits[name].digests[place] for name, place in places))
