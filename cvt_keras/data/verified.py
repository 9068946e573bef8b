"""Loads the images of a finished run in its splits, so that a later command tests on no image that was trained on."""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

from cvt_keras.data import folder, sources
from cvt_keras.data.cache import Cache
from cvt_keras.data.record import ImageRecord
from cvt_keras.data.split import Source
from cvt_keras.errors import DataError

# What reports say: whether it is certain that no test image was trained on.
VERIFIED, NOT_VERIFIED = "verified", "held-out images not verified"


@dataclass(frozen=True)
class RunImages:
    """The images of a run.

    Args:
        source: a `Source`. For a folder, it has only the images that the run had.
        unverified: why some test images may have been trained on; empty if it is certain that none was.
        notes: other sentences for the user.
    """

    source: Source
    unverified: str = ""
    notes: tuple[str, ...] = ()

    @property
    def held_out(self):
        """`VERIFIED` or `NOT_VERIFIED`."""
        return NOT_VERIFIED if self.unverified else VERIFIED

    @property
    def warnings(self):
        """Lines for the terminal."""
        return [*([f"{NOT_VERIFIED}. {self.unverified}"] if self.unverified else []), *self.notes]


def load(record_file, dataset, data_dir, preprocessing, cache):
    """Loads the images of a run.

    Files that can't be read are left out, as they may be new ones, which are not used anyway.

    Args:
        record_file: the run's images.csv, which runs of older versions lack.
        dataset, data_dir, preprocessing, cache: as for `sources.load`.

    Returns:
        A `RunImages`. Any of its splits may be empty.

    Raises:
        RunError: if the record is damaged.
        And what `sources.load` raises.
    """
    record = ImageRecord.read(record_file)
    load_source = functools.partial(sources.load, dataset, data_dir, preprocessing, skip_broken=True, record=record)
    note = ()
    try:
        source = load_source(cache=cache)
    except DataError as error:
        if error.argument != "cache_dir":
            raise
        # The run may come from another machine.
        source, note = load_source(cache=Cache("memory")), (f"{error.summary}. The images are decoded for this command only.",)
    images = settle(source, record, Path(record_file).name)
    return dataclasses.replace(images, notes=(*images.notes, *note))


def settle(source, record, name):
    """Removes from a source the images that a run did not have, and moves the others to the run's splits.

    Args:
        source: a `Source`.
        record: the `ImageRecord` of the run, or `None`.
        name: file name of the record, for messages.

    Returns:
        A `RunImages`.
    """
    if source.train.digests is None:  # not a folder: its splits never change
        return RunImages(source)
    notes = []
    if broken := sum(n for reason, n in source.left_out.items() if reason.startswith(folder.BROKEN)):
        notes.append(f"Files that can't be read are left out: {broken:,}.")
    if record is None:
        reason = (
            f"The run has no {name}, so some test images may have been trained on: by this run, if its folder has changed "
            "since, or by the run that its weights come from."
        )
        return RunImages(source, reason, tuple(notes))
    source, comparison = record.apply(source, keep_new=False)
    if comparison:
        new = " New ones are left out." if comparison.new else ""
        notes.insert(0, f"Images differ from those of the run: {comparison}.{new}")
    return RunImages(source, notes=tuple(notes))
