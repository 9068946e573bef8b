"""The command `cvt-keras train`: flags in, one call of `cvt_keras.training.run`."""

import dataclasses
import sys
import traceback
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cvt_keras import cli, environment
from cvt_keras.training import flags


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(flags.RecipeFlags):
    run_dir: Path | None = None
    """The run folder to write; defaults to runs/<recipe>-<dataset>-<variant>."""
    resume: bool = False
    """Resume the run in the run folder after its last finished epoch. Use the same flags as at the start."""
    devices: Annotated[int | Literal["all"] | None, tyro.conf.arg(metavar="N|all")] = None
    """Devices to train on, in each process; more than one with KERAS_BACKEND=jax only.
    None: one, and for one of several processes all that it sees."""
    coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    """With several processes: the address of process 0. Defaults to JAX_COORDINATOR_ADDRESS, or to what Slurm or Open MPI say.
    There is no password: use a trusted network."""
    processes: int | None = None
    """With several processes: their number. Defaults to JAX_NUM_PROCESSES, or to what Slurm or Open MPI say."""
    process_id: int | None = None
    """With several processes: the index of this one, from 0. Defaults to JAX_PROCESS_ID, or to what Slurm or Open MPI say."""


def parse(argv):
    """Reads the command line; see `flags.parse` for what it returns and raises."""
    return flags.parse(argv, Arguments, "cvt-keras train", "Train a network.")


def main(argv):
    name, arguments = parse(argv)
    environment.start(*environment.TRAINING_BACKENDS)
    from cvt_keras.report import metrics
    from cvt_keras.training import distributed
    from cvt_keras.training.loop import run

    group = distributed.find(arguments.coordinator, arguments.processes, arguments.process_id)
    if group and arguments.resume and arguments.run_dir and _is_trained(arguments):
        # The group has parted before. A scheduler may start a single one of its processes again.
        if group.process_id:
            print("all epochs are finished: process 0 does the rest alone")
            return
        group = None
    try:
        if group:
            distributed.join(group)
        with cli.resumable("train", argv):
            result = run(arguments.recipe, arguments.run_dir, resume=arguments.resume, name=name, devices=arguments.devices)
    except (Exception, KeyboardInterrupt) as error:
        if group is None:
            raise
        print()  # the error does not continue the line of the progress bar
        try:
            code = cli.failed("train", error)
        except Exception:
            traceback.print_exc()
            code = 1
        distributed.end_process(code)
    if result.report is None:  # process 0 writes it
        return
    split = "test" if result.report.test else "validation"  # a run from Python may have left the test images untouched
    scores = getattr(result.report, split)
    low, high = metrics.wilson(scores["top1"], scores["images"])  # the report of an older version lacks it
    interval = f"95% interval: {low:.2%} to {high:.2%}"
    print(f"{scores['top1']:.2%} top-1 ({interval}) on {scores['images']:,} {split} images; the run is in {result.run_dir}")


def _is_trained(arguments):
    from cvt_keras.training.callbacks import is_early_stop_due, stored_history

    history, recipe = stored_history(arguments.run_dir), arguments.recipe
    return len(history) >= recipe.epochs or is_early_stop_due(history, recipe.early_stopping)


if __name__ == "__main__":
    sys.exit(cli.run("train", sys.argv[1:]))
