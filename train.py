"""Trains a network: flags in, one call of `cvt_keras.training.run`. See python train.py --help."""

import dataclasses
import os
import shlex
import signal
import sys
from pathlib import Path

import tyro

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # before TensorFlow is imported: its notes would break the progress bar

from cvt_keras import runs
from cvt_keras.data.sources import DataError
from cvt_keras.training import RECIPES, Recipe, RecipeError, run

DEFAULT = "cifar10"


class Terminated(KeyboardInterrupt):
    """SIGTERM, ended like Ctrl-C."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    recipe: tyro.conf.OmitArgPrefixes[Recipe]
    recipe_file: Path | None = None
    """A recipe.json, a run's for instance, in place of RECIPE: its values are the flags' defaults."""
    run_dir: Path | None = None
    """Where the run is written; without it runs/<recipe>-<dataset>-<variant>."""
    resume: bool = False
    """Go on with the run in the run folder, after its last finished epoch."""


def parse(argv):
    """`[RECIPE] [flags]` -> `Arguments` with a run folder. The recipe comes first, as its values are the flags' defaults.

    Raises:
        RecipeError: for an unknown recipe or a value that no run can have.
        SystemExit: for flags that tyro refuses, with 2, and for --help.
    """
    named = bool(argv) and not argv[0].startswith("-")
    name, flags = (argv[0], argv[1:]) if named else (DEFAULT, argv)
    if name not in RECIPES:
        raise RecipeError(f"`RECIPE` must be one of {', '.join(RECIPES)}. Received: {name}")
    defaults = RECIPES[name]
    file = _recipe_file(flags)
    if file:
        if named:
            raise RecipeError(f"a recipe is named or comes from a file, not both. Received: {name} and --recipe-file {file}")
        name, defaults = file.stem, _read(file)
    arguments = tyro.cli(
        Arguments,
        prog="train.py [RECIPE]",
        description=f"RECIPE, one of {', '.join(RECIPES)}, comes first; {DEFAULT} if left out. "
        f"The defaults below are those of {name}: {defaults.description}",
        default=Arguments(defaults),
        args=flags,
    )
    recipe = arguments.recipe
    folder = f"{name}-{recipe.dataset}-{recipe.variant_name}".replace(":", "-").replace("/", "-")
    return dataclasses.replace(arguments, run_dir=arguments.run_dir or Path("runs") / folder)


def _recipe_file(flags):
    """The file that --recipe-file names, read before the other flags, whose defaults it holds."""
    for i, flag in enumerate(flags):
        if flag == "--recipe-file" and i + 1 < len(flags):
            return Path(flags[i + 1])
        if flag.startswith("--recipe-file="):
            return Path(flag.partition("=")[2])
    return None


def _read(file):
    try:
        return Recipe.from_settings(runs.read_json(file))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RecipeError(f"`--recipe-file` {file} is no recipe.json: {error}") from error


def main(argv):
    signal.signal(signal.SIGTERM, _terminate)
    try:
        arguments = parse(argv)
        report = run(arguments.recipe, arguments.run_dir, resume=arguments.resume)
    except (RecipeError, FileExistsError) as error:
        return _fail(error, 2)
    except (DataError, FloatingPointError, OSError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt as stop:
        command = shlex.join(["python", "train.py", *argv, *([] if "--resume" in argv else ["--resume"])])
        return _fail(f"stopped; finished epochs are kept. To go on: {command}", 143 if isinstance(stop, Terminated) else 130)
    print(f"{report.test['top1']:.2%} top-1 on {report.test['images']} test images; the run is in {arguments.run_dir}")
    return 0


def _terminate(number, frame):
    raise Terminated


def _fail(message, code):
    print(f"\ntrain.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
