"""Measures whether the data pipeline keeps up with training: python benchmarks/pipeline.py --help.

Runs a recipe's pipeline without training, and its training on one batch in memory. The two alternate, so that noise on the
machine affects both alike.
"""

import dataclasses
import json
import statistics
import time

import keras
import numpy as np
import tensorflow as tf
import tyro

from cvt_keras import build_classifier, environment
from cvt_keras.data.pipeline import training_batches
from cvt_keras.data.split import Split
from cvt_keras.training import RECIPES
from cvt_keras.training.optimizers import make_optimizer
from cvt_keras.training.plan import resolve


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Images per second of a recipe's pipeline and of its training, on random pixels."""

    recipe: str = "cifar10"
    """Name of a recipe."""
    num_images: int = 45_000
    """Training images, shuffled and augmented as in the recipe."""
    num_classes: int = 10
    """Number of classes."""
    steps: int = 20
    """Training steps per turn; the pipeline makes four times as many batches."""
    turns: int = 5
    """Turns of each; the result is their median."""

    def __post_init__(self):
        if self.recipe not in RECIPES:
            raise ValueError(f"`recipe` must be one of {', '.join(RECIPES)}. Received: recipe={self.recipe!r}")
        for name in ("num_classes", "steps", "turns"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1. Received: {name}={getattr(self, name)}")
        least = RECIPES[self.recipe].batch_size
        if self.num_images < least:
            raise ValueError(f"`num_images` must be at least a batch, {least}. Received: num_images={self.num_images}")


def main(arguments):
    recipe = dataclasses.replace(resolve(RECIPES[arguments.recipe]), epochs=10**6)  # never ends
    random = np.random.default_rng(0)
    shape = (*recipe.preprocessing.image_size, 3)
    images = random.integers(0, 256, (arguments.num_images, *shape), "uint8")
    split = Split(images, random.integers(0, arguments.num_classes, arguments.num_images))
    batches = training_batches(split, arguments.num_classes, recipe)

    keras.utils.set_random_seed(0)
    model = build_classifier(recipe.variant, arguments.num_classes, shape, dtype=recipe.precision)
    model.compile(
        make_optimizer(recipe, model, 10**6),
        keras.losses.CategoricalCrossentropy(from_logits=True),
        jit_compile=recipe.xla == "on",
    )
    batch = tf.data.Dataset.from_tensors(next(iter(batches))).repeat()

    def pipeline():
        # A new iterator: the batches that an old one prefetched during training would count as made in no time.
        for _ in batches.take(4 * arguments.steps):
            pass
        return 4 * arguments.steps

    def training():
        model.fit(batch, steps_per_epoch=arguments.steps, shuffle=False, verbose=0)
        return arguments.steps

    rates = {"pipeline": [], "training": []}
    for turn in range(arguments.turns + 1):
        for name, work in (("pipeline", pipeline), ("training", training)):
            started = time.perf_counter()
            count = work() * recipe.batch_size
            if turn:  # the first turn compiles
                rates[name].append(count / (time.perf_counter() - started))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(
        json.dumps(
            {
                **dataclasses.asdict(arguments),
                "pipeline_images_per_second": round(medians["pipeline"]),
                "training_images_per_second": round(medians["training"], 1),
                "ratio": round(medians["pipeline"] / medians["training"], 2),
                "ratios": [round(a / b, 2) for a, b in zip(rates["pipeline"], rates["training"])],
                "variant": recipe.variant_name,
                "precision": recipe.precision,
                "xla": recipe.xla,
                "device": environment.device(),
                "versions": environment.versions(),
            }
        )
    )


if __name__ == "__main__":
    main(tyro.cli(Arguments))
