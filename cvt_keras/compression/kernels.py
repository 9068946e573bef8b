"""The kernels that a compression changes, and their zeros."""

import re

import keras
import numpy as np
import tensorflow as tf

from cvt_keras.compression.options import require_layers
from cvt_keras.errors import RecipeError, RunError
from cvt_keras.model import cvt_of


def kernels(classifier, layers=None):
    """Returns the kernels to prune or to cluster.

    Args:
        classifier: a `CvT`, or a classifier around one.
        layers: paths in the network, such as `"stage1_block0/mlp/fc1"`, or their beginnings, such as `"stage1"`; or a predicate
            that takes a path and returns whether to choose its kernel. `None` means every convolution and Dense layer but the
            first trained one (the stem, or the first token embedding without a stem), the depthwise convolutions, and the
            head: these have few weights, and losing one costs much accuracy. Norms, biases and the fixed kernel of whitening
            are never chosen.

    Returns:
        A dict of path, without the name `kernel` -> `keras.Variable`, in the network's order.

    Raises:
        RecipeError: for a name that matches no layer with a kernel, or a predicate that chooses none. It lists the layers.
    """
    network, known = cvt_of(classifier), all_kernels(classifier)
    if layers is None:
        first = "stem" if network.variant.stem else "stage0_embed"
        return {path: kernel for path, kernel in known.items() if not _is_left_out(path, first)}
    if callable(layers):
        chosen = {path for path in known if layers(path)}
        if not chosen:
            raise RecipeError(
                f"`layers` must choose at least one of {', '.join(known)}. Received: {describe(layers)}, which chooses none",
                argument="layers",
            )
    else:
        require_layers(layers)
        chosen = set()
        for name in layers:
            matching = [path for path in known if re.match(rf"{re.escape(name)}(?:$|[/_])", path)]
            if not matching:
                raise RecipeError(
                    f"`layers` must name layers with a kernel, or the start of a name: {', '.join(known)}. Received: {name}",
                    argument="layers",
                )
            chosen.update(matching)
    return {path: kernel for path, kernel in known.items() if path in chosen}


def describe(layers):
    """Returns `layers` for recipe.json: a list of names, `[]` for `None`, or the name of a predicate."""
    if layers is None:
        return []
    if not callable(layers):
        return list(layers)
    return f"{layers.__module__}.{layers.__qualname__}" if hasattr(layers, "__qualname__") else repr(layers)


def all_kernels(classifier):
    """Returns every trained kernel of a `CvT`, or of a classifier around one, by its path in the network."""
    return {_path(variable): variable for variable in cvt_of(classifier).trainable_variables if variable.name == "kernel"}


class Zeros:
    """Keeps the zeros of a pruned network in a later compression.

    Args:
        kernels: path -> `keras.Variable`.

    Attributes:
        masks: path -> `tf.Variable`, 0 where the kernel is 0 and 1 elsewhere. Part of every checkpoint.
    """

    def __init__(self, kernels):
        self.masks = {
            path: tf.Variable(tf.cast(kernel.value != 0, tf.float32), trainable=False, name="mask")
            for path, kernel in kernels.items()
        }

    def hold(self, kernels):
        """Sets the masked weights back to 0 after a training step."""
        for path, mask in self.masks.items():
            kernels[path].value.assign(kernels[path].value * tf.cast(mask, kernels[path].dtype))

    def check(self, kernels):
        """Raises a `RunError` if a masked weight is not 0."""
        for path, mask in self.masks.items():
            if np.any(np.asarray(kernels[path])[mask.numpy() == 0] != 0):
                raise RunError(
                    f"{path} has lost zeros of the pruning, so no model was written",
                    hint="Compress again in another --run-dir",
                )


def share_of_zeros(variables):
    """Returns the share of zeros, in 0..1, over all variables together."""
    values = [keras.ops.convert_to_numpy(variable) for variable in variables]
    return 1 - sum(np.count_nonzero(value) for value in values) / sum(value.size for value in values)


def _path(variable):
    """`cvt/stage0_block0/mlp/fc1/kernel` -> `stage0_block0/mlp/fc1`. Other names may precede `cvt`."""
    parts = variable.path.split("/")
    start = next(i for i, part in enumerate(parts) if part.startswith(("stem", "stage", "head")))
    return "/".join(parts[start:-1])


def _is_left_out(path, first):
    return path.startswith((first, "head")) or path.endswith("/depthwise")
