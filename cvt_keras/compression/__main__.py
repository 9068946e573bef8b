"""Makes a run's network smaller, into a run of its own: python -m cvt_keras.compression prune|cluster|qat RUN --run-dir NEW"""

import dataclasses
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

from cvt_keras.errors import NoRunError, RunError

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before TensorFlow is imported: its notes would break the progress bar

try:
    import tyro

    from cvt_keras import runs, signals
    from cvt_keras.compression.clustering import WeightClustering
    from cvt_keras.compression.pruning import MagnitudePruning
    from cvt_keras.compression.quantization import QuantizationAwareTraining
    from cvt_keras.errors import CheckpointError, DataError, RecipeError
    from cvt_keras.training import Recipe, run
except (ImportError, ValueError) as error:  # ValueError: a KERAS_BACKEND that there is not
    sys.exit(f"compression: {error}. Is all of requirements.txt installed, and KERAS_BACKEND unset?")

PROGRAM = "python -m cvt_keras.compression"
# Of the run's own peak: what is learned already is to be kept.
RATE = 0.25
# Flags that are fields of the recipe, and where they are not given, the run's own.
GIVEN = ("peak_learning_rate", "batch_size", "precision", "seed", "data_dir", "train_limit", "test_limit")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run folder to start from."""
    run_dir: Path
    """Where the new run is written."""
    epochs: int = 2
    """Passes over the training images."""
    peak_learning_rate: float | None = None
    """Reached after the warm-up; by default a quarter of the run's own."""
    batch_size: int | None = None
    """By default the run's own; qat needs more memory than the training before."""
    precision: Literal["auto", "float32", "mixed_bfloat16", "mixed_float16"] | None = None
    """By default auto, as in train.py, and float32 for qat, which takes no other."""
    seed: int | None = None
    """By default the run's own."""
    data_dir: str | None = None
    """Where the run's data set lies now, if not where it was."""
    train_limit: int | None = None
    """Train on the first N images only; by default as the run did."""
    test_limit: int | None = None
    """Test on the first N images only; by default as the run was."""
    resume: bool = False
    """Go on with the new run, after its last finished epoch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prune(Command):
    """Sets the weights of least magnitude to zero. The file is as large, but gzip makes it smaller."""

    sparsity: float | None = None
    """Share of zeros in each pruned kernel; 0.7, or 0.5 with 2:4."""
    pattern: Literal["unstructured", "2:4", "4x1"] = "unstructured"
    """Where zeros may lie: anywhere; two in each four inputs; or in blocks of four inputs, of Dense layers alone."""
    schedule: Literal["polynomial", "constant"] | None = None
    """polynomial, the default: more and more over the first half of the training; constant: all at the first step, as with 2:4,
    which takes neither."""
    frequency: int | None = None
    """Steps between polynomial's updates; by default so many that there are at least 20, if the steps allow."""
    layers: tuple[str, ...] = ()
    """Which, stage1 or stage1_block0/mlp/fc1 for instance; by default all but stem, depthwise convolutions and head."""

    def compression(self, after):
        sparsity = self.sparsity if self.sparsity is not None else 0.5 if self.pattern == "2:4" else 0.7
        return MagnitudePruning(sparsity, self.pattern, self.schedule, self.frequency, self.layers, after)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster(Command):
    """Lets each kernel have a few values alone. The file is as large, but gzip makes it smaller. Zeros of a pruned run stay."""

    clusters: int = 16
    """Values in each clustered kernel."""
    layers: tuple[str, ...] = ()
    """Which, stage1 or stage1_block0/mlp/fc1 for instance; by default all but stem, depthwise convolutions and head."""

    def compression(self, after):
        return WeightClustering(self.clusters, keep_zeros=_method(after) == "prune", layers=self.layers, after=after)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qat(Command):
    """Trains with the roundings of 8-bit integers, so that the int8 file loses less. Zeros of a pruned run stay."""

    def compression(self, after):
        return QuantizationAwareTraining(keep_zeros=_method(after) == "prune", after=after)


def compress(command):
    """Runs a `Prune`, `Cluster` or `Qat` -> the `Report` of the new run.

    Raises:
        NoRunError, RunError: if there is no finished run at `command.run`.
        RecipeError: for an argument that can't be, or what can't be combined.
        ImportError: if tensorflow-model-optimization is missing.
        And what `cvt_keras.training.run` raises.
    """
    runs.require_finished(command.run)
    path = command.run / runs.RECIPE
    try:
        recipe = Recipe.from_settings(runs.read_json(path))
    except (RecipeError, TypeError) as error:
        raise RunError(f"{path} is broken: {error}") from error
    compression = command.compression(recipe.compression)
    given = {name: getattr(command, name) for name in GIVEN if getattr(command, name) is not None}
    recipe = dataclasses.replace(
        recipe,
        **{
            "peak_learning_rate": RATE * recipe.peak_learning_rate,
            # What suited the machine of the run need not suit this one. A network in half precision has nothing left to round.
            "precision": "float32" if isinstance(command, Qat) else "auto",
            "xla": "auto",
            **given,
            "weights": str(command.run / runs.MODEL),
            "compression": None,
            "epochs": command.epochs,
            "ema": 0.0,
            "layer_decay": 1.0,
        },
    )
    return run(recipe, command.run_dir, resume=command.resume, compression=compression)


def _method(settings):
    return settings["method"] if settings else None


def main(argv):
    """Runs the command line -> its exit code."""
    resuming = shlex.join(["python", "-m", "cvt_keras.compression", *argv, *([] if "--resume" in argv else ["--resume"])])
    signals.raise_on_sigterm()
    try:
        command = tyro.cli(Prune | Cluster | Qat, prog=PROGRAM, description=__doc__.partition(":")[0], args=argv)
        report = compress(command)
    except (RecipeError, FileExistsError, NoRunError) as error:
        return _fail(error, 2)
    except (CheckpointError, DataError, RunError, FloatingPointError, MemoryError, ImportError) as error:
        return _fail(error, 1)
    except OSError as error:
        return _fail(f"{error}; finished epochs are kept. To go on once that is mended: {resuming}", 1)
    except KeyboardInterrupt as stop:
        return _fail(f"stopped; finished epochs are kept. To go on: {resuming}", signals.exit_code(stop))
    found = report.test or report.validation
    print(f"{found['top1']:.2%} top-1 on {found['images']} images; the run is in {command.run_dir}")
    print(f"its files: python -m export {shlex.quote(str(command.run_dir))}")
    return 0


def _fail(message, code):
    print(f"\ncompression: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
