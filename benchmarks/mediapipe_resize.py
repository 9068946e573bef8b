"""Accuracy that MediaPipe's resizing costs: python benchmarks/mediapipe_resize.py RUN

MediaPipe's ImageClassifier resizes an image to the network's size without antialiasing. This benchmark classifies larger test
images twice: as they are, and resized beforehand in several ways. Images of a small data set are enlarged first. For a run
with --resize crop, the ways cut out the middle, too; MediaPipe always takes the whole image.
"""

import dataclasses
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import tensorflow as tf
import tyro
from PIL import Image

from cvt_keras import environment, runs
from cvt_keras.data import verified
from cvt_keras.data.images import fit
from cvt_keras.export.verify import why_ended
from cvt_keras.training.recipes import read_recipe

ROOT = Path(__file__).parent.parent
PYTHON = Path(os.environ.get("CVT_MEDIAPIPE_PYTHON") or ROOT / ".venv-mediapipe" / "bin" / "python")
INSTALL = "python3.11 -m venv .venv-mediapipe && .venv-mediapipe/bin/pip install -r requirements-mediapipe.txt"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Top-1 of a run's TFLite file in MediaPipe, on test images that are larger than its input."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The folder of an exported run."""
    data_dir: str | None = None
    """Folder of the run's data set, if it has moved."""
    kind: str = "float32"
    """Name of the file in export/tflite, without .tflite."""
    images: int = 1000
    """Use the first N test images."""
    sides: tuple[int, ...] = (64, 128, 224, 480)
    """Sides to resize the test images to, in pixels, with Lanczos' filter; of a run with --resize crop, their shorter sides."""

    def __post_init__(self):
        for name, value in {"images": self.images, "sides": min(self.sides, default=0)}.items():
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1. Received: {name}={getattr(self, name)}")


def classify(file, images, **options):
    """Classifies images with MediaPipe.

    Args:
        file: a .tflite file.
        images: uint8 `(height, width, 3)` each.
        options: further arguments of `ImageClassifierOptions`.

    Returns:
        MediaPipe's version, and for each image its categories: dicts of `index`, `score`, `category_name`, `display_name`.

    Raises:
        RuntimeError: if MediaPipe does not run, with its last line of output.
    """
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/images.npz", *images)
        script = Path(__file__).parent / "mediapipe_classify.py"
        command = [PYTHON, script, file, f"{folder}/images.npz", f"{folder}/answers.json", json.dumps(options)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=300)
        if done.returncode:
            raise RuntimeError(f"MediaPipe does not run: {why_ended(done.returncode, done.stderr)}")
        answers = json.loads(Path(f"{folder}/answers.json").read_text())
    return answers["version"], answers["images"]


def middle(image, preprocessing):
    """The part of an image that a network sees, in whole pixels, before it is resized."""
    if preprocessing.resize == "stretch":
        return image
    sides = image.shape[:2]
    scale = min(side / covered for side, covered in zip(sides, preprocessing.crop_from))
    tall, wide = (max(1, round(side * scale)) for side in preprocessing.image_size)
    top, left = (sides[0] - tall) // 2, (sides[1] - wide) // 2
    return image[top : top + tall, left : left + wide]


def halved(image, size):
    """Halves sides while at least twice those of `size`, then resizes to it, always bilinear: the usual way on Android."""
    sides = image.shape[:2]
    while sides != size:
        sides = tuple(max(least, side // 2) if side >= 2 * least else least for side, least in zip(sides, size))
        image = tf.image.resize(image, sides)
    return tf.saturate_cast(tf.round(image), tf.uint8).numpy()


def main(arguments):
    recipe = read_recipe(arguments.run)
    preprocessing = recipe.preprocessing
    size = preprocessing.image_size
    # Reads the images at the largest side. At the network's size they would already be antialiased.
    data_dir = arguments.data_dir or recipe.data_dir
    largest = preprocessing.replace(image_size=[max(arguments.sides)] * 2)
    images_of_run = verified.load(arguments.run / runs.IMAGES, recipe.dataset, data_dir, largest, recipe.pixel_cache)
    source = images_of_run.source
    test = source.test.limit(arguments.images)
    file = arguments.run / runs.EXPORT / "tflite" / f"{arguments.kind}.tflite"
    ways = {
        "as_it_is": lambda image: image,
        "as_in_training": lambda image: fit(image, preprocessing).numpy(),
        "halved": lambda image: halved(middle(image, preprocessing), size),
        "lanczos": lambda image: _lanczos(middle(image, preprocessing), size),
    }
    rows = {}
    for side in arguments.sides:
        images = [_scaled(image, side) for image in test.images]
        correct = {}
        for name, way in ways.items():
            version, answers = classify(file, [way(image) for image in images], max_results=1)
            correct[name] = np.array([best["index"] for [best] in answers]) == test.labels
        rows[side] = {name: round(float(hits.mean()), 4) for name, hits in correct.items()}
        # Paired by image, so that the images' difficulty cancels.
        cost = correct["as_in_training"].astype(float) - correct["as_it_is"]
        rows[side]["cost_in_points"] = round(100 * float(cost.mean()), 2)
        rows[side]["standard_error"] = round(100 * float(cost.std() / len(cost) ** 0.5), 2)
    print(
        json.dumps(
            {
                "run": str(arguments.run),
                "kind": arguments.kind,
                "data": "; ".join(filter(None, (source.note or source.name, *images_of_run.warnings))),
                "image_size": size,
                "images": len(test.labels),
                "top1": rows,
                "device": environment.cpu(),
                "versions": {**environment.versions(), "mediapipe": version},
            }
        )
    )


def _scaled(image, side):
    """Resizes an image until its shorter side has `side` pixels."""
    height, width = image.shape[:2]
    return _lanczos(image, (side * height // min(height, width), side * width // min(height, width)))


def _lanczos(image, size):
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.LANCZOS))


if __name__ == "__main__":
    main(tyro.cli(Arguments))
