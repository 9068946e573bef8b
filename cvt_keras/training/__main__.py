"""The command `cvt-keras train`: flags in, one call of `cvt_keras.training.run`."""

import dataclasses
import sys
from pathlib import Path

from cvt_keras import cli, environment
from cvt_keras.training import flags


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(flags.RecipeFlags):
    run_dir: Path | None = None
    """The run folder to write; defaults to runs/<recipe>-<dataset>-<variant>."""
    resume: bool = False
    """Resume the run in the run folder after its last finished epoch. Use the same flags as at the start."""


def parse(argv):
    """Reads the command line; see `flags.parse` for what it returns and raises."""
    return flags.parse(argv, Arguments, "cvt-keras train", "Train a network.")


def main(argv):
    name, arguments = parse(argv)
    environment.start()
    from cvt_keras.report import metrics
    from cvt_keras.training.loop import run

    with cli.resumable("train", argv):
        result = run(arguments.recipe, arguments.run_dir, resume=arguments.resume, name=name)
    split = "test" if result.report.test else "validation"  # a run from Python may have left the test images untouched
    scores = getattr(result.report, split)
    low, high = metrics.wilson(scores["top1"], scores["images"])  # the report of an older version lacks it
    interval = f"95% interval: {low:.2%} to {high:.2%}"
    print(f"{scores['top1']:.2%} top-1 ({interval}) on {scores['images']:,} {split} images; the run is in {result.run_dir}")


if __name__ == "__main__":
    sys.exit(cli.run("train", sys.argv[1:]))
