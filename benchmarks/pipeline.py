"""Measures whether the data pipeline keeps up with training: python benchmarks/pipeline.py --help.

Runs a recipe's pipeline without training, from each place where decoded images can be kept, and the recipe's training on one
batch in memory. All take turns, so that noise on the machine affects them alike.
"""

import dataclasses
import json
import statistics
import tempfile
import time
from typing import Literal

import keras
import numpy as np
import tensorflow as tf
import tyro

from cvt_keras import build_classifier, environment
from cvt_keras.data import sources
from cvt_keras.data.cache import Cache
from cvt_keras.data.pipeline import training_batches
from cvt_keras.data.split import Split
from cvt_keras.training import RECIPES
from cvt_keras.training.objective import compile_classifier
from cvt_keras.training.plan import resolve
from measuring import require_at_least_one


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Images per second of a recipe's pipeline and of its training, on random pixels or on a folder of images."""

    recipe: str = "cifar10"
    """Name of a recipe."""
    image_size: int | None = None
    """Side of the images in pixels, instead of the recipe's."""
    resize: Literal["stretch", "crop"] = "stretch"
    """How images are brought to that size. With crop, training draws random areas."""
    data_dir: str | None = None
    """A folder of images for each class, instead of random pixels. Adds the turns of --cache off."""
    num_images: int = 45_000
    """Number of random images, shuffled and augmented as in the recipe."""
    num_classes: int = 10
    """Number of classes of random images."""
    steps: int = 20
    """Training steps per turn; the pipeline makes four times as many batches."""
    pipeline_only: bool = False
    """Do not measure the training. A large --image-size may need too much memory for it."""
    turns: int = 5
    """Turns of each; the result is their median."""

    def __post_init__(self):
        if self.recipe not in RECIPES:
            raise ValueError(f"`recipe` must be one of {', '.join(RECIPES)}. Received: recipe={self.recipe!r}")
        require_at_least_one(self, "num_classes", "steps", "turns")
        least = RECIPES[self.recipe].batch_size
        if self.num_images < least:
            raise ValueError(f"`num_images` must be at least a batch, {least}. Received: num_images={self.num_images}")


def splits(arguments, recipe, folder):
    """Returns the same training images from each place, a dict of kind of cache -> `Split`, and the number of classes."""
    if arguments.data_dir is not None:
        kinds = ("memory", "disk", "off")
        loaded = {kind: sources.load("folder", arguments.data_dir, recipe.preprocessing, Cache(kind, folder)) for kind in kinds}
        return {kind: source.train for kind, source in loaded.items()}, len(loaded["disk"].class_names)
    n, shape = arguments.num_images, (*recipe.preprocessing.image_size, 3)
    labels = np.random.default_rng(0).integers(0, arguments.num_classes, n)
    kept = {}
    for kind in ("memory", "disk"):
        random = np.random.default_rng(1)
        with Cache(kind, folder).open("random", None) as store:
            with store.adding() as add:
                for i in range(n):
                    add(str(i), random.integers(0, 256, shape, "uint8"))
            kept[kind] = Split(store.images(np.arange(n)), labels)
    return kept, arguments.num_classes


def main(arguments):
    recipe = resolve(dataclasses.replace(RECIPES[arguments.recipe], epochs=10**6, resize=arguments.resize))  # never ends
    if arguments.image_size is not None:
        recipe = dataclasses.replace(recipe, image_size=arguments.image_size)
    with tempfile.TemporaryDirectory() as folder:
        measure(arguments, recipe, *splits(arguments, recipe, folder))


def measure(arguments, recipe, kept, num_classes):
    batches = {kind: training_batches(split, num_classes, recipe) for kind, split in kept.items()}

    def pipeline(kind):
        # A new iterator: the batches that an old one prefetched during training would count as made in no time.
        for _ in batches[kind].take(4 * arguments.steps):
            pass
        return 4 * arguments.steps

    work = {kind: lambda kind=kind: pipeline(kind) for kind in batches}
    if not arguments.pipeline_only:
        work["training"] = training_on_one_batch(recipe, num_classes, batches["memory"], arguments.steps)
    rates = {name: [] for name in work}
    for turn in range(arguments.turns + 1):
        for name, run in work.items():
            started = time.perf_counter()
            count = run() * recipe.batch_size
            if turn:  # the first turn compiles
                rates[name].append(count / (time.perf_counter() - started))
    print(
        json.dumps(
            {
                **dataclasses.asdict(arguments),
                "images": len(kept["disk"]),
                "images_per_second": {name: round(statistics.median(values), 1) for name, values in rates.items()},
                **{f"{kind}_to_memory": _ratios(rates[kind], rates["memory"]) for kind in batches if kind != "memory"},
                "disk_to_training": None if arguments.pipeline_only else _ratios(rates["disk"], rates["training"]),
                "variant": recipe.variant_name,
                "precision": recipe.precision,
                "xla": recipe.xla,
                "device": environment.device(),
                "versions": environment.versions(),
            }
        )
    )


def training_on_one_batch(recipe, num_classes, batches, steps):
    """Returns a function that trains the recipe's network for `steps` steps, and returns their number."""
    keras.utils.set_random_seed(0)
    shape = (*recipe.preprocessing.image_size, 3)
    model = build_classifier(recipe.variant, num_classes, shape, dtype=recipe.precision)
    compile_classifier(model, recipe, 10**6)
    batch = tf.data.Dataset.from_tensors(next(iter(batches))).repeat()

    def train():
        model.fit(batch, steps_per_epoch=steps, shuffle=False, verbose=0)
        return steps

    return train


def _ratios(rates, others):
    """The median ratio of the turns, the least and the most."""
    ratios = [rate / other for rate, other in zip(rates, others)]
    return [round(value, 2) for value in (statistics.median(ratios), min(ratios), max(ratios))]


if __name__ == "__main__":
    main(tyro.cli(Arguments))
