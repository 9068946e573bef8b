"""Verifies each artifact against the Keras model, on the same test images, in the runtime that its users run.

An artifact runs in its own process, which creates no Keras object:
python -m cvt_keras.export.verify ARTIFACT IMAGES.npy ANSWERS.npz OPTIONS, where OPTIONS are those of `answer` as JSON.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from cvt_keras import environment, runs, terminal
from cvt_keras.errors import ArgumentError, ExportError, MissingPackageError
from cvt_keras.preprocessing import Calibration

# Pixels per batch, 500 images of 32x32: the memory of attention grows with the image.
BATCH_PIXELS = 512_000
# Calls of which the median time is taken, and calls before them.
TIMED, WARM_UP = 200, 20
# The reference kernels run on the first images only: they are 30 times slower than the default kernels.
REFERENCE_IMAGES = 200
# It takes so many images to break a bound; fewer may be chance.
LEAST_IMAGES = 3
MOST_MAGNIFIED = 2.0


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The largest differences that an artifact may have; `None` means any. It takes `LEAST_IMAGES` images to break a bound.

    Args:
        top1_drop: the Keras model's top-1 minus the artifact's, a fraction of 1.
        max_abs_diff: absolute difference of a probability from the Keras model's.
        reference_max_abs_diff: absolute difference of a probability between the default and the reference kernels.
    """

    top1_drop: float
    max_abs_diff: float | None = None
    reference_max_abs_diff: float | None = None

    def scaled_for(self, temperature):
        """Returns the bounds for logits that are divided by `temperature`: below 1, it magnifies what rounding does to them.

        The bounds at most double. Else a low temperature would allow any difference.
        """
        scale = min(MOST_MAGNIFIED, 1 / min(1.0, temperature))
        differences = {name: getattr(self, name) for name in ("max_abs_diff", "reference_max_abs_diff")}
        return dataclasses.replace(self, **{name: bound and bound * scale for name, bound in differences.items()})


BOUNDS = {
    # The same operations in another order: only float32 rounding differs.
    "saved_model": Bounds(0.0, 1e-4),
    "float32": Bounds(0.0, 1e-4, 1e-4),
    # The weights lose 13 of their 24 bits, which moves a probability near 1/2 by about a hundredth.
    "float16": Bounds(0.002, 0.02, 1e-3),
    # Where Keras is unsure, 8 bits may change the class: only accuracy can be bounded. Kernels that round differently are a
    # few hundredths apart.
    "dynamic_int8": Bounds(0.002, None, 0.1),
    "int8": Bounds(0.01, None, 0.25),
    "onnx": Bounds(0.0, 1e-4),  # as `float32`
}
FORMATS = tuple(BOUNDS)  # the one list of what an export can write
TFLITE_FORMATS = tuple(name for name in FORMATS if name not in ("saved_model", "onnx"))
DEFAULT_FORMATS = ("saved_model", *TFLITE_FORMATS)
ONNX_PACKAGES = ("onnx", "onnxruntime", "tf2onnx")  # only `onnx` needs them
# For the int8 file of a quantised network, which rounds in Keras too. Kernels still round intermediate values differently:
# by at most 0.10 on 10,000 images, without a loss of accuracy.
QUANTIZED = Bounds(0.005, 0.2, 0.25)


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A row of export/report.json.

    Args:
        name: one of `FORMATS`.
        path: relative to the run folder.
        bytes: size of the file, or of all files of a SavedModel.
        top1: share of the images that it classifies correctly.
        agreement: share of the images that it classifies as the Keras model does.
        max_abs_diff: largest difference of a probability from the Keras model's.
        reference_max_abs_diff: largest difference between the default and the reference kernels; `None` if there are none.
        milliseconds: median time per image, on one thread.
        images: number of test images.
        runtime: name and version of the runtime.
        bounds: the fields of `Bounds`.
        broken: names of the bounds that it breaks.
        passed: whether `broken` is empty.
        worst_image: index in the test split of the image with the largest difference; if a bound is broken, of that difference.
        device: the processor that it ran on.
        float_tensors: name -> reason, for each tensor that stays float in `int8`; empty for the other formats.
        opset: the version of ONNX's operations in the file; `None` for the other formats.
    """

    name: str
    path: str
    bytes: int
    top1: float
    agreement: float
    max_abs_diff: float
    reference_max_abs_diff: float | None
    milliseconds: float
    images: int
    runtime: str
    bounds: dict
    broken: list[str]
    passed: bool
    worst_image: int
    device: str
    float_tensors: dict[str, str]
    opset: int | None


def summary(artifact):
    """The measurements of an artifact in one line."""
    floats = f", {len(artifact.float_tensors)} float tensors, see {runs.REPORT}" if artifact.float_tensors else ""
    return (
        f"{artifact.top1:.2%} top-1, {artifact.agreement:.2%} same as Keras, {artifact.milliseconds:.2f} ms, "
        f"{artifact.bytes / 1e6:.2f} MB{floats}, {'passed' if artifact.passed else 'FAILED'}"
    )


def checked(formats, verify_images):
    """Returns the formats without duplicates.

    Raises:
        ArgumentError: if a format is unknown, `formats` is empty, or `verify_images` is below 1.
        MissingPackageError: for `onnx`, if one of `ONNX_PACKAGES` is not installed.
    """
    formats = [formats] if isinstance(formats, str) else list(formats)
    if not formats or set(formats) - set(FORMATS):
        raise ArgumentError(
            f"`formats` must be one or more of {', '.join(FORMATS)}. Received: formats={formats}", argument="formats"
        )
    if verify_images is not None and verify_images < 1:
        raise ArgumentError(
            f"`verify_images` must be at least 1. Received: verify_images={verify_images}", argument="verify_images"
        )
    missing = [package for package in ONNX_PACKAGES if "onnx" in formats and importlib.util.find_spec(package) is None]
    if missing:
        raise MissingPackageError(
            f"the format onnx needs {' and '.join(missing)}",
            argument="formats",
            hint="Install what is missing: pip install tf2onnx onnxruntime",
        )
    return tuple(dict.fromkeys(formats))


def batches(images):
    """Splits images into batches of up to `BATCH_PIXELS` pixels, at least one image each."""
    n = max(1, BATCH_PIXELS // (images.shape[1] * images.shape[2]))
    return (np.asarray(images[i : i + n]) for i in range(0, len(images), n))


def verify(name, file, path, images, labels, expected, bounds=None, **options):
    """Runs an artifact and compares its probabilities with the Keras model's.

    Args:
        name: one of `FORMATS`.
        file: the folder of a SavedModel, or a .tflite or .onnx file.
        path: its final path, relative to the run folder.
        images: a .npy file of uint8 `(n, height, width, 3)`.
        labels: int `(n,)`.
        expected: the Keras model's probabilities, float `(n, classes)`.
        bounds: `Bounds`; `None` means `BOUNDS[name]`.
        options: the other arguments of `answer`.

    Returns:
        An `Artifact`.

    Raises:
        ExportError: if the runtime can't run it, with the last line of its stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "answers.npz"
        command = [sys.executable, "-m", "cvt_keras.export.verify", *map(str, (file, images, output)), json.dumps(options)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise ExportError(f"{name} failed: {why_ended(done.returncode, done.stderr)}")
        with np.load(output) as answers:
            return compare(name, file, path, labels, expected, dict(answers), bounds)


def why_ended(code, stderr):
    """Why a process failed: the last line that it wrote, or the signal that killed it."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    # Skip TensorFlow's log: it does not explain the failure.
    lines = [line for line in stderr.splitlines() if line.strip() and not re.match(r"[IWE]\d{4} |WARNING: All log", line)]
    return lines[-1] if lines else f"exit code {code}"


def compare(name, file, path, labels, expected, answers, bounds=None):
    """Compares what `answer` returns with the Keras model's probabilities.

    Args: as in `verify`; `answers` is what `answer` returns.

    Returns:
        An `Artifact`.

    Raises:
        ExportError: if a probability is NaN or infinite.
    """
    bounds = bounds or BOUNDS[name]
    probabilities, reference = answers["probabilities"], answers.get("reference")
    if not np.isfinite(probabilities).all():
        raise ExportError(f"{name} failed: its probabilities are NaN or infinite")
    differences = {"max_abs_diff": np.abs(probabilities - expected).max(axis=1)}  # of each image
    if reference is not None:
        differences["reference_max_abs_diff"] = np.abs(reference - probabilities[: len(reference)]).max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    lost = int((expected.argmax(axis=1) == labels).sum() - correct.sum())
    broken = ["top1_drop"] if lost >= LEAST_IMAGES and lost > bounds.top1_drop * len(labels) else []
    for field, values in differences.items():
        bound = getattr(bounds, field)
        if bound is not None and np.count_nonzero(values > bound) >= LEAST_IMAGES:
            broken.append(field)
    files = [file] if file.is_file() else [part for part in file.rglob("*") if part.is_file()]
    return Artifact(
        name=name,
        path=path,
        bytes=sum(part.stat().st_size for part in files),
        top1=float(correct.mean()),
        agreement=float((probabilities.argmax(axis=1) == expected.argmax(axis=1)).mean()),
        max_abs_diff=float(differences["max_abs_diff"].max()),
        reference_max_abs_diff=None if reference is None else float(differences["reference_max_abs_diff"].max()),
        milliseconds=float(answers["milliseconds"]),
        images=len(labels),
        runtime=str(answers["runtime"]),
        device=environment.cpu(),
        bounds=dataclasses.asdict(bounds),
        broken=broken,
        passed=not broken,
        worst_image=int(differences[next((field for field in broken if field in differences), "max_abs_diff")].argmax()),
        float_tensors=dict(zip(answers["float_tensors"].tolist(), answers["float_reasons"].tolist())) if name == "int8" else {},
        opset=int(answers["opset"]) if "opset" in answers else None,
    )


def answer(file, images, frame=None, class_names=None, calibration=None):
    """Runs an artifact.

    Args:
        file: the folder of a SavedModel, or a .tflite or .onnx file.
        images: uint8 `(n, height, width, 3)`.
        frame: `(height, width)` of the files for `serving_bytes`, which have the images in their middle. For a network with
            `resize="crop"`, its `crop_from`: it then cuts out the images without resizing. `None` means the size of the images.
        class_names: those that a SavedModel must answer with, in the order of its probabilities; `None` means any.
        calibration: the config of the `Calibration` that a SavedModel must have; `None` means one that changes nothing.

    Returns:
        A dict of `probabilities`, `(n, classes)`; `milliseconds`; `runtime`; for a .tflite file `reference`, the
        probabilities of the first `REFERENCE_IMAGES` by the reference kernels, and `float_tensors` and `float_reasons`,
        strings; for an .onnx file `opset`.

    Raises:
        ExportError: if the outputs of a SavedModel contradict each other.
    """
    if file.is_dir():
        return _saved_model(file, images, frame, class_names, Calibration.from_config(calibration))
    return (_onnx if file.suffix == ".onnx" else _tflite)(file, images)


def _saved_model(folder, images, frame, class_names, calibration):
    import tensorflow as tf

    # One thread, as for .tflite files. Must be set before TensorFlow starts.
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    signatures = tf.saved_model.load(str(folder)).signatures

    def serve(name, **inputs):
        outputs = {key: value.numpy() for key, value in signatures[name](**inputs).items()}
        _require_agreement(outputs, class_names, calibration)
        return outputs["probabilities"]

    with terminal.progress(len(images), "SavedModel") as bar:
        rows = []
        for batch in batches(images):
            rows.append(serve("serving_default", images=tf.constant(batch)))
            bar.update(len(batch))
    probabilities = np.concatenate(rows)
    # The other signatures must agree. Where one does not, its answer replaces the default's, so `compare` sees it.
    done = 0
    for batch in batches(images[:REFERENCE_IMAGES]):
        framed = tf.image.resize_with_crop_or_pad(batch, *frame) if frame else batch
        encoded = tf.constant([tf.io.encode_png(image).numpy() for image in framed])
        answers = probabilities[done : done + len(batch)]
        answers[:] = _farthest(
            answers,
            serve("serving_bytes", image_bytes=encoded),
            calibration.probabilities(signatures["logits"](images=tf.constant(batch))["logits"]),
        )
        done += len(batch)
    one = tf.constant(images[:1])
    milliseconds = _median_milliseconds(lambda: signatures["serving_default"](images=one)["probabilities"].numpy())
    return {"probabilities": probabilities, "milliseconds": milliseconds, "runtime": f"TensorFlow {tf.__version__}"}


def _require_agreement(outputs, class_names, calibration):
    """Raises ExportError if `classes` or `unsure` of a SavedModel contradict its `probabilities`."""
    probabilities = outputs["probabilities"]
    if not np.array_equal(outputs["unsure"], calibration.unsure(probabilities)):
        raise ExportError(f"`unsure` contradicts `probabilities` at the threshold {calibration.threshold}")
    if class_names is not None:
        answered = [class_names.index(name.decode()) for name in outputs["classes"]]
        if not np.array_equal(probabilities[range(len(answered)), answered], probabilities.max(axis=1), equal_nan=True):
            raise ExportError("`classes` contradicts `probabilities`")


def _farthest(default, *others):
    """Returns, for each image, the answer that differs most from the default's: `default` if none differs by more than 1e-5."""
    answers = np.stack([default, *others])
    distances = np.nan_to_num(np.abs(answers - default).max(axis=2), nan=np.inf)
    distances[0] = np.where(np.isnan(default).any(axis=1), np.inf, 1e-5)
    return answers[distances.argmax(axis=0), np.arange(len(default))]


def _tflite(file, images):
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    def run(resolver, images, kernels):
        interpreter = Interpreter(str(file), experimental_op_resolver_type=resolver, num_threads=1)
        interpreter.allocate_tensors()
        [input_], [output] = interpreter.get_input_details(), interpreter.get_output_details()
        rows = []
        with terminal.progress(len(images), f"{file.stem}, {kernels} kernels") as bar:
            for image in images:
                interpreter.set_tensor(input_["index"], image[None])
                interpreter.invoke()
                rows.append(interpreter.get_tensor(output["index"])[0])
                bar.update()
        rows = np.stack(rows)
        if rows.dtype != np.float32:
            scale, zero_point = output["quantization"]
            rows = (rows.astype("float32") - zero_point) * scale
        return interpreter, rows

    interpreter, probabilities = run(OpResolverType.AUTO, images, "default")
    reference_interpreter, reference = run(OpResolverType.BUILTIN_REF, images[:REFERENCE_IMAGES], "reference")
    floats = _float_tensors(reference_interpreter)
    return {
        "probabilities": probabilities,
        "reference": reference,
        "milliseconds": _median_milliseconds(interpreter.invoke),
        "runtime": f"LiteRT {importlib.metadata.version('ai-edge-litert')}",
        "float_tensors": np.array(list(floats), str),
        "float_reasons": np.array(list(floats.values()), str),
    }


def _float_tensors(interpreter):
    """Maps each float tensor of a graph to the reason: the operation that the converter keeps in floats."""
    reasons = {}
    # Private, but LiteRT's only list of operations. With default kernels, a delegate would appear as one operation.
    for operation in interpreter._get_ops_details():
        for index in (*operation["inputs"], *operation["outputs"]):
            reasons.setdefault(int(index), f"the converter keeps {operation['op_name']} in floats here")
    return {
        tensor["name"]: reasons.get(tensor["index"], "no operation uses it")
        for tensor in interpreter.get_tensor_details()
        if tensor["dtype"] in (np.float16, np.float32)
    }


def _onnx(file, images):
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(batch):
        return session.run(["probabilities"], {"images": batch})[0]

    rows = []
    with terminal.progress(len(images), "onnx") as bar:
        for batch in batches(images):
            rows.append(run(batch))
            bar.update(len(batch))
    one = np.asarray(images[:1])
    [opset] = [entry.version for entry in onnx.load(str(file)).opset_import if not entry.domain]
    return {
        "probabilities": np.concatenate(rows),
        "milliseconds": _median_milliseconds(lambda: run(one)),
        "runtime": f"ONNX Runtime {onnxruntime.__version__}",
        "opset": opset,
    }


def _median_milliseconds(run):
    seconds = []
    for _ in range(WARM_UP + TIMED):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return 1000 * float(np.median(seconds[WARM_UP:]))


if __name__ == "__main__":
    artifact, images, output = map(Path, sys.argv[1:4])
    try:
        np.savez(output, **answer(artifact, np.load(images, mmap_mode="r"), **json.loads(sys.argv[4])))
    except ExportError as error:
        sys.exit(str(error))
