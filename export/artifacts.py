"""Writes a run's model in the forms that others run, each verified on real images."""

import dataclasses
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from tensorflow.lite.python.convert import ConverterError

from cvt_keras import environment, runs, signals
from cvt_keras.data import verified
from cvt_keras.data.images import stretch
from cvt_keras.errors import DataError, ExportError, OutOfMemoryError, RunError, first_line
from cvt_keras.model import preprocessing_of
from cvt_keras.quantized.model import float_form, quantized_cvt_of
from cvt_keras.report import page
from cvt_keras.training.recipes import read_recipe

from . import saved_model, tflite
from .verify import BOUNDS, FORMATS, LEAST_IMAGES, QUANTIZED, Artifact, batches, checked, summary, verify

IMAGES = "images.npy"
FEW_IMAGES = 100  # one of them is a whole point of accuracy


def export(
    run_dir: str | Path,
    formats: Sequence[str] = FORMATS,
    data_dir: str | None = None,
    verify_images: int | None = None,
) -> list[Artifact]:
    """Writes a run as SavedModel and TFLite files into `RUN/export/`, and their table into `report.html`.

    Each file is verified on the run's test images; of a folder, on those that the run's images.csv names. A file that is out of
    its bounds is in the report, but is not put into `RUN/export/`; nor is one that can't be run.

    Args:
        run_dir: the folder of a finished run.
        formats: what to write, of `FORMATS`.
        data_dir: where the run's data set lies now; `None` means where it was.
        verify_images: the number of test images to verify on; `None` means all that the run was tested on.

    Returns:
        An `Artifact` for each of `formats`; those that were not written have `passed=False`.

    Raises:
        ArgumentError: for an argument that can't be, or on another Keras backend than TensorFlow.
        RunError: if `run_dir` holds no finished run, is damaged, or is in use.
        DataError: if the images can't be had, or none of the run's test images is among them.
        ExportError: if a file can't be made or run. Files that were verified before it are kept, and are in the report.
        OutOfMemoryError: if the network does not fit into the memory.
        OSError: if a file can't be written.
    """
    run_dir = Path(run_dir)
    formats = checked(formats, verify_images)
    environment.require_backend("tensorflow")
    recipe, classifier = _read(run_dir)
    images_of_run = verified.load(run_dir / runs.IMAGES, recipe.dataset, data_dir or recipe.data_dir, recipe.image_size)
    source = images_of_run.source
    class_names = preprocessing_of(classifier).class_names
    if class_names != tuple(source.class_names):
        raise RunError(
            f"{run_dir} was trained on other classes than those of {source.name}",
            argument="data_dir",
            hint="Give the images that it was trained on by --data-dir",
        )
    for warning in images_of_run.warnings:
        _warn(warning)
    if not len(source.test):
        raise _gone("test", run_dir)
    test = source.test.limit(recipe.test_limit).limit(verify_images)
    images = _pixels(test.images, recipe.image_size)
    quantized = quantized_cvt_of(classifier) is not None
    # Float files of a quantised network are made of its weights without the roundings.
    networks = {"int8": classifier, "float": float_form(classifier) if quantized else classifier}
    try:
        expected = {form: _probabilities(networks[form], images) for form in {_form(name, quantized) for name in formats}}
    except tf.errors.ResourceExhaustedError as error:
        raise OutOfMemoryError(f"{run_dir / runs.MODEL} does not fit into the memory") from error
    calibration = None
    if "int8" in formats and not quantized:  # a quantised network holds the ranges that its training found
        calibration = _calibration(run_dir, source.train.limit(recipe.train_limit), len(class_names), recipe)

    folder = run_dir / runs.EXPORT
    folder.mkdir(exist_ok=True)
    artifacts = []
    if len(images) < FEW_IMAGES:
        _warn(
            f"only {len(images)} test images, too few to measure a loss of accuracy. A file passes if fewer than "
            f"{LEAST_IMAGES} of them differ"
        )
    with runs.lock(folder), runs.scratch(folder) as scratch:
        np.save(scratch / IMAGES, images)
        with runs.whole(folder / tflite.LABELS) as aside:
            aside.write_text(tflite.labels_text(class_names), encoding="utf-8")
        for name in formats:
            file, path = scratch / name, _place(folder, name)
            form = _form(name, quantized)
            print(f"{name}: writing, then verifying on {len(images):,} images", flush=True)
            with signals.Held(f"TensorFlow's work on {name}"):
                _write(networks[form], class_names, name, calibration, file)
            bounds = QUANTIZED if form == "int8" else BOUNDS[name]
            relative = path.relative_to(run_dir).as_posix()
            artifact = verify(name, file, relative, scratch / IMAGES, test.labels, expected[form], bounds)
            artifacts.append(artifact)
            print(f"  {summary(artifact)}", flush=True)
            if artifact.passed:
                path.parent.mkdir(parents=True, exist_ok=True)
                runs.place(file, path)
            # After each artifact, as the next one may fail.
            _report(folder, artifact, images_of_run, 0 if calibration is None else len(calibration))
            page.write(run_dir)
    return artifacts


def _read(run_dir):
    """A run's recipe and its classifier."""
    runs.require_finished(run_dir)
    recipe = read_recipe(run_dir)
    if not zipfile.is_zipfile(run_dir / runs.MODEL):
        raise RunError(f"{run_dir / runs.MODEL} is damaged", hint="Remove it, and resume the run: it is written again")
    try:
        classifier = keras.saving.load_model(run_dir / runs.MODEL, compile=False)
        preprocessing_of(classifier)
    except MemoryError:
        raise
    except Exception as error:
        raise RunError(f"{run_dir / runs.MODEL} can't be read: {first_line(error)}") from error
    return recipe, classifier


def _calibration(run_dir, train, num_classes, recipe):
    """Training images that set the ranges of int8, squares of the network's size."""
    if not len(train):
        raise _gone("training", run_dir)
    return _pixels(tflite.calibration_images(train, num_classes, recipe.seed), recipe.image_size)


def _gone(split, run_dir):
    return DataError(
        f"none of the {split} images of {run_dir} is found",
        argument="data_dir",
        hint="Name the folder where they are now with --data-dir; files may have been moved and renamed, but not changed",
    )


def _warn(text):
    print(f"WARNING: {text}", file=sys.stderr, flush=True)


def _form(name, quantized):
    """Which form of a network an artifact is made of, and compared with."""
    return "int8" if name == "int8" and quantized else "float"


def _write(classifier, class_names, name, calibration, file):
    try:
        if name == "saved_model":
            saved_model.write(classifier, class_names, file)
        else:
            file.write_bytes(tflite.convert(classifier, class_names, name, calibration))
    except (tf.errors.OpError, ConverterError) as error:  # also for a full disk or memory
        raise ExportError(f"{name} can't be made: {first_line(error)}") from error


def _probabilities(classifier, images):
    logits = [classifier.predict_on_batch(batch.astype("float32")) for batch in batches(images)]
    return tf.nn.softmax(np.concatenate(logits)).numpy()


def _pixels(images, size):
    """uint8 squares of the network's size, as training saw them."""
    return np.concatenate([stretch(batch, size).numpy() for batch in batches(images)])


def _place(folder, name):
    if name != "saved_model":
        return folder / "tflite" / f"{name}.tflite"
    versions = [int(path.name) for path in (folder / name).glob("*") if path.name.isdecimal()]
    return folder / name / str(max(versions, default=0) + 1)


def _report(folder, artifact, images_of_run, calibration_images):
    """Puts an artifact's row into the report. The rows of other artifacts stay, also those of earlier exports."""
    path = folder / runs.REPORT
    try:
        report = runs.read_json(path) if path.exists() else {}
        rows = {row["name"]: row for row in report.get("artifacts", ())}
    except (RunError, LookupError, TypeError, AttributeError):
        report, rows = {}, {}  # it was damaged
    rows[artifact.name] = dataclasses.asdict(artifact)
    report |= {
        "artifacts": [rows[name] for name in FORMATS if name in rows],
        "dataset": images_of_run.source.name,
        "data_note": images_of_run.source.note,
        "held_out": images_of_run.held_out,
        "held_out_note": " ".join(filter(None, (images_of_run.unverified, *images_of_run.notes))),
        "versions": environment.versions(),
    }
    if artifact.name == "int8":
        report["calibration_images"] = calibration_images
    runs.write_json(path, report)
