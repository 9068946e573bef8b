"""The command `cvt-keras search`: parses flags and calls `cvt_keras.search.search`."""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Annotated

import tyro

from cvt_keras import cli, environment, runs
from cvt_keras.errors import ArgumentError
from cvt_keras.search import folder
from cvt_keras.search import space as spaces
from cvt_keras.search.options import Options
from cvt_keras.training import flags


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(flags.RecipeFlags, Options):
    search_dir: Path
    """Search folder. Repeat the command to resume."""
    space: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """JSON file that replaces the default space, such as {"warmup": {"low": 0.02, "high": 0.3}, "stage0_depth": [1, 2]}.
    docs/guides/search.md lists the names."""
    yes: bool = False
    """Do not ask before --fresh deletes the search."""


def parse(argv):
    """Parses the command line. Raises a `UserError` if flags conflict."""
    description = "Search for a better recipe with keras-tuner."
    _, arguments = flags.parse(argv, Arguments, "cvt-keras search", description, recipe_details=False)
    Options(**_options(arguments)).require(arguments.recipe)
    return arguments


def main(argv):
    arguments = parse(argv)
    options = _options(arguments)
    space = None if arguments.space is None else spaces.read(arguments.space, arguments.recipe)
    if not arguments.worker:  # a worker's folder holds trials, but no search
        folder.require_usable(arguments.search_dir)
    if arguments.fresh and folder.holds_search(arguments.search_dir) and not (arguments.yes or _agreed(arguments.search_dir)):
        print(f"nothing was deleted in {arguments.search_dir}", file=sys.stderr)
        return 1
    environment.start(*environment.TRAINING_BACKENDS)
    from cvt_keras.search import search

    with cli.resumable("search", argv, again=[word for word in argv if word not in ("--fresh", "--yes")]):
        result = search(arguments.recipe, arguments.search_dir, space=space, **options)
    if result is None:  # a worker has no result
        return 0
    _show(result, arguments.recipe.epochs)
    return 1 if result.failing else 0


def _options(arguments):
    return {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Options)}


def _agreed(search_dir):
    """Asks whether to delete the search in the folder.

    Raises:
        ArgumentError: if standard input is not a terminal.
    """
    trials = len(folder.trial_dirs(search_dir))
    if not sys.stdin.isatty():
        raise ArgumentError(
            f"`fresh` deletes the search in {search_dir} and must be confirmed, but standard input is not a terminal",
            argument="fresh",
            hint="Confirm with --yes",
        )
    try:
        answer = input(f"delete the search in {search_dir}, with the runs of {trials} trials? [y/N] ")
    except EOFError:  # Ctrl-D
        print(file=sys.stderr)
        return False
    return answer.strip().lower() in ("y", "yes")


def _show(result, epochs):
    best = result.best
    epochs_short = f" after {best['epochs']} of {epochs} epochs" if best["epochs"] < epochs else ""
    accuracy = f"{best['val_accuracy']:.2%} top-1 on the validation images{epochs_short}"
    print(f"best: trial {best['trial']}, {accuracy}; page: {result.search_dir / runs.PAGE}")
    file = shlex.quote(str(result.recipe_file))
    print(f"to train it on all images: cvt-keras train --recipe-file {file} --epochs N")


if __name__ == "__main__":
    sys.exit(cli.run("search", sys.argv[1:]))
