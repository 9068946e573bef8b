"""The search space: which settings of a recipe and its network a search varies, and how values become a recipe.

A search space is a dict of name -> `Range` or `Choice`. A name is a field of `Recipe` that holds a number or one of a few
words, or a setting of the network: `mlp_ratio` and `drop_path` for all stages, and `stage0_depth`, `stage0_dim`,
`stage0_kernel_size`, `stage0_stride`, `stage0_mlp_ratio` for each stage.
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
from cvt_keras.training.recipes import RESIZING, Recipe
from cvt_keras.variants import get_variant, named

DIGITS = 4  # significant digits of values drawn from a range: easy to read and to type


def _is_number(value):
    limit = sys.float_info.max  # also for integers: Python's can be larger
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -limit <= value <= limit


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, drawn uniformly, or log-uniformly with `log`.

    Raises:
        RecipeError: if a bound is not a finite number, or `low` is not below `high`.
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
            raise RecipeError(f"`low` must be less than `high`. Received: low={self.low}, high={self.high}")
        if self.log and self.low <= 0:
            raise RecipeError(f"`low` must be positive if `log` is true. Received: low={self.low}, log=True")

    def __contains__(self, value: Any) -> bool:
        return _is_number(value) and self.low <= value <= self.high

    @property
    def ends(self) -> tuple[float, float]:
        return self.low, self.high

    @property
    def kind(self) -> type[float]:
        """The type of its values."""
        return float

    @property
    def values_to_check(self) -> tuple[float, float]:
        """Values to validate: if a recipe can have these, it can have all."""
        return self.ends

    @property
    def marks(self) -> tuple[float, float]:
        """Values to label on an axis: the ends."""
        return self.ends

    def place(self, value: float) -> float:
        """The position of a value between the ends, in 0..1."""
        low, high = self.ends
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low)


@dataclass(frozen=True)
class Choice:
    """One of a few numbers, sorted, or of a few words.

    Raises:
        RecipeError: for fewer than two values, or values that are neither finite numbers nor words.
    """

    values: tuple[float | str, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.values, (tuple, list)):
            raise RecipeError(f"a choice must be a list of finite numbers or of words. Received: {self.values!r}")
        words = all(isinstance(value, str) for value in self.values)
        if not words and not all(_is_number(value) for value in self.values):
            raise RecipeError(f"a choice must be a list of finite numbers or of words. Received: {self.values!r}")
        values = self.values if words else sorted(self.values)
        object.__setattr__(self, "values", tuple(dict.fromkeys(values)))
        if len(self.values) < 2:
            raise RecipeError(f"a choice must have at least two values. Received: {list(self.values)}")

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, str) == (self.kind is str) and value in self.values

    @property
    def ends(self) -> tuple[Any, Any]:
        return self.values[0], self.values[-1]

    @property
    def kind(self) -> type[float] | type[str]:
        """The type of its values."""
        if isinstance(self.values[0], str):
            return str
        return int if all(isinstance(value, int) for value in self.values) else float

    @property
    def values_to_check(self) -> tuple[float | str, ...]:
        """Values to validate: all of them, as each may be invalid on its own."""
        return self.values

    @property
    def marks(self) -> tuple[float | str, ...]:
        """Values to label on an axis: the ends of numbers, all words."""
        return self.values if self.kind is str else self.ends

    def place(self, value: Any) -> float:
        """The position of a value between the ends, in 0..1. Words are evenly spaced."""
        if self.kind is str:
            return self.values.index(value) / (len(self.values) - 1)
        low, high = self.ends
        return (value - low) / (high - low)


# From a quarter of the recipe's own value to four times it: good values differ much between optimizers. A value of 0 stays.
SCALED = ("peak_learning_rate", "weight_decay")
SCALE = 4.0
# Wide enough that a good recipe is well inside, narrow enough that most candidates learn. Widened to the recipe's own values.
RECIPE_SPACE = {
    "decay": Choice(("linear", "cosine")),
    "warmup": Range(0.02, 0.3),
    "label_smoothing": Range(0.0, 0.2),
    "rand_augment": Choice((0, 1, 2)),
    "rand_augment_magnitude": Range(2.0, 9.0),
    "erase": Range(0.0, 0.3),
    "mixup": Range(0.0, 0.4),
    "cutmix": Range(0.0, 1.0),
}
LAYER_DECAY = Range(0.6, 1.0)  # only for recipes with `weights`
DROP_PATH = Range(0.0, 0.3)
MLP_RATIOS = (1.0, 2.0, 3.0, 4.0)
WIDTHS = (0.5, 0.75, 1.0, 1.25, 1.5)  # times the stage's own width
KERNEL_SIZES = (3, 5, 7)
STAGE_FIELDS = ("depth", "dim", "kernel_size", "stride", "mlp_ratio")


def space_of(recipe):
    """The default search space around a recipe.

    With `weights` it has no names of the network, whose shape the weights fix. The stride of a stage that pools is not varied:
    a stride of 1 would leave nothing to pool.

    Returns:
        A dict of name -> `Range` or `Choice`.
    """
    space = {name: _scaled(value) for name in SCALED if (value := getattr(recipe, name)) > 0}
    space |= {name: _around(axis, getattr(recipe, name)) for name, axis in RECIPE_SPACE.items()}
    if recipe.weights is not None:
        return {**space, "layer_decay": _around(LAYER_DECAY, recipe.layer_decay)}
    stages = get_variant(recipe.variant).stages
    one_ratio = len({stage.mlp_ratio for stage in stages}) == 1
    if one_ratio:
        space["mlp_ratio"] = Choice((*MLP_RATIOS, stages[0].mlp_ratio))
    space["drop_path"] = _around(DROP_PATH, stages[-1].drop_path)
    for i, stage in enumerate(stages):
        space[f"stage{i}_depth"] = Choice(tuple(max(1, stage.depth + more) for more in (-1, 0, 1, 2)))
        space[f"stage{i}_dim"] = Choice((stage.dim, *(_even(stage.dim * width) for width in WIDTHS)))
        space[f"stage{i}_kernel_size"] = Choice((*KERNEL_SIZES, stage.kernel_size))
        if not stage.pool:
            space[f"stage{i}_stride"] = Choice((max(1, stage.stride // 2), stage.stride) if stage.stride > 1 else (1, 2))
        if not one_ratio:
            space[f"stage{i}_mlp_ratio"] = Choice((*MLP_RATIOS, stage.mlp_ratio))
    return space


def values_of(recipe, space):
    """A recipe's own values in a space: a dict of name -> value, or `None` if it is outside."""
    values = {}
    stages = get_variant(recipe.variant).stages if recipe.variant is not None else ()
    for name in space:
        if name == "mlp_ratio":
            ratios = {stage.mlp_ratio for stage in stages}
            value = ratios.pop() if len(ratios) == 1 else None
        elif name == "drop_path":
            value = stages[-1].drop_path
        elif stage_field := _stage_field(name):
            stage, field = stage_field
            value = getattr(stages[stage], field)
        else:
            value = getattr(recipe, name)
        values[name] = value
    return {name: axis.kind(values[name]) if values[name] in axis else None for name, axis in space.items()}


def apply(recipe, values):
    """Applies the values of a candidate to a recipe.

    Args:
        recipe: the `Recipe` to vary.
        values: a dict of name -> value, for names of its space.

    Returns:
        A `Recipe` without description. The recipe's own values give the recipe itself.

    Raises:
        RecipeError: for invalid values.
    """
    fields = {name: value for name, value in values.items() if not _is_of_network(name)}
    if len(fields) < len(values):
        fields["variant"] = network(recipe, values)
    return dataclasses.replace(recipe, description="", **fields)


def network(recipe, values):
    """Applies the values of a candidate to the network of a recipe.

    If a stage's width changes, its heads keep their width as nearly as possible. If its kernel changes, so does the padding.
    `drop_path` is the rate of the last stage; it rises linearly from 0 in the first.

    Args:
        recipe, values: as for `apply`. Names of other settings are ignored.

    Returns:
        A name of `VARIANTS`, or a `Variant`.

    Raises:
        RecipeError: for an invalid network.
    """
    variant = get_variant(recipe.variant)
    changes = [{} for _ in variant.stages]
    for name, value in values.items():
        if stage_field := _stage_field(name):
            stage, field = stage_field
            changes[stage][field] = value
    try:
        stages = []
        for i, (stage, change) in enumerate(zip(variant.stages, changes)):
            if (dim := change.get("dim", stage.dim)) != stage.dim:
                dataclasses.replace(stage, dim=dim, heads=1)  # raises for an invalid width
                change["heads"] = _heads(dim, stage.dim / stage.heads)
            if change.get("kernel_size", stage.kernel_size) != stage.kernel_size:
                change["padding"] = change["kernel_size"] // 2
            if (ratio := change.get("mlp_ratio", values.get("mlp_ratio"))) is not None:
                change["mlp_ratio"] = float(ratio)
            if values.get("drop_path", variant.stages[-1].drop_path) != variant.stages[-1].drop_path:
                last = len(variant.stages) - 1
                change["drop_path"] = values["drop_path"] * (i / last if last else 1)
            stages.append(dataclasses.replace(stage, **change))
        variant = dataclasses.replace(variant, stages=tuple(stages))
    except ValueError as error:
        raise RecipeError(str(error)) from error
    return named(variant)


def read(source, recipe):
    """Reads a search space, and checks that its values are valid for the recipe.

    Args:
        source: a dict of name -> `Range`, `Choice` or their form in JSON:
            `{"peak_learning_rate": {"low": 1e-3, "high": 4e-3, "log": true}, "stage0_depth": [1, 2]}`.
            Or the path of a JSON file with such a dict.
        recipe: the `Recipe` to vary.

    Returns:
        A dict of name -> `Range` or `Choice`.

    Raises:
        RecipeError: for an empty space, an unknown name or an invalid value.
    """
    if isinstance(source, dict):
        return _read(source, recipe, "`space`")
    try:
        axes = runs.read_json(source)
    except FileNotFoundError as error:
        raise RecipeError(f"`space` file not found: {source}", argument="space") from error
    except OSError as error:
        raise RecipeError(f"`space` can't be read: {source}: {error.strerror}", argument="space") from error
    except RunError as error:
        raise RecipeError(f"`space` can't be read: {error.summary}", argument="space") from error
    return _read(axes, recipe, f"`space` {source}")


def _read(axes, recipe, label):
    if not isinstance(axes, dict) or not axes:
        raise RecipeError(f"{label} must map at least one name to its values. Received: {axes!r}", argument="space")
    known = (*space_of(recipe), *_network_names(recipe), *_number_fields(), *_word_fields())
    space = {}
    for name, axis in axes.items():
        if name not in known:
            reason = " (`weights` fix the network)" if recipe.weights and _is_of_network(name) else ""
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
    raise RecipeError(f'must be {{"low": .., "high": .., "log": true or false}} or a list. Received: {axis!r}')


def _require_kind(name, axis):
    """Raises unless the values have the type of the setting: numbers, integers or words."""
    received = json.dumps(_written(axis))
    if isinstance(axis, Range) and _is_whole(name):
        raise RecipeError(f"must be a list of integers, not a range. Received: {received}")
    words = _word_fields().get(name)
    if words and axis.kind is not str:
        raise RecipeError(f"must be a list of some of {', '.join(words)}. Received: {received}")
    if not words and axis.kind is str:
        raise RecipeError(f"must be a list of finite numbers. Received: {received}")


def written(space):
    """A space as a dict for JSON, which `read` reads."""
    return {name: _written(axis) for name, axis in space.items()}


def _written(axis):
    return list(axis.values) if isinstance(axis, Choice) else dataclasses.asdict(axis)


def rounded(value, axis):
    """Rounds a number of a `Range` to `DIGITS` significant digits within its bounds. Leaves a value of a `Choice` unchanged."""
    if isinstance(axis, Choice):
        return value
    return min(max(float(f"{value:.{DIGITS}g}"), axis.low), axis.high)


def smallest(space):
    """The values of the smallest network: a dict of name -> value, of the names that change its multiply-accumulates."""
    values = {}
    for name, axis in space.items():
        if not _is_of_network(name) or name == "drop_path":
            continue
        low, high = axis.ends
        values[name] = high if name.endswith("_stride") else low  # a larger stride leaves fewer tokens
    return values


def shown(value):
    """A value as text, numbers in short form."""
    return value if isinstance(value, str) else f"{value:g}"


def _number_fields():
    """Fields of a recipe that are numbers, as name -> type, except those that a search must not vary."""
    fixed = ("epochs", "seed", *RESIZING)  # the images are loaded once for all trials
    kinds = {int: int, float: float, float | None: float}
    return {name: kinds[hint] for name, hint in get_type_hints(Recipe).items() if hint in kinds and name not in fixed}


def _word_fields():
    """Fields of a recipe that are one of a few words, as name -> words, except those of the machine and of `RESIZING`."""
    hints, fixed = get_type_hints(Recipe), ("cache", "precision", "xla", *RESIZING)
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal and name not in fixed}


def _scaled(own):
    return Range(*(float(f"{end:.{DIGITS}g}") for end in (own / SCALE, own * SCALE)), log=True)


def _around(axis, own):
    """Widens a `Range` or `Choice` to the recipe's own value."""
    if isinstance(axis, Choice):
        return Choice((*axis.values, own))
    return Range(min(axis.low, own), max(axis.high, own), axis.log)


def _is_whole(name):
    if stage_field := _stage_field(name):
        return stage_field[1] != "mlp_ratio"
    return _number_fields().get(name) is int


def _is_of_network(name):
    return name in ("mlp_ratio", "drop_path") or _stage_field(name) is not None


def _network_names(recipe):
    """The names of all settings of the network, or none if `weights` fix it."""
    if recipe.weights is not None:
        return ()
    stages = range(len(get_variant(recipe.variant).stages))
    return ("mlp_ratio", "drop_path", *(f"stage{i}_{field}" for i in stages for field in STAGE_FIELDS))


def _stage_field(name):
    """`stage1_depth` -> (1, "depth"); `None` for any other name."""
    match = re.fullmatch(rf"stage(\d+)_({'|'.join(STAGE_FIELDS)})", name)
    return (int(match[1]), match[2]) if match else None


def _heads(dim, width):
    """The number of heads that divides `dim` into widths nearest to `width`; the larger number on a tie."""
    divisors = [heads for heads in range(1, dim + 1) if dim % heads == 0]
    return min(divisors, key=lambda heads: (abs(math.log(dim / heads / width)), -heads))


def _even(dim):
    return max(8, 8 * round(dim / 8))
