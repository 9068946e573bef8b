"""Which kernels of a network are made smaller, and what they hold."""

import re

import keras
import numpy as np
import tensorflow as tf

from cvt_keras.errors import RecipeError, RunError
from cvt_keras.model import cvt_of


def kernels(classifier, layers=()):
    """The kernels to prune or to cluster.

    Args:
        classifier: a `CvT`, or a classifier around one.
        layers: names, as paths in the network: `"stage1_block0/mlp/fc1"`, or `"stage1"` for all whose path starts so; or a
            predicate, which takes such a path and says whether its kernel is one of them. Without any, the default: every
            convolution and Dense but the stem (where a network has none, the first token embedding), the depthwise
            convolutions, and the head. These are few weights that cost much accuracy each; norms and biases are no kernels.

    Returns:
        A dict of path in the network, without the name `kernel` -> `keras.Variable`, in the network's order.

    Raises:
        RecipeError: for a name that no layer with a kernel has, or a predicate that none meets, with those that there are.
    """
    network, found = cvt_of(classifier), all_kernels(classifier)
    known = ", ".join(found)
    if callable(layers):
        chosen = {path: kernel for path, kernel in found.items() if layers(path)}
        if not chosen:
            raise RecipeError(f"`layers` must choose at least one of {known}. Received: {describe(layers)}, which chooses none")
        return chosen
    if not layers:
        first = "stem" if network.variant.stem else "stage0_embed"
        return {path: kernel for path, kernel in found.items() if not _is_left_out(path, first)}
    chosen = {}
    for name in layers:
        under = [path for path in found if re.match(rf"{re.escape(name)}(?:$|[/_])", path)]
        if not under:
            raise RecipeError(f"`layers` must name layers with a kernel, or how their names start: {known}. Received: {name}")
        chosen |= dict.fromkeys(under)
    return {path: kernel for path, kernel in found.items() if path in chosen}


def describe(layers):
    """`layers` as recipe.json holds it: the names, or a predicate's own."""
    if not callable(layers):
        return list(layers)
    return f"{layers.__module__}.{layers.__qualname__}" if hasattr(layers, "__qualname__") else repr(layers)


def all_kernels(classifier):
    """Every trained kernel of a `CvT`, or of a classifier around one, by its path in the network."""
    return {_path(variable): variable for variable in cvt_of(classifier).trainable_variables if variable.name == "kernel"}


class Zeros:
    """The zeros of a pruned network, which whatever comes after it holds.

    Args:
        kernels: path -> `keras.Variable`.

    Attributes:
        masks: path -> `tf.Variable`, 0 where the kernel is and else 1; a checkpoint must keep them.
    """

    def __init__(self, kernels):
        self.masks = {
            path: tf.Variable(tf.cast(kernel.value != 0, tf.float32), trainable=False, name="mask")
            for path, kernel in kernels.items()
        }

    def hold(self, kernels):
        """Sets what became something else to 0 again."""
        for path, mask in self.masks.items():
            kernels[path].value.assign(kernels[path].value * tf.cast(mask, kernels[path].dtype))

    def check(self, kernels):
        """Raises RunError if one of them is no zero any more."""
        for path, mask in self.masks.items():
            if np.any(np.asarray(kernels[path])[mask.numpy() == 0] != 0):
                raise RunError(f"{path} has lost zeros that it was pruned to: nothing was written. Compress anew")


def share_of_zeros(variables):
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
