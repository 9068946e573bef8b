"""The options of pruning and clustering, and their checks.

Nothing heavy is imported here, so that a command refuses wrong flags at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import tyro

from cvt_keras.errors import RecipeError

Layers = Sequence[str] | Callable[[str], bool] | None  # names, a predicate that takes a path, or `None` for the default layers
LayerFlags = Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="NAME [NAME ...]")]
Pattern = Literal["unstructured", "2:4", "4x1"]
Schedule = Literal["polynomial", "constant"]


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """The arguments of `MagnitudePruning`."""

    # The string under a field is the help of its flag in `cvt-keras prune`.

    sparsity: float | None = None
    """Fraction of zeros in each pruned kernel; defaults to 0.7, or to 0.5 with 2:4."""
    pattern: Pattern = "unstructured"
    """Sparsity pattern. unstructured: anywhere; 2:4: two zeros in every four weights along the inputs.
    4x1: blocks of four inputs of one output, Dense layers only."""
    schedule: Schedule | None = None
    """polynomial: add zeros over the first half of training; constant: all at the first step. Defaults to polynomial.
    2:4 adds all at the first step and takes no schedule."""
    frequency: int | None = None
    """Steps between updates with polynomial; default: at least 20 updates, or one per step in a short run."""
    layers: LayerFlags = None
    """Layers to prune, such as stage1 or stage1_block0/mlp/fc1.
    Defaults to all but the stem (without a stem: the first token embedding), depthwise convolutions and head."""

    def require(self):
        """Raises a `RecipeError` for an option out of range, or options that can't be combined."""
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise RecipeError(
                f"`sparsity`, the fraction of zeros, must be more than 0 and less than 1. Received: sparsity={self.sparsity}",
                argument="sparsity",
            )
        for name, value, known in (
            ("pattern", self.pattern, get_args(Pattern)),
            ("schedule", self.schedule, (*get_args(Schedule), None)),
        ):
            if value not in known:
                raise RecipeError(
                    f"`{name}` must be one of {', '.join(filter(None, known))}. Received: {name}={value}", argument=name
                )
        if self.pattern == "2:4":
            if self.sparsity not in (None, 0.5):
                raise RecipeError(
                    f"`sparsity` must be 0.5 with the pattern 2:4, two zeros in every four. Received: sparsity={self.sparsity}",
                    argument="sparsity",
                )
            if self.schedule:
                raise RecipeError(
                    "`schedule` must be left out with the pattern 2:4, which adds all zeros at the first step. "
                    f"Received: schedule={self.schedule}",
                    argument="schedule",
                )
        if self.frequency is not None:
            if self.frequency < 1:
                raise RecipeError(
                    f"`frequency` must be at least 1 step. Received: frequency={self.frequency}", argument="frequency"
                )
            if self.pattern == "2:4" or self.schedule == "constant":
                raise RecipeError(
                    f"`frequency` must be left out with {self.schedule or self.pattern}, which adds all zeros at the first "
                    f"step. Received: frequency={self.frequency}",
                    argument="frequency",
                )
        require_layers(self.layers)


@dataclass(frozen=True, kw_only=True)
class Clustering:
    """The arguments of `WeightClustering` that have a flag."""

    # The string under a field is the help of its flag in `cvt-keras cluster`.

    clusters: int = 16
    """Distinct values in each clustered kernel."""
    layers: LayerFlags = None
    """Layers to cluster, such as stage1 or stage1_block0/mlp/fc1.
    Defaults to all but the stem (without a stem: the first token embedding), depthwise convolutions and head."""

    def require(self):
        """Raises a `RecipeError` for an option out of range."""
        if self.clusters < 2:
            raise RecipeError(f"`clusters` must be at least 2. Received: clusters={self.clusters}", argument="clusters")
        require_layers(self.layers)


def require_layers(layers):
    """Checks `layers`, as far as this is possible without the network.

    Args:
        layers: as in `kernels.kernels`.

    Raises:
        RecipeError: if it is a string, or an empty sequence.
    """
    if layers is None or callable(layers):
        return
    if isinstance(layers, str):
        raise RecipeError(f"`layers` must be a tuple of names, or a predicate. Received: layers={layers!r}", argument="layers")
    if not len(layers):
        raise RecipeError(
            "`layers` must name at least one layer. Received no name",
            argument="layers",
            hint="Use --layers with names such as stage1, or leave it out for the default layers",
        )
