"""Builds `Source`s of a folder without files, for tests of which image is in which split."""

import numpy as np

from cvt_keras.data.pixels import mean_and_std
from cvt_keras.data.split import Source, Split


def _split(images):
    """A `Split` of images such as `"7a"`: digest 7, all pixels 7, class a.

    `"7'a"` is another file with the same pixels.
    """
    colours = [image[:-1].rstrip("'") for image in images]
    pixels = np.tile(np.array(colours, "uint8")[:, None, None, None], (1, 2, 2, 3)).reshape(-1, 2, 2, 3)
    labels = np.array(["ab".index(image[-1]) for image in images], "int64")
    return Split(pixels, labels, tuple(image[:-1] for image in images), tuple(f"pixels {colour}" for colour in colours))


def small_source(train, validation, test, split_folders=("train",)):
    """A `Source` with digests; a split is a string such as `"1a 2b"`."""
    splits = [_split(images.split()) for images in (train, validation, test)]
    return Source("folder", *splits, ("a", "b"), *mean_and_std(splits[0].images), split_folders=split_folders)


def written(source):
    """The splits of a source as strings, in the format of `small_source`."""
    return [
        " ".join(f"{digest}{'ab'[label]}" for digest, label in zip(split.digests, split.labels))
        for split in (source.train, source.validation, source.test)
    ]
