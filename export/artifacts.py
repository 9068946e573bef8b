"""Writes a run's model in the forms that others run, each checked on real images: python -m export RUN"""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated, Literal, get_args

from cvt_keras.errors import DataError, NoRunError, RunError

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before TensorFlow is imported: its notes would hide what is said here

try:
    import keras
    import numpy as np
    import tensorflow as tf
    import tyro
    from cvt_keras.export import saved_model, tflite
    from cvt_keras.export.verify import BOUNDS, QUANTIZED, batches, verify
    from tensorflow.lite.python.convert import ConverterError

    from cvt_keras import environment, runs, signals
    from cvt_keras.data import sources
    from cvt_keras.errors import RecipeError
    from cvt_keras.model import cvt_of
    from cvt_keras.quantized.model import float_form, quantized_cvt_of
    from cvt_keras.report import page
    from cvt_keras.training import Recipe
except (ImportError, ValueError) as error:  # ValueError: a KERAS_BACKEND that there is not
    sys.exit(f"export: {error}. Is all of requirements.txt installed, and KERAS_BACKEND unset?")

IMAGES = "images.npy"
Format = Literal["saved_model", "float32", "float16", "dynamic_int8", "int8"]


@dataclasses.dataclass(frozen=True)
class Arguments:
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run folder."""
    formats: tuple[Format, ...] = get_args(Format)
    """What to write."""
    data_dir: str | None = None
    """Where the run's data set lies now, if not where it was."""
    verify_images: int | None = None
    """Check on the first N test images only."""


def export(run_dir, formats=tuple(BOUNDS), data_dir=None, verify_images=None):
    """Writes `RUN/export/` and the table on `report.html`.

    What does not run, or not within its bounds, is not put in its place; the report tells of it all the same.

    Args:
        run_dir: of a finished run.
        formats: names in `BOUNDS`.
        data_dir: where the run's data set lies now; `None` means where it was.
        verify_images: how many test images to check on; `None` means all that the run was tested on.

    Returns:
        The `Artifact`s, in the order of `formats`.

    Raises:
        RunError: for a folder that is no finished run, or in use; or on another of Keras' backends than TensorFlow.
        DataError: if its images can't be had.
        RuntimeError: if an artifact can't be made, or does not run. What was done before it stands, and is in the report.
        OSError: if a file can't be written.
    """
    run_dir = Path(run_dir)
    if keras.config.backend() != "tensorflow":
        raise RunError(f"exports need KERAS_BACKEND=tensorflow. Received: {keras.config.backend()}")
    recipe, classifier = _read(run_dir)
    source = sources.load(recipe.dataset, data_dir or recipe.data_dir, recipe.image_size)
    class_names = list(source.class_names)
    if class_names != _network(classifier).preprocessing["class_names"]:
        raise RunError(f"{run_dir} knows other classes than {source.name}: give --data-dir the data that it was trained on")
    test = source.test.limit(recipe.test_limit).limit(verify_images)
    images = _pixels(test.images, recipe.image_size)
    quantized = quantized_cvt_of(classifier) is not None
    # Of a run trained for quantisation only the integer file has its roundings.
    forms = {"int8": classifier, "float": float_form(classifier) if quantized else classifier}
    try:
        asked = {_form(name, quantized) for name in formats}
        expected = {form: _probabilities(forms[form], images) for form in asked}
    except tf.errors.ResourceExhaustedError as error:
        raise MemoryError(f"the memory is too small for {run_dir / runs.MODEL}") from error
    calibration = None
    if not quantized:  # else its ranges are what training found
        train = source.train.limit(recipe.train_limit)
        calibration = _pixels(tflite.calibration_images(train, len(class_names), recipe.seed), recipe.image_size)
    folder = run_dir / runs.EXPORT
    folder.mkdir(exist_ok=True)
    artifacts = []
    with runs.lock(folder), runs.scratch(folder) as scratch:
        np.save(scratch / IMAGES, images)
        with runs.whole(folder / tflite.LABELS) as aside:
            aside.write_text(tflite.labels_text(class_names), encoding="utf-8")
        for name in formats:
            file, path = scratch / name, _place(folder, name)
            form = _form(name, quantized)
            print(f"{name}: writing, then checking on {len(images):,} images", flush=True)
            with signals.Held(f"TensorFlow's work on {name}"):
                _write(forms[form], class_names, name, calibration, file)
            bounds = QUANTIZED if form == "int8" else BOUNDS[name]
            relative = path.relative_to(run_dir).as_posix()
            artifact = verify(name, file, relative, scratch / IMAGES, test.labels, expected[form], bounds)
            artifacts.append(artifact)
            print(f"  {_line(artifact)}", flush=True)
            if artifact.passed:
                path.parent.mkdir(parents=True, exist_ok=True)
                runs.place(file, path)
            # After each: what comes next may fail, and this one is there.
            _report(folder, artifact, source, 0 if calibration is None else len(calibration))
            page.write(run_dir)
    return artifacts


def _form(name, quantized):
    """Which form of a network an artifact is made of, and compared with."""
    return "int8" if name == "int8" and quantized else "float"


def _write(classifier, class_names, name, calibration, file):
    try:
        if name == "saved_model":
            saved_model.write(classifier, class_names, file)
        else:
            file.write_bytes(tflite.convert(classifier, class_names, name, calibration))
    except (tf.errors.OpError, ConverterError) as error:  # of the disk and the memory too
        raise RuntimeError(f"{name} can't be made: {_first_line(error)}") from error


def _read(run_dir):
    """A run's recipe and its classifier."""
    runs.require_finished(run_dir)
    try:
        recipe = Recipe.from_settings(runs.read_json(run_dir / runs.RECIPE))
    except (RecipeError, TypeError) as error:
        raise RunError(f"{run_dir / runs.RECIPE} is broken: {error}") from error
    try:
        classifier = keras.saving.load_model(run_dir / runs.MODEL, compile=False)
        _network(classifier)
    except MemoryError:
        raise
    except Exception as error:
        raise RunError(f"{run_dir / runs.MODEL} can't be read: {_first_line(error)}") from error
    return recipe, classifier


def _network(classifier):
    return quantized_cvt_of(classifier) or cvt_of(classifier)


def _probabilities(classifier, images):
    logits = [classifier.predict_on_batch(batch.astype("float32")) for batch in batches(images)]
    return tf.nn.softmax(np.concatenate(logits)).numpy()


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _pixels(images, size):
    """uint8 squares of the network's size, as training saw them."""
    return np.concatenate([sources.stretch(batch, size).numpy() for batch in batches(images)])


def _place(folder, name):
    if name != "saved_model":
        return folder / "tflite" / f"{name}.tflite"
    versions = [int(path.name) for path in (folder / name).glob("*") if path.name.isdecimal()]
    return folder / name / str(max(versions, default=0) + 1)


def _line(artifact):
    floats = f", {len(artifact.float_tensors)} float tensors, see {runs.REPORT}" if artifact.float_tensors else ""
    return (
        f"{artifact.top1:.2%} top-1, {artifact.agreement:.2%} as Keras, {artifact.milliseconds:.2f} ms, "
        f"{artifact.bytes / 1e6:.2f} MB{floats}, {'passed' if artifact.passed else 'FAILED'}"
    )


def _report(folder, artifact, source, calibration_images):
    """Puts an artifact's row into the report; those of the others, also of earlier exports, stay."""
    path = folder / runs.REPORT
    try:
        report = runs.read_json(path) if path.exists() else {}
        rows = {row["name"]: row for row in report.get("artifacts", ())}
    except (RunError, LookupError, TypeError, AttributeError):
        report, rows = {}, {}  # broken, and now mended
    rows[artifact.name] = dataclasses.asdict(artifact)
    report |= {
        "artifacts": [rows[name] for name in BOUNDS if name in rows],
        "dataset": source.name,
        "data_note": source.note,
        "versions": environment.versions(),
    }
    if artifact.name == "int8":
        report["calibration_images"] = calibration_images
    runs.write_json(path, report)


def main(argv):
    """Runs the command line -> its exit code."""
    signals.raise_on_sigterm()
    try:
        arguments = tyro.cli(Arguments, prog="python -m export", description=__doc__.partition(":")[0], args=argv)
        for name, value in {"verify_images": arguments.verify_images, "formats": len(arguments.formats)}.items():
            if value is not None and value < 1:
                return _fail(f"`{name}` must be at least 1. Received: {name}={value}", 2)
        formats = tuple(dict.fromkeys(arguments.formats))  # each once
        artifacts = export(arguments.run, formats, arguments.data_dir, arguments.verify_images)
    except NoRunError as error:
        return _fail(error, 2)
    except (RunError, DataError, RuntimeError, MemoryError) as error:
        return _fail(error, 1)
    except OSError as error:
        return _fail(f"{arguments.run / runs.EXPORT} can't be written: {error}. Is the disk full?", 1)
    except KeyboardInterrupt as stop:
        return _fail("stopped; files that passed their check are kept, what was being written is gone", signals.exit_code(stop))
    failed = [artifact for artifact in artifacts if not artifact.passed]
    for artifact in failed:
        broken = ", ".join(f"{name} ({artifact.bounds.get(name)} at most)" for name in artifact.broken)
        said = f"{artifact.name} is out of its bounds in {broken}, and was not put into {arguments.run / artifact.path}"
        _fail(f"{said}: {_line(artifact)}. Test image {artifact.worst_image} differs most", 1)
    if failed:
        return 1
    print(f"exported into {arguments.run / runs.EXPORT}; the table is in {arguments.run / runs.PAGE}")
    return 0


def _fail(message, code):
    print(f"\nexport: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
