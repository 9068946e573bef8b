"""Trains a network: flags in, one call of `cvt_keras.training.run`. See python train.py --help."""

import dataclasses
import os
import sys
from pathlib import Path

import tyro

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # before TensorFlow is imported: its notes would break the progress bar

from cvt_keras.data.sources import DataError
from cvt_keras.training import RECIPES, Recipe, RecipeError, run

DEFAULT = "cifar10"


@dataclasses.dataclass(frozen=True)
class Arguments:
    recipe: tyro.conf.OmitArgPrefixes[Recipe]
    run_dir: Path | None = None
    """Where the run is written; without it runs/<recipe>-<dataset>-<variant>."""


def parse(argv):
    """`[RECIPE] [flags]` -> a `Recipe` and the run folder. The recipe comes first, as its values are the flags' defaults.

    Raises:
        RecipeError: for an unknown recipe or a value that no run can have.
        SystemExit: for flags that tyro refuses, with 2, and for --help.
    """
    named = bool(argv) and not argv[0].startswith("-")
    name, flags = (argv[0], argv[1:]) if named else (DEFAULT, argv)
    if name not in RECIPES:
        raise RecipeError(f"`RECIPE` must be one of {', '.join(RECIPES)}. Received: {name}")
    arguments = tyro.cli(
        Arguments,
        prog="train.py [RECIPE]",
        description=f"RECIPE, one of {', '.join(RECIPES)}, comes first; {DEFAULT} if left out. "
        f"The defaults below are those of {name}: {RECIPES[name].description}",
        default=Arguments(RECIPES[name]),
        args=flags,
    )
    recipe = arguments.recipe
    return recipe, arguments.run_dir or Path("runs") / f"{name}-{recipe.dataset}-{recipe.variant}"


def main(argv):
    run_dir = None
    try:
        recipe, run_dir = parse(argv)
        report = run(recipe, run_dir)
    except (RecipeError, FileExistsError) as error:
        return _fail(error, 2)
    except (DataError, FloatingPointError, OSError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail(f"stopped. The run is not finished: to train again, remove {run_dir} or name another with --run-dir", 130)
    print(f"{report.test['top1']:.2%} top-1 on {report.test['images']} test images; the run is in {run_dir}")
    return 0


def _fail(message, code):
    print(f"\ntrain.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
