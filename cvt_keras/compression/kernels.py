"""Which kernels of a network are made smaller, and what they hold."""

import re

import keras
import numpy as np

from cvt_keras.model import cvt_of
from cvt_keras.training.recipes import RecipeError


def kernels(classifier, names=()):
    """The kernels to prune or to cluster.

    Args:
        classifier: a `CvT`, or a classifier around one.
        names: of layers, as paths in the network: `"stage1_block0/mlp/fc1"`, or `"stage1"` for all whose path starts so.
            Without any, the default: every convolution and Dense but the stem (where a network has none, the first token
            embedding), the depthwise convolutions, and the head. These are few weights that cost much accuracy each; norms and
            biases are no kernels.

    Returns:
        A dict of path in the network, without the name `kernel` -> `keras.Variable`, in the network's order.

    Raises:
        RecipeError: for a name that no layer with a kernel has, with those that there are.
    """
    network = cvt_of(classifier)
    found = {_path(variable): variable for variable in network.trainable_variables if variable.name == "kernel"}
    if not names:
        first = "stem" if network.variant.stem else "stage0_embed"
        return {path: kernel for path, kernel in found.items() if not _is_left_out(path, first)}
    chosen = {}
    for name in names:
        under = [path for path in found if re.match(rf"{re.escape(name)}(?:$|[/_])", path)]
        if not under:
            known = ", ".join(found)
            raise RecipeError(f"`layers` must name layers with a kernel, or how their names start: {known}. Received: {name}")
        chosen |= dict.fromkeys(under)
    return {path: kernel for path, kernel in found.items() if path in chosen}


def sparsity(variables):
    """Share of zeros in variables together, a fraction of 1."""
    values = [keras.ops.convert_to_numpy(variable) for variable in variables]
    return 1 - sum(np.count_nonzero(value) for value in values) / sum(value.size for value in values)


def _path(variable):
    """`cvt/stage0_block0/mlp/fc1/kernel` -> `stage0_block0/mlp/fc1`; Keras may have put other names before."""
    parts = variable.path.split("/")
    start = next(i for i, part in enumerate(parts) if part.startswith(("stem", "stage", "head")))
    return "/".join(parts[start:-1])


def _is_left_out(path, first):
    return path.startswith((first, "head")) or path.endswith("/depthwise")
