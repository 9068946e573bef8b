"""What a network looks at: its attention maps, attention rollout, and Grad-CAM.

All maps are NumPy arrays over grids of tokens. The functions call the layers one by one, in inference mode. They run on the
TensorFlow and JAX backends, under mixed precision too, and add nothing to the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from cvt_keras.errors import ArgumentError, UserError
from cvt_keras.layers import ConvTokenEmbedding, CvTBlock, PixelNormalization, ResidualConv
from cvt_keras.model import CvT
from cvt_keras.variants import is_integer


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """The attention weights of one block.

    Args:
        stage, block: the block's place, each from 0. Its layer is `f"stage{stage}_block{block}"`.
        weights: float32 `(batch, heads, queries, keys)`; each row of keys sums to 1. Queries and keys are the tokens of their
            grids in row-major order. If there is a cls token, it comes first in both.
        query_grid: `(height, width)` of the queries: the grid of the stage.
        key_grid: `(height, width)` of the keys and values: the grid of the stage after strides or pooling.
        cls_token: whether the stage has a cls token.
    """

    stage: int
    block: int
    weights: np.ndarray
    query_grid: tuple[int, int]
    key_grid: tuple[int, int]
    cls_token: bool


def attention_maps(model: keras.Model, images: Any) -> list[AttentionMap]:
    """Returns the attention weights of every block.

    They take `heads * queries * keys * 4` bytes per image and block: for `cvt_13` at 224x224, 10 MB in the first block.

    Args:
        model: a classifier that `build_classifier` made, or a `CvT`.
        images: what the model takes: `(batch, height, width, channels)`, pixels in 0..255 for a classifier, normalised floats
            for a `CvT`.

    Returns:
        A list of `AttentionMap`, from the first block to the last.

    Raises:
        ArgumentError: for another model, such as one with int8 rounding, or for images of another shape.
        ValueError: for images that are too small for the network.
    """
    layers, x = _layers(model), _checked(model, images)
    maps: list[AttentionMap] = []
    stage, block = -1, 0
    for layer in layers:
        if isinstance(layer, ConvTokenEmbedding):
            stage, block = stage + 1, 0
        if not isinstance(layer, CvTBlock):
            x = _apply(layer, x)
            continue
        grid, *cls_token = _parts(x)
        keys = layer.attention.conv_k.compute_output_shape(grid.shape)
        x, weights = layer(grid, *cls_token, return_attention_scores=True)
        weights = ops.convert_to_numpy(weights)
        maps.append(AttentionMap(stage, block, weights, tuple(grid.shape[1:3]), tuple(keys[1:3]), bool(cls_token)))
        block += 1
    return maps


def rollout(maps: Sequence[AttentionMap]) -> np.ndarray:
    """Follows attention from the head back to the first stage (Abnar and Zuidema, arXiv 2005.00928).

    Each block passes half of a token's share to the token itself, by the shortcut, and half to the tokens that it attends to,
    averaged over the heads. Shares start at what the head reads: the cls token, or all tokens of the last stage equally.

    CvT needs one more rule, as keys and stages have grids of their own. A token of a coarser grid passes its share evenly to
    the area that it covers when the coarser grid is stretched over the finer one. So uniform attention gives a uniform map, and
    whatever the map shows comes from attention. The rule ignores that convolutions also see the neighbours of that area.

    A stage's learned cls token is no part of the image: the share that stays on it is left out.

    Args:
        maps: as `attention_maps` returns them, of all blocks.

    Returns:
        float32 `(batch, height, width)` over the grid of the first stage. Each image's values sum to 1. They are the same for
        every class.

    Raises:
        ArgumentError: unless there is a map of each block, in order.
    """
    blocks = [(block.stage, block.block) for block in maps]
    after = [{(stage, block + 1), (stage + 1, 0)} for stage, block in blocks]
    if blocks[:1] != [(0, 0)] or not all(block in allowed for block, allowed in zip(blocks[1:], after)):
        received = ", ".join(f"stage {stage} block {block}" for stage, block in blocks) or "none"
        raise ArgumentError(f"`maps` must hold the maps of all blocks, in order. Received: {received}", argument="maps")
    last = maps[-1]
    batch, _, queries, _ = last.weights.shape
    shares = np.zeros((batch, queries))
    shares[:, 0 if last.cls_token else slice(None)] = 1 if last.cls_token else 1 / queries
    stage, grid = last.stage, last.query_grid
    for block in reversed(maps):
        if block.stage != stage:
            on_grid = shares[:, -np.prod(grid) :].reshape(batch, *grid)  # without the cls token
            shares = _spread(on_grid, block.query_grid).reshape(batch, -1)
            if block.cls_token:  # the later stage reads the grid only
                shares = np.pad(shares, [(0, 0), (1, 0)])
            stage, grid = block.stage, block.query_grid
        keys = np.einsum("bq,bqk->bk", shares, block.weights.mean(axis=1))
        attended = _spread(keys[:, int(block.cls_token) :].reshape(batch, *block.key_grid), grid).reshape(batch, -1)
        attended = np.concatenate([keys[:, : int(block.cls_token)], attended], axis=1)
        shares = (shares + attended) / 2
    on_grid = shares[:, -np.prod(grid) :].reshape(batch, *grid)
    return (on_grid / on_grid.sum(axis=(1, 2), keepdims=True)).astype("float32")


def grad_cam(model: keras.Model, images: Any, classes: Any = None, stage: int = -1) -> np.ndarray:
    """Returns the evidence for a class in the tokens of a stage (Grad-CAM, Selvaraju et al., arXiv 1610.02391).

    Each channel of the tokens is weighted by the mean gradient of the class's logit. The map is the weighted sum over the
    channels, negative values set to 0.

    At the last stage the tokens are those after the norm, which the pooling reads. Before negative values are set to 0, the map
    then adds up to the logit without its bias, as in CAM (Zhou et al., arXiv 1512.04150). If the last stage has a cls token,
    the logits depend on its grid through that token only. So the tokens are the input of its last block.

    Args:
        model: a classifier that `build_classifier` made, or a `CvT` with a head.
        images: as in `attention_maps`.
        classes: the class to explain: an integer, or one per image, `(batch,)`. Defaults to the predicted classes. For several
            classes of one image, repeat the image.
        stage: the stage whose tokens to weight. -1 is the last one.

    Returns:
        float32 `(batch, height, width)` over the grid of the stage; at least 0, and not normalised.

    Raises:
        ArgumentError: for another model, such as one with int8 rounding, or an argument that does not fit.
        UserError: on a backend other than TensorFlow and JAX.
        ValueError: for images that are too small for the network.
    """
    layers, x = _layers(model), _checked(model, images)
    network = model if isinstance(model, CvT) else model.layers[-1]
    if not network.num_classes:
        raise ArgumentError("`model` must have a head. Received: num_classes=0", argument="model")
    stages = len(network.variant.stages)
    if not is_integer(stage) or not -stages <= stage < stages:
        raise ArgumentError(f"`stage` must be from {-stages} to {stages - 1}. Received: stage={stage!r}", argument="stage")
    stage %= stages
    cut = next(i for i, layer in enumerate(layers) if layer.name == f"stage{stage}")
    if stage == stages - 1:
        cut += -1 if network.variant.stages[stage].cls_token else 2  # the stage's last block, or the pooling
    for layer in layers[:cut]:
        x = _apply(layer, x)
    grid, *cls_token = _parts(x)
    grid = ops.cast(grid, "float32")

    def logits(grid):
        x = (grid, *cls_token) if cls_token else grid
        for layer in layers[cut:]:
            x = _apply(layer, x)
        return x

    if classes is None:
        classes = ops.convert_to_numpy(ops.argmax(logits(grid), axis=-1))
    chosen = _one_hot(classes, len(grid), network.num_classes)
    gradient = _gradient(lambda grid: ops.sum(logits(grid) * chosen), grid)
    weights = ops.mean(gradient, axis=(1, 2), keepdims=True)  # (B, H, W, C) -> (B, 1, 1, C)
    return ops.convert_to_numpy(ops.relu(ops.sum(weights * grid, axis=-1)))


def _layers(model):
    """The layers of a classifier or a `CvT`, in the order of their calls, without the input."""
    if isinstance(model, CvT):
        return model.layers[1:]
    layers = list(getattr(model, "layers", ()))
    if len(layers) != 3 or not isinstance(layers[1], PixelNormalization) or not isinstance(layers[2], CvT):
        names = ", ".join(type(layer).__name__ for layer in layers[:5])
        raise ArgumentError(
            "`model` must be a `CvT` or a classifier that `build_classifier` made, without int8 rounding. "
            f"Received: {type(model).__name__}" + (f" of {names}" if names else ""),
            argument="model",
        )
    return [layers[1], *layers[2].layers[1:]]


def _checked(model, images):
    """The images as a float32 tensor. Raises unless the model takes their shape."""
    images = ops.convert_to_tensor(images)
    expected = model.input_shape
    if len(images.shape) != 4 or not all(side in (None, size) for side, size in zip(expected, images.shape)):
        shape = tuple(images.shape)
        raise ArgumentError(f"`images` must have the shape {expected}. Received: shape {shape}", argument="images")
    network = model if isinstance(model, CvT) else model.layers[-1]
    network.variant.grids(*images.shape[1:3])
    return ops.cast(images, "float32")


def _apply(layer, x):
    """Applies a layer of a `CvT` to an image or to tokens: a grid, or a pair of grid and cls token."""
    grid, *cls_token = _parts(x)
    if not cls_token:
        return layer(grid)
    if isinstance(layer, ConvTokenEmbedding):  # a later stage reads the grid only
        return layer(grid)
    if isinstance(layer, (CvTBlock, ResidualConv)):
        return layer(grid, *cls_token)
    if isinstance(layer, keras.layers.Identity):  # the stage's output
        return x
    return layer(*cls_token)  # the norm before the head


def _parts(x):
    return tuple(x) if isinstance(x, (tuple, list)) else (x,)


def _spread(shares, grid):
    """Spreads the share of each token evenly over the area that it covers in a finer grid: `(B, h, w)` -> `(B, *grid)`."""
    rows, columns = (_overlaps(n, length) for n, length in zip(shares.shape[1:], grid))
    return np.einsum("bhw,hy,wx->byx", shares, rows, columns)


def _overlaps(n, length):
    """The share of each of `n` equal parts of a side that lies in each of its `length` tokens: `(n, length)`, rows sum to 1."""
    edges, tokens = np.arange(n + 1) * length / n, np.arange(length)
    ends, starts = np.minimum(edges[1:, None], tokens + 1), np.maximum(edges[:-1, None], tokens)
    return np.maximum(ends - starts, 0) * n / length


def _one_hot(classes, batch, num_classes):
    """Classes `()` or `(batch,)` -> float32 `(batch, num_classes)`."""
    classes = np.asarray(classes)
    if classes.dtype.kind not in "iu" or classes.shape not in ((), (batch,)):
        raise ArgumentError(
            f"`classes` must be an integer or one per image, ({batch},). Received: classes={classes!r}", argument="classes"
        )
    if np.any((classes < 0) | (classes >= num_classes)):
        raise ArgumentError(
            f"`classes` must be from 0 to {num_classes - 1}. Received: classes={classes.tolist()}", argument="classes"
        )
    return np.eye(num_classes, dtype="float32")[np.broadcast_to(classes, (batch,))]


def _gradient(function, x):
    """The gradient of a scalar function at `x`, which Keras itself does not offer."""
    backend = keras.config.backend()
    if backend == "jax":
        import jax

        return jax.grad(function)(x)
    if backend != "tensorflow":
        raise UserError(f"Grad-CAM needs the TensorFlow or JAX backend of Keras. Received: {backend}")
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(x)
        value = function(x)
    return tape.gradient(value, x)
