"""`[RECIPE] [flags]`: the recipe's name or file comes first, as its values are the flags' defaults."""

import dataclasses
import itertools
from pathlib import Path

import tyro

from cvt_keras import runs
from cvt_keras.training.recipes import RECIPES, Recipe, RecipeError

DEFAULT = "cifar10"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeFile:
    """The flag that is read first."""

    recipe_file: Path | None = None
    """A recipe.json, a run's for instance, in place of RECIPE: its values are the flags' defaults."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeFlags(RecipeFile):
    """A command's flags: it adds its own."""

    recipe: tyro.conf.OmitArgPrefixes[Recipe]


def parse(argv, kind, program, description):
    """Reads a command line.

    Args:
        argv: its words after the program.
        kind: a dataclass that adds the command's own flags to `RecipeFlags`.
        program: what is typed before them: `"python train.py"`.
        description: for --help.

    Returns:
        The recipe's name, or what its file is called, and the `kind`.

    Raises:
        RecipeError: for an unknown recipe or a value that no run can have.
        SystemExit: for flags that tyro refuses, with 2, and for --help.
    """
    shown = f"{program.removeprefix('python ').removeprefix('-m ')} [RECIPE]"
    named = bool(argv) and not argv[0].startswith("-")
    name, flags = (argv[0], argv[1:]) if named else (DEFAULT, argv)
    if name not in RECIPES:
        raise RecipeError(f"`RECIPE` must be one of {', '.join(RECIPES)}. Received: {name}")
    for before, flag in itertools.pairwise(flags):
        if flag in RECIPES and (not before.startswith("--") or "=" in before):
            raise RecipeError(f"`RECIPE` comes before the flags: {program} {flag} ... Received: it after {before}")
    # Read before the other flags, whose defaults it holds.
    given, _ = tyro.cli(RecipeFile, prog=shown, args=flags, return_unknown_args=True, add_help=False)
    file, defaults = given.recipe_file, RECIPES[name]
    if file:
        if named:
            raise RecipeError(f"a recipe is named or comes from a file, not both. Received: {name} and --recipe-file {file}")
        defaults = _read(file)
        name = file.stem if file.name != runs.RECIPE else file.resolve().parent.name  # every run's is called alike
    # What has no default of its own is asked for; tyro takes defaults from an instance alone.
    blank = {field.name: tyro.MISSING for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING}
    arguments = tyro.cli(
        kind,
        prog=shown,
        description=f"{description} RECIPE, one of {', '.join(RECIPES)}, comes first; {DEFAULT} if left out. "
        f"The defaults below are those of {name}: {defaults.description}",
        default=kind(**{**blank, "recipe": defaults}),
        args=flags,
    )
    return name, arguments


def _read(file):
    try:
        return Recipe.from_settings(runs.read_json(file))
    except OSError as error:
        raise RecipeError(f"`--recipe-file` {file} can't be read: {error.strerror}") from error
    except (RecipeError, runs.RunError) as error:
        raise RecipeError(f"`--recipe-file` {file} is no recipe.json: {error}") from error
