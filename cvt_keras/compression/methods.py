"""`compress`, which applies a method of compression to a finished run."""

import dataclasses
import inspect
import os
from pathlib import Path
from typing import Any, Literal

from cvt_keras import runs
from cvt_keras.compression.clustering import WeightClustering
from cvt_keras.compression.pruning import MagnitudePruning
from cvt_keras.compression.quantization import QuantizationAwareTraining
from cvt_keras.errors import RecipeError
from cvt_keras.training.loop import run as train
from cvt_keras.training.plan import RunResult
from cvt_keras.training.recipes import read_recipe

METHODS = {"prune": MagnitudePruning, "cluster": WeightClustering, "qat": QuantizationAwareTraining}
# Share of the run's peak learning rate. A high rate would undo what the network has learned.
LEARNING_RATE_SHARE = 0.25


def compress(
    run: str | os.PathLike[str],
    run_dir: str | os.PathLike[str],
    method: Literal["prune", "cluster", "qat"],
    *,
    epochs: int = 2,
    peak_learning_rate: float | None = None,
    batch_size: int | None = None,
    precision: str | None = None,
    seed: int | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    train_limit: int | None = None,
    validation_limit: int | None = None,
    test_limit: int | None = None,
    skip_broken: bool = False,
    class_weights: str | os.PathLike[str] | None = None,
    resume: bool = False,
    **options: Any,
) -> RunResult:
    """Makes the network of a finished run smaller, and writes a new run folder.

    `compress("runs/mine", "runs/pruned", "prune", sparsity=0.5)` trains the network of `runs/mine` further, on the same images
    and with the settings of its recipe. `ema`, `layer_decay` and `freeze` are off.

    Args:
        run: the run folder to start from.
        run_dir: the run folder to write. Unless `resume` is set, it must be new or empty.
        method: `"prune"`, for `MagnitudePruning`; `"cluster"`, for `WeightClustering`; or `"qat"`, for
            `QuantizationAwareTraining`.
        epochs: passes over the training images.
        peak_learning_rate: `None` means a quarter of the run's.
        batch_size: images per training step; `None` means the run's. `"qat"` needs more memory than the run did.
        precision: `None` means `"auto"`, and `"float32"` for `"qat"`, which takes no other.
        seed: `None` means the run's.
        data_dir: the folder of the run's data set; `None` means the one that the run read.
        train_limit, validation_limit, test_limit: use the first N images only; `None` means the run's limit.
        skip_broken: whether to skip files of a folder that can't be read; always true if the run skipped them.
        class_weights: `"auto"`, `"none"` or a file, as in a `Recipe`; `None` means the run's.
        resume: continue the run in `run_dir` after its last finished epoch.
        options: the method's own arguments, such as `sparsity` or `clusters`. Zeros of a pruned run stay zero, unless
            `keep_zeros=False`.

    Returns:
        A `RunResult`.

    Raises:
        NoRunError: if `run` holds no run.
        RunError: if that run is not finished or is damaged.
        RecipeError: for an unknown method or option, a value out of range, or a method that can't follow the run's.
        MissingPackageError: if tensorflow-model-optimization is not installed.
        UserError: any other error of `cvt_keras.training.run`.
    """
    run, run_dir = Path(run), Path(run_dir)
    runs.require_finished(run, argument="run")
    recipe = read_recipe(run)
    compressor = _compressor(method, options, recipe.compression)
    settings = {
        "peak_learning_rate": peak_learning_rate,
        "batch_size": batch_size,
        "precision": precision,
        "seed": seed,
        "data_dir": data_dir,
        "train_limit": train_limit,
        "validation_limit": validation_limit,
        "test_limit": test_limit,
        "skip_broken": skip_broken or None,
        "class_weights": class_weights,
    }
    defaults = {
        "peak_learning_rate": LEARNING_RATE_SHARE * recipe.peak_learning_rate,
        # `auto` again, as this may be another machine. Half precision would round a second time before int8 does.
        "precision": "float32" if method == "qat" else "auto",
        "xla": "auto",
        "weights": str(run / runs.MODEL),
        "compression": None,
        "epochs": epochs,
        "ema": 0.0,
        "layer_decay": 1.0,
        "freeze": None,
    }
    recipe = dataclasses.replace(
        recipe, **{**defaults, **{name: value for name, value in settings.items() if value is not None}}
    )
    return train(recipe, run_dir, resume=resume, compressor=compressor)


def _compressor(method, options, after):
    """Returns the `Compressor` of a method.

    Args:
        method: a name in `METHODS`.
        options: its arguments.
        after: `settings` of the run's own compression, or `None`.
    """
    if method not in METHODS:
        raise RecipeError(f"`method` must be one of {', '.join(METHODS)}. Received: method={method!r}", argument="method")
    known = [name for name in inspect.signature(METHODS[method]).parameters if name != "after"]
    if unknown := sorted(set(options) - set(known)):
        raise RecipeError(
            f"`{unknown[0]}` is not an option of {method}, whose options are {', '.join(known)}. "
            f"Received: {unknown[0]}={options[unknown[0]]!r}",
            argument=unknown[0],
        )
    if "keep_zeros" in known:
        options = {"keep_zeros": after is not None and after["method"] == "prune", **options}
    return METHODS[method](**options, after=after)
