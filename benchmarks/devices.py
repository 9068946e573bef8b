"""Trains the same steps on JAX by one device, several devices and several processes: python benchmarks/devices.py --help

Shows that the losses are the same, and what the exchange of gradients costs. On one CPU all share its cores, so more devices
are no faster there.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro

from cvt_keras import environment, runs
from cvt_keras.training import Recipe
from cvt_keras.variants import get_variant
from measuring import require_at_least_one
from result_tables import write_rows

# All that is random, and a moving average of the weights.
STOCHASTIC_DEPTH = 0.1
RECIPE = Recipe(
    epochs=2,
    batch_size=120,
    train_limit=2_400,
    validation_limit=1_000,
    test_limit=500,
    crop_padding=3,
    mixup=0.2,
    ema=0.9,
    label_smoothing=0.1,
    peak_learning_rate=4.5e-3,
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Trains cvt_cifar, with stochastic depth, for two epochs on JAX in each way, and prints losses and times."""

    dataset: str = "cifar10"
    """cifar10 or digits."""
    processes: tuple[int, ...] = (2, 4)
    """Numbers of processes, which also are the numbers of devices of one process."""
    train_limit: int = RECIPE.train_limit
    """Train on the first N images only."""
    variant: str = "cvt_cifar"
    """The name of a network in VARIANTS."""
    csv: Path | None = None
    """Write the table to this file too."""

    def __post_init__(self):
        require_at_least_one(self, "train_limit")
        for count in self.processes:
            if count < 1 or RECIPE.batch_size % count:
                raise ValueError(f"`processes` must divide {RECIPE.batch_size}, the batch size. Received: {count}")


def recipe_of(arguments):
    """The recipe of all runs."""
    variant = get_variant(arguments.variant)
    stages = tuple(dataclasses.replace(stage, drop_path=STOCHASTIC_DEPTH) for stage in variant.stages)
    return dataclasses.replace(
        RECIPE,
        variant=dataclasses.replace(variant, stages=stages),
        dataset=arguments.dataset,
        train_limit=arguments.train_limit,
    )


def ways(processes):
    """How to train: `(name, devices of each process, arguments of cvt-keras before those of train)`."""
    yield "one device", 1, ["train"]
    for count in processes:
        yield f"{count} devices", count, ["train"]
        yield f"{count} processes", 1, ["launch", "--processes", str(count), "--", "train"]


def train(name, devices, command, recipe_file, run_dir):
    """Trains in one way. Returns the history, and the seconds of the whole command."""
    variables = {
        **os.environ,
        "KERAS_BACKEND": "jax",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    flags = ["--recipe-file", str(recipe_file), "--run-dir", str(run_dir), "--devices", str(devices)]
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "cvt_keras.cli", *command, *flags], env=variables, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr}")
    return runs.read_history(run_dir), time.perf_counter() - started


def row(name, history, seconds, first, steps):
    """A row of the table.

    Args:
        name: the way.
        history, seconds: of `train`.
        first: the history of one device.
        steps: training steps per epoch.
    """
    differences = [
        abs(epoch[key] - other[key]) for epoch, other in zip(history, first, strict=True) for key in ("loss", "val_loss")
    ]
    return {
        "trained by": name,
        "loss": f"{history[-1]['loss']:.6f}",
        "validation loss": f"{history[-1]['val_loss']:.6f}",
        "largest difference of a loss": f"{max(differences):.1e}",
        "seconds per step": f"{statistics.median(epoch['train_seconds'] for epoch in history[1:]) / steps:.3f}",
        "seconds in all": f"{seconds:.0f}",
    }


def main(arguments):
    recipe = recipe_of(arguments)
    steps = recipe.train_limit // recipe.batch_size
    rows, first = [], None
    with tempfile.TemporaryDirectory() as folder:
        recipe_file = Path(folder) / "recipe.json"
        recipe_file.write_text(json.dumps(recipe.settings()))
        for name, devices, command in ways(arguments.processes):
            history, seconds = train(name, devices, command, recipe_file, Path(folder) / name)
            first = first or history
            rows.append(row(name, history, seconds, first, steps))
            if len(rows) == 1:
                print(" | ".join(rows[0]))
            print(" | ".join(rows[-1].values()), flush=True)
    print(f"{environment.cpu()}; {environment.versions()}")
    if arguments.csv:
        write_rows(arguments.csv, rows)
    return rows


if __name__ == "__main__":
    main(tyro.cli(Arguments))
