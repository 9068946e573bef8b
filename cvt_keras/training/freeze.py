"""Freezes the first layers of a network."""

import re

import numpy as np

from cvt_keras.errors import RecipeError
from cvt_keras.variants import get_variant

BACKBONE = "backbone"


def require(recipe):
    """Raises if a recipe freezes more stages than its network has.

    Args:
        recipe: a `Recipe`; its variant must not be `None`.

    Raises:
        RecipeError: if it does.
    """
    if recipe.freeze in (None, BACKBONE):
        return
    stages = len(get_variant(recipe.variant).stages)
    if int(recipe.freeze) > stages:
        raise RecipeError(
            f"`freeze` must be at most {stages}, the stages in {recipe.variant_name}. Received: freeze={recipe.freeze}",
            argument="freeze",
        )


def freeze(network, what):
    """Freezes layers. Frozen layers run in inference mode, so their batch norms keep mean and variance too.

    Args:
        network: a `CvT`.
        what: `"backbone"` for all layers except the Dense layer `head`, or the number of stages to freeze. A stage includes its
            embedding and residual convolutions; whitening and stem are frozen too.
    """
    for layer in network.layers:
        if layer.name != "head" if what == BACKBONE else _comes_before(layer.name, int(what)):
            layer.trainable = False
    count = sum(int(np.prod(variable.shape)) for variable in network.trainable_variables)
    frozen = "the backbone" if what == BACKBONE else f"the first {what} stages" if int(what) > 1 else "the first stage"
    print(f"frozen: {frozen}; {count:,} trainable parameters", flush=True)


def _comes_before(name, stages):
    """Whether a layer lies before the stage of this index."""
    stage = re.match(r"stage(\d+)(?:_|$)", name)
    return int(stage[1]) < stages if stage else name.startswith(("whitening", "stem"))
