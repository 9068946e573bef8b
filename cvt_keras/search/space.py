"""What a search may change in a recipe and in its variant: names, ranges, and the way from values back to a recipe.

A search space is a dict of name -> `Range` or `Choice`. A name is a field of `Recipe` that holds a number or one of a few
words, or one of the network's: `mlp_ratio` and `drop_path` of all stages, and `stage0_depth`, `stage0_dim`,
`stage0_kernel_size`, `stage0_stride` of each.
"""

import dataclasses
import json
import math
import re
import sys
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from cvt_keras import runs
from cvt_keras.errors import RecipeError, RunError
from cvt_keras.training.recipes import Recipe
from cvt_keras.variants import get_variant, named

DIGITS = 4  # significant, of what is drawn from a range: so a recipe can be read, and typed


def _is_number(value):
    most = sys.float_info.max  # also of whole numbers, which Python lets grow
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -most <= value <= most


@dataclass(frozen=True)
class Range:
    """All numbers from `low` to `high`; with `log`, as many below the geometric mean as above it.

    Raises:
        RecipeError: for bounds that hold no number.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not all(_is_number(bound) for bound in (self.low, self.high)):
            raise RecipeError(f"`low` and `high` must be finite numbers. Received: low={self.low!r}, high={self.high!r}")
        if not isinstance(self.log, bool):
            raise RecipeError(f"`log` must be true or false. Received: log={self.log!r}")
        if self.low >= self.high:
            raise RecipeError(f"`low` must be under `high`. Received: low={self.low}, high={self.high}")
        if self.log and self.low <= 0:
            raise RecipeError(f"`low` must be over 0 with `log`. Received: low={self.low}")

    def __contains__(self, value: Any) -> bool:
        return _is_number(value) and self.low <= value <= self.high

    @property
    def ends(self) -> tuple[float, float]:
        return self.low, self.high

    @property
    def kind(self) -> type[float]:
        """Of all its values."""
        return float

    @property
    def values_to_check(self) -> tuple[float, float]:
        """If a recipe can have these, it can have all of them."""
        return self.ends

    @property
    def marks(self) -> tuple[float, float]:
        """What names an axis of it: the ends."""
        return self.ends

    def place(self, value: float) -> float:
        """Where a value is on the way from one end, 0, to the other, 1."""
        low, high = self.ends
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low)


@dataclass(frozen=True)
class Choice:
    """One of a few numbers, kept in rising order, or of a few words.

    Raises:
        RecipeError: if there are not two to choose from.
    """

    values: tuple[float | str, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.values, (tuple, list)):
            raise RecipeError(f"a choice must be a list of finite numbers, or of words. Received: {self.values!r}")
        words = all(isinstance(value, str) for value in self.values)
        if not words and not all(_is_number(value) for value in self.values):
            raise RecipeError(f"a choice must be a list of finite numbers, or of words. Received: {self.values!r}")
        values = self.values if words else sorted(self.values)
        object.__setattr__(self, "values", tuple(dict.fromkeys(values)))
        if len(self.values) < 2:
            raise RecipeError(f"a choice must have two values at least. Received: {list(self.values)}")

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, str) == (self.kind is str) and value in self.values

    @property
    def ends(self) -> tuple[Any, Any]:
        return self.values[0], self.values[-1]

    @property
    def kind(self) -> type[float] | type[str]:
        """Of all its values."""
        if isinstance(self.values[0], str):
            return str
        return int if all(isinstance(value, int) for value in self.values) else float

    @property
    def values_to_check(self) -> tuple[float | str, ...]:
        """All of them, as one may be allowed and the next not."""
        return self.values

    @property
    def marks(self) -> tuple[float | str, ...]:
        """What names an axis of it: the ends, or all words, as a place says nothing of them."""
        return self.values if self.kind is str else self.ends

    def place(self, value: Any) -> float:
        """Where a value is on the way from one end, 0, to the other, 1; words are as far from each other."""
        if self.kind is str:
            return self.values.index(value) / (len(self.values) - 1)
        low, high = self.ends
        return (value - low) / (high - low)


RATES = 4.0  # the learning rate from a quarter of the recipe's own to four times it
# Wide enough for a good recipe to lie well inside, narrow enough that most candidates learn; widened to hold the recipe's own.
RECIPE_SPACE = {
    "decay": Choice(("linear", "cosine")),
    "weight_decay": Range(1e-3, 0.2, log=True),
    "warmup": Range(0.02, 0.3),
    "label_smoothing": Range(0.0, 0.2),
    "rand_augment": Choice((0, 1, 2)),
    "rand_augment_magnitude": Range(2.0, 9.0),
    "erase": Range(0.0, 0.3),
    "mixup": Range(0.0, 0.4),
    "cutmix": Range(0.0, 1.0),
}
LAYER_DECAY = Range(0.6, 1.0)  # where the network starts from weights
DROP_PATH = Range(0.0, 0.3)
MLP_RATIOS = (1.0, 2.0, 3.0, 4.0)
WIDTHS = (0.5, 0.75, 1.0, 1.25, 1.5)  # of the stage's own
KERNEL_SIZES = (3, 5, 7)


def space_of(recipe):
    """The whole space around a recipe -> a dict of name -> `Range` or `Choice`.

    Of the network only where it is trained anew: with `weights` its shape is theirs.
    """
    space = {}
    if (rate := recipe.peak_learning_rate) > 0:
        space["peak_learning_rate"] = Range(*(float(f"{end:.{DIGITS}g}") for end in (rate / RATES, rate * RATES)), log=True)
    space |= {name: _around(where, getattr(recipe, name)) for name, where in RECIPE_SPACE.items()}
    if recipe.weights is not None:
        return {**space, "layer_decay": _around(LAYER_DECAY, recipe.layer_decay)}
    stages = get_variant(recipe.variant).stages
    space["mlp_ratio"] = Choice((*MLP_RATIOS, *(stage.mlp_ratio for stage in stages)))
    space["drop_path"] = _around(DROP_PATH, stages[-1].drop_path)
    for i, stage in enumerate(stages):
        space[f"stage{i}_depth"] = Choice(tuple(max(1, stage.depth + more) for more in (-1, 0, 1, 2)))
        space[f"stage{i}_dim"] = Choice((stage.dim, *(_even(stage.dim * width) for width in WIDTHS)))
        space[f"stage{i}_kernel_size"] = Choice((*KERNEL_SIZES, stage.kernel_size))
        space[f"stage{i}_stride"] = Choice((max(1, stage.stride // 2), stage.stride) if stage.stride > 1 else (1, 2))
    return space


def values_of(recipe, space):
    """A recipe's own place in a space -> a dict of name -> value; `None` for what lies outside."""
    values = {}
    stages = get_variant(recipe.variant).stages if recipe.variant is not None else ()
    for name in space:
        if name == "mlp_ratio":
            ratios = {stage.mlp_ratio for stage in stages}
            value = ratios.pop() if len(ratios) == 1 else None
        elif name == "drop_path":
            value = stages[-1].drop_path
        elif place := _stage_field(name):
            value = getattr(stages[place[0]], place[1])
        else:
            value = getattr(recipe, name)
        values[name] = value
    return {name: where.kind(values[name]) if values[name] in where else None for name, where in space.items()}


def apply(recipe, values):
    """A recipe with the values of a candidate.

    Args:
        recipe: the `Recipe` that is varied.
        values: a dict of name -> value, of a space of it.

    Returns:
        A `Recipe`; for the recipe's own values the recipe itself, but for its description.

    Raises:
        RecipeError: for values that no run can have.
    """
    fields = {name: value for name, value in values.items() if not _is_of_network(name)}
    if len(fields) < len(values):
        fields["variant"] = network(recipe, values)
    return dataclasses.replace(recipe, description="", **fields)


def network(recipe, values):
    """The network of a candidate -> a name of `VARIANTS`, or a `Variant`.

    A stage of another width keeps the width of its heads, as nearly as whole heads allow; one of another kernel has its
    padding follow; `drop_path` is the last stage's, and a stage before has a share of it, the first none.

    Args:
        recipe, values: as `apply` has them; what is not the network's is passed over.

    Raises:
        RecipeError: for values that no network can have.
    """
    variant = get_variant(recipe.variant)
    changes = [{} for _ in variant.stages]
    for name, value in values.items():
        if place := _stage_field(name):
            changes[place[0]][place[1]] = value
    try:
        stages = []
        for i, (stage, change) in enumerate(zip(variant.stages, changes)):
            if change.get("dim", stage.dim) != stage.dim:
                change["heads"] = _heads(change["dim"], stage.dim / stage.heads)
            if change.get("kernel_size", stage.kernel_size) != stage.kernel_size:
                change["padding"] = change["kernel_size"] // 2
            if "mlp_ratio" in values:
                change["mlp_ratio"] = float(values["mlp_ratio"])
            if values.get("drop_path", variant.stages[-1].drop_path) != variant.stages[-1].drop_path:
                last = len(variant.stages) - 1
                change["drop_path"] = values["drop_path"] * (i / last if last else 1)
            stages.append(dataclasses.replace(stage, **change))
        variant = dataclasses.replace(variant, stages=tuple(stages))
    except ValueError as error:
        raise RecipeError(str(error)) from error
    return named(variant)


def read(source, recipe):
    """Reads a space, and checks that the recipe can have its values.

    Args:
        source: a dict of name -> `Range`, `Choice` or what stands for them in JSON:
            `{"peak_learning_rate": {"low": 1e-3, "high": 4e-3, "log": true}, "stage0_depth": [1, 2]}`.
            Or the path of a JSON file of it.
        recipe: the `Recipe` that is varied.

    Returns:
        A dict of name -> `Range` or `Choice`.

    Raises:
        RecipeError: for an empty space, an unknown name, or values that no run can have, naming them.
    """
    if isinstance(source, dict):
        return _read(source, recipe, "`space`")
    try:
        axes = runs.read_json(source)
    except OSError as error:
        raise RecipeError(f"`space` can't be read: {source}: {error.strerror}", argument="space") from error
    except RunError as error:
        raise RecipeError(f"`space` can't be read: {error.summary}", argument="space") from error
    return _read(axes, recipe, f"`space` {source}")


def _read(axes, recipe, label):
    if not isinstance(axes, dict) or not axes:
        raise RecipeError(f"{label} must hold an object of at least one name. Received: {axes!r}", argument="space")
    known = (*space_of(recipe), *_number_fields(), *_word_fields())
    space = {}
    for name, axis in axes.items():
        if name not in known:
            reason = " (the network is that of the weights)" if recipe.weights and _is_of_network(name) else ""
            names = ", ".join(dict.fromkeys(known))
            raise RecipeError(f"{label} has an unknown name: {name}{reason}. Known: {names}", argument="space")
        try:
            space[name] = _axis(axis)
            _require_kind(name, space[name])
            for value in space[name].values_to_check:
                apply(recipe, {name: value})
        except RecipeError as error:
            raise RecipeError(f"{label}: {name}: {error.summary}", argument="space") from error
    return space


def _axis(axis):
    if isinstance(axis, (Range, Choice)):
        return axis
    if isinstance(axis, list):
        return Choice(tuple(axis))
    if isinstance(axis, dict) and {"low", "high"} <= set(axis) <= {"low", "high", "log"}:
        return Range(**axis)
    raise RecipeError(f'it must be {{"low": .., "high": .., "log": true or false}} or a list. Received: {axis!r}')


def _require_kind(name, axis):
    """Raises unless the values are of the kind that the name has: numbers, whole numbers, or words."""
    received = json.dumps(_written(axis))
    if isinstance(axis, Range) and _is_whole(name):
        raise RecipeError(f"it is a whole number: give a list of them. Received: {received}")
    words = _word_fields().get(name)
    if words and axis.kind is not str:
        raise RecipeError(f"it must be a list of {', '.join(words)}. Received: {received}")
    if not words and axis.kind is str:
        raise RecipeError(f"it must be a list of finite numbers. Received: {received}")


def written(space):
    """A space as `read` reads it."""
    return {name: _written(axis) for name, axis in space.items()}


def _written(axis):
    return list(axis.values) if isinstance(axis, Choice) else dataclasses.asdict(axis)


def rounded(value, where):
    """A number of a `Range` to `DIGITS` significant digits, still within it; one of a `Choice` as it is."""
    if isinstance(where, Choice):
        return value
    return min(max(float(f"{value:.{DIGITS}g}"), where.low), where.high)


def sizes(space):
    """The values of the smallest network, of the names that its multiply-accumulates depend on.

    Returns:
        A dict of name -> value.
    """
    values = {}
    for name, axis in space.items():
        if not _is_of_network(name) or name == "drop_path":
            continue
        low, high = axis.ends
        values[name] = high if name.endswith("_stride") else low  # a large stride leaves few tokens
    return values


def shown(value):
    """A value as text: a number without needless digits."""
    return value if isinstance(value, str) else f"{value:g}"


def _number_fields():
    """name -> default, of the fields of a recipe that are numbers, but for those that say how much is trained, and how long."""
    apart = ("image_size", "epochs", "seed")
    defaults = {field.name: field.default for field in dataclasses.fields(Recipe)}
    return {name: default for name, default in defaults.items() if _is_number(default) and name not in apart}


def _word_fields():
    """name -> what it can be, of the fields of a recipe that are one of a few words, but for those of the machine."""
    hints = get_type_hints(Recipe)
    return {
        name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal and name not in ("precision", "xla")
    }


def _around(where, own):
    """A part of the space, wide enough for the recipe's own value; a logarithmic one can't hold 0."""
    if isinstance(where, Choice):
        return Choice((*where.values, own))
    if where.log and own <= 0:
        return where
    return Range(min(where.low, own), max(where.high, own), where.log)


def _is_whole(name):
    return _stage_field(name) is not None or isinstance(_number_fields().get(name), int)


def _is_of_network(name):
    return name in ("mlp_ratio", "drop_path") or _stage_field(name) is not None


def _stage_field(name):
    """`stage1_depth` -> (1, "depth"); `None` for another name."""
    found = re.fullmatch(r"stage(\d+)_(depth|dim|kernel_size|stride)", name)
    return (int(found[1]), found[2]) if found else None


def _heads(dim, width):
    """Heads that divide `dim`, each as near to `width` as can be; of equals the more."""
    divisors = [heads for heads in range(1, dim + 1) if dim % heads == 0]
    return min(divisors, key=lambda heads: (abs(math.log(dim / heads / width)), -heads))


def _even(dim):
    return max(8, 8 * round(dim / 8))
