"""Compares each artifact with the Keras model, on the same real images, in the runtime that its users run.

An artifact runs in a process of its own, which makes no Keras object:
python -m cvt_keras.export.verify ARTIFACT IMAGES.npy ANSWERS.npz
"""

import dataclasses
import importlib.metadata
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from cvt_keras import environment, runs
from cvt_keras.errors import ArgumentError, ExportError

# Pixels of a batch, 500 images of 32x32: attention's memory grows with the image.
BATCH_PIXELS = 512_000
# For the median time of one image.
TIMED, WARM_UP = 200, 20
# Of the first images: TFLite's reference kernels are 30 times slower than the default ones.
REFERENCE_IMAGES = 200
# Fewer images than these are chance: they break no bound.
LEAST_IMAGES = 3


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What an artifact must keep to; `None` is no bound. `LEAST_IMAGES` that don't are needed to break one.

    Args:
        top1_drop: the Keras model's top-1 less the artifact's, a fraction of 1.
        max_abs_diff: of a probability from the Keras model's.
        reference_max_abs_diff: of a probability by the default kernels from the same by the reference kernels.
    """

    top1_drop: float
    max_abs_diff: float | None = None
    reference_max_abs_diff: float | None = None


BOUNDS = {
    # The same operations in another order: rounding of float32.
    "saved_model": Bounds(0.0, 1e-4),
    "float32": Bounds(0.0, 1e-4, 1e-4),
    # The weights lose 13 of their 24 bits; a probability near 1/2 turns that into a hundredth.
    "float16": Bounds(0.002, 0.02, 1e-3),
    # Where Keras is unsure, 8 bits may turn the answer: only accuracy can be bounded. Kernels that round otherwise are a few
    # hundredths apart.
    "dynamic_int8": Bounds(0.002, None, 0.1),
    "int8": Bounds(0.01, None, 0.25),
}
FORMATS = tuple(BOUNDS)  # the one list of what an export can write
TFLITE_FORMATS = tuple(name for name in FORMATS if name != "saved_model")
# For the int8 file of a quantised network, which rounds in Keras too. What is left is how a kernel rounds on the way: at most
# 0.10 on 10,000 images, without a loss.
QUANTIZED = Bounds(0.005, 0.2, 0.25)


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A row of export/report.json.

    Args:
        name: as in `--formats`.
        path: from the run folder.
        bytes: of the file, or of all files of a SavedModel.
        top1, agreement: share of the images that it gets right, and that it classifies as the Keras model does.
        max_abs_diff: largest difference of a probability from the Keras model's.
        reference_max_abs_diff: that of the default kernels from the reference kernels; `None` for a SavedModel.
        milliseconds: median time of one image on one thread.
        images: how many.
        runtime: its name and version.
        bounds: the fields of `Bounds`.
        broken: which of them it does not keep to.
        passed: whether `broken` is empty.
        worst_image: where the image with the largest difference, that of the broken bound if one is, stands in the test
            split, from 0.
        device: what it ran on.
        float_tensors: what stays float in an integer file, each with the reason; empty for the others, float by design.
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


def summary(artifact):
    """What was measured, in a line."""
    floats = f", {len(artifact.float_tensors)} float tensors, see {runs.REPORT}" if artifact.float_tensors else ""
    return (
        f"{artifact.top1:.2%} top-1, {artifact.agreement:.2%} same as Keras, {artifact.milliseconds:.2f} ms, "
        f"{artifact.bytes / 1e6:.2f} MB{floats}, {'passed' if artifact.passed else 'FAILED'}"
    )


def checked(formats, verify_images):
    """Returns the formats, each once.

    Raises:
        ArgumentError: for an unknown format, or none, or fewer images than one.
    """
    formats = [formats] if isinstance(formats, str) else list(formats)
    if not formats or set(formats) - set(FORMATS):
        raise ArgumentError(f"`formats` must be of {', '.join(FORMATS)}. Received: formats={formats}", argument="formats")
    if verify_images is not None and verify_images < 1:
        raise ArgumentError(
            f"`verify_images` must be at least 1. Received: verify_images={verify_images}", argument="verify_images"
        )
    return tuple(dict.fromkeys(formats))


def batches(images):
    """Splits images into batches that a network of any size can take."""
    n = max(1, BATCH_PIXELS // (images.shape[1] * images.shape[2]))
    return (images[i : i + n] for i in range(0, len(images), n))


def verify(name, file, path, images, labels, expected, bounds=None):
    """Runs an artifact and compares its probabilities with the Keras model's.

    Args:
        name: one of `FORMATS`.
        file: where it lies now: a SavedModel's folder, or a .tflite file.
        path: where it will lie, relative to the run folder.
        images: a file, as `numpy.save` writes it, of uint8 `(n, height, width, 3)`.
        labels: int `(n,)`.
        expected: the Keras model's probabilities, float `(n, classes)`.
        bounds: `Bounds`; `None` means those of `name`.

    Returns:
        An `Artifact`.

    Raises:
        ExportError: if the runtime can't run it, with the last line that it wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        answers = Path(folder) / "answers.npz"
        command = [sys.executable, "-m", "cvt_keras.export.verify", str(file), str(images), str(answers)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise ExportError(f"{name} does not run: {why_ended(done.returncode, done.stderr)}")
        with np.load(answers) as found:
            return compare(name, file, path, labels, expected, dict(found), bounds)


def why_ended(code, stderr):
    """Why a process failed, in a line: the last one that it wrote, or the signal that killed it."""
    if code < 0:
        return f"it was ended by {signal.Signals(-code).name}"
    # TensorFlow's log says nothing about the failure.
    lines = [line for line in stderr.splitlines() if line.strip() and not re.match(r"[IWE]\d{4} |WARNING: All log", line)]
    return lines[-1] if lines else f"it ended with {code}"


def compare(name, file, path, labels, expected, found, bounds=None):
    """Compares what `answer` returns with the Keras model's probabilities.

    Args: as in `verify`; `found` is what `answer` returns.

    Returns:
        An `Artifact`.

    Raises:
        ExportError: if a probability is NaN or infinite.
    """
    bounds = bounds or BOUNDS[name]
    probabilities, reference = found["probabilities"], found.get("reference")
    if not np.isfinite(probabilities).all():
        raise ExportError(f"{name} does not run: its probabilities are NaN or infinite")
    apart = {"max_abs_diff": np.abs(probabilities - expected).max(axis=1)}
    if reference is not None:
        apart["reference_max_abs_diff"] = np.abs(reference - probabilities[: len(reference)]).max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    lost = int((expected.argmax(axis=1) == labels).sum() - right.sum())
    broken = ["top1_drop"] if lost >= LEAST_IMAGES and lost > bounds.top1_drop * len(labels) else []
    for field, differences in apart.items():
        bound = getattr(bounds, field)
        if bound is not None and np.count_nonzero(differences > bound) >= LEAST_IMAGES:
            broken.append(field)
    files = [file] if file.is_file() else [part for part in file.rglob("*") if part.is_file()]
    return Artifact(
        name=name,
        path=path,
        bytes=sum(part.stat().st_size for part in files),
        top1=float(right.mean()),
        agreement=float((probabilities.argmax(axis=1) == expected.argmax(axis=1)).mean()),
        max_abs_diff=float(apart["max_abs_diff"].max()),
        reference_max_abs_diff=None if reference is None else float(apart["reference_max_abs_diff"].max()),
        milliseconds=float(found["milliseconds"]),
        images=len(labels),
        runtime=str(found["runtime"]),
        device=environment.cpu(),
        bounds=dataclasses.asdict(bounds),
        broken=broken,
        passed=not broken,
        worst_image=int(apart[next((field for field in broken if field in apart), "max_abs_diff")].argmax()),
        float_tensors=dict(zip(found["float_tensors"].tolist(), found["float_reasons"].tolist())) if name == "int8" else {},
    )


def answer(file, images):
    """An artifact's answers.

    Returns:
        A dict of `probabilities`, `(n, classes)`; `milliseconds`; `runtime`; and for a .tflite file `reference`, the
        probabilities by the reference kernels of the first `REFERENCE_IMAGES`, `float_tensors` and `float_reasons`, strings.
    """
    return _saved_model(file, images) if file.is_dir() else _tflite(file, images)


def _saved_model(folder, images):
    import tensorflow as tf

    # Before TensorFlow starts: as the .tflite files are timed.
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    loaded = tf.saved_model.load(str(folder))
    serve = loaded.signatures["serving_default"]
    with _progress(len(images), "SavedModel") as bar:
        rows = []
        for batch in batches(images):
            rows.append(serve(images=tf.constant(batch))["probabilities"].numpy())
            bar.update(len(batch))
    probabilities = np.concatenate(rows)
    # The other signatures must answer the same; what they say otherwise counts as a difference.
    done = 0
    for batch in batches(images[:REFERENCE_IMAGES]):
        encoded = tf.constant([tf.io.encode_png(image).numpy() for image in batch])
        here = probabilities[done : done + len(batch)]
        for other in (
            loaded.signatures["serving_bytes"](image_bytes=encoded)["probabilities"],
            tf.nn.softmax(loaded.signatures["logits"](images=tf.constant(batch))["logits"]),
        ):
            apart = np.abs(other.numpy() - here).max(axis=1) > 1e-5
            here[apart] = other.numpy()[apart]
        done += len(batch)
    one = tf.constant(images[:1])
    milliseconds = _median_milliseconds(lambda: serve(images=one)["probabilities"].numpy())
    return {"probabilities": probabilities, "milliseconds": milliseconds, "runtime": f"TensorFlow {tf.__version__}"}


def _tflite(file, images):
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    def run(resolver, images, kernels):
        interpreter = Interpreter(str(file), experimental_op_resolver_type=resolver, num_threads=1)
        interpreter.allocate_tensors()
        [taken], [given] = interpreter.get_input_details(), interpreter.get_output_details()
        rows = []
        with _progress(len(images), f"{file.stem}, {kernels} kernels") as bar:
            for image in images:
                interpreter.set_tensor(taken["index"], image[None])
                interpreter.invoke()
                rows.append(interpreter.get_tensor(given["index"])[0])
                bar.update()
        rows = np.stack(rows)
        if rows.dtype != np.float32:
            scale, zero_point = given["quantization"]
            rows = (rows.astype("float32") - zero_point) * scale
        return interpreter, rows

    interpreter, probabilities = run(OpResolverType.AUTO, images, "default")
    plain, reference = run(OpResolverType.BUILTIN_REF, images[:REFERENCE_IMAGES], "reference")
    floats = _float_tensors(plain)
    return {
        "probabilities": probabilities,
        "reference": reference,
        "milliseconds": _median_milliseconds(interpreter.invoke),
        "runtime": f"LiteRT {importlib.metadata.version('ai-edge-litert')}",
        "float_tensors": np.array(list(floats), str),
        "float_reasons": np.array(list(floats.values()), str),
    }


def _float_tensors(interpreter):
    """The float tensors of a graph, each with the reason: the operation that the converter left in floats around it."""
    reasons = {}
    # Private, but the only list of operations that LiteRT gives. Of the reference kernels: a delegate's would be one.
    for operation in interpreter._get_ops_details():
        for index in (*operation["inputs"], *operation["outputs"]):
            reasons.setdefault(int(index), f"the converter keeps {operation['op_name']} in floats here")
    return {
        tensor["name"]: reasons.get(tensor["index"], "no operation takes it")
        for tensor in interpreter.get_tensor_details()
        if tensor["dtype"] in (np.float16, np.float32)
    }


def _progress(n, said):
    """A bar where someone looks; gone when it is full."""
    from tqdm import tqdm  # here, as --help does without it

    return tqdm(total=n, desc=said, unit=" images", leave=False, disable=None, file=sys.stdout)


def _median_milliseconds(run):
    seconds = []
    for _ in range(WARM_UP + TIMED):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return 1000 * float(np.median(seconds[WARM_UP:]))


if __name__ == "__main__":
    artifact, images, answers = map(Path, sys.argv[1:])
    np.savez(answers, **answer(artifact, np.load(images, mmap_mode="r")))
