"""Reads the run in a run folder, and checks whether a recipe can resume it."""

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path

from cvt_keras import environment, runs
from cvt_keras.errors import DifferentRunError, RunError
from cvt_keras.preprocessing import Preprocessing
from cvt_keras.training.callbacks import stored_machine
from cvt_keras.training.recipes import Recipe, read_recipe
from cvt_keras.variants import Variant, different_fields, get_variant, named


@dataclass(frozen=True)
class StoredRun:
    """A run in a run folder, finished or not.

    Args:
        run_dir: the run folder.
        recipe: the `Recipe` in its recipe.json.
        newer_fields: fields of a recipe that are missing in its recipe.json, because an older version wrote it.
        same_backend: whether the backend of Keras is that of the finished epochs. XLA is an option of TensorFlow only, so the
            `xla` of a run on another backend does not count.
    """

    run_dir: Path
    recipe: Recipe
    newer_fields: tuple[str, ...]
    same_backend: bool = True

    def completed(self, recipe):
        """Fills in the fields that a recipe leaves open from the stored recipe.

        Open are `dataset`, `precision` and `xla` if they are `auto`, and the variant and the way of resizing if they come from
        the weights. The `newer_fields` get their defaults.
        """
        recipe = without_newer_fields(recipe, self.newer_fields)
        open_fields = [name for name in ("dataset", "precision", "xla") if getattr(recipe, name) == "auto"]
        if not self.same_backend:
            open_fields = [name for name in open_fields if name != "xla"]
        if recipe.weights and same_weights(self.recipe.weights, recipe.weights) and self._leaves_variant_open(recipe):
            open_fields.append("variant")
        recipe = dataclasses.replace(recipe, **{name: getattr(self.recipe, name) for name in open_fields})
        return recipe.resized_like(self.recipe.preprocessing)

    def _leaves_variant_open(self, recipe):
        """Whether the variant of the recipe, or only its activation, comes from the weights."""
        stored = get_variant(self.recipe.variant)
        return (
            recipe.variant is None or dataclasses.replace(get_variant(recipe.variant), activation=stored.activation) == stored
        )

    def require_same(self, recipe, images_known=True):
        """Raises unless a recipe has the settings of the run.

        Args:
            recipe: the recipe to resume with, after `completed`.
            images_known: `False` before the images are loaded. Then it is unknown whether they may be mirrored, and the stored
                `flip` is used.

        Raises:
            DifferentRunError: if settings differ. It names them.
        """
        if not images_known:
            recipe = dataclasses.replace(recipe, flip=recipe.flip and self.recipe.flip)
        stored, received = self.recipe.settings(), recipe.settings()
        for settings in (stored, received):
            settings["variant"] = settings["variant"] and named(get_variant(settings["variant"]))
        names = [name for name in received | stored if stored.get(name) != received.get(name)]
        # TFDS' folder may change, but another folder of images is another data set. `Checkpoints.restore` compares the images.
        if recipe.dataset != "folder" or _same_path(stored["data_dir"], received["data_dir"]):
            names = [name for name in names if name != "data_dir"]
        # `Checkpoints.restore` compares the weights in the file.
        if _same_path(stored["class_weights"], received["class_weights"]):
            names = [name for name in names if name != "class_weights"]
        # A broken file that the run did not have may be skipped: `Checkpoints.restore` compares the images. The pixels are the
        # same wherever they are kept.
        names = [name for name in names if name not in ("skip_broken", "cache", "cache_dir")]
        if not self.same_backend:
            names = [name for name in names if name != "xla"]
        if same_weights(stored["weights"], received["weights"]):
            names = [name for name in names if name != "weights"]
        elif "variant" in names:  # it comes from the weights
            names = ["weights", *(name for name in names if name not in ("weights", "variant"))]
        if names:
            differences = {name: (_as_text(stored.get(name)), _as_text(received.get(name))) for name in names}
            if "variant" in names and isinstance(stored["variant"], Variant) and received["variant"]:
                parts = ", ".join(different_fields(stored["variant"], get_variant(received["variant"])))
                differences["variant"] = (f"a network that differs in {parts}", differences["variant"][1])
            hint = "Resume with the same flags, or train in another --run-dir"
            if recipe.compression is None:
                flags = ["--recipe-file", self.run_dir / runs.RECIPE, "--run-dir", self.run_dir, "--resume"]
                command = shlex.join(["cvt-keras", "train", *map(str, flags)])
                hint = f"To resume with the run's own settings: {command}. Or train in another --run-dir"
            raise DifferentRunError(self.run_dir, differences, hint)


def read_stored_run(run_dir):
    """Reads the `StoredRun` in a folder. Returns `None` if there is no run.

    Raises:
        RunError: if its recipe.json is damaged.
    """
    path = run_dir / runs.RECIPE
    if not path.exists():
        return None
    hint = "Restore the recipe.json of the run, or train in another --run-dir"
    recipe = read_recipe(run_dir, hint)
    if open_fields := [name for name in ("dataset", "precision", "xla") if getattr(recipe, name) == "auto"]:
        raise RunError(f"{path} was not written by a run: it has auto for {', '.join(open_fields)}", hint=hint)
    # Versions that did not store how images are resized stretched them.
    recipe = recipe.resized_like(Preprocessing())
    backend = stored_machine(run_dir).get("backend")  # unknown before the first checkpoint
    same_backend = backend == environment.backend() if backend else not (environment.backend() == "jax" and recipe.xla == "off")
    return StoredRun(run_dir, recipe, newer_fields(runs.read_json(path)), same_backend)


def newer_fields(settings):
    """The fields of a recipe that stored settings lack, because an older version wrote them.

    Args:
        settings: the dict in a recipe.json.
    """
    return tuple(name for name in Recipe().settings() if name not in settings)


def without_newer_fields(recipe, names):
    """The recipe with the default values of these fields. Prints each other value that it ignores."""
    defaults = {field.name: field.default for field in dataclasses.fields(recipe) if field.name in names}
    for name, default in defaults.items():
        if (value := getattr(recipe, name)) != default:
            print(f"{name}={value} is ignored: the version that started this did not have {name}", flush=True)
    return dataclasses.replace(recipe, **defaults)


def same_weights(stored, received):
    """Whether these are the same weights, even if the file was moved or the path is relative to another folder.

    A file counts as moved if one of the same name exists at the received path, and none at the stored path.
    """
    if stored == received or stored is None or received is None:
        return stored == received
    stored_path, received_path = Path(stored).expanduser(), Path(received).expanduser()
    moved = stored_path.name == received_path.name and received_path.exists() and not stored_path.exists()
    return moved or _same_path(stored, received)


def _as_text(value):
    return "a Variant without a name" if isinstance(value, Variant) else repr(value)


def _same_path(*paths):
    """Whether all paths lead to the same file or folder. A path may be `None`."""
    return len({path and Path(path).expanduser().resolve() for path in paths}) == 1
