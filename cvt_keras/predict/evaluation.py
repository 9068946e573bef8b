"""Evaluates a classifier on a folder of images with a folder for each class, and makes a page of the results."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import tempfile
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cvt_keras import runs
from cvt_keras.data import file_types, image_files, images
from cvt_keras.data.folder import pixel_digest
from cvt_keras.data.listing import first_names
from cvt_keras.data.record import EARLIER, ImageRecord
from cvt_keras.errors import DataError, ImageError

if TYPE_CHECKING:
    from cvt_keras.predict.classifier import Classifier

TRAINED_ON = "used to train this run, or one that its weights come from"
MOST_LISTED = 200  # mistakes on the page


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The results of a classifier on labelled images.

    Args:
        class_names: in the order of the network's outputs.
        scores: top-1, cross-entropy and so on; a dict as `test` in report.json.
        per_class: a dict per class, as in report.json.
        confusion: number of images by label and prediction.
        mistakes: a dict per misclassified image, the highest cross-entropy first: `path`, `label`, `prediction`, and the
            `probability` of the prediction.
        left_out: reason -> number of images that were not evaluated.
        warnings: a sentence each.
        unreadable: pairs of a path and the reason why it can't be read.
    """

    class_names: tuple[str, ...]
    scores: dict[str, Any]
    per_class: list[dict[str, Any]]
    confusion: list[list[int]]
    mistakes: list[dict[str, Any]]
    left_out: dict[str, int]
    warnings: tuple[str, ...]
    unreadable: tuple[tuple[str, str], ...]


class _Image(NamedTuple):
    path: Path
    label: int
    error: ImageError | None  # why the path can't be read


def evaluate(
    classifier: Classifier,
    folder: str | Path,
    page: str | Path | None = None,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda answers, n: answers,
) -> Evaluation:
    """Evaluates a classifier on images in a folder for each class.

    Images that the classifier's run was trained on are left out, by the run's images.csv, and counted. So are copies of
    them, also with other metadata.

    Args:
        classifier: what `load_run` returns.
        folder: Each folder in it has the name of a class; classes may be missing.
        page: the HTML file to write, or `None`.
        progress: wraps the iterable of answers, of which there are as many as its second argument.

    Returns:
        An `Evaluation`.

    Raises:
        DataError: if `folder` is no folder, has a folder that is not a class, or no image is left to evaluate.
        RunError: if images.csv is damaged.
    """
    from cvt_keras.report import metrics

    files, stray = _list_files(_existing(folder), classifier.class_names)
    record = None if classifier.run_dir is None else ImageRecord.read(classifier.run_dir / runs.IMAGES)
    left_out: collections.Counter[str] = collections.Counter()
    if stray:
        left_out["outside the class folders"] = stray
    validation, unreadable = set(), []

    def read(image, reserve):
        if image.error:
            return image.error
        try:
            data = image_files.read(image.path)
            pixels = images.decode(data, reserve)
        except ImageError as error:
            return error
        split = record and record.split_of(hashlib.sha256(data).hexdigest(), pixel_digest(pixels))
        if split == "validation":
            validation.add(image.path)
        return TRAINED_ON if split in ("train", EARLIER) else pixels

    evaluated, rows = [], []
    for image, answer in progress(classifier.answers(files, read), len(files)):
        if isinstance(answer, ImageError):
            unreadable.append((str(image.path), str(answer)))
        elif isinstance(answer, str):
            left_out[answer] += 1
        else:
            evaluated.append(image)
            rows.append(answer)
    if unreadable:
        left_out["can't be read"] = len(unreadable)
    if not evaluated:
        reasons = "; ".join(f"{reason}: {n:,}" for reason, n in left_out.items()) or "it is empty"
        raise DataError(f"`folder` has no image to evaluate on. Received: {folder} ({reasons})", hint="Choose another folder")
    labels = np.array([image.label for image in evaluated])
    logits, probabilities = map(np.stack, zip(*rows))
    if classifier.model is not None:  # an exported file is calibrated already
        logits = classifier.calibration.scaled(logits)
    warnings = []
    if record is None:
        warnings.append("It is not known which images the network was trained on, so some of these may be among them.")
    if validation:
        are = "is a validation image" if len(validation) == 1 else "are validation images"
        warnings.append(f"{len(validation):,} of these images {are}, on which the run chose its best epoch.")
    names, predicted = classifier.class_names, metrics.predictions(logits)
    result = Evaluation(
        class_names=names,
        scores=metrics.evaluate(logits, labels),
        per_class=metrics.per_class(logits, labels, names),
        confusion=metrics.confusion(logits, labels, len(names)).tolist(),
        mistakes=[
            {
                "path": str(evaluated[i].path),
                "label": names[labels[i]],
                "prediction": names[predicted[i]],
                "probability": round(float(probabilities[i].max()), 6),
            }
            for i in metrics.worst(logits, labels, len(labels))
        ],
        left_out=dict(left_out),
        warnings=tuple(warnings),
        unreadable=tuple(unreadable),
    )
    if page is not None:
        _write_page(Path(page), classifier, Path(folder), result, [image.path for image in evaluated], logits, labels)
    return result


def _existing(folder: str | Path) -> Path:
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise DataError(f"`folder` must be a folder. Received: {folder}", hint="Use one with a folder of images per class")
    return path


def _list_files(folder, class_names):
    """Lists the files of each class.

    Returns:
        A list of `_Image`, and the number of images outside the folders of classes.
    """
    labels = {unicodedata.normalize("NFC", name): label for label, name in enumerate(class_names)}
    files, unknown, stray = [], [], 0
    for path in sorted(folder.iterdir()):
        if file_types.is_hidden(path.name) or file_types.is_clutter(path.name):
            continue
        if not path.is_dir():
            stray += 1
        elif (name := unicodedata.normalize("NFC", path.name)) in labels:  # macOS may store NFD
            files += [_Image(file, labels[name], error) for file, error in image_files.within(path)]
        else:
            unknown.append(path)
    if unknown:
        known = ", ".join(class_names[:10]) + (f" and {len(class_names) - 10} more" if len(class_names) > 10 else "")
        inner = next((path for path in unknown if any(child.name in labels for child in path.iterdir())), None)
        raise DataError(
            f"`folder` has folders that are not classes of the network: {first_names(unknown)}. Its classes are {known}",
            hint=f"Use {inner}" if inner else "Rename these folders, or move them out",
        )
    return files, stray


# === The page ===


def _write_page(path, classifier, images_folder, result, paths, logits, labels):
    from cvt_keras.report import figures, metrics, page

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        plots = Path(folder) / runs.PLOTS
        plots.mkdir()
        worst = {i: _thumbnail(paths[i]) for i in metrics.worst(logits, labels, figures.MOST_WRONG_IMAGES)}
        figures.draw_results(plots, worst, logits, labels, result.class_names)
        names = (figures.CONFUSION, figures.CALIBRATION, figures.MOST_WRONG)
        page.render(
            page.TEMPLATES / "evaluation.html",
            path,
            network=str(classifier.path),
            images_folder=str(images_folder),
            most_listed=MOST_LISTED,
            evaluation=dataclasses.asdict(result),
            classes=page.classes(dataclasses.asdict(result)),
            few_images=metrics.FEW_IMAGES,
            pictures={Path(name).stem: page.picture(Path(folder), name) for name in names},
            numbered=figures.is_numbered(plots / figures.CONFUSION),
        )


def _thumbnail(path):
    """The pixels of an image, uint8 `(height, width, 3)`, with sides of at most 256."""
    from PIL import Image

    image = Image.fromarray(images.decode(image_files.read(path)))
    image.thumbnail((256, 256))
    return np.asarray(image)
