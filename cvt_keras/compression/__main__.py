"""The commands `cvt-keras prune`, `cluster` and `qat`: flags in, one call of `cvt_keras.compression.compress`."""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from cvt_keras import cli, environment, runs
from cvt_keras.compression import options
from cvt_keras.training.recipes import COMPRESSIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """The flags that all methods share, named as the arguments of `compress`."""

    method: ClassVar[str]

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run folder to start from."""
    run_dir: Path
    """The run folder to write."""
    epochs: int = 2
    """Passes over the training images."""
    peak_learning_rate: float | None = None
    """Learning rate after the warm-up; defaults to a quarter of the run's."""
    batch_size: int | None = None
    """Images per training step; defaults to the run's."""
    precision: Literal["auto", "float32", "mixed_bfloat16", "mixed_float16"] | None = None
    """Precision of the training; defaults to auto, as in train."""
    seed: int | None = None
    """Seed of the training; defaults to the run's."""
    data_dir: str | None = None
    """Data set folder; defaults to the run's."""
    train_limit: int | None = None
    """Train on the first N images only; defaults to the run's."""
    validation_limit: int | None = None
    """Validate on the first N images only; defaults to the run's."""
    test_limit: int | None = None
    """Test on the first N images only; defaults to the run's."""
    skip_broken: tyro.conf.FlagCreatePairsOff[bool] = False
    """Skip files of a folder that can't be read, and count them in the report. Always on if the run used it."""
    class_weights: Annotated[str | None, tyro.conf.arg(metavar="auto|none|FILE")] = None
    """The weight of each class in the loss; defaults to the run's."""
    resume: bool = False
    """Resume the new run after its last finished epoch."""

    def require(self):
        """Raises a `RecipeError` for wrong options of the method. Nothing to check here."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prune(options.Pruning, Arguments):
    """Prune a run: train it further and set its smallest weights to zero.
    The exported file keeps its size, but compresses better with gzip."""

    method = "prune"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster(options.Clustering, Arguments):
    """Cluster a run: train it further with few distinct values in each kernel.
    The exported file keeps its size, but compresses better with gzip. Zeros of a pruned run stay zero."""

    method = "cluster"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qat(Arguments):
    """Train a run further with int8 rounding (quantisation-aware training), so that the int8 file loses less accuracy.
    Zeros of a pruned run stay zero."""

    method = "qat"

    batch_size: int | None = None
    """Images per training step; defaults to the run's. Training needs more memory than the run did."""
    precision: Literal["auto", "float32", "mixed_bfloat16", "mixed_float16"] | None = None
    """float32, the default; auto only on a device where it means float32."""


def parse(argv):
    """Reads the method's name and its flags. Raises a `RecipeError` for a wrong value."""
    arguments = tyro.cli(Prune | Cluster | Qat, prog="cvt-keras", description="Make a run's network smaller.", args=argv)
    arguments.require()
    return arguments


def main(argv):
    """Compresses a run.

    Args:
        argv: the method's name and its flags.
    """
    arguments = parse(argv)
    runs.require_finished(arguments.run, argument="run")
    environment.start("tensorflow")
    from cvt_keras.compression.methods import compress

    with cli.resumable(arguments.method, argv[1:]):
        result = compress(method=arguments.method, **dataclasses.asdict(arguments))
    scores = result.report.test
    print(f"{scores['top1']:.2%} top-1 on {scores['images']:,} test images; the run is in {result.run_dir}")
    print(f"To export it: cvt-keras export {shlex.quote(str(result.run_dir))}")


if __name__ == "__main__":
    method, *flags = sys.argv[1:] or ["--help"]
    sys.exit(cli.run(method, flags) if method in COMPRESSIONS else main([method, *flags]))
