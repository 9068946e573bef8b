"""images.csv: which images a run trained, validated and tested on, so that no later test uses an image that it trained on."""

import csv
import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cvt_keras.data.pixels import mean_and_std
from cvt_keras.data.split import SPLITS
from cvt_keras.errors import RunError

# An image that is no longer in the folder, but that the weights which the run started from were trained on.
EARLIER = "earlier"
COLUMNS = ("digest", "split", "label", "pixels")


class Image(NamedTuple):
    """An image in a record.

    Args:
        split: one of `SPLITS`, or `EARLIER`.
        label: the name of its class.
        pixels: digest of its decoded pixels; see `Split`.
    """

    split: str
    label: str
    pixels: str


@dataclass(frozen=True)
class Comparison:
    """How the images of a source differ from those of a record. Copies of a file count once.

    Args:
        missing: images that are in the record only.
        new: images that are in the source only.
        relabelled: images that are now in the folder of another class.
        moved: images that are in the folder of another split than their split in the record.
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
        # Files with the same pixels are the same image, as after an edit of metadata. If one was trained on, that counts: it
        # comes last in the dict.
        order = ("test", "validation", EARLIER, "train")
        ordered = sorted(self.images.values(), key=lambda image: order.index(image.split))
        object.__setattr__(self, "_splits", {image.pixels: image.split for image in ordered})

    @classmethod
    def of(cls, splits, class_names):
        """The record of a run's splits.

        Args:
            splits: `{name: Split}` with digests, before any limit: an image that is not recorded could change its split later.
            class_names: in the order of the labels.
        """
        images = {}
        for name, split in splits.items():
            for digest, label, pixels in zip(split.digests, split.labels, split.pixels):
                images[digest] = Image(name, class_names[label], pixels)
        return cls(images)

    @classmethod
    def of_source(cls, source):
        """The record of the splits of a `Source`."""
        return cls.of({name: getattr(source, name) for name in SPLITS}, source.class_names)

    def after(self, earlier):
        """Adds, as `EARLIER`, the training images of an earlier run that this record lacks: the weights have seen them.

        Args:
            earlier: the `ImageRecord` of the run that the weights come from.
        """
        missing = {
            digest: image._replace(split=EARLIER)
            for digest, image in earlier.images.items()
            if image.split in ("train", EARLIER) and self.split_of(digest, image.pixels) is None
        }
        return ImageRecord(missing | self.images)

    def split_of(self, digest, pixels):
        """The split of an image, looked up by digest and then by pixels; `None` if the record does not have it."""
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
        """Reads a file that `write` wrote. Returns `None` if it does not exist, as in runs of older versions.

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
                raise ValueError(f"it has an unknown split, {min(unknown)}")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, csv.Error) as error:
            raise RunError(f"{path} is damaged: {error}", hint="Remove it: held-out images are then not verified") from error
        return cls(images)

    def apply(self, source, keep_new=True):
        """Moves each image of a source to the split that it has in the record.

        Args:
            source: a `Source` whose splits have digests and share no pixels.
            keep_new: whether to keep images that the run did not have. An `EARLIER` image then goes to the train split; others
                stay in their split.

        Returns:
            The `Source`, with mean and std of its training images; and a `Comparison`.
        """
        members = {name: [] for name in SPLITS}  # pairs (name of the split in `source`, index there)
        for name in SPLITS:
            split = getattr(source, name)
            for i, recorded in enumerate(map(self.split_of, split.digests, split.pixels)):
                if recorded in SPLITS:
                    members[recorded].append((name, i))
                elif keep_new:
                    members["train" if recorded == EARLIER else name].append((name, i))
        changed = {
            name: _gather(source, pairs)
            for name, pairs in members.items()
            if pairs != [(name, i) for i in range(len(getattr(source, name)))]
        }
        if "train" in changed and len(changed["train"]):
            changed["mean"], changed["std"] = mean_and_std(changed["train"].images)
        return dataclasses.replace(source, **changed), self._compare(source)

    def _compare(self, source):
        labels, folders, new = {}, {}, set()  # the dicts have both digests and pixels as keys, which never clash
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
    """The split whose folder holds the images of `split`: held-out images are in the folder of the train split."""
    return split if split in source.split_folders else "train"


def _gather(source, pairs):
    """A `Split` of the images at `pairs` (name of a split, index), sorted as `folder.load` sorts, by digest and label."""
    splits = [getattr(source, name) for name in SPLITS]
    everything = splits[0].followed_by(*splits[1:])
    starts = dict(zip(SPLITS, np.cumsum([0, *map(len, splits)])))
    rows = [starts[name] + i for name, i in pairs]
    return everything.take(np.array(sorted(rows, key=lambda row: (everything.digests[row], everything.labels[row])), "int64"))
