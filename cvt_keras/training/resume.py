"""The run that is in a run folder already: what it began with, and whether a recipe may resume it."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from cvt_keras import runs
from cvt_keras.errors import DifferentRunError, RunError
from cvt_keras.training.recipes import Recipe, read_recipe
from cvt_keras.variants import Variant, get_variant, named


@dataclass(frozen=True)
class StoredRun:
    """A run that has begun.

    Args:
        run_dir: its folder.
        recipe: the `Recipe` in its recipe.json.
        newer_fields: the fields of a recipe that its recipe.json lacks, as the version that wrote it did not have them.
    """

    run_dir: Path
    recipe: Recipe
    newer_fields: tuple[str, ...]

    def completed(self, recipe):
        """A recipe with what it leaves open as the run has it.

        These are `dataset`, `precision` and `xla` where they are `auto`, the variant where it comes from the weights, and the
        fields that the run's version did not have.
        """
        recipe = without_newer_fields(recipe, self.newer_fields)
        left_open = [name for name in ("dataset", "precision", "xla") if getattr(recipe, name) == "auto"]
        if recipe.weights and same_weights(self.recipe.weights, recipe.weights) and self._settles_variant_of(recipe):
            left_open.append("variant")
        return dataclasses.replace(recipe, **{name: getattr(self.recipe, name) for name in left_open})

    def _settles_variant_of(self, recipe):
        """Whether the recipe leaves its variant, or the activation of it, to the weights."""
        stored = get_variant(self.recipe.variant)
        return (
            recipe.variant is None or dataclasses.replace(get_variant(recipe.variant), activation=stored.activation) == stored
        )

    def require_same(self, recipe, images_known=True):
        """Raises unless a recipe is that of the run.

        Args:
            recipe: what the run is to be resumed with, completed.
            images_known: `False` before the images are loaded, which may be gone: whether they can be mirrored is stored.

        Raises:
            DifferentRunError: if it has other settings, naming them.
        """
        if not images_known:
            recipe = dataclasses.replace(recipe, flip=recipe.flip and self.recipe.flip)
        was, is_now = self.recipe.settings(), recipe.settings()
        for settings in (was, is_now):
            settings["variant"] = settings["variant"] and named(get_variant(settings["variant"]))
        names = [name for name in is_now | was if was.get(name) != is_now.get(name)]
        # Where TFDS keeps a data set may change; another folder of images is another data set. Its images are compared with
        # the checkpoint's.
        if recipe.dataset != "folder" or _same_place(was["data_dir"], is_now["data_dir"]):
            names = [name for name in names if name != "data_dir"]
        if _same_place(was["class_weights"], is_now["class_weights"]):  # the checkpoint has the weights in the file
            names = [name for name in names if name != "class_weights"]
        # The checkpoint knows the images; a file that broke since must not end the run.
        names = [name for name in names if name != "skip_broken"]
        if same_weights(was["weights"], is_now["weights"]):
            names = [name for name in names if name != "weights"]
        elif "variant" in names:  # which comes from the weights
            names = ["weights", *(name for name in names if name not in ("weights", "variant"))]
        if names:
            raise DifferentRunError(self.run_dir, {name: (_shown(was.get(name)), _shown(is_now.get(name))) for name in names})


def read_stored_run(run_dir):
    """The `StoredRun` in a folder, or `None` where no run has begun.

    Raises:
        RunError: if its recipe.json is damaged.
    """
    path = run_dir / runs.RECIPE
    if not path.exists():
        return None
    hint = "Put the run's own back, or train in another --run-dir"
    recipe = read_recipe(run_dir, hint)
    if unsettled := [name for name in ("dataset", "precision", "xla") if getattr(recipe, name) == "auto"]:
        raise RunError(f"{path} is not from a run: it leaves {', '.join(unsettled)} open", hint=hint)
    return StoredRun(run_dir, recipe, newer_fields(runs.read_json(path)))


def newer_fields(settings):
    """The fields of a recipe that its stored settings lack, as the version that stored them did not have them.

    Args:
        settings: the dict in a recipe.json.
    """
    return tuple(name for name in Recipe().settings() if name not in settings)


def without_newer_fields(recipe, names):
    """The recipe with the defaults of these fields, as their absence meant. Prints each value that is not used then."""
    defaults = {field.name: field.default for field in dataclasses.fields(recipe) if field.name in names}
    for name, default in defaults.items():
        if (value := getattr(recipe, name)) != default:
            print(f"{name}={value} is not used: the version that began this had no {name}", flush=True)
    return dataclasses.replace(recipe, **defaults)


def same_weights(was, is_now):
    """Whether these are the same weights, even if they were moved, or are named from another folder."""
    if was == is_now or was is None or is_now is None:
        return was == is_now
    before, after = Path(was).expanduser(), Path(is_now).expanduser()
    return _same_place(was, is_now) or (before.name == after.name and after.exists() and not before.exists())


def _shown(value):
    return "a Variant of its own" if isinstance(value, Variant) else repr(value)


def _same_place(*paths):
    """Whether paths, of which any may be `None`, lead to the same file or folder, however they are spelled."""
    return len({path and Path(path).expanduser().resolve() for path in paths}) == 1
