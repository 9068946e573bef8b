"""Keeps the first layers of a network as they start."""

import re

import numpy as np

from cvt_keras.errors import RecipeError
from cvt_keras.variants import get_variant

BACKBONE = "backbone"


def require(recipe):
    """Raises unless a network has what a recipe freezes.

    Args:
        recipe: a `Recipe`, with its variant settled.

    Raises:
        RecipeError: if it does not.
    """
    if recipe.freeze in (None, BACKBONE):
        return
    stages = len(get_variant(recipe.variant).stages)
    if int(recipe.freeze) > stages:
        raise RecipeError(
            f"`freeze` must be at most {stages}, the stages of {recipe.variant_name}. Received: freeze={recipe.freeze}",
            argument="freeze",
        )


def freeze(network, what):
    """Freezes layers. They then run as in inference: their batch norms keep mean and variance too.

    Args:
        network: a `CvT`.
        what: `"backbone"` for all layers but the last one, the Dense layer `head`; or a number of stages, which are frozen with
            their embeddings and all that comes before them.
    """
    for layer in network.layers:
        if layer.name != "head" if what == BACKBONE else _comes_before(layer.name, int(what)):
            layer.trainable = False
    count = sum(int(np.prod(variable.shape)) for variable in network.trainable_variables)
    print(f"frozen: {what if what == BACKBONE else f'{what} stages'}; {count:,} parameters are trained", flush=True)


def _comes_before(name, stages):
    """Whether a layer lies before the stage of this index."""
    stage = re.match(r"stage(\d+)(?:_|$)", name)
    return int(stage[1]) < stages if stage else name.startswith("stem")
