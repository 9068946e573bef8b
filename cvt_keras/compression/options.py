"""The options of the methods of compression, and which go together.

Nothing heavy is imported here, so that a command refuses wrong flags at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import tyro

from cvt_keras.errors import RecipeError

Layers = Sequence[str] | Callable[[str], bool] | None  # names, a predicate of a name, or the default layers
LayerFlags = Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="NAME [NAME ...]")]
Pattern = Literal["unstructured", "2:4", "4x1"]
Schedule = Literal["polynomial", "constant"]


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """The arguments of `MagnitudePruning`."""

    # The string under a field is its flag's help in `cvt-keras prune`.

    sparsity: float | None = None
    """Share of zeros in each pruned kernel; defaults to 0.7, or to 0.5 with 2:4."""
    pattern: Pattern = "unstructured"
    """Where zeros may lie: anywhere; two in each four inputs; or in blocks of four inputs, in Dense layers only."""
    schedule: Schedule | None = None
    """polynomial: more and more zeros over the first half of the training; constant: all zeros from the first step. Defaults to
    polynomial. 2:4 has all zeros from the first step and takes neither."""
    frequency: int | None = None
    """Steps between the updates of polynomial; by default there are at least 20 updates, if there are as many steps."""
    layers: LayerFlags = None
    """Layers to prune, such as stage1 or stage1_block0/mlp/fc1; defaults to all but stem, depthwise convolutions and head."""

    def require(self):
        """Raises unless each option is in its range, and they go together.

        Raises:
            RecipeError: if not.
        """
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise RecipeError(
                f"`sparsity` is a share of zeros, and must be over 0 and under 1. Received: sparsity={self.sparsity}",
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
                    "`sparsity` must be 0.5 with the pattern 2:4, which has two zeros in four. "
                    f"Received: sparsity={self.sparsity}",
                    argument="sparsity",
                )
            if self.schedule:
                raise RecipeError(
                    "`schedule` must be left out with the pattern 2:4, whose zeros all come at the first step. "
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
                    f"`frequency` must be left out with {self.schedule or self.pattern}, whose zeros all come at the first "
                    f"step. Received: frequency={self.frequency}",
                    argument="frequency",
                )
        require_layers(self.layers)


@dataclass(frozen=True, kw_only=True)
class Clustering:
    """The arguments of `WeightClustering` that have a flag."""

    # The string under a field is its flag's help in `cvt-keras cluster`.

    clusters: int = 16
    """Values in each clustered kernel."""
    layers: LayerFlags = None
    """Layers to cluster, such as stage1 or stage1_block0/mlp/fc1; defaults to all but stem, depthwise convolutions and head."""

    def require(self):
        """Raises unless each option is in its range.

        Raises:
            RecipeError: if not.
        """
        if self.clusters < 2:
            raise RecipeError(f"`clusters` must be at least 2. Received: clusters={self.clusters}", argument="clusters")
        require_layers(self.layers)


def require_layers(layers):
    """Raises unless `layers` can choose kernels: before the network is there.

    Args:
        layers: as in `kernels.kernels`.

    Raises:
        RecipeError: if they are one string, or no names.
    """
    if layers is None or callable(layers):
        return
    if isinstance(layers, str):
        raise RecipeError(f"`layers` must be a tuple of names, or a predicate. Received: layers={layers!r}", argument="layers")
    if not len(layers):
        raise RecipeError(
            "`layers` must name at least one layer. Received no name",
            argument="layers",
            hint="Leave out --layers for the default layers, or give it names such as stage1",
        )
