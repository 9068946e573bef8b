"""The options of a search and their checks.

Imports neither Keras nor TensorFlow, so that the command refuses wrong flags at once.
"""

import math
import re
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import tyro

from cvt_keras.errors import ArgumentError, RecipeError

HEARTBEAT_SECONDS = 5.0  # between two heartbeats of a worker
MISSED_HEARTBEATS = 3  # in a row, before a worker may count as lost

Algorithm = Literal["bayesian", "hyperband", "random"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The arguments of a search, except the recipe, the space and the folder."""

    # The string below a field is the help of its flag.

    trials: int = 20
    """Number of candidates to train. A larger number extends a finished search."""
    algorithm: Algorithm = "bayesian"
    """Algorithm of keras-tuner. hyperband trains many candidates for few epochs, and the best again for up to --epochs."""
    max_macs: Annotated[float | None, tyro.conf.arg(metavar="M")] = None
    """Maximum multiply-accumulates (MACs) per image, for example 55e6. Larger networks are not tried."""
    chief: bool = False
    """Coordinate workers: hand out trials, train none here."""
    worker: bool = False
    """Train the trials that the chief at --address hands out."""
    address: Annotated[str, tyro.conf.arg(metavar="HOST:PORT")] = "127.0.0.1:7171"
    """Address that the chief listens on and workers connect to. There is no password: use a trusted network."""
    worker_timeout: float = 120.0
    """Seconds without a heartbeat, at least 15, until a worker's trial goes to another worker.
    The chief stops after as many seconds without any worker."""
    fresh: bool = False
    """Delete the search in the folder and start over. Asks first, unless --yes is given."""

    def require(self, recipe):
        """Checks the options, and that they fit the recipe.

        Raises:
            ArgumentError: for a wrong value, or options that exclude each other.
            RecipeError: if the recipe can't be searched around.
        """
        if self.chief and self.worker:
            raise ArgumentError(
                "`chief` and `worker` exclude each other: they are separate processes. Received: chief=True, worker=True",
                argument="worker",
                hint="Start one process with --chief and each other one with --worker",
            )
        if self.worker and self.fresh:
            raise ArgumentError(
                "`fresh` does not apply to a worker: only the chief has a search to delete. Received: fresh=True, worker=True",
                argument="fresh",
                hint="Use --fresh for the chief only",
            )
        if self.trials < 1:
            raise ArgumentError(f"`trials` must be at least 1. Received: trials={self.trials}", argument="trials")
        if self.algorithm not in get_args(Algorithm):
            raise ArgumentError(
                f"`algorithm` must be one of {', '.join(get_args(Algorithm))}. Received: algorithm={self.algorithm!r}",
                argument="algorithm",
            )
        if self.max_macs is not None and not 0 < self.max_macs < math.inf:
            raise ArgumentError(
                f"`max_macs` must be positive and finite. Received: max_macs={self.max_macs}", argument="max_macs"
            )
        least = MISSED_HEARTBEATS * HEARTBEAT_SECONDS
        if not least <= self.worker_timeout < math.inf:
            raise ArgumentError(
                f"`worker_timeout` must be at least {least:g} seconds: workers send a heartbeat every {HEARTBEAT_SECONDS:g}. "
                f"Received: worker_timeout={self.worker_timeout:g}",
                argument="worker_timeout",
            )
        port = re.fullmatch(r".+:(\d+)", self.address)
        if not port or not 0 < int(port[1]) < 65536:
            raise ArgumentError(
                f"`address` must be HOST:PORT, for example 127.0.0.1:7171. Received: address={self.address}",
                argument="address",
            )
        self._require_searchable(recipe)

    def _require_searchable(self, recipe):
        if recipe.compression is not None:
            raise RecipeError(
                f"`compression` must be None for a search. Received: compression={recipe.compression}",
                argument="compression",
                hint="Use the --recipe-file of the run before the compression",
            )
        if recipe.variant is None and recipe.weights is None:
            raise RecipeError(
                "a search needs `weights` to start from or a `variant` to train. Received: weights=None, variant=None",
                argument="weights",
                hint="Use --weights SOURCE or --variant NAME",
            )
        if self.max_macs is not None and recipe.weights is not None:
            raise ArgumentError(
                "`max_macs` can't be combined with `weights`, which fix the network. "
                f"Received: max_macs={self.max_macs:g}, weights={recipe.weights}",
                argument="max_macs",
                hint="Leave out --max-macs or --weights",
            )
