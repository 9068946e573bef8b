"""Compares networks for `cvt_cifar`: trains each on CIFAR-10 with several seeds. python benchmarks/networks.py --help

Runs on JAX alone, so that one GPU trains many short runs at once: all runs of a network share a program, and `vmap` stacks
their weights. The networks are functions, not the project's layers. tests/benchmarks/test_networks.py holds the two together:
the same outputs as `CvT`, and the same steps as the project's Muon.

Validation images only: this script never reads the test split.
"""

import concurrent.futures
import dataclasses
import functools
import json
import math
import sys
import time
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

CLASSES = 10
VALIDATION_IMAGES = 5_000
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
MAX_CROP = 4  # the images are padded by so much whatever the crop, so that its size needs no program of its own
WHITENING_IMAGES = 5_000
WHITENING_FILTERS = 24  # 2 * 2 * 3 eigenvectors and their negatives
LOOKAHEAD_STEPS = 5
NORM_EPSILON = 1e-5
BATCH_NORM_MOMENTUM = 0.9

# === What is compared ===


@dataclass(frozen=True)
class Stage:
    """A token embedding by a 3x3 convolution, then blocks.

    Args:
        dim: width of a token.
        depth: number of blocks.
        heads: attention heads; must divide `dim`.
        mlp_ratio: hidden width of the MLP, as a multiple of `dim`.
        stride_kv: stride of the key's and value's projections.
        embed: `"conv"` (stride 2, then norm: the paper's), `"conv_act"` (the same, then GELU), or `"pool"` (stride 1, 2x2
            max-pool, norm, GELU).
        local: number of residual 3x3 convolutions (norm, GELU) between embedding and blocks.
        mlp: `"linear"`, `"local"` (a residual depthwise 3x3 convolution between the two linear layers) or `"conv"` (the first
            layer is a 3x3 convolution).
        projection: `"conv"` (queries, keys and values come from depthwise convolutions) or `"linear"` (from the tokens
            themselves, at stride 1).
    """

    dim: int
    depth: int
    heads: int
    mlp_ratio: float = 2.0
    stride_kv: int = 2
    embed: Literal["conv", "conv_act", "pool"] = "pool"
    local: int = 0
    mlp: Literal["linear", "local", "conv"] = "linear"
    projection: Literal["conv", "linear"] = "conv"


@dataclass(frozen=True)
class Network:
    """A CvT, or with `widths` the plain CNN that it is compared with.

    Args:
        stages: `Stage` records.
        stem: widths of 3x3 convolutions with BatchNorm and GELU, before the first stage.
        whiten: padding of the 2x2 whitening convolution in front of everything: `"valid"`, `"same"`, or `""` for none.
        trained_whitening: train the kernel of that convolution from a random start.
        class_token: give the last stage a class token, and classify by it; needs blocks there, and no `"conv"` MLP.
        norm: `"layer"` or `"batch"`, of blocks and of the head. An embedding that pools always has BatchNorm.
        widths: of the CNN's groups: two 3x3 convolutions each, with a 2x2 max-pool after the first.
    """

    stages: tuple[Stage, ...] = ()
    stem: tuple[int, ...] = ()
    whiten: Literal["", "valid", "same"] = ""
    trained_whitening: bool = False
    class_token: bool = False
    norm: Literal["layer", "batch"] = "layer"
    widths: tuple[int, ...] = ()


@dataclass(frozen=True)
class Settings:
    """How a run trains; the defaults are those of the recipe `cifar10` before these experiments.

    Args:
        batch_size: images per training step.
        newton_schulz_steps: of Muon.
        precision: `"bfloat16"` or `"float32"`, of convolutions and matrix products. Weights, optimizer, norms and softmax are
            float32. On a GPU JAX rounds the inputs of float32 products to TF32.
        epochs: passes over the training images.
        peak_learning_rate, warmup: of `WarmupThenDecay`, linear.
        adamw_ratio: learning rate of what Muon does not train, as a share of Muon's.
        momentum: of Muon.
        weight_decay: of what Muon trains.
        adamw_weight_decay: of the other kernels.
        gradient_clip: largest norm of all gradients together.
        label_smoothing: share of each label that is spread over all classes.
        crop_padding: pixels of reflected padding; at most `MAX_CROP`.
        alternating_flip: mirror each image in every second epoch, instead of at random.
        erase: probability that a box of an image becomes noise.
        cutmix: probability that a box of an image becomes another image's.
        drop_path: stochastic depth rate of the last block; the rates rise linearly from 0 in the first.
        ema: momentum of the weights' moving average, which is validated; 0 is off.
        lookahead: share of the slow weights that is kept, at the end of training, each time they move towards the fast ones,
            which then restart from them: every five steps. The share rises from 0 with the cube of time. 0 is off; excludes
            `ema`.
        head_scale: scale attention by the width of a head, not of all heads together.
        max_pool: take the largest token in the head, not their mean.
        whitening_epsilon: added to the eigenvalues.
        dirac: whether embeddings start by passing their input through.
        centre_tap: whether the depthwise convolutions of attention start near the identity.
        zero_branches: whether the last layer of each residual branch starts at zero.
        fan_in: whether linear layers start with deviation `1 / sqrt(inputs)`, not 0.02.
    """

    batch_size: int = 128
    newton_schulz_steps: int = 5
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    epochs: int = 10
    peak_learning_rate: float = 2e-3
    warmup: float = 0.1
    adamw_ratio: float = 0.5
    momentum: float = 0.95
    weight_decay: float = 0.05
    adamw_weight_decay: float = 0.05
    gradient_clip: float = 1.0
    label_smoothing: float = 0.0
    crop_padding: int = 4
    alternating_flip: bool = False
    erase: float = 0.0
    cutmix: float = 0.0
    drop_path: float = 0.0
    ema: float = 0.0
    lookahead: float = 0.0
    head_scale: bool = False
    max_pool: bool = False
    whitening_epsilon: float = 5e-4
    dirac: bool = False
    centre_tap: bool = False
    zero_branches: bool = False
    fan_in: bool = False


# These shape the program; those below only the weights that a run starts from. All others are inputs of the program.
PROGRAM_SETTINGS = ("batch_size", "newton_schulz_steps", "precision")
INITIAL_SETTINGS = ("epochs", "warmup", "whitening_epsilon", "dirac", "centre_tap", "zero_branches", "fan_in")


@dataclass(frozen=True)
class Experiment:
    """A network and how it trains."""

    name: str
    network: Network
    settings: Settings = field(default_factory=Settings)


# === Networks ===


@dataclass(frozen=True)
class Weight:
    """A weight: a convolution's kernel is the matrix `(height * width * in, out)` that multiplies patches."""

    shape: tuple[int, ...]
    initial: str
    fan_in: int = 0
    muon: bool = False
    decays: bool = False
    branch_end: bool = False


class Tracer:
    """Passes through a network: reads its weights, or, without any, lists them and counts multiplies."""

    def __init__(self, weights=None, statistics=None, hyper=None, key=None, dtype=jnp.float32):
        self.weights, self.statistics, self.hyper, self.key, self.dtype = weights, statistics, hyper, key, dtype
        self.new_statistics = {}
        self.listed: dict[str, Weight] = {}
        self.listed_statistics: dict[str, tuple[int, ...]] = {}
        self.macs = self.block_macs = 0
        self.in_block = False
        self._scopes: list[str] = []
        self._draws = 0

    @property
    def training(self):
        return self.key is not None

    def scoped(self, name):
        self._scopes.append(name)
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._scopes.pop()

    def setting(self, name):
        return self.hyper[name] if self.hyper is not None else jnp.float32(0)

    def weight(self, name, shape, initial, **about):
        name = "/".join((*self._scopes, name))
        if self.weights is None:
            assert name not in self.listed, name
            self.listed[name] = Weight(tuple(shape), initial, **about)
            return jnp.zeros(shape)
        return self.weights[name]

    def count(self, macs):
        self.macs += macs
        self.block_macs += macs if self.in_block else 0

    def next_key(self):
        self._draws += 1
        return jax.random.fold_in(self.key, self._draws)

    # --- Layers ---

    def conv(self, x, dim, name, stride=1, bias=False):
        with self.scoped(name):
            patches = jnp.concatenate(_shifted(x, stride), axis=-1)  # (B, H, W, 9 C)
            _, height, width, fan_in = patches.shape
            self.count(height * width * fan_in * dim)
            x = self.product(patches, self.weight("kernel", (fan_in, dim), "conv", fan_in=fan_in, muon=True, decays=True))
            return x + self.weight("bias", (dim,), "conv_bias", fan_in=fan_in).astype(x.dtype) if bias else x

    def product(self, x, kernel):
        return jnp.matmul(x.astype(self.dtype), kernel.astype(self.dtype))

    def linear(self, x, dim, name, muon=True, **about):
        with self.scoped(name):
            self.count(math.prod(x.shape[1:-1]) * x.shape[-1] * dim)
            shape = (x.shape[-1], dim)
            x = self.product(x, self.weight("kernel", shape, "linear", fan_in=shape[0], muon=muon, decays=True, **about))
            return x + self.weight("bias", (dim,), "zeros").astype(x.dtype)

    def depthwise(self, x, name, stride=1, initial="depthwise"):
        with self.scoped(name):
            kernel = self.weight("kernel", (9, x.shape[-1]), initial, decays=True).astype(x.dtype)
            x = sum(part * kernel[tap] for tap, part in enumerate(_shifted(x, stride)))
            self.count(9 * math.prod(x.shape[1:]))
            return jax.lax.optimization_barrier(x)  # and its gradient once per tap

    def batch_norm(self, x, name):
        with self.scoped(name):
            dim = x.shape[-1]
            scale = self.weight("gamma", (dim,), "ones")
            shift = self.weight("beta", (dim,), "zeros")
            name = "/".join(self._scopes)
            self.listed_statistics[name] = (2, dim)
            wide = x.astype(jnp.float32)
            if self.training or self.weights is None:
                mean = jnp.mean(wide, axis=(0, 1, 2))
                variance = jnp.mean(jnp.square(wide), axis=(0, 1, 2)) - jnp.square(mean)
                if self.statistics is not None:
                    before, now = self.statistics[name], jnp.stack([mean, variance])
                    self.new_statistics[name] = before * BATCH_NORM_MOMENTUM + now * (1 - BATCH_NORM_MOMENTUM)
            else:
                mean, variance = self.statistics[name]
            scale = scale * jax.lax.rsqrt(variance + NORM_EPSILON)
            return (wide * scale + (shift - mean * scale)).astype(x.dtype)

    def layer_norm(self, x, name):
        with self.scoped(name):
            scale = self.weight("gamma", x.shape[-1:], "ones")
            shift = self.weight("beta", x.shape[-1:], "zeros")
            wide = x.astype(jnp.float32)
            mean = jnp.mean(wide, axis=-1, keepdims=True)
            variance = jnp.mean(jnp.square(wide - mean), axis=-1, keepdims=True)
            return ((wide - mean) * jax.lax.rsqrt(variance + NORM_EPSILON) * scale + shift).astype(x.dtype)

    def norm(self, x, kind, name):
        return self.batch_norm(x, name) if kind == "batch" else self.layer_norm(x, name)

    def drop_path(self, branch, share):
        if not self.training:
            return branch
        rate = self.setting("drop_path") * share
        kept = jax.random.uniform(self.next_key(), (branch.shape[0], 1, 1, 1)) >= rate
        return branch * (kept / (1 - rate)).astype(branch.dtype)


def _shifted(x, stride):
    """The nine views of `x` that a 3x3 kernel multiplies, one per tap; padded with zeros, evenly."""
    _, height, width, _ = x.shape
    x = jax.lax.optimization_barrier(x)  # XLA would compute what leads to `x` once per tap
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows, columns = (side - 1 - (side - 1) % stride + 1 for side in (height, width))
    return [x[:, i : i + rows : stride, j : j + columns : stride] for i in range(3) for j in range(3)]


def gelu(x):
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


def max_pool(x):
    """2x2, stride 2; what does not fill a window is left out."""
    _, height, width, _ = x.shape
    rows, columns = height // 2 * 2, width // 2 * 2
    corners = [x[:, i:rows:2, j:columns:2] for i in (0, 1) for j in (0, 1)]
    return functools.reduce(jnp.maximum, corners)


def apply(network, tracer, images):
    """Normalised images `(batch, 32, 32, 3)` -> logits `(batch, 10)`, float32."""
    x = images.astype(tracer.dtype)
    if network.whiten:
        x = _whiten(tracer, x, network)
    x = _cnn(network, tracer, x) if network.widths else _cvt(network, tracer, x)
    mean, largest = jnp.mean(x.astype(jnp.float32), axis=(1, 2)), jnp.max(x, axis=(1, 2)).astype(jnp.float32)
    x = jnp.where(tracer.setting("max_pool") > 0, largest, mean)
    with tracer.scoped("head"):  # in float32: logits lie close together
        tracer.count(x.shape[-1] * CLASSES)
        kernel = tracer.weight("kernel", (x.shape[-1], CLASSES), "linear", fan_in=x.shape[-1], decays=True)
        return x @ kernel + tracer.weight("bias", (CLASSES,), "zeros")


def _whiten(tracer, x, network):
    if network.whiten == "same":
        x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    height, width = x.shape[1] - 1, x.shape[2] - 1
    patches = jnp.concatenate([x[:, i : i + height, j : j + width] for i in (0, 1) for j in (0, 1)], axis=-1)  # (B, H, W, 12)
    tracer.count(height * width * 12 * WHITENING_FILTERS)
    with tracer.scoped("whiten"):
        if network.trained_whitening:
            kernel = tracer.weight("kernel", (12, WHITENING_FILTERS), "conv", fan_in=12, muon=True, decays=True)
        else:
            kernel = jnp.zeros((12, WHITENING_FILTERS)) if tracer.hyper is None else tracer.hyper["whitening"]
        x = tracer.product(patches, kernel)
        return gelu(x + tracer.weight("bias", (WHITENING_FILTERS,), "zeros").astype(x.dtype))


def _cnn(network, tracer, x):
    for i, dim in enumerate(network.widths):
        with tracer.scoped(f"group{i}"):
            x = gelu(tracer.batch_norm(max_pool(tracer.conv(x, dim, "conv0")), "norm0"))
            x = gelu(tracer.batch_norm(tracer.conv(x, dim, "conv1"), "norm1"))
    return x


def _cvt(network, tracer, x):
    for i, dim in enumerate(network.stem):
        with tracer.scoped(f"stem{i}"):
            x = gelu(tracer.batch_norm(tracer.conv(x, dim, "conv"), "norm"))
    blocks, done, token = sum(stage.depth for stage in network.stages), 0, None
    for i, stage in enumerate(network.stages):
        with tracer.scoped(f"stage{i}"):
            with tracer.scoped("embed"):
                if stage.embed == "pool":
                    x = gelu(tracer.batch_norm(max_pool(tracer.conv(x, stage.dim, "proj")), "norm"))
                elif stage.embed == "conv_act":
                    x = gelu(tracer.batch_norm(tracer.conv(x, stage.dim, "proj", 2), "norm"))
                else:
                    x = tracer.layer_norm(tracer.conv(x, stage.dim, "proj", 2, bias=True), "norm")
            for j in range(stage.local):
                with tracer.scoped(f"local{j}"):
                    x = x + gelu(tracer.batch_norm(tracer.conv(x, stage.dim, "conv"), "norm"))
            if network.class_token and i == len(network.stages) - 1:
                token = tracer.weight("token", (1, 1, 1, stage.dim), "linear").astype(x.dtype)
                token = jnp.broadcast_to(token, (x.shape[0], 1, 1, stage.dim))
            tracer.in_block = True
            for j in range(stage.depth):
                with tracer.scoped(f"block{j}"):
                    x, token = _block(network, stage, tracer, x, token, done / max(blocks - 1, 1))
                done += 1
            tracer.in_block = False
    return tracer.norm(x if token is None else token, network.norm, "norm")


def _block(network, stage, tracer, grid, token, drop_share):
    """Grid `(B, H, W, C)` and class token `(B, 1, 1, C)` or None; returns the same."""
    x = _joined(grid, token)
    tokens = tracer.norm(x, network.norm, "norm1")
    x = x + tracer.drop_path(_attention(stage, tracer, *_parted(tokens, grid.shape, token)), drop_share)
    tokens = tracer.norm(x, network.norm, "norm2")
    hidden = int(stage.dim * stage.mlp_ratio)
    first = functools.partial(tracer.conv, bias=True) if stage.mlp == "conv" else tracer.linear
    tokens = first(tokens, hidden, "fc1")
    if stage.mlp == "local":
        inner, inner_token = _parted(tokens, (*grid.shape[:3], hidden), token)
        tokens = _joined(inner + tracer.depthwise(inner, "local"), inner_token)
    x = x + tracer.drop_path(tracer.linear(gelu(tokens), stage.dim, "fc2", branch_end=True), drop_share)
    return _parted(x, grid.shape, token)


def _joined(grid, token):
    """Grid `(B, H, W, C)` and class token `(B, 1, 1, C)` -> `(B, 1 + H * W, 1, C)`; the grid itself where there is no token."""
    if token is None:
        return grid
    return jnp.concatenate([token, grid.reshape(grid.shape[0], -1, 1, grid.shape[-1])], axis=1)


def _parted(tokens, shape, token):
    """What `_joined` joined: a grid of this shape and, unless `token` is None, a class token."""
    return (tokens, None) if token is None else (tokens[:, 1:].reshape(shape), tokens[:, :1])


def _attention(stage, tracer, grid, token):
    parts = []
    for name, stride in (("q", 1), ("k", stage.stride_kv), ("v", stage.stride_kv)):
        y = grid
        if stage.projection == "conv":
            y = tracer.batch_norm(tracer.depthwise(grid, f"conv_{name}", stride, "projection"), f"norm_{name}")
        y = _joined(y, token)
        y = y.reshape(y.shape[0], -1, stage.dim)  # (B, H, W, C) -> (B, N, C)
        parts.append(tracer.linear(y, stage.dim, f"proj_{name}"))
    heads, width = stage.heads, stage.dim // stage.heads
    q, k, v = (part.reshape(*part.shape[:2], heads, width) for part in parts)  # (B, N, C) -> (B, N, heads, C / heads)
    tracer.count(2 * q.shape[1] * k.shape[1] * stage.dim)
    scale = jnp.where(tracer.setting("head_scale") > 0, width**-0.5, stage.dim**-0.5)
    scores = jnp.einsum("bqhc,bkhc->bhqk", q, k).astype(jnp.float32) * scale
    y = jnp.einsum("bhqk,bkhc->bqhc", jax.nn.softmax(scores).astype(v.dtype), v)
    y = y.reshape(_joined(grid, token).shape)  # (B, N, heads, C / heads) -> (B, H, W, C)
    return tracer.linear(y, stage.dim, "proj", branch_end=True)


@functools.cache
def weights_of(network):
    """A tracer that has listed a network's weights, statistics and multiplies."""
    tracer = Tracer()
    jax.eval_shape(lambda x: apply(network, tracer, x), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    return tracer


def initial_weights(network, settings, seed):
    """The weights that a run starts from, drawn as the project's layers draw them."""
    random = np.random.default_rng([seed, 1])
    weights = {}
    for name, weight in weights_of(network).listed.items():
        weights[name] = _initial(weight, random, settings, "/embed/" in name).astype("float32")
    return weights


def _initial(weight, random, settings, is_embedding):
    if weight.initial in ("zeros", "ones"):
        return np.full(weight.shape, float(weight.initial == "ones"))
    if weight.initial in ("conv", "conv_bias"):
        bound = weight.fan_in**-0.5
        drawn = random.uniform(-bound, bound, weight.shape)
        if weight.initial == "conv" and settings.dirac and is_embedding:
            inputs, outputs = weight.fan_in // 9, weight.shape[1]
            same = min(inputs, outputs)
            drawn[:, :same] = 0
            drawn[4 * inputs + np.arange(same), np.arange(same)] = 1  # the fifth of nine taps is the middle
        return drawn
    if weight.initial in ("depthwise", "projection"):
        drawn = random.uniform(-1 / 3, 1 / 3, weight.shape)
        if weight.initial == "projection" and settings.centre_tap:
            drawn[4] += 1
        return drawn
    drawn = random.normal(size=weight.shape)
    while (outside := np.abs(drawn) > 2).any():  # Keras' truncated normal
        drawn[outside] = random.normal(size=outside.sum())
    deviation = weight.fan_in**-0.5 if settings.fan_in and weight.muon else 0.02
    return drawn * deviation / 0.8796 * (0 if settings.zero_branches and weight.branch_end else 1)


def whitening_axes(images):
    """Eigenvalues and eigenvectors of the 2x2 patches of uint8 images `(n, 32, 32, 3)`."""
    x = normalized(np.asarray(images)).astype("float64")
    patches = np.concatenate([x[:, i : i + 31, j : j + 31] for i in (0, 1) for j in (0, 1)], axis=-1).reshape(-1, 12)
    return np.linalg.eigh(patches.T @ patches / len(patches))


def whitening_kernel(axes, epsilon):
    """Eigenvectors, each divided by the deviation along it, and their negatives: `(12, 24)`.

    Args:
        axes: of `whitening_axes`.
        epsilon: added to the eigenvalues, so that what is mostly noise is not blown up.
    """
    values, vectors = axes
    kernel = vectors / np.sqrt(values + epsilon)
    return np.concatenate([kernel, -kernel], axis=1).astype("float32")


# === Augmentation ===


def normalized(pixels):
    return (pixels.astype("float32") / 255 - np.array(MEAN, "float32")) / np.array(STD, "float32")


def augmented(pixels, labels, mirrored, hyper, key):
    """Mirrors, crops, erases and mixes a batch.

    Args:
        pixels: uint8 `(batch, 32, 32, 3)`.
        labels: one-hot `(batch, 10)`.
        mirrored: bool `(batch,)`.
        hyper: of the run.
        key: for the draws.

    Returns:
        Normalised images and labels.
    """
    place, size, choice, noise = jax.random.split(key, 4)
    pixels = jnp.where(mirrored[:, None, None, None], pixels[:, :, ::-1], pixels)
    padding = hyper["crop_padding"]
    offsets = jnp.floor(jax.random.uniform(place, (len(pixels), 2)) * (2 * padding + 1)) - padding + MAX_CROP
    pixels = _crop(pixels, offsets.astype(jnp.int32)).astype(jnp.float32)
    pixels = _erased(pixels, hyper["erase"], noise)
    inside = _mix_boxes(pixels.shape, size) & (jax.random.uniform(choice, (len(pixels), 1, 1, 1)) < hyper["cutmix"])
    kept = 1 - jnp.mean(inside.astype(jnp.float32), axis=(1, 2))  # (B, 1)
    pixels = jnp.where(inside, jnp.roll(pixels, 1, axis=0), pixels)
    return normalized(pixels), kept * labels + (1 - kept) * jnp.roll(labels, 1, axis=0)


def _crop(pixels, offsets):
    padded = jnp.pad(pixels, ((0, 0), (MAX_CROP,) * 2, (MAX_CROP,) * 2, (0, 0)), "reflect")

    def cut(image, offset):
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), (32, 32, 3))

    return jax.vmap(cut)(padded, offsets)


def _erased(pixels, probability, key):
    choice, sizes, place, noise = jax.random.split(key, 4)
    area, aspect = jax.random.uniform(sizes, (2, len(pixels)))
    area = 0.02 + area * (0.4 - 0.02)
    aspect = jnp.exp(math.log(0.3) * (1 - 2 * aspect))  # 0.3 to 1 / 0.3
    inside = _box(jnp.sqrt(area * aspect), jnp.sqrt(area / aspect), place)
    inside &= jax.random.uniform(choice, (len(pixels), 1, 1, 1)) < probability
    return jnp.where(inside, jax.random.uniform(noise, pixels.shape, maxval=255.0), pixels)


def _mix_boxes(shape, key):
    draw, place = jax.random.split(key)
    side = jnp.sqrt(jax.random.uniform(draw, shape[:1]))  # Beta(1, 1) is uniform
    return _box(side, side, place)


def _box(tall, wide, key):
    place = jax.random.uniform(key, (2, len(tall)))

    def inside(share, place):
        length = jnp.round(jnp.minimum(share, 1.0) * 32)
        first = jnp.floor(place * (32 - length + 1))
        position = jnp.arange(32.0)
        return (position >= first[:, None]) & (position < (first + length)[:, None])  # (B, 32)

    return inside(tall, place[0])[:, :, None, None] & inside(wide, place[1])[:, None, :, None]


# === Training ===


def orthogonalized(matrices, steps):
    """Newton-Schulz, as in Keras' Muon; matrices of one shape go through it together."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, matrix in matrices.items():
        groups.setdefault(tuple(sorted(matrix.shape)), []).append(name)
    results = {}
    for names in groups.values():
        x = jnp.stack([matrices[name].T if _is_tall(matrices[name]) else matrices[name] for name in names])
        x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
        for _ in range(steps):
            a = x @ x.mT
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        results.update({name: part.T if _is_tall(matrices[name]) else part for name, part in zip(names, x)})
    return results


def _is_tall(matrix):
    return matrix.shape[0] > matrix.shape[1]


def learning_rate(step, hyper):
    """`WarmupThenDecay`, linear."""
    left = jnp.clip((hyper["steps"] - step) / (hyper["steps"] - hyper["warmup_steps"]), 0.0, 1.0)
    return hyper["peak_learning_rate"] * jnp.minimum((step + 1) / jnp.maximum(1.0, hyper["warmup_steps"]), left)


def updated(listed, weights, gradients, moments, velocities, step, hyper, newton_schulz_steps):
    """One step of the project's Muon. Returns new weights, moments and velocities."""
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(gradient)) for gradient in gradients.values()))
    clip = jnp.minimum(1.0, hyper["gradient_clip"] / norm)
    gradients = {name: gradient * clip for name, gradient in gradients.items()}
    rate = learning_rate(step, hyper)
    weights = dict(weights)
    for name, weight in listed.items():
        if weight.decays:
            weights[name] *= 1 - rate * hyper["weight_decay" if weight.muon else "adamw_weight_decay"]
    new_moments, new_velocities, directions = {}, {}, {}
    for name, weight in listed.items():
        gradient, beta = gradients[name], hyper["momentum"]
        if weight.muon:
            new_moments[name] = moments[name] * beta + gradient
            directions[name] = gradient + beta * new_moments[name]
            continue
        new_moments[name] = moments[name] + (gradient - moments[name]) * (1 - 0.9)
        new_velocities[name] = velocities[name] + (jnp.square(gradient) - velocities[name]) * (1 - 0.999)
        alpha = rate * hyper["adamw_ratio"]
        alpha *= jnp.sqrt(1 - 0.999 ** (step + 1)) / (1 - 0.9 ** (step + 1))
        weights[name] -= alpha * new_moments[name] / (jnp.sqrt(new_velocities[name]) + 1e-7)
    for name, update in orthogonalized(directions, newton_schulz_steps).items():
        weights[name] -= rate * update * math.sqrt(max(update.shape)) * 0.2
    return weights, new_moments, new_velocities


def averaged(weights, average, step, hyper):
    """Moves the average of weights after a step. Returns the weights to continue from, and the average."""
    slow = hyper["lookahead"] > 0
    sync = jnp.mod(step + 1, LOOKAHEAD_STEPS) == 0
    share = hyper["lookahead"] * ((step + 1) / hyper["steps"]) ** 3
    kept = jnp.where(slow, jnp.where(sync, share, 1.0), jnp.where(step > 0, hyper["ema"], 0.0))
    average = {name: kept * average[name] + (1 - kept) * weights[name] for name in weights}
    return {name: jnp.where(slow & sync, average[name], weights[name]) for name in weights}, average


def training_step(network, newton_schulz_steps, dtype, state, hyper, images, labels, step_key):
    """Trains on one batch of normalised images and soft labels. Returns the new state, loss and accuracy."""
    listed = weights_of(network).listed

    def loss(weights):
        tracer = Tracer(weights, state["statistics"], hyper, step_key, dtype)
        logits = apply(network, tracer, images)
        smooth = labels * (1 - hyper["label_smoothing"]) + hyper["label_smoothing"] / CLASSES
        entropy = -jnp.mean(jnp.sum(smooth * jax.nn.log_softmax(logits), axis=-1))
        return entropy, (tracer.new_statistics, logits)

    (entropy, (statistics, logits)), gradients = jax.value_and_grad(loss, has_aux=True)(state["weights"])
    step = state["step"]
    weights, moments, velocities = updated(
        listed, state["weights"], gradients, state["moments"], state["velocities"], step, hyper, newton_schulz_steps
    )
    weights, average = averaged(weights, state["average"], step, hyper)
    hits = jnp.mean(jnp.argmax(logits, axis=-1) == jnp.argmax(labels, axis=-1))
    state = {
        "weights": weights,
        "statistics": statistics,
        "moments": moments,
        "velocities": velocities,
        "average": average,
        "step": step + 1,
    }
    return state, entropy, hits


def train_epoch(network, batch_size, newton_schulz_steps, precision, state, hyper, images, labels, epoch):
    """One pass over the training images. Returns the new state, and the means of loss and accuracy."""
    n = len(images)
    key = jax.random.key(hyper["seed"].astype(jnp.uint32))
    flips, orders, draws = jax.random.split(key, 3)
    order = jax.random.permutation(jax.random.fold_in(orders, epoch), n)
    order = order[: n // batch_size * batch_size].reshape(-1, batch_size)
    first = jax.random.bernoulli(flips, shape=(n,))
    anew = jax.random.bernoulli(jax.random.fold_in(flips, epoch + 1), shape=(n,))
    mirrored = jnp.where(hyper["alternating_flip"] > 0, first ^ (epoch % 2 == 1), anew)

    def step(state, chosen):
        augmentation, network_key = jax.random.split(jax.random.fold_in(draws, state["step"].astype(jnp.int32)))
        one_hot = jax.nn.one_hot(labels[chosen], CLASSES)
        batch, targets = augmented(images[chosen], one_hot, mirrored[chosen], hyper, augmentation)
        state, *measured = training_step(
            network, newton_schulz_steps, jnp.dtype(precision), state, hyper, batch, targets, network_key
        )
        return state, measured

    state, (losses, hits) = jax.lax.scan(step, state, order)
    return state, jnp.mean(losses), jnp.mean(hits)


def predictions(network, precision, state, hyper, images):
    """Logits `(n, 10)` of uint8 images, by the averaged weights."""

    def predict(batch):
        tracer = Tracer(state["average"], state["statistics"], hyper, dtype=jnp.dtype(precision))
        return apply(network, tracer, normalized(batch))

    size = math.gcd(len(images), 500)
    return jax.lax.map(predict, images.reshape(-1, size, *images.shape[1:])).reshape(-1, CLASSES)


def initial_state(network, settings, seed):
    weights = initial_weights(network, settings, seed)
    tracer = weights_of(network)
    zeros = {name: np.zeros_like(weight) for name, weight in weights.items()}
    statistics = {
        name: np.stack([np.zeros(dim, "float32"), np.ones(dim, "float32")])
        for name, (_, dim) in tracer.listed_statistics.items()
    }
    return {
        "weights": weights,
        "statistics": statistics,
        "moments": zeros,
        "velocities": {name: zeros[name] for name, weight in tracer.listed.items() if not weight.muon},
        "average": weights,
        "step": np.float32(0),
    }


def hyper_of(settings, seed, steps_per_epoch, whitening):
    """A run's inputs to the program."""
    steps = steps_per_epoch * settings.epochs
    fields = {
        name: np.float32(value)
        for name, value in dataclasses.asdict(settings).items()
        if name not in (*PROGRAM_SETTINGS, *INITIAL_SETTINGS)
    }
    return {
        **fields,
        "seed": np.float32(seed),
        "steps": np.float32(steps),
        "warmup_steps": np.float32(min(round(settings.warmup * steps), steps - 1)),
        "whitening": whitening,
    }


# === Runs ===


@dataclass(frozen=True)
class Data:
    """uint8 images `(n, 32, 32, 3)` and their labels."""

    train_images: np.ndarray
    train_labels: np.ndarray
    images: np.ndarray
    labels: np.ndarray

    @functools.cached_property
    def whitening_axes(self):
        return whitening_axes(self.train_images[:WHITENING_IMAGES])


class Group:
    """Runs of one network, which train at once.

    Args:
        experiments: of one network, and the same in `PROGRAM_SETTINGS` and epochs.
        seeds: each experiment runs with each.
        data: a `Data`.
    """

    def __init__(self, experiments, seeds, data):
        self.experiments, self.data = experiments, data
        self.network, first = experiments[0].network, experiments[0].settings
        self.epochs = first.epochs
        self.program_settings = tuple(getattr(first, name) for name in PROGRAM_SETTINGS)
        self.runs = [(experiment, seed) for experiment in experiments for seed in seeds]

    @property
    def names(self):
        return "; ".join(experiment.name for experiment in self.experiments)

    @property
    def size(self):
        """MACs per image, times epochs, times runs."""
        return weights_of(self.network).macs * self.epochs * len(self.runs)

    @property
    def program_key(self):
        """Groups with the same share a program."""
        return self.network, self.program_settings, len(self.runs)

    def start(self):
        """The runs' states and inputs, stacked."""
        steps = len(self.data.train_images) // self.program_settings[0]
        states, hypers = [], []
        for experiment, seed in self.runs:
            settings = experiment.settings
            whitening = whitening_kernel(self.data.whitening_axes, settings.whitening_epsilon)
            states.append(initial_state(self.network, settings, seed))
            hypers.append(hyper_of(settings, seed, steps, whitening))
        return _stacked(states), _stacked(hypers)

    def compiled(self):
        """Programs for an epoch and for predictions, and the seconds that they took to compile."""
        started = time.perf_counter()
        state, hyper = self.start()
        data = self.data
        train = functools.partial(train_epoch, self.network, *self.program_settings)
        train = jax.jit(jax.vmap(train, in_axes=(0, 0, None, None, None)), donate_argnums=0)
        train = train.lower(state, hyper, data.train_images, data.train_labels, np.int32(0))
        predict = functools.partial(predictions, self.network, self.program_settings[-1])
        predict = jax.jit(jax.vmap(predict, in_axes=(0, 0, None))).lower(state, hyper, data.images)
        return train.compile(), predict.compile(), time.perf_counter() - started

    def train(self, start, train, predict):
        """Trains all epochs. Returns arrays for `records`."""
        started = time.perf_counter()
        data = self.data
        state, hyper = jax.device_put(start)
        validation, training, losses = [], [], []
        for epoch in range(self.epochs):
            state, loss, hits = train(state, hyper, data.train_images, data.train_labels, np.int32(epoch))
            logits = predict(state, hyper, data.images)
            training.append(hits)
            losses.append(loss)
            validation.append(jnp.mean(jnp.argmax(logits, axis=-1) == data.labels, axis=-1))
            if epoch % 10 == 9:
                _say(f"epoch {epoch + 1} of {self.epochs}, {100 * jnp.mean(validation[-1]):.2f} on average: {self.names}")
        mirrored = predict(state, hyper, data.images[:, :, ::-1])
        results = jax.device_get((validation, training, losses, logits, mirrored))
        return *results, time.perf_counter() - started

    def records(self, validation, training, losses, logits, mirrored, seconds):
        """A dict of JSON's types per run."""
        labels = np.asarray(self.data.labels)
        listed = weights_of(self.network)
        records = []
        for i, (experiment, seed) in enumerate(self.runs):
            both = _log_softmax(logits[i]) + _log_softmax(mirrored[i])
            temperature, fitted = fit_temperature(logits[i], labels)
            records.append(
                {
                    "experiment": experiment.name,
                    "seed": seed,
                    "validation": [round(float(row[i]), 4) for row in validation],
                    "validation_mirrored_too": round(float(np.mean(both.argmax(-1) == labels)), 4),
                    "cross_entropy": round(cross_entropy(logits[i], labels), 4),
                    "cross_entropy_fitted": round(fitted, 4),
                    "temperature": round(temperature, 3),
                    "training": [round(float(row[i]), 4) for row in training],
                    "loss": round(float(losses[-1][i]), 4),
                    "macs": listed.macs,
                    "block_macs": listed.block_macs,
                    "parameters": sum(math.prod(weight.shape) for weight in listed.listed.values()),
                    "seconds_of_all_runs": round(seconds, 1),
                    "runs_at_once": len(self.runs),
                    "network": dataclasses.asdict(self.network),
                    "settings": dataclasses.asdict(experiment.settings),
                }
            )
        return records


def _stacked(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def _log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def cross_entropy(logits, labels):
    return float(-_log_softmax(logits)[np.arange(len(labels)), labels].mean())


def fit_temperature(logits, labels):
    """The temperature that gives the least cross-entropy, to a few thousandths, and that cross-entropy."""
    temperatures = np.exp(np.linspace(math.log(0.2), math.log(3), 60))
    entropies = [cross_entropy(logits / temperature, labels) for temperature in temperatures]
    best = int(np.argmin(entropies))
    return float(temperatures[best]), entropies[best]


def grouped(experiments, most):
    """Lists of at most `most` experiments that can share a program, in the order of their first."""
    groups: list[list[Experiment]] = []
    filling: dict[tuple, list[Experiment]] = {}
    for experiment in experiments:
        settings = experiment.settings
        key = (experiment.network, settings.epochs, *(getattr(settings, name) for name in PROGRAM_SETTINGS))
        if len(filling.get(key, ())) == most or key not in filling:
            filling[key] = []
            groups.append(filling[key])
        filling[key].append(experiment)
    return groups


def run_all(experiments, seeds, data, out, at_once=6, seconds=math.inf, compilers=4):
    """Runs experiments, and appends a line of JSON per run to `out` as soon as it is there.

    Args:
        experiments: `Experiment` records, the most important first.
        seeds: each experiment runs with each.
        data: a `Data`.
        out: path of the file.
        at_once: experiments that share a program, at most.
        seconds: nothing starts that would not end within them.
        compilers: programs that are compiled at a time, while others run.
    """
    started = time.perf_counter()
    data = Data(*(jax.device_put(getattr(data, field.name)) for field in dataclasses.fields(data)))
    waiting = [Group(group, seeds, data) for group in grouped(experiments, at_once)]
    compiling, starting, writing = (concurrent.futures.ThreadPoolExecutor(n) for n in (compilers, 1, 1))
    programs: dict[tuple, concurrent.futures.Future] = {}
    for group in waiting:
        if group.program_key not in programs:
            programs[group.program_key] = compiling.submit(group.compiled)
    starts = {group: starting.submit(group.start) for group in waiting}

    def write(group, results):
        with open(out, "a") as file:
            for record in group.records(*results):
                file.write(json.dumps(record) + "\n")
                _say(_summary(record))

    written, cost = [], 0.0  # seconds per MAC, epoch and run, the most so far
    while waiting:
        left = seconds - (time.perf_counter() - started)
        ready = [group for group in waiting if programs[group.program_key].done()]
        if not ready and left > 0:
            concurrent.futures.wait([programs[group.program_key] for group in waiting], min(left, 1), "FIRST_COMPLETED")
            continue
        fitting = [group for group in ready if cost * group.size <= left]
        if left <= 0 or not fitting:
            _say(f"out of time: {' | '.join(group.names for group in waiting)}")
            break
        group = fitting[0]
        waiting.remove(group)
        begun = time.perf_counter()
        try:
            train, predict, compile_seconds = programs[group.program_key].result()
            results = group.train(starts.pop(group).result(), train, predict)
            written.append(writing.submit(write, group, results))
            spent = time.perf_counter() - begun
            cost = max(cost, spent / group.size)
            now = time.perf_counter() - started
            _say(f"{now:.0f} s: {len(group.runs)} runs in {spent:.1f} s, compiled in {compile_seconds:.0f} s: {group.names}")
        except Exception:  # one network that fails must not cost the others
            _say(f"FAILED: {group.names}\n{traceback.format_exc()}")
    for future in written:
        future.result()
    for pool in (compiling, starting, writing):
        pool.shutdown(wait=False, cancel_futures=True)


def _summary(record):
    figures = record["validation"][-1], record["validation_mirrored_too"], record["training"][-1]
    percents = " ".join(f"{100 * figure:.2f}" for figure in figures)
    return f"{record['experiment']} | {record['seed']} | {percents} | {record['cross_entropy_fitted']:.4f}"


def _say(line):
    print(line, file=sys.stderr, flush=True)


def load(path=None, limit=None):
    """CIFAR-10's training images, the last 5,000 of them for validation.

    Args:
        path: an .npz file with `images` and `labels` in the order of TFDS; without it the project reads TFDS' own.
        limit: train on the first of so many only, validate on a tenth of that.
    """
    if path:
        with np.load(path) as arrays:
            images, labels = arrays["images"], arrays["labels"].astype("int32")
        kept = len(images) - VALIDATION_IMAGES
        parts = (images[:kept], labels[:kept], images[kept:], labels[kept:])
    else:
        sys.path.insert(0, str(Path(__file__).parent.parent))
        from cvt_keras.data import sources

        source = sources.load("cifar10")
        parts = (source.train.images, source.train.labels, source.validation.images, source.validation.labels)
    limits = (limit, limit, limit and max(1, limit // 10), limit and max(1, limit // 10))
    return Data(*(np.ascontiguousarray(part[:limit]) for part, limit in zip(parts, limits)))


# === Experiments ===


def _stages(*stages, mlp="local"):
    """`stages`, with this MLP where they name no other."""
    return tuple(replace(stage, mlp=mlp) if stage.mlp == "linear" else stage for stage in stages)


_C1 = Stage(64, 1, 2, 1, 4), Stage(128, 1, 4), Stage(256, 1, 8)
_C10 = Stage(48, 1, 2, 1, 4), Stage(128, 2, 4), Stage(256, 2, 8)
_CONV_MLP = Stage(128, 1, 4, 1, mlp="conv"), Stage(256, 1, 8, 1, embed="conv_act", mlp="conv")
_pooled = functools.partial(Network, norm="batch")
NETWORKS = {
    "first": Network(  # `cvt_cifar` before these experiments; it is `c12` now
        (Stage(64, 1, 1, embed="conv"), Stage(128, 2, 2, embed="conv"), Stage(256, 1, 4, embed="conv")), stem=(32, 32)
    ),
    "cnn": Network(whiten="valid", widths=(64, 128, 128)),
    "c1": _pooled(_stages(*_C1), whiten="valid"),
    "c1, linear MLP": _pooled(_C1, whiten="valid"),
    "c1, layer norm": _pooled(_stages(*_C1), whiten="valid", norm="layer"),
    "c2": _pooled(_stages(Stage(48, 1, 2, 1), Stage(128, 1, 4), Stage(224, 1, 7)), whiten="same"),
    "c3": _pooled(
        _stages(Stage(48, 1, 2, 1, 4), Stage(128, 2, 4), Stage(256, 2, 8, 1.5, embed="conv_act")),
        whiten="same",
    ),
    "c4": _pooled(_stages(Stage(48, 1, 2, 1, 4), Stage(128, 1, 4, local=1), Stage(256, 1, 8)), whiten="valid"),
    "c6": _pooled(_stages(Stage(48, 1, 2, 1, 4), *_CONV_MLP), whiten="same"),
    "c7": _pooled(_stages(Stage(48, 1, 2, 1, 4), Stage(128, 1, 4, 1), Stage(384, 1, 12, 1.5)), whiten="valid"),
    "c10": _pooled(_stages(*_C10), whiten="valid"),
    "c11": _pooled(_stages(_C10[0], Stage(128, 1, 4, 1), Stage(320, 2, 10, 1.25)), whiten="valid"),
    "c12": _pooled(_stages(_C10[0], Stage(128, 1, 4, local=1), Stage(256, 2, 8, 1)), whiten="valid"),
    "c13": _pooled(_stages(_C10[0], Stage(128, 3, 4, 1), Stage(256, 2, 8, 1.5)), whiten="valid"),
    "c14": _pooled(_stages(_C10[0], Stage(128, 1, 4), Stage(256, 3, 8)), whiten="valid"),
    "c15": _pooled(_stages(Stage(40, 1, 2, 1, 4), Stage(112, 2, 4), Stage(224, 2, 7)), whiten="same"),
    "c10, heads of 16": _pooled(_stages(*(replace(stage, heads=stage.dim // 16) for stage in _C10)), whiten="valid"),
    "c10, heads of 64": _pooled(_stages(_C10[0], replace(_C10[1], heads=2), replace(_C10[2], heads=4)), whiten="valid"),
}

# `cvt_cifar_large`, for longer training; above the budget of the others.
LARGE = {"large": _pooled(_stages(Stage(96, 1, 4, 1, 4), Stage(256, 3, 8, local=1), Stage(512, 6, 16)), whiten="valid")}


def _papers_ablations(name):
    """A network with one of the paper's ablations each."""
    network = NETWORKS[name]

    def changed(**changes):
        return replace(network, stages=tuple(replace(stage, **changes) for stage in network.stages))

    return {
        f"{name}, linear projection": changed(projection="linear", stride_kv=1),
        f"{name}, full keys and values": changed(stride_kv=1),
        f"{name}, without blocks": changed(depth=0),
        f"{name}, class token": replace(network, class_token=True),
    }


# `c10` and `c12` with one thing changed, whatever that does to their MACs.
ABLATIONS = {
    "c10, layer norm": replace(NETWORKS["c10"], norm="layer"),
    "c10, trained whitening": replace(NETWORKS["c10"], trained_whitening=True),
    "c10, strided embeddings": _pooled(_stages(*(replace(stage, embed="conv_act") for stage in _C10)), whiten="valid"),
    "c10, strided embeddings, wider": _pooled(
        _stages(
            *(replace(stage, embed="conv_act") for stage in (Stage(64, 1, 2, 1, 4), Stage(144, 2, 4), Stage(320, 2, 10, 1.75)))
        ),
        whiten="valid",
    ),
    "c10, linear MLP": _pooled(_C10, whiten="valid"),
    **_papers_ablations("c10"),
    **_papers_ablations("c12"),
    "c12, no residual convolution": _pooled(tuple(replace(s, local=0) for s in NETWORKS["c12"].stages), whiten="valid"),
}

# The settings that the survey behind these experiments proposes, and the same with two changes that helped `c1`.
R = Settings(peak_learning_rate=3e-3, weight_decay=0.3, label_smoothing=0.1, crop_padding=3, head_scale=True)
S = replace(R, weight_decay=0.6, max_pool=True)
# `S` with the four changes of `FACTORS` that gained most, by top-1 and cross-entropy together.
W = replace(S, alternating_flip=True, centre_tap=True, dirac=True, peak_learning_rate=4.5e-3, whitening_epsilon=1e-2)
# With the head of `cvt_cifar`: the recipe `cifar10`.
V = replace(W, max_pool=False)


# What a designed experiment changes in `S`, each in half of its runs: twelve runs after Plackett and Burman, and the same with
# every choice reversed, so that no effect is mixed up with that of a pair.
FACTORS = {
    "mean pooling": {"max_pool": False},
    "decay 0.3": {"weight_decay": 0.3},
    "alternating flip": {"alternating_flip": True},
    "centre tap, dirac": {"centre_tap": True, "dirac": True},
    "smoothing 0.2": {"label_smoothing": 0.2},
    "rate 4.5e-3": {"peak_learning_rate": 4.5e-3},
    "lookahead": {"lookahead": 0.95**5},
    "fan-in, zero branches": {"fan_in": True, "zero_branches": True},
    "whitening 1e-2": {"whitening_epsilon": 1e-2},
    "momentum 0.85": {"momentum": 0.85},
    "AdamW rate x2": {"adamw_ratio": 1.0},
}


def design():
    """Which of `FACTORS` each run of the designed experiment changes: bool `(24, 11)`."""
    first = np.array([True, True, False, True, True, True, False, False, False, True, False])
    half = np.array([np.roll(first, shift) for shift in range(11)] + [np.zeros(11, bool)])
    return np.concatenate([half, ~half])


def _experiments():
    """Every experiment by its name, in the order of docs/results/recipe.md."""
    experiments = {}

    def add(name, network, settings, **changes):
        experiments[name] = Experiment(name, (NETWORKS | ABLATIONS | LARGE)[network], replace(settings, **changes))

    add("first, its recipe", "first", Settings())
    add("first, R", "first", R, head_scale=False)
    for crop in (2, 3, 4):
        add(f"cnn, crop {crop}", "cnn", R, max_pool=True, crop_padding=crop)
    add("cnn, alternating flip", "cnn", R, max_pool=True, alternating_flip=True)
    add("cnn, decay 0.6", "cnn", S)
    add("cnn, rate 4e-3", "cnn", R, max_pool=True, peak_learning_rate=4e-3)
    for crop in (2, 3, 4):
        add(f"c1, crop {crop}", "c1", R, crop_padding=crop)
    add("c1, decay 0.6", "c1", R, weight_decay=0.6)
    add("c1, rate 4e-3", "c1", R, peak_learning_rate=4e-3)
    add("c1, max-pool head", "c1", R, max_pool=True)
    for network in ("c1, linear MLP", "c3"):
        add(f"{network}, R", network, R)
        add(f"{network}, max-pool head", network, R, max_pool=True)
        add(f"{network}, decay 0.6", network, R, weight_decay=0.6)
    add("c1, S", "c1", S)
    add("c1, S, alternating flip", "c1", S, alternating_flip=True)
    add("c1, S, rate 4e-3", "c1", S, peak_learning_rate=4e-3)
    add("c1, S, centre tap, dirac", "c1", S, centre_tap=True, dirac=True)
    add("c1, S, cutmix 0.1", "c1", S, cutmix=0.1)
    add("c1, S, drop path 0.1", "c1", S, drop_path=0.1)
    for network in ("c4", "c6", "c7", "c10"):
        add(f"{network}, S", network, S)

    for i, changed in enumerate(design()):
        changes = [change for change, is_changed in zip(FACTORS.values(), changed) if is_changed]
        add(f"c10, design {i + 1}", "c10", S, **{name: value for change in changes for name, value in change.items()})

    for network in ("c10", "c11", "c12", "c13", "c14", "c15"):
        add(f"{network}, W", network, W)
    add("c10, W, batch 256", "c10", W, batch_size=256, peak_learning_rate=4.5e-3 * math.sqrt(2))
    for network in ("c10, heads of 16", "c10, heads of 64"):
        add(f"{network}, W", network, W)
    for network in ("c10", *(name for name in ABLATIONS if name.startswith("c10"))):
        add(f"{network}, 5 epochs", network, W, epochs=5)

    add("cnn, W", "cnn", W)
    add("c12, V", "c12", V)
    for network in ("c12", *(name for name in ABLATIONS if name.startswith("c12"))):
        add(f"{network}, 5 epochs", network, V, epochs=5)
    add("c12, width scale, 5 epochs", "c12", V, epochs=5, head_scale=False)
    longer = replace(V, crop_padding=4, weight_decay=0.3)
    for name, changes in {"cutmix": {"cutmix": 0.4}, "erase": {"erase": 0.25}}.items():
        add(f"c12, V, 50 epochs, {name}", "c12", longer, epochs=50, **changes)
    larger = replace(longer, batch_size=256, cutmix=0.5, drop_path=0.1)
    add("large, 60 epochs", "large", larger, epochs=60)
    add("large, 48 epochs, rate 2.25e-3", "large", larger, epochs=48, peak_learning_rate=2.25e-3, weight_decay=0.6)

    # Not run yet.
    add("c7, W", "c7", W)
    add("c12, S", "c12", S)
    add("c10, R", "c10", R)
    add("c12, W, float32", "c12", W, precision="float32")
    add("c10, W, 3 Newton-Schulz steps", "c10", W, newton_schulz_steps=3)
    for name, changes in {"erase 0.5": {"erase": 0.5}, "erase, drop path 0.1": {"erase": 0.25, "drop_path": 0.1}}.items():
        add(f"c12, V, 50 epochs, {name}", "c12", longer, epochs=50, **changes)
    for network in ("c1, layer norm", "c2"):
        add(f"{network}, S", network, S)
    add("c1, S, smoothing 0.2", "c1", S, label_smoothing=0.2)
    add("c1, S, width scale", "c1", S, head_scale=False)
    add("c1, S, zero branches", "c1", S, zero_branches=True)
    add("c1, S, fan-in", "c1", S, fan_in=True)
    add("c1, S, EMA 0.995", "c1", S, ema=0.995)
    add("c1, S, whitening 1e-2", "c1", S, whitening_epsilon=1e-2)
    add("c1, S, decay 1.0", "c1", S, weight_decay=1.0)
    add("c1, S, erase 0.1", "c1", S, erase=0.1)
    add("c1, S, rate 2e-3, decay 1.0", "c1", S, peak_learning_rate=2e-3, weight_decay=1.0)
    return experiments


EXPERIMENTS = _experiments()


@dataclass(frozen=True)
class Arguments:
    """Trains networks for CIFAR-10 by JAX, and appends a line of JSON per run to a file."""

    out: Path = Path("networks.jsonl")
    """Where the lines go."""
    only: tuple[str, ...] = ()
    """Only the experiments of these names, in this order; --only list prints them all."""
    seeds: int = 3
    """Runs of each experiment."""
    data: Path | None = None
    """An .npz file with the training images, by default TFDS'."""
    train_limit: int | None = None
    """Train on the first N images only, and validate on a tenth as many."""
    at_once: int = 6
    """Experiments of one network that train at once, with all their seeds."""
    seconds: float = math.inf
    """Nothing starts that would not end within so many."""


def main(arguments):
    if arguments.only == ("list",):
        print("\n".join(EXPERIMENTS))
        return
    if unknown := set(arguments.only) - set(EXPERIMENTS):
        raise ValueError(f"`only` must name experiments. Received: {', '.join(sorted(unknown))}")
    chosen = [EXPERIMENTS[name] for name in arguments.only or EXPERIMENTS]
    data = load(arguments.data, arguments.train_limit)
    run_all(chosen, range(arguments.seeds), data, arguments.out, arguments.at_once, arguments.seconds)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
