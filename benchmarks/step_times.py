"""Times training steps of a recipe's network and of changes to it: python benchmarks/step_times.py --help

The networks take turns in one process, so that a machine that slows down slows all of them.
"""

import dataclasses
import statistics
import time

import keras
import numpy as np
import tyro

from cifar10 import CHANGES, CNN, build
from cvt_keras import Preprocessing, environment
from cvt_keras.data import tfds
from cvt_keras.training import RECIPES
from cvt_keras.training.objective import compile_classifier
from cvt_keras.training.plan import resolve
from cvt_keras.variants import get_variant, named
from measuring import require_at_least_one

NETWORKS = {**CHANGES, CNN: lambda variant: variant}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Prints the milliseconds of a training step of each network, and their ratio to the recipe's network."""

    recipe: str = "cifar10"
    """The recipe: its network, and how to train."""
    changes: tuple[str, ...] = tuple(name for name in NETWORKS if name)
    """What to compare with the recipe's network: cnn, or keys of CHANGES in cifar10.py."""
    turns: int = 7
    """Turns of all networks."""
    steps: int = 5
    """Steps per turn."""

    def __post_init__(self):
        if unknown := set(self.changes) - set(NETWORKS):
            known = ", ".join(filter(None, NETWORKS))
            raise ValueError(f"`changes` must be of {known}. Received: {', '.join(sorted(unknown))}")
        require_at_least_one(self, "turns", "steps")


def compiled(change, recipe, source):
    """Returns a network that is ready to train, and its MACs.

    Args:
        change: a key of `NETWORKS`.
        recipe: a `Recipe`.
        source: anything with the mean, std and class names of a data set.
    """
    keras.utils.set_random_seed(0)
    recipe = dataclasses.replace(recipe, variant=named(NETWORKS[change](get_variant(recipe.variant))))
    network = CNN if change == CNN else "recipe"
    classifier, cost = build(network, "" if network == CNN else change, recipe, source, recipe.precision)
    compile_classifier(classifier, recipe, 10_000)
    return classifier, cost


def step_seconds(networks, batch, turns, steps):
    """Returns the seconds of a step of each network in each turn: a list for each. A turn before them compiles."""
    seconds = {name: [] for name in networks}
    for turn in range(turns + 1):
        for name in networks if turn % 2 else reversed(networks):
            started = time.perf_counter()
            for _ in range(steps):
                networks[name].train_on_batch(*batch)
            seconds[name].append((time.perf_counter() - started) / steps)
    return {name: times[1:] for name, times in seconds.items()}


def main(arguments):
    recipe = resolve(RECIPES[arguments.recipe])
    side, random = recipe.image_size, np.random.default_rng(0)
    source = Preprocessing(tfds.CIFAR10_MEAN, tfds.CIFAR10_STD, tuple(map(str, range(10))))
    pixels = random.integers(0, 256, (recipe.batch_size, side, side, 3)).astype("float32")
    batch = pixels, np.eye(len(source.class_names), dtype="float32")[random.integers(0, 10, len(pixels))]
    built = {name: compiled(name, recipe, source) for name in ("", *arguments.changes)}
    times = step_seconds({name: network for name, (network, _) in built.items()}, batch, arguments.turns, arguments.steps)
    print("| network | MACs | ms per step | images/s | ratio, least and most |\n| --- | --- | --- | --- | --- |")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        ratios = [one / other for one, other in zip(seconds, times[""])]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        row = (
            name or recipe.variant_name,
            f"{built[name][1] / 1e6:.1f} M",
            f"{1000 * median:.0f}",
            f"{len(pixels) / median:.0f}",
        )
        print(f"| {' | '.join((*row, ratio))} |")
    print(f"{environment.device()}, {environment.versions()}")
    return times


if __name__ == "__main__":
    main(tyro.cli(Arguments))
