"""Which images are held out: those that a record says, so that nothing that was trained on is tested on."""

from pathlib import Path

from cvt_keras import runs
from cvt_keras.data.record import SPLITS, ImageRecord, without_copies
from cvt_keras.errors import DataError, RunError


def settle(source, run_dir=None, weights=None):
    """Splits a folder of images as the run did before, or the run that the weights come from.

    A run that is resumed keeps its own images, and new ones are left out. A run that starts from another run's weights also
    uses new images, and each image that the other run had stays in its split.

    Args:
        source: a `Source`.
        run_dir: the run folder, if the run is resumed.
        weights: where the weights come from, or `None`.

    Returns:
        The `Source`; the `ImageRecord` for the run folder, or `None` for a data set that is no folder; and warnings, a
        sentence each.

    Raises:
        DataError: if the images of a split are all gone.
        RunError: if a record is damaged.
    """
    if source.train.digests is None:
        return source, None, []
    own = run_dir and ImageRecord.read(run_dir / runs.IMAGES)
    earlier_dir = run_of(weights)
    earlier = earlier_dir and ImageRecord.read(earlier_dir / runs.IMAGES)
    settled, copies = without_copies(source)
    warnings = []
    if copies:
        warnings.append(f"images left out of validation or test, as a copy of each is in another split: {copies:,}")
    if earlier_dir and earlier is None and _trained_on_folder(earlier_dir):
        warnings.append(f"held-out images not verified: {earlier_dir} has no {runs.IMAGES}")
    if own:
        settled, comparison = own.apply(settled, keep_new=False)
        left_out = ", which are left out" if comparison.new else ""
        warnings += _differences(comparison, run_dir, left_out)
    elif earlier:
        settled, comparison = earlier.apply(settled)
        warnings += _differences(comparison, earlier_dir)
    for name in SPLITS:
        if len(getattr(settled, name)):
            continue
        if own or earlier:
            reason = f"those of {run_dir if own else earlier_dir} are gone"
            hint = "Bring the images back, or name the folder where they are with --data-dir"
        else:
            reason, hint = (
                "each is a copy of one in another split",
                "Give that split images of its own, or move its folder away",
            )
        raise DataError(f"no image is left for the split {name}: {reason}", argument="data_dir", hint=hint)
    if own:
        return settled, own, warnings
    record = ImageRecord.of_source(settled)
    return settled, record.after(earlier) if earlier else record, warnings


def run_of(weights):
    """The run folder in which the weights lie, or `None`."""
    if weights is None:
        return None
    path = Path(weights).expanduser()
    folder = path if path.is_dir() else path.parent
    return folder if any((folder / name).is_file() for name in (runs.RECIPE, runs.IMAGES)) else None


def _trained_on_folder(run_dir):
    """Whether a run without a record was on a folder of images; if that can't be told, it may have been."""
    try:
        return runs.read_json(run_dir / runs.RECIPE)["dataset"] == "folder"
    except (OSError, RunError, LookupError, TypeError):
        return True


def _differences(comparison, run_dir, more=""):
    return [f"images differ from those of {run_dir}: {comparison}{more}"] if comparison else []
