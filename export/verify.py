"""Every artifact beside the Keras model, on the same real images, by the runtime that its users run.

Each runs in a process of its own, in which there is no Keras: python -m export.verify ARTIFACT IMAGES.npy ANSWERS.npz
"""

import dataclasses
import importlib.metadata
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

BATCH = 500
# For the median time of one image.
TIMED, WARM_UP = 200, 20
# Of the first images: TFLite's reference kernels are 30 times slower than the default ones.
REFERENCE_IMAGES = 200
# Fewer images than these are chance, whatever share of all they are.
LEAST_IMAGES = 3


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What an artifact must keep to; `None` is no bound.

    Args:
        top1_drop: the Keras model's top-1 less the artifact's, a fraction of 1; fewer than `LEAST_IMAGES` images do not count.
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
    "dynamic_int8": Bounds(0.002),
    "int8": Bounds(0.01),
}


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
        passed: whether it keeps to them.
        worst_image: where the image with the largest difference stands in the test split, from 0.
        float_tensors: what stays float in an integer file; empty for the others, which are float by design.
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
    passed: bool
    worst_image: int
    float_tensors: list[str]


def verify(name, file, path, images, labels, expected):
    """Runs an artifact and compares.

    Args:
        name: as in `BOUNDS`.
        file: where it lies now: a SavedModel's folder, or a .tflite file.
        path: where it will lie, from the run folder.
        images: uint8 `(n, height, width, 3)`.
        labels: int `(n,)`.
        expected: the Keras model's probabilities, float `(n, classes)`.

    Returns:
        An `Artifact`.

    Raises:
        RuntimeError: if the runtime can't run it, with what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "images.npy", images)
        command = [sys.executable, "-m", "export.verify", str(file), f"{folder}/images.npy", f"{folder}/answers.npz"]
        done = subprocess.run(command, cwd=Path(__file__).parent.parent, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()] or [f"it ended with {done.returncode}"]
            raise RuntimeError(f"{name} does not run: {said[-1]}")
        with np.load(f"{folder}/answers.npz") as answers:
            found = dict(answers)
    return compare(name, file, path, labels, expected, found)


def compare(name, file, path, labels, expected, found):
    """The answers of an artifact beside the Keras model's -> an `Artifact`. Args: as `verify`'s, and what `answer` gives."""
    bounds = BOUNDS[name]
    probabilities = found["probabilities"]
    differences = np.abs(probabilities - expected).max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    lost = int((expected.argmax(axis=1) == labels).sum() - right.sum())
    limits = {
        "max_abs_diff": float(differences.max()),
        "reference_max_abs_diff": float(found["reference_max_abs_diff"]) if "reference_max_abs_diff" in found else None,
    }
    passed = lost < LEAST_IMAGES or lost <= bounds.top1_drop * len(labels)
    for field, value in limits.items():
        bound = getattr(bounds, field)
        passed &= bound is None or value is None or value <= bound
    files = [file] if file.is_file() else [part for part in file.rglob("*") if part.is_file()]
    return Artifact(
        name=name,
        path=path,
        bytes=sum(part.stat().st_size for part in files),
        top1=float(right.mean()),
        agreement=float((probabilities.argmax(axis=1) == expected.argmax(axis=1)).mean()),
        **limits,
        milliseconds=float(found["milliseconds"]),
        images=len(labels),
        runtime=str(found["runtime"]),
        bounds=dataclasses.asdict(bounds),
        passed=bool(passed and not (name == "int8" and len(found["float_tensors"]))),
        worst_image=int(differences.argmax()),
        float_tensors=[str(tensor) for tensor in found["float_tensors"]] if name == "int8" else [],
    )


def answer(file, images):
    """An artifact's answers: a dict of `probabilities`, `milliseconds`, `runtime`, `float_tensors` and, for a .tflite file,
    `reference_max_abs_diff`."""
    return _saved_model(file, images) if file.is_dir() else _tflite(file, images)


def _saved_model(folder, images):
    import tensorflow as tf

    # Before TensorFlow starts: as the .tflite files are timed.
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    loaded = tf.saved_model.load(str(folder))
    serve = loaded.signatures["serving_default"]
    batches = range(0, len(images), BATCH)
    probabilities = np.concatenate([serve(images=tf.constant(images[i : i + BATCH]))["probabilities"] for i in batches])
    # The other signatures must answer the same; what they say otherwise counts as a difference.
    some = images[:REFERENCE_IMAGES]
    encoded = tf.constant([tf.io.encode_png(image).numpy() for image in some])
    others = [
        loaded.signatures["serving_bytes"](image_bytes=encoded)["probabilities"],
        tf.nn.softmax(loaded.signatures["logits"](images=tf.constant(some))["logits"]),
    ]
    for other in others:
        apart = np.abs(other.numpy() - probabilities[: len(some)]).max(axis=1) > 1e-5
        probabilities[: len(some)][apart] = other.numpy()[apart]
    one = tf.constant(images[:1])
    milliseconds = _median_milliseconds(lambda: serve(images=one)["probabilities"].numpy())
    return {
        "probabilities": probabilities,
        "milliseconds": milliseconds,
        "runtime": f"TensorFlow {tf.__version__}",
        "float_tensors": [],
    }


def _tflite(file, images):
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    def run(resolver, images):
        interpreter = Interpreter(str(file), experimental_op_resolver_type=resolver, num_threads=1)
        interpreter.allocate_tensors()
        [taken], [given] = interpreter.get_input_details(), interpreter.get_output_details()
        rows = []
        for image in images:
            interpreter.set_tensor(taken["index"], image[None])
            interpreter.invoke()
            rows.append(interpreter.get_tensor(given["index"])[0])
        rows = np.stack(rows)
        if rows.dtype != np.float32:
            scale, zero_point = given["quantization"]
            rows = (rows.astype("float32") - zero_point) * scale
        return interpreter, rows

    interpreter, probabilities = run(OpResolverType.AUTO, images)
    _, reference = run(OpResolverType.BUILTIN_REF, images[:REFERENCE_IMAGES])
    return {
        "probabilities": probabilities,
        "reference_max_abs_diff": np.abs(reference - probabilities[:REFERENCE_IMAGES]).max(),
        "milliseconds": _median_milliseconds(interpreter.invoke),
        "runtime": f"LiteRT {importlib.metadata.version('ai-edge-litert')}",
        "float_tensors": [
            tensor["name"] for tensor in interpreter.get_tensor_details() if tensor["dtype"] in (np.float16, np.float32)
        ],
    }


def _median_milliseconds(run):
    seconds = []
    for _ in range(WARM_UP + TIMED):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return 1000 * float(np.median(seconds[WARM_UP:]))


if __name__ == "__main__":
    artifact, images, answers = map(Path, sys.argv[1:])
    np.savez(answers, **answer(artifact, np.load(images)))
