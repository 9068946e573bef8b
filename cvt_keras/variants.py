"""The shape and cost of each network, as data: no Keras is imported here.

Sources: Wu et al., "CvT: Introducing Convolutions to Vision Transformers" (arXiv 2103.15808), table 1,
and the yaml files of the authors' code, which settle what the paper leaves open. The CIFAR variants are this project's own.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PROJECTION_KERNEL_SIZE = 3  # the paper's s in section 3.2; every published network uses 3
PROJECTIONS = ("dw_bn", "avg", "linear")
ACTIVATIONS = ("quick_gelu", "gelu")
NORMS = ("layer", "batch")
ATTENTION_SCALES = ("dim", "head")


@dataclass(frozen=True)
class Stage:
    """One stage: a convolutional token embedding, then `depth` blocks of convolutional attention and MLP.

    Args:
        dim: width of a token.
        depth: number of blocks.
        heads: attention heads; must divide `dim`.
        kernel_size: side of the token embedding's kernel, in pixels or tokens of the stage before.
        stride: stride of the token embedding: the stage divides height and width by it.
        padding: zeros that the token embedding adds on each of the four sides.
        mlp_ratio: hidden width of the MLP, as a multiple of `dim`.
        drop_path: stochastic depth rate of the last block; the rates rise linearly from 0 in the first.
        projection: `"dw_bn"` (depthwise convolution and BatchNorm), or the paper's ablations `"avg"` (average-pooled
            keys and values) and `"linear"` (none).
        qkv_bias: whether the linear projections of query, key and value have a bias.
        stride_q: stride of the query's projection, a field of the authors' yaml files. `"dw_bn"` needs 1, because a block adds
            its output to its input; `"avg"` and `"linear"` do not project the query and ignore it.
        stride_kv: stride of the key's and value's projections; 2 squeezes them to a quarter. `"linear"` ignores it.
        cls_token: whether the stage has a learned token beside its grid. The head reads the last stage's.
        pool: whether the token embedding downsamples by max-pooling: its convolution has stride 1, and max-pooling, norm and
            activation follow. `stride` is then the side of the pooling window. Not in the paper, whose embedding has a strided
            convolution and no activation.
        residual_convs: number of 3x3 convolutions with BatchNorm, activation and a shortcut, between embedding and blocks; 0 in
            the paper.
        mlp_conv: whether the MLPs have a depthwise 3x3 convolution with a shortcut before their activation. Not in the paper.

    Raises:
        ValueError: for an invalid value; the message names it.
    """

    dim: int
    depth: int
    heads: int
    kernel_size: int = 3
    stride: int = 2
    padding: int = 1
    mlp_ratio: float = 4.0
    drop_path: float = 0.0
    projection: str = "dw_bn"
    qkv_bias: bool = True
    stride_q: int = 1
    stride_kv: int = 2
    cls_token: bool = False
    pool: bool = False
    residual_convs: int = 0
    mlp_conv: bool = False

    def __post_init__(self) -> None:
        for name in ("dim", "depth", "heads", "kernel_size", "stride", "stride_q", "stride_kv"):
            if not is_integer(value := getattr(self, name)) or value < 1:
                raise ValueError(f"`{name}` must be a positive integer. Received: {name}={value!r}")
        if self.dim % self.heads:
            raise ValueError(f"`heads` must divide `dim`. Received: heads={self.heads}, dim={self.dim}")
        if not is_integer(self.padding) or not 0 <= self.padding < self.kernel_size:
            raise ValueError(
                "`padding` must be an integer from 0 to `kernel_size` - 1. "
                f"Received: padding={self.padding!r}, kernel_size={self.kernel_size}"
            )
        if not 0 < self.mlp_ratio < math.inf or self.mlp_dim < 1:
            raise ValueError(
                "`mlp_ratio` must be finite and make the MLP at least 1 wide. "
                f"Received: mlp_ratio={self.mlp_ratio}, dim={self.dim}"
            )
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"`drop_path` must be at least 0 and less than 1. Received: drop_path={self.drop_path}")
        if self.projection not in PROJECTIONS:
            raise ValueError(f"`projection` must be one of {PROJECTIONS}. Received: projection={self.projection!r}")
        if not is_integer(self.residual_convs) or self.residual_convs < 0:
            raise ValueError(
                f"`residual_convs` must be an integer, at least 0. Received: residual_convs={self.residual_convs!r}"
            )
        for name in ("pool", "mlp_conv"):
            _require_bool(name, getattr(self, name))
        if self.pool and self.stride < 2:
            raise ValueError(f"`pool` needs a `stride` of at least 2. Received: pool=True, stride={self.stride}")
        if self.projection == "dw_bn" and self.stride_q != 1:
            raise ValueError(
                f"`stride_q` must be 1, because a block adds its output to its input. Received: stride_q={self.stride_q}"
            )

    @property
    def mlp_dim(self) -> int:
        """Hidden width of the MLP."""
        return int(self.dim * self.mlp_ratio)

    @property
    def drop_path_rates(self) -> tuple[float, ...]:
        """The stochastic depth rate of each block: `linspace(0, drop_path, depth)`."""
        return tuple(self.drop_path * block / max(self.depth - 1, 1) for block in range(self.depth))


@dataclass(frozen=True)
class Variant:
    """A network without its classifier head.

    Args:
        stages: `Stage` records (or their dicts), in order.
        activation: `"quick_gelu"`, as in the authors' weights, or `"gelu"` (exact). The paper's networks have one in their MLPs
            only; the other parts with an activation use the same.
        stem: widths of 3x3 convolutions with BatchNorm and activation, at full resolution, before the first stage.
            Empty in the paper's networks.
        whitening: kernel size of a `Whitening` layer before everything else; 0 for none, as in the paper.
        norm: the norm of embeddings, blocks and head: `"layer"`, as in the paper, or `"batch"`.
        attention_scale: attention scores are divided by the square root of a width: `"dim"`, that of all heads together, as in
            the authors' code, or `"head"`, that of one head.
        identity_init: whether the convolutions of embeddings and projections start near the identity: the first filters of an
            embedding pass one input channel each, and a projection's centre weights are larger by 1. It changes the initial
            weights only.

    Raises:
        ValueError: for an invalid value; the message names it.
    """

    stages: tuple[Stage, ...]
    activation: str = "quick_gelu"
    stem: tuple[int, ...] = ()
    whitening: int = 0
    norm: str = "layer"
    attention_scale: str = "dim"
    identity_init: bool = False

    def __post_init__(self) -> None:
        for name in ("stages", "stem"):
            if not isinstance(getattr(self, name), (tuple, list)):
                raise TypeError(f"`{name}` must be a tuple. Received: {name}={getattr(self, name)!r}")
        stages = (_record(Stage, stage, f"stage {i}") for i, stage in enumerate(self.stages))
        object.__setattr__(self, "stages", tuple(stages))
        object.__setattr__(self, "stem", tuple(self.stem))
        if not self.stages:
            raise ValueError("`stages` must hold at least one `Stage`. Received: stages=()")
        choices = {"activation": ACTIVATIONS, "norm": NORMS, "attention_scale": ATTENTION_SCALES}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` must be one of {known}. Received: {name}={getattr(self, name)!r}")
        if not is_integer(self.whitening) or self.whitening < 0:
            raise ValueError(f"`whitening` must be an integer, at least 0. Received: whitening={self.whitening!r}")
        _require_bool("identity_init", self.identity_init)
        if not all(is_integer(width) and width > 0 for width in self.stem):
            raise ValueError(f"`stem` must hold positive integers. Received: stem={self.stem}")

    @property
    def stride(self) -> int:
        """The product of the stages' strides: pixels per token of the last stage, along each side."""
        return math.prod(stage.stride for stage in self.stages)

    @property
    def min_side(self) -> int:
        """The smallest height and width of an image, in pixels.

        At least `stride`, because a token of the last stage would see mostly padding otherwise, and large enough to leave a
        token in every stage.
        """
        side = 1
        for stage in reversed(self.stages):
            if stage.pool:
                side = stage.stride * side + stage.kernel_size - 1 - 2 * stage.padding
            else:
                side = stage.stride * (side - 1) + stage.kernel_size - 2 * stage.padding
            side = max(1, side)
        return max(self.stride, side + max(0, self.whitening - 1))

    def grids(self, height: int, width: int) -> list[tuple[int, int]]:
        """Returns the number of tokens along height and width after each stage.

        Args:
            height, width: size of the image in pixels.

        Returns:
            A list of `(height, width)`, one for each stage.

        Raises:
            ValueError: if a side is smaller than `min_side`.
        """
        if min(height, width) < self.min_side:
            raise ValueError(
                f"`input_shape` must be at least {self.min_side}x{self.min_side} for this network. Received: {height}x{width}"
            )
        height, width = _whitened(height, self), _whitened(width, self)
        grids = []
        for stage in self.stages:
            height, width = _embedded(height, stage), _embedded(width, stage)
            grids.append((height, width))
        return grids


def _record(cls, value, place):
    """Returns `value`, or builds a `cls` from its dict."""
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        raise TypeError(f"{place} must be a `{cls.__name__}` or its dict. Received: {value!r}")
    fields = dataclasses.fields(cls)
    unknown = set(value) - {field.name for field in fields}
    missing = {field.name for field in fields if field.default is dataclasses.MISSING} - set(value)
    if unknown or missing:
        known = ", ".join(field.name for field in fields)
        raise ValueError(f"{place} has the fields {known}. Unknown: {sorted(unknown)}; missing: {sorted(missing)}")
    return cls(**value)


def is_integer(value):
    """Whether `value` is an `int`, and not a `bool`."""
    return isinstance(value, int) and not isinstance(value, bool)


def _convolved(side, kernel_size, stride, padding):
    return (side + 2 * padding - kernel_size) // stride + 1


def _whitened(side, variant):
    """Pixels along a side after whitening, which has no padding."""
    return _convolved(side, variant.whitening, 1, 0) if variant.whitening else side


def _embedded(side, stage):
    """Tokens along a side after the token embedding of `stage`."""
    if stage.pool:
        return _convolved(side, stage.kernel_size, 1, stage.padding) // stage.stride
    return _convolved(side, stage.kernel_size, stage.stride, stage.padding)


def _require_bool(name, value):
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False. Received: {name}={value!r}")


def _paper(dims, heads, depths, drop_path):
    """Builds a network of the paper. The three differ only in sizes (table 1; `experiments/imagenet/cvt/*.yaml`)."""
    sizes = zip(dims, heads, depths, (7, 3, 3), (4, 2, 2), (2, 1, 1), (0.0, 0.0, drop_path), (False, False, True))
    return Variant(
        tuple(
            Stage(dim, depth, head, kernel, stride, padding, drop_path=drop, cls_token=cls)
            for dim, head, depth, kernel, stride, padding, drop, cls in sizes
        )
    )


def _cifar(*stages):
    """Builds a network for CIFAR. The two differ only in their stages."""
    return Variant(stages, activation="gelu", whitening=2, norm="batch", attention_scale="head", identity_init=True)


VARIANTS: dict[str, Variant] = {
    "cvt_13": _paper((64, 192, 384), (1, 3, 6), (1, 2, 10), drop_path=0.1),
    "cvt_21": _paper((64, 192, 384), (1, 3, 6), (1, 4, 16), drop_path=0.1),
    "cvt_w24": _paper((192, 768, 1024), (3, 12, 16), (2, 2, 20), drop_path=0.3),
    # docs/results/recipe.md has the experiments behind each choice.
    "cvt_cifar": _cifar(
        Stage(dim=48, depth=1, heads=2, mlp_ratio=1.0, stride_kv=4, pool=True, mlp_conv=True),
        Stage(dim=128, depth=1, heads=4, mlp_ratio=2.0, pool=True, residual_convs=1, mlp_conv=True),
        Stage(dim=256, depth=2, heads=8, mlp_ratio=1.0, pool=True, mlp_conv=True),
    ),
    # Wider and deeper, for a GPU.
    "cvt_cifar_large": _cifar(
        Stage(dim=96, depth=1, heads=4, mlp_ratio=1.0, stride_kv=4, pool=True, mlp_conv=True),
        Stage(dim=256, depth=3, heads=8, mlp_ratio=2.0, drop_path=0.05, pool=True, residual_convs=1, mlp_conv=True),
        Stage(dim=512, depth=6, heads=16, mlp_ratio=2.0, drop_path=0.1, pool=True, mlp_conv=True),
    ),
    # For tests: every part of the paper's networks at the smallest size.
    "cvt_tiny": Variant(
        (
            Stage(dim=8, depth=1, heads=1, mlp_ratio=2.0),
            Stage(dim=16, depth=2, heads=2, mlp_ratio=2.0, drop_path=0.1, cls_token=True),
        )
    ),
}


def get_variant(variant: Variant | str | Mapping[str, Any]) -> Variant:
    """Returns a `Variant` from its name, its dict or itself.

    Raises:
        ValueError: for an unknown name, with the list of known ones.
        TypeError: for anything else.
    """
    if isinstance(variant, Variant):
        return variant
    if isinstance(variant, str):
        if variant not in VARIANTS:
            raise ValueError(f"`variant` must be one of {', '.join(VARIANTS)}. Received: variant={variant!r}")
        return VARIANTS[variant]
    if isinstance(variant, Mapping):
        return _record(Variant, variant, "`variant`")
    raise TypeError(f"`variant` must be a name, a `Variant` or its dict. Received: variant={variant!r}")


def named(variant: Variant) -> Variant | str:
    """Returns the variant's name in `VARIANTS`, or the variant itself if it has none."""
    return next((name for name, known in VARIANTS.items() if known == variant), variant)


def different_fields(variant: Variant, other: Variant) -> dict[str, tuple[Any, Any]]:
    """Compares two variants. If their numbers of stages differ, it compares the stages that both have.

    Returns:
        A dict: `"whitening"`, `"number of stages"`, `"pool of stage 1"` -> (value of `variant`, value of `other`).
    """
    fields = {name: (value, getattr(other, name)) for name, value in vars(variant).items() if name != "stages"}
    fields["number of stages"] = (len(variant.stages), len(other.stages))
    for i, (ours, theirs) in enumerate(zip(variant.stages, other.stages)):
        fields |= {f"{name} of stage {i}": (value, getattr(theirs, name)) for name, value in vars(ours).items()}
    return {name: (ours, theirs) for name, (ours, theirs) in fields.items() if ours != theirs}


def to_dict(variant: Variant) -> dict[str, Any]:
    """Returns a dict of JSON types, which `get_variant` accepts."""
    config = dataclasses.asdict(variant)
    return {**config, "stages": list(config["stages"]), "stem": list(config["stem"])}


def macs(variant: Variant | str | Mapping[str, Any], input_shape: Sequence[int], num_classes: int) -> int:
    """Counts the multiply-accumulates of a forward pass of one image.

    It counts convolutions, whitening included, linear projections, the two matrix products of attention, and the head. Like
    the authors' own count, it leaves out normalisation, activations, softmax and pooling.

    Args:
        variant: a name, a `Variant` or its dict.
        input_shape: `(height, width, channels)`.
        num_classes: outputs of the head.

    Returns:
        An int.
    """
    variant = get_variant(variant)
    if len(input_shape) != 3 or None in input_shape:
        raise ValueError(f"`input_shape` must be (height, width, channels), all known. Received: {tuple(input_shape)}")
    height, width, channels = input_shape
    total = 0
    grids = variant.grids(height, width)
    if variant.whitening:
        height, width = _whitened(height, variant), _whitened(width, variant)
        patch = variant.whitening**2 * channels
        channels = 2 * patch
        total += height * width * patch * channels
    for dim in variant.stem:
        total += height * width * 9 * channels * dim
        channels = dim
    for stage, grid in zip(variant.stages, grids):
        tokens = math.prod(grid)
        stride = 1 if stage.pool else stage.stride
        positions = math.prod(_convolved(side, stage.kernel_size, stride, stage.padding) for side in (height, width))
        total += positions * stage.kernel_size**2 * channels * stage.dim
        total += stage.residual_convs * tokens * 9 * stage.dim**2
        total += stage.depth * _block_macs(stage, grid)
        channels = stage.dim
        height, width = grid
    return total + channels * num_classes


def _block_macs(stage, grid):
    kernel = PROJECTION_KERNEL_SIZE
    queries, keys = math.prod(grid), math.prod(grid)
    convolution = 0
    if stage.projection == "dw_bn":
        keys = math.prod(_convolved(side, kernel, stage.stride_kv, kernel // 2) for side in grid)
        convolution = (queries + 2 * keys) * kernel**2 * stage.dim
    elif stage.projection == "avg":
        keys = math.prod(pooled(side, kernel, stage.stride_kv) for side in grid)
    queries, keys = queries + stage.cls_token, keys + stage.cls_token
    linear = 2 * (queries + keys) * stage.dim**2  # query and output, key and value
    attention = 2 * queries * keys * stage.dim
    mlp = 2 * queries * stage.dim * stage.mlp_dim
    if stage.mlp_conv:
        mlp += math.prod(grid) * kernel**2 * stage.mlp_dim
    return convolution + linear + attention + mlp


def pooled(side, kernel_size, stride):
    """Tokens along a side after average pooling in ceil mode with padding `kernel_size // 2`, as in PyTorch.

    The last window must start inside the input or the padding before it: at stride 2, an even side gets one more token.
    """
    padding = kernel_size // 2
    return (side + padding + min(padding + stride - 1, kernel_size - 1) - kernel_size) // stride + 1
