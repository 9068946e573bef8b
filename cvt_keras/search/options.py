"""The options of a search, and which go together.

Nothing heavy is imported here, so that the command refuses wrong flags at once.
"""

import math
import re
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import tyro

from cvt_keras.errors import ArgumentError, RecipeError

HEARTBEAT_SECONDS = 5.0  # between two messages of a worker that it is alive
MISSED_HEARTBEATS = 3  # in a row; fewer do not mean that a worker is gone

Algorithm = Literal["bayesian", "hyperband", "random"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The arguments of a search, beside the recipe, the space and the folder."""

    # The string under a field is its flag's help in `cvt-keras search`.

    trials: int = 20
    """Candidates to train. A larger number continues a finished search."""
    algorithm: Algorithm = "bayesian"
    """One of keras-tuner's. hyperband: many for few epochs, and the best of them again for more, up to --epochs."""
    max_macs: Annotated[float | None, tyro.conf.arg(metavar="M")] = None
    """Multiply-accumulates per image that a network may take, 55e6 for instance: a larger one is not trained."""
    chief: bool = False
    """Train nothing, and hand the trials to workers."""
    worker: bool = False
    """Train what the chief at --address hands out."""
    address: Annotated[str, tyro.conf.arg(metavar="HOST:PORT")] = "127.0.0.1:7171"
    """Where the chief listens. Workers on other machines must reach it. There is no password."""
    worker_timeout: float = 120.0
    """After so many seconds without a heartbeat a worker's trial goes to another worker; without any worker the chief ends."""
    fresh: bool = False
    """Delete the search in the folder, after asking, and start over."""

    def require(self, recipe):
        """Raises unless the options go together, and with the recipe.

        Raises:
            ArgumentError: if they do not.
        """
        if self.chief and self.worker:
            raise ArgumentError(
                "`chief` and `worker` exclude each other: they are two processes. Received: both",
                argument="worker",
                hint="Start one process with --chief, and each other with --worker",
            )
        if self.worker and self.fresh:
            raise ArgumentError(
                "`fresh` is the chief's: a worker has no search to delete. Received: fresh=True, worker=True",
                argument="fresh",
                hint="Give --fresh to the chief",
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
                f"`max_macs` must be a finite number over 0. Received: max_macs={self.max_macs}", argument="max_macs"
            )
        least = MISSED_HEARTBEATS * HEARTBEAT_SECONDS
        if not least <= self.worker_timeout < math.inf:
            raise ArgumentError(
                f"`worker_timeout` must be at least {least:g} seconds, as a worker is heard every {HEARTBEAT_SECONDS:g}. "
                f"Received: worker_timeout={self.worker_timeout:g}",
                argument="worker_timeout",
            )
        port = re.fullmatch(r".+:(\d+)", self.address)
        if not port or not 0 < int(port[1]) < 65536:
            raise ArgumentError(
                f"`address` must be HOST:PORT, 127.0.0.1:7171 for instance. Received: address={self.address}",
                argument="address",
            )
        self._require_searchable(recipe)

    def _require_searchable(self, recipe):
        if recipe.compression is not None:
            raise RecipeError(
                f"`compression` can't be searched: search the run that was compressed. Received: {recipe.compression}",
                argument="compression",
                hint="Give the --recipe-file of the run before the compression",
            )
        if recipe.variant is None and recipe.weights is None:
            raise RecipeError(
                "`weights` must say what to start from, or `variant` what to train from random weights. Received: neither",
                argument="weights",
                hint="Give --weights SOURCE, or --variant NAME",
            )
        if self.max_macs is not None and recipe.weights is not None:
            raise ArgumentError(
                "`max_macs` has nothing to choose from: the network is that of `weights`. "
                f"Received: max_macs={self.max_macs:g}, weights={recipe.weights}",
                argument="max_macs",
                hint="Leave out --max-macs or --weights",
            )
