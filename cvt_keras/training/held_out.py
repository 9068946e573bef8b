"""Which images are held out: those that a record says, so that nothing that was trained on is tested on."""

from pathlib import Path

from cvt_keras import runs
from cvt_keras.data.record import SPLITS, ImageRecord
from cvt_keras.data.verified import NOT_VERIFIED
from cvt_keras.errors import DataError, RunError


def settle(source, run_dir=None, weights=None, class_names=None):
    """Splits a folder of images as the run did before, or the run that the weights come from.

    A run that is resumed keeps its own images, and new ones are left out. A run that starts from another run's weights also
    uses new images, and each image that the other run had stays in its split.

    Args:
        source: a `Source`.
        run_dir: the run folder, if the run is resumed.
        weights: where the weights come from, or `None`.
        class_names: the classes that the weights name, `()` if they name none, or `None` if that isn't known.

    Returns:
        The `Source`; the `ImageRecord` for the run folder, or `None` if there must be none: for a data set that is no folder,
        and where it isn't known what the weights were trained on; and warnings, a sentence each.

    Raises:
        DataError: if the images of a split are all gone.
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
        unknown = f"{earlier_dir} has no {runs.IMAGES}"
    elif _may_have_seen(source, origin, class_names if origin == weights else None):
        unknown = f"there is no {runs.IMAGES} beside {origin}"
    if unknown is None:
        return source, ImageRecord.of_source(source), []
    # A record would say that no test image was trained on.
    return source, None, [f"{NOT_VERIFIED}: {unknown}, so that this run gets none"]


def _require_images(source, run_dir):
    for name in SPLITS:
        if not len(getattr(source, name)):
            raise DataError(
                f"no image is left for the split {name}: those of {run_dir} are gone",
                argument="data_dir",
                hint="Bring the images back, or name the folder where they are with --data-dir",
            )


def _record_of(weights):
    """What the weights were trained on.

    Returns:
        The run on a folder of images from which they come, and its `ImageRecord`, each `None` if there is none; and the first
        weights that lie in no run, or `None`.
    """
    passed = set()
    while weights is not None and (run_dir := run_of(weights)) is not None:
        if record := ImageRecord.read(run_dir / runs.IMAGES):
            return run_dir, record, None
        try:
            recipe = runs.read_json(run_dir / runs.RECIPE)
            dataset, weights = recipe["dataset"], recipe.get("weights")
        except (OSError, RunError, LookupError, TypeError, AttributeError):
            return run_dir, None, None  # it may have been on a folder
        if dataset == "folder" or weights in passed:
            return run_dir, None, None
        passed.add(weights)  # of a run on another data set: what its own weights have seen counts
    return None, None, weights


def named_classes(checkpoint):
    """The classes that a `Checkpoint` names, `()` if it names none; `None` without a checkpoint."""
    return None if checkpoint is None else checkpoint.preprocessing.class_names or ()


def run_of(weights):
    """The run folder in which the weights lie, or a link to them leads, or `None`."""
    if weights is None:
        return None
    path = Path(weights).expanduser()
    for place in (path.resolve(), path) if path.is_symlink() else (path,):
        folder = place if place.is_dir() else place.parent
        if any((folder / name).is_file() for name in (runs.RECIPE, runs.IMAGES)):
            return folder
    return None


def _may_have_seen(source, weights, class_names):
    """Whether weights that lie in no run may have been trained on images of a source: they name one of its classes, or they are
    a `.keras` file of which the names are not known."""
    if weights is None:
        return False
    if class_names is None:
        return Path(weights).suffix == ".keras"
    return not set(class_names).isdisjoint(source.class_names)


def _differences(comparison, run_dir, more=""):
    return [f"images differ from those of {run_dir}: {comparison}.{more}"] if comparison else []
