"""Command lines of the form `[RECIPE] [flags]`. The recipe, by name or file, sets the defaults of the flags."""

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
    """The flag that is read before the others."""

    recipe_file: Path | None = None
    """Take the defaults from this file, for example the recipe.json of a run, instead of from RECIPE."""


@dataclasses.dataclass(frozen=True)
class _UncheckedRecipe(Recipe):
    """A recipe before its values are checked. If `Recipe` raised inside tyro, tyro would print the error without its hint."""

    def __post_init__(self):
        pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeFlags(RecipeFile):
    """A flag for each field of a recipe. A command adds its own flags in a subclass."""

    recipe: tyro.conf.OmitArgPrefixes[_UncheckedRecipe]
    """The settings of the training run, stored in its recipe.json."""


def parse(argv, kind, program, description, recipe_details=True):
    """Reads a command line.

    Args:
        argv: the arguments after the program.
        kind: a dataclass that adds the command's own flags to `RecipeFlags`.
        program: the program, such as `"cvt-keras train"`.
        description: what the command does, for --help.
        recipe_details: whether --help shows the command and the result of the recipe, which are those of cvt-keras train.

    Returns:
        The name of the recipe or of its file, and an instance of `kind` with a checked `Recipe`.

    Raises:
        RecipeError: if the recipe is unknown, or a value is invalid.
        SystemExit: by tyro: with 2 for flags that it rejects, with 0 after --help.
    """
    has_name = bool(argv) and not argv[0].startswith("-")
    name, flags = (argv[0], argv[1:]) if has_name else (DEFAULT, argv)
    if name not in RECIPES:
        raise RecipeError(f"`RECIPE` must be one of {', '.join(RECIPES)}. Received: {name}", argument="RECIPE")
    for previous, word in itertools.pairwise(flags):
        if word in RECIPES and (not previous.startswith("--") or "=" in previous):
            raise RecipeError(
                f"`RECIPE` must come before the flags. Received: {word}",
                argument="RECIPE",
                hint=f"Use {program} {word} ...",
            )
    # Read first, as it sets the defaults of the other flags.
    first, _ = tyro.cli(RecipeFile, prog=program, args=flags, return_unknown_args=True, add_help=False)
    file, defaults = first.recipe_file, RECIPES[name]
    if file:
        if has_name:
            raise RecipeError(
                f"`RECIPE` and `recipe_file` can't be used together. Received: {name} and {file}",
                argument="recipe_file",
                hint="Leave out RECIPE or --recipe-file",
            )
        defaults = _read(file)
        name = file.stem if file.name != runs.RECIPE else file.resolve().parent.name  # runs all name it alike
    about = defaults.description if recipe_details else defaults.description.partition("\n")[0]
    about = f": {about[0].lower()}{about[1:]}" if about else "."
    # Keep arguments without a default required: tyro takes all defaults from one instance.
    required = {field.name: tyro.MISSING for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING}
    arguments = tyro.cli(
        kind,
        prog=f"{program} [RECIPE]",
        description=f"{description} RECIPE sets the defaults of the flags: {', '.join(RECIPES)}. Without RECIPE: {DEFAULT}.\n\n"
        f"The defaults below are those of {name}{about}",
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
        raise RecipeError(
            f"`recipe_file` must be a recipe in JSON, like recipe.json. {error.summary}", argument="recipe_file"
        ) from error
    except RecipeError as error:
        raise RecipeError(
            f"`recipe_file` must be a recipe in JSON, like recipe.json. Received: {file}: {error.summary}",
            argument="recipe_file",
        ) from error
