"""Keeps the splits of earlier runs, so that no image that was trained on is tested on."""

from pathlib import Path

from cvt_keras import runs
from cvt_keras.data.record import ImageRecord
from cvt_keras.data.split import SPLITS
from cvt_keras.data.verified import NOT_VERIFIED
from cvt_keras.errors import DataError, RunError


def settle(source, run_dir=None, weights=None, class_names=None):
    """Splits a folder of images like the run that is resumed, or like the run that the weights come from.

    A resumed run keeps its own images, and leaves out new ones. A run that starts from the weights of another run keeps the
    split of each image of that run, and also uses new images.

    Args:
        source: a `Source`.
        run_dir: the run folder if the run is resumed, or `None`.
        weights: the path or hub id of the weights, or `None`.
        class_names: the classes that the weights name, `()` if they name none, or `None` if unknown.

    Returns:
        The `Source`; the `ImageRecord` for the run folder; and a list of warnings. The record is `None` if `source` is not a
        folder of images, or if it is unknown which images the weights were trained on.

    Raises:
        DataError: if all images of a split are missing.
        RunError: if a record is damaged.
    """
    if source.train.digests is None:
        return source, None, []
    if run_dir and (own := ImageRecord.read(run_dir / runs.IMAGES)):
        settled, comparison = own.apply(source, keep_new=False)
        _require_images(settled, run_dir)
        return settled, own, _differences(comparison, run_dir, " New ones are left out." if comparison.new else "")
    earlier_dir, earlier, origin = _record_of(weights)
    if earlier:
        settled, comparison = earlier.apply(source)
        _require_images(settled, earlier_dir)
        return settled, ImageRecord.of_source(settled).after(earlier), _differences(comparison, earlier_dir)
    unknown = None
    if earlier_dir:
        unknown = f"{earlier_dir} has no {runs.IMAGES}, so this run gets none either"
    elif _may_have_seen(source, origin, class_names if origin == weights else None):
        unknown = f"the training images of {origin} are not recorded, so this run gets no {runs.IMAGES}"
    if unknown is None:
        return source, ImageRecord.of_source(source), []
    # A record would claim that no test image was trained on.
    return source, None, [f"{NOT_VERIFIED}: {unknown}"]


def _require_images(source, run_dir):
    for name in SPLITS:
        if not len(getattr(source, name)):
            raise DataError(
                f"the split {name} has no images: those of {run_dir} are missing",
                argument="data_dir",
                hint="Restore the images, or point --data-dir to the folder that holds them",
            )


def _record_of(weights):
    """Finds the run on a folder of images that the weights come from, through any runs in between.

    Returns:
        The run folder and its `ImageRecord`, each `None` if there is none; and the first weights outside a run, or `None`.
    """
    visited = set()
    while weights is not None and (run_dir := run_of(weights)) is not None:
        if record := ImageRecord.read(run_dir / runs.IMAGES):
            return run_dir, record, None
        try:
            recipe = runs.read_json(run_dir / runs.RECIPE)
            dataset, weights = recipe["dataset"], recipe.get("weights")
        except (OSError, RunError, LookupError, TypeError, AttributeError):
            return run_dir, None, None  # its data set is unknown, and may be a folder
        if dataset == "folder" or weights in visited:
            return run_dir, None, None
        visited.add(weights)  # the run is on another data set: continue with the weights that it started from
    return None, None, weights


def named_classes(checkpoint):
    """The class names in a `Checkpoint`, `()` if it has none; `None` without a checkpoint."""
    return None if checkpoint is None else checkpoint.preprocessing.class_names or ()


def run_of(weights):
    """The run folder that holds the weights, also through a symbolic link, or `None`."""
    if weights is None:
        return None
    path = Path(weights).expanduser()
    for candidate in (path.resolve(), path) if path.is_symlink() else (path,):
        folder = candidate if candidate.is_dir() else candidate.parent
        if any((folder / name).is_file() for name in (runs.RECIPE, runs.IMAGES)):
            return folder
    return None


def _may_have_seen(source, weights, class_names):
    """Whether weights outside a run may have been trained on images of this source.

    True if they name one of its classes, or are a `.keras` file with unknown classes.
    """
    if weights is None:
        return False
    if class_names is None:
        return Path(weights).suffix == ".keras"
    return not set(class_names).isdisjoint(source.class_names)


def _differences(comparison, run_dir, note=""):
    return [f"images differ from those of {run_dir}: {comparison}.{note}"] if comparison else []
