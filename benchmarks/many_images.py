"""Measures what many images cost: python benchmarks/many_images.py --help.

Makes images, loads them twice through a cache on disk of their own, and trains for an epoch on them. Prints how fast they are
decoded, how soon a later command has them, and the memory that each step takes.
"""

import dataclasses
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from PIL import Image

from cvt_keras import Stage, Variant, environment
from cvt_keras.data import sources
from cvt_keras.training import Recipe, run

CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Time and memory of loading many images, and of training on them."""

    images: int = 100_000
    """Number of images."""
    height: int = 160
    """Height of the images in pixels."""
    width: int = 160
    """Width of the images in pixels."""
    image_size: int = 160
    """Side that they are resized to, in pixels."""
    resize: Literal["stretch", "crop"] = "stretch"
    """How they are resized."""
    batch_size: int = 128
    """Images per training step."""

    def __post_init__(self):
        for name, least in {"images": 100, "height": 16, "width": 16, "image_size": 16, "batch_size": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}. Received: {name}={getattr(self, name)}")


class Memory:
    """The most anonymous memory of this process (`RssAnon`) during a block, in GB. Pages of memory maps do not count."""

    def __enter__(self):
        self.peak = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()

    def _watch(self):
        while True:
            lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
            self.peak = max(self.peak, int(lines["RssAnon"].split()[0]) / 1e6)
            if self._done.wait(0.2):
                return


def write(folder, arguments):
    """Writes the images, smooth colours with noise as JPEG, no two alike. Returns their mean number of bytes."""
    random = np.random.default_rng(0)
    height, width = arguments.height, arguments.width
    colours = Image.fromarray(random.integers(0, 256, (16, 16, 3), "uint8"))
    large = np.asarray(colours.resize((2 * width, 2 * height), Image.Resampling.BICUBIC), "int16")
    large = np.clip(large + random.normal(0, 6, large.shape).astype("int16"), 0, 255).astype("uint8")
    size = 0
    for i in range(arguments.images):
        label = i % CLASSES
        top, left = random.integers(0, height + 1), random.integers(0, width + 1)
        pixels = large[top : top + height, left : left + width].copy()
        pixels[: height // 4, : width // 4] = random.integers(0, 256, 3)
        pixels[height // 2 :, width // 2 :, 0] = 25 * label
        path = folder / str(label) / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path, quality=88)
        size += path.stat().st_size
    return size / arguments.images


def main(arguments):
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "images"
        folder.mkdir()
        kilobytes = write(folder, arguments) / 1e3
        # One stage with few tokens: the images should take the memory, not the network.
        stage = Stage(32, 1, 1, kernel_size=17, stride=16, padding=8)
        recipe = Recipe(
            variant=Variant((stage,)),
            dataset="folder",
            data_dir=folder,
            cache_dir=Path(temporary) / "cache",
            image_size=arguments.image_size,
            resize=arguments.resize,
            batch_size=arguments.batch_size,
            epochs=1,
        )
        time.sleep(1.5)  # files that have just changed would be read again
        with Memory() as decoding:
            first = _seconds(recipe)
        later = _seconds(recipe)
        with Memory() as training:
            result = run(recipe, Path(temporary) / "run", evaluate_test=False)
        cache_bytes = sum(path.stat().st_size for path in Path(recipe.cache_dir).rglob("*") if path.is_file())
    print(
        json.dumps(
            {
                **dataclasses.asdict(arguments),
                "kilobytes_per_file": round(kilobytes, 1),
                "decoded_images_per_second": round(arguments.images / first, 1),
                "later_seconds": round(later, 2),
                "cache_gigabytes": round(cache_bytes / 1e9, 3),
                "decoding_gigabytes": round(decoding.peak, 2),
                "training_gigabytes": round(training.peak, 2),
                "training_images": result.report.train_images,
                "device": environment.device(),
                "versions": environment.versions(),
            }
        )
    )


def _seconds(recipe):
    started = time.perf_counter()
    sources.load("folder", recipe.data_dir, recipe.preprocessing, recipe.pixel_cache)
    return time.perf_counter() - started


if __name__ == "__main__":
    main(tyro.cli(Arguments))
