"""Exports a run as SavedModel, TFLite and ONNX files, and verifies each on the run's test images."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf
from tensorflow.lite.python.convert import ConverterError

from cvt_keras import environment, runs, signals
from cvt_keras.data import verified
from cvt_keras.data.images import fit
from cvt_keras.errors import DataError, ExportError, OutOfMemoryError, RunError, first_line
from cvt_keras.model import calibration_of, load_classifier, preprocessing_of
from cvt_keras.quantized.model import float_form, quantized_cvt_of
from cvt_keras.report import page
from cvt_keras.training.recipes import read_recipe

from . import onnx, saved_model, tflite
from .verify import BOUNDS, DEFAULT_FORMATS, FORMATS, LEAST_IMAGES, QUANTIZED, Artifact, batches, checked, summary, verify

IMAGES = "images.npy"
FEW_IMAGES = 100  # with fewer, one image counts for more than a point of accuracy


def export(
    run_dir: str | Path,
    formats: Sequence[str] = DEFAULT_FORMATS,
    data_dir: str | None = None,
    verify_images: int | None = None,
) -> list[Artifact]:
    """Exports a run as SavedModel, TFLite and ONNX files into `RUN/export/`, and adds their table to `report.html`.

    Verifies each file on the run's test images. For a run on a folder of images, images.csv lists them. A file that exceeds its
    bounds is in the report, but not in `RUN/export/`.

    Args:
        run_dir: the folder of a finished run.
        formats: which of `FORMATS` to write. Defaults to all but `"onnx"`, which needs further packages.
        data_dir: the folder of the run's data set; `None` means the folder in its recipe.
        verify_images: verify on this many test images; `None` means all that the run was tested on.

    Returns:
        An `Artifact` for each of `formats`; those that were not written have `passed=False`.

    Raises:
        ArgumentError: if an argument is invalid, or the Keras backend is not TensorFlow.
        MissingPackageError: for `"onnx"`, if tf2onnx or onnxruntime is not installed.
        RunError: if `run_dir` holds no finished run, is damaged, or is in use.
        DataError: if the images are missing, or none of the run's test images is among them.
        ExportError: if a file can't be written or run. Files that were verified before it are kept, and are in the report.
        OutOfMemoryError: if the network does not fit into memory.
        OSError: if a file can't be written.
    """
    run_dir = Path(run_dir)
    formats = checked(formats, verify_images)
    environment.require_backend("tensorflow")
    recipe, classifier = _read(run_dir)
    images_of_run = verified.load(
        run_dir / runs.IMAGES, recipe.dataset, data_dir or recipe.data_dir, recipe.preprocessing, recipe.pixel_cache
    )
    source = images_of_run.source
    # A classifier of version 0.1 does not store the size.
    preprocessing = preprocessing_of(classifier).replace(image_size=classifier.input_shape[1:3])
    calibration, class_names = calibration_of(classifier), preprocessing.class_names
    if class_names != tuple(source.class_names):
        raise RunError(
            f"{run_dir} was trained on other classes than {source.name} has",
            argument="data_dir",
            hint="Set --data-dir to the images that it was trained on",
        )
    for warning in images_of_run.warnings:
        _warn(warning)
    if not len(source.test):
        raise _no_images("test", run_dir)
    test = source.test.limit(recipe.test_limit).limit(verify_images)
    frame = preprocessing.crop_from if preprocessing.resize == "crop" else None
    quantized = quantized_cvt_of(classifier) is not None
    # The float formats of a quantised network use its weights without the rounding.
    networks = {"int8": classifier, "float": float_form(classifier) if quantized else classifier}
    int8_images = None
    if "int8" in formats and not quantized:  # a quantised network stores the ranges from its training
        drawn = _calibration_images(run_dir, source.train.limit(recipe.train_limit), len(class_names), recipe.seed)
        int8_images = np.concatenate(list(_resized(drawn, preprocessing)))

    folder = run_dir / runs.EXPORT
    folder.mkdir(exist_ok=True)
    artifacts = []
    if len(test) < FEW_IMAGES:
        _warn(
            f"only {len(test)} test images, too few to measure a loss of accuracy. A file passes if it differs from Keras on "
            f"fewer than {LEAST_IMAGES} of them"
        )
    with runs.lock(folder), runs.scratch(folder) as scratch:
        # In a file, as all test images may not fit into memory. The processes that verify read it too.
        with open(scratch / IMAGES, "wb") as file:
            shape = len(test), *classifier.input_shape[1:]
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            file.writelines(batch.data for batch in _resized(test.images, preprocessing))
        images = np.load(scratch / IMAGES, mmap_mode="r")
        try:
            expected = {form: _probabilities(networks[form], images) for form in {_form(name, quantized) for name in formats}}
        except tf.errors.ResourceExhaustedError as error:
            raise OutOfMemoryError(f"{run_dir / runs.MODEL} does not fit into memory") from error
        with runs.whole(folder / tflite.LABELS) as temporary:
            temporary.write_text(tflite.labels_text(class_names), encoding="utf-8")
        for name in formats:
            path = _place(folder, name)
            file = scratch / path.name
            form = _form(name, quantized)
            print(f"{name}: writing, then verifying on {len(images):,} images", flush=True)
            with signals.Held(f"TensorFlow's work on {name}"):
                _write(networks[form], class_names, name, int8_images, file)
            bounds = (QUANTIZED if form == "int8" else BOUNDS[name]).scaled_for(calibration.temperature)
            relative = path.relative_to(run_dir).as_posix()
            options = {"frame": frame, "class_names": class_names, "calibration": calibration.get_config()}
            artifact = verify(name, file, relative, scratch / IMAGES, test.labels, expected[form], bounds, **options)
            artifacts.append(artifact)
            print(f"  {summary(artifact)}", flush=True)
            if artifact.passed:
                path.parent.mkdir(parents=True, exist_ok=True)
                runs.place(file, path)
            # After each artifact, because the next may fail.
            _report(folder, artifact, images_of_run, calibration, 0 if int8_images is None else len(int8_images))
            page.write(run_dir)
    return artifacts


def _read(run_dir):
    """Reads a run's recipe and classifier."""
    runs.require_finished(run_dir)
    recipe = read_recipe(run_dir)
    return recipe, load_classifier(run_dir / runs.MODEL)


def _calibration_images(run_dir, train, num_classes, seed):
    """Training images that calibrate int8, as they are stored."""
    if not len(train):
        raise _no_images("training", run_dir)
    return tflite.calibration_images(train, num_classes, seed)


def _no_images(split, run_dir):
    return DataError(
        f"none of the {split} images of {run_dir} was found",
        argument="data_dir",
        hint="Set --data-dir to the folder that has them; files may be moved and renamed, but their pixels must not change",
    )


def _warn(text):
    print(f"WARNING: {text}", file=sys.stderr, flush=True)


def _form(name, quantized):
    """The form of the network that an artifact is converted from and compared with."""
    return "int8" if name == "int8" and quantized else "float"


def _write(classifier, class_names, name, int8_images, file):
    try:
        if name == "saved_model":
            saved_model.write(classifier, class_names, file)
        elif name == "onnx":
            file.write_bytes(onnx.convert(classifier, class_names))
        else:
            file.write_bytes(tflite.convert(classifier, class_names, name, int8_images))
    except (tf.errors.OpError, ConverterError) as error:  # OpError also means a full disk or memory
        raise ExportError(f"{name} can't be written: {first_line(error)}") from error


def _probabilities(classifier, images):
    logits = [classifier.predict_on_batch(batch.astype("float32")) for batch in batches(images)]
    return calibration_of(classifier).probabilities(np.concatenate(logits))


def _resized(images, preprocessing):
    """Yields images in batches at the network's size, as validation sees them: uint8 `(batch, height, width, 3)`."""
    for batch in (image[None] for image in images) if None in images.shape else batches(images):
        yield fit(batch, preprocessing).numpy()


def _place(folder, name):
    if name == "onnx":
        return folder / "onnx" / "model.onnx"
    if name != "saved_model":
        return folder / "tflite" / f"{name}.tflite"
    versions = [int(path.name) for path in (folder / name).glob("*") if path.name.isdecimal()]
    return folder / name / str(max(versions, default=0) + 1)


def _report(folder, artifact, images_of_run, calibration, calibration_images):
    """Adds an artifact's row to the report, or replaces it. Keeps the other rows, also those of earlier exports."""
    path = folder / runs.REPORT
    try:
        report = runs.read_json(path) if path.exists() else {}
        rows = {row["name"]: row for row in report.get("artifacts", ())}
    except (RunError, LookupError, TypeError, AttributeError):
        report, rows = {}, {}  # damaged: start a new one
    rows[artifact.name] = dataclasses.asdict(artifact)
    report |= {
        "artifacts": [rows[name] for name in FORMATS if name in rows],
        "dataset": images_of_run.source.name,
        "data_note": images_of_run.source.note,
        "held_out": images_of_run.held_out,
        "held_out_note": " ".join(filter(None, (images_of_run.unverified, *images_of_run.notes))),
        "calibration": calibration.get_config(),
        "versions": environment.versions(),
    }
    if artifact.name == "int8":
        report["calibration_images"] = calibration_images
    runs.write_json(path, report)
