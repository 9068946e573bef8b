"""`[RECIPE] [flags]`: the recipe's name or file comes first, as its values are the flags' defaults."""

import dataclasses
import itertools
from pathlib import Path

import tyro

from cvt_keras import runs
from cvt_keras.errors import RecipeError, RunError
from cvt_keras.training.recipes import RECIPES, Recipe

DEFAULT = "cifar10"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeFile:
    """The flag that is read first."""

    recipe_file: Path | None = None
    """A recipe.json, a run's for instance, in place of RECIPE: its values are the flags' defaults."""


@dataclasses.dataclass(frozen=True)
class _UncheckedRecipe(Recipe):
    """A recipe as its flags are typed. tyro would print what `Recipe` refuses in words of its own, without the way out."""

    def __post_init__(self):
        pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeFlags(RecipeFile):
    """A command's flags: it adds its own."""

    recipe: tyro.conf.OmitArgPrefixes[_UncheckedRecipe]  # a `Recipe`, once `parse` has checked it


def parse(argv, kind, program, description):
    """Reads a command line.

    Args:
        argv: its words after the program.
        kind: a dataclass that adds the command's own flags to `RecipeFlags`.
        program: the words before them: `"cvt-keras train"`.
        description: of the command, for --help.

    Returns:
        The recipe's name, or that of its file, and the `kind`.

    Raises:
        RecipeError: for an unknown recipe, or a value that no run can have.
        SystemExit: by tyro, for flags that it refuses, with 2, and for --help.
    """
    has_name = bool(argv) and not argv[0].startswith("-")
    name, flags = (argv[0], argv[1:]) if has_name else (DEFAULT, argv)
    if name not in RECIPES:
        raise RecipeError(f"`RECIPE` must be one of {', '.join(RECIPES)}. Received: {name}", argument="RECIPE")
    for before, flag in itertools.pairwise(flags):
        if flag in RECIPES and (not before.startswith("--") or "=" in before):
            raise RecipeError(
                f"`RECIPE` must come before the flags. Received: {flag} after {before}",
                argument="RECIPE",
                hint=f"Write {program} {flag} ...",
            )
    # Read before the other flags, whose defaults it holds.
    first, _ = tyro.cli(RecipeFile, prog=program, args=flags, return_unknown_args=True, add_help=False)
    file, defaults = first.recipe_file, RECIPES[name]
    if file:
        if has_name:
            raise RecipeError(
                f"`RECIPE` and `recipe_file` exclude each other. Received: {name} and {file}",
                argument="recipe_file",
                hint="Leave out the name or --recipe-file",
            )
        defaults = _read(file)
        name = file.stem if file.name != runs.RECIPE else file.resolve().parent.name  # every run's file has the same name
    # An argument without a default is required; tyro takes defaults from an instance alone.
    required = {field.name: tyro.MISSING for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING}
    arguments = tyro.cli(
        kind,
        prog=f"{program} [RECIPE]",
        description=f"{description} RECIPE, one of {', '.join(RECIPES)}, comes first; it defaults to {DEFAULT}. "
        f"The defaults below are those of {name}: {defaults.description}",
        default=kind(**{**required, "recipe": _UncheckedRecipe(**_fields(defaults))}),
        args=flags,
    )
    return name, dataclasses.replace(arguments, recipe=Recipe(**_fields(arguments.recipe)))


def _fields(recipe):
    return {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}


def _read(file):
    try:
        return Recipe.from_settings(runs.read_json(file))
    except OSError as error:
        raise RecipeError(f"`recipe_file` can't be read: {file}: {error.strerror}", argument="recipe_file") from error
    except RunError as error:  # which names the file
        raise RecipeError(f"`recipe_file` must be a recipe.json. {error.summary}", argument="recipe_file") from error
    except RecipeError as error:
        raise RecipeError(
            f"`recipe_file` must be a recipe.json. Received: {file}: {error.summary}", argument="recipe_file"
        ) from error
