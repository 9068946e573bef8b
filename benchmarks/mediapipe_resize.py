"""What MediaPipe's way of resizing costs: python benchmarks/mediapipe_resize.py --help.

MediaPipe's ImageClassifier samples an image of another size than the network's at the network's pixels, without smoothing it
first. Real test images, enlarged or of a set whose images are larger than the network's, are handed to it as they are and
resized beforehand.
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
from cvt_keras.data.images import stretch
from cvt_keras.export.verify import why_ended
from cvt_keras.training.recipes import read_recipe

ROOT = Path(__file__).parent.parent
PYTHON = Path(os.environ.get("CVT_MEDIAPIPE_PYTHON") or ROOT / ".venv-mediapipe" / "bin" / "python")
INSTALL = "python3.11 -m venv .venv-mediapipe && .venv-mediapipe/bin/pip install -r requirements-mediapipe.txt"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Top-1 of a run's TFLite file in MediaPipe on enlarged test images."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The exported run."""
    data_dir: str | None = None
    """Where the run's data set lies now, if not where it was."""
    kind: str = "float32"
    """The file's name in export/tflite."""
    images: int = 1000
    """Test images, the first ones."""
    sides: tuple[int, ...] = (64, 128, 224, 480)
    """To which they are brought by Lanczos' filter, in pixels; their own side leaves them as they are."""

    def __post_init__(self):
        for name, value in {"images": self.images, "sides": min(self.sides, default=0)}.items():
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1. Received: {name}={getattr(self, name)}")


def classify(file, images, **options):
    """MediaPipe's answers.

    Args:
        file: a .tflite file.
        images: uint8 `(height, width, 3)` each.
        options: further arguments of `ImageClassifierOptions`.

    Returns:
        MediaPipe's version, and for each image its categories: dicts of `index`, `score`, `category_name`, `display_name`.

    Raises:
        RuntimeError: if MediaPipe does not run, with what it said.
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


def halved(image, size):
    """Halved while twice `size` or more, then stretched to it, each by bilinear sampling alone: the usual way on Android."""
    sides = image.shape[:2]
    while sides != (size, size):
        sides = tuple(max(size, side // 2) if side >= 2 * size else size for side in sides)
        image = tf.image.resize(image, sides)
    return tf.saturate_cast(tf.round(image), tf.uint8).numpy()


def main(arguments):
    recipe = read_recipe(arguments.run)
    size = recipe.image_size
    # Not at the network's size: what is smoothed on reading can't alias any more.
    data_dir = arguments.data_dir or recipe.data_dir
    images_of_run = verified.load(arguments.run / runs.IMAGES, recipe.dataset, data_dir, max(arguments.sides))
    source = images_of_run.source
    test = source.test.limit(arguments.images)
    file = arguments.run / runs.EXPORT / "tflite" / f"{arguments.kind}.tflite"
    ways = {
        "as_it_is": lambda image: image,
        "as_in_training": lambda image: stretch(image, size).numpy(),
        "halved": lambda image: halved(image, size),
        "lanczos": lambda image: _lanczos(image, size),
    }
    rows = {}
    for side in arguments.sides:
        images = [_lanczos(image, side) for image in test.images]
        right = {}
        for name, way in ways.items():
            version, answers = classify(file, [way(image) for image in images], max_results=1)
            right[name] = np.array([best["index"] for [best] in answers]) == test.labels
        rows[side] = {name: round(float(hits.mean()), 4) for name, hits in right.items()}
        # Of the same images, so that their difficulty is not in it.
        cost = right["as_in_training"].astype(float) - right["as_it_is"]
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


def _lanczos(image, side):
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS))


if __name__ == "__main__":
    main(tyro.cli(Arguments))
