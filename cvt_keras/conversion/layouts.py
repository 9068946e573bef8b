"""The two layouts of PyTorch weights: a map for each, key by key, and the functions that recognise them.

`"microsoft"` is the layout of the authors' code, `"transformers"` that of Hugging Face's port. The maps are generated from a
variant.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from cvt_keras.errors import ArgumentError, CheckpointError, CheckpointFileError
from cvt_keras.variants import VARIANTS, get_variant

# PyTorch's axes in Keras' order.
_CONV = (2, 3, 1, 0)  # (out, in, height, width) -> (height, width, in, out)
_DEPTHWISE = (2, 3, 0, 1)  # (channels, 1, height, width) -> (height, width, channels, 1)
_LINEAR = (1, 0)  # (out, in) -> (in, out)

PAPER = ("cvt_13", "cvt_21", "cvt_w24")


# === The weight maps ===


class Weight(NamedTuple):
    """An array in PyTorch and its variable in Keras.

    `key` and `shape` are PyTorch's, `path` is Keras'. `axes`, if given, transposes PyTorch's array to Keras' order.
    """

    key: str
    path: str
    shape: tuple[int, ...]
    axes: tuple[int, ...] | None = None


def microsoft_weights(variant, num_classes=1000, channels=3):
    """The weight map of the authors' code (microsoft/CvT, `lib/models/cls_cvt.py`).

    Args:
        variant: a name, a `Variant` or its dict.
        num_classes: outputs of the head.
        channels: channels of the images.

    Returns:
        A list with a `Weight` for every weight of the network, including BatchNorm's statistics.

    Raises:
        ValueError: for a variant with parts that the authors' code lacks, such as a stem.
    """
    variant = get_variant(variant)
    if faults := _extensions(variant, "the authors' code"):
        raise ValueError(faults[0])
    weights = []
    for i, stage in enumerate(variant.stages):
        if stage.cls_token:
            weights.append(Weight(f"stage{i}.cls_token", f"stage{i}_embed/cls_token", (1, 1, stage.dim)))
        weights += _conv(f"stage{i}.patch_embed.proj", f"stage{i}_embed/proj", channels, stage)
        weights += _layer_norm(f"stage{i}.patch_embed.norm", f"stage{i}_embed/norm", stage.dim)
        for j in range(stage.depth):
            key, path, dim = f"stage{i}.blocks.{j}", f"stage{i}_block{j}", stage.dim
            weights += _layer_norm(f"{key}.norm1", f"{path}/norm1", dim)
            for name in "qkv":
                if stage.projection == "dw_bn":
                    conv = f"{path}/attention/conv_{name}"
                    weights += _depthwise(f"{key}.attn.conv_proj_{name}.conv", f"{conv}/depthwise", dim)
                    weights += _batch_norm(f"{key}.attn.conv_proj_{name}.bn", f"{conv}/norm", dim)
                weights += _linear(f"{key}.attn.proj_{name}", f"{path}/attention/proj_{name}", dim, dim, stage.qkv_bias)
            weights += _linear(f"{key}.attn.proj", f"{path}/attention/proj", dim, dim)
            weights += _layer_norm(f"{key}.norm2", f"{path}/norm2", dim)
            weights += _linear(f"{key}.mlp.fc1", f"{path}/mlp/fc1", dim, stage.mlp_dim)
            weights += _linear(f"{key}.mlp.fc2", f"{path}/mlp/fc2", stage.mlp_dim, dim)
        channels = stage.dim
    return weights + _layer_norm("norm", "norm", channels) + _linear("head", "head", channels, num_classes)


def transformers_weights(variant, num_classes=1000, channels=3):
    """The weight map of transformers' `CvtForImageClassification`.

    Args, returns: as `microsoft_weights`.

    Raises:
        ValueError: for a variant that transformers can't build or run: with parts that it lacks, such as a stem, with another
            projection than `"dw_bn"`, without a cls token in the last stage, or with one in a stage of another width.
    """
    variant = get_variant(variant)
    if faults := _without_weights(variant):
        raise ValueError(faults[0])
    weights = []
    for i, stage in enumerate(variant.stages):
        key = f"cvt.encoder.stages.{i}"
        if stage.cls_token:
            weights.append(Weight(f"{key}.cls_token", f"stage{i}_embed/cls_token", (1, 1, stage.dim)))
        embed = f"{key}.embedding.convolution_embeddings"
        weights += _conv(f"{embed}.projection", f"stage{i}_embed/proj", channels, stage)
        weights += _layer_norm(f"{embed}.normalization", f"stage{i}_embed/norm", stage.dim)
        for j in range(stage.depth):
            layer, path, dim = f"{key}.layers.{j}", f"stage{i}_block{j}", stage.dim
            attention = f"{layer}.attention.attention"
            weights += _layer_norm(f"{layer}.layernorm_before", f"{path}/norm1", dim)
            for name in ("query", "key", "value"):
                conv = f"{attention}.convolution_projection_{name}.convolution_projection"
                weights += _depthwise(f"{conv}.convolution", f"{path}/attention/conv_{name[0]}/depthwise", dim)
                weights += _batch_norm(f"{conv}.normalization", f"{path}/attention/conv_{name[0]}/norm", dim)
                linear = f"{path}/attention/proj_{name[0]}"
                weights += _linear(f"{attention}.projection_{name}", linear, dim, dim, stage.qkv_bias)
            weights += _linear(f"{layer}.attention.output.dense", f"{path}/attention/proj", dim, dim)
            weights += _layer_norm(f"{layer}.layernorm_after", f"{path}/norm2", dim)
            weights += _linear(f"{layer}.intermediate.dense", f"{path}/mlp/fc1", dim, stage.mlp_dim)
            weights += _linear(f"{layer}.output.dense", f"{path}/mlp/fc2", stage.mlp_dim, dim)
        channels = stage.dim
    return weights + _layer_norm("layernorm", "norm", channels) + _linear("classifier", "head", channels, num_classes)


class Layout(NamedTuple):
    """A layout: its weight map, its activation, and the prefixes of the keys whose shapes give channels and classes."""

    weights: Callable
    activation: str
    embedding: str
    head: str


LAYOUTS = {
    "microsoft": Layout(microsoft_weights, "quick_gelu", "stage0.patch_embed.proj", "head"),
    "transformers": Layout(
        transformers_weights, "gelu", "cvt.encoder.stages.0.embedding.convolution_embeddings.projection", "classifier"
    ),
}


def _extensions(variant, code):
    """Returns the fields of a network that only CvT-Keras has and that differ from the paper's, one line each."""
    parts = [(variant, ("stem", "whitening", "norm", "attention_scale"), "")]
    parts += [(stage, ("pool", "residual_convs", "mlp_conv"), f" in stage {i}") for i, stage in enumerate(variant.stages)]
    return [
        f"{code} has only {name}={getattr(type(part), name)!r}. Received: {name}={getattr(part, name)!r}{place}"
        for part, names, place in parts
        for name in names
        if getattr(part, name) != getattr(type(part), name)
    ]


def _without_weights(variant):
    """Returns the reasons why transformers has no weights for a network, one line each."""
    last = variant.stages[-1]
    faults = _extensions(variant, "transformers")
    if not last.cls_token:
        faults.append("transformers classifies by a cls token. Received: a variant with cls_token=False in its last stage")
    for i, stage in enumerate(variant.stages):
        if stage.projection != "dw_bn":
            faults.append(f"transformers has no projection but `dw_bn`. Received: projection={stage.projection!r} in stage {i}")
        if stage.cls_token and stage.dim != last.dim:
            faults.append(
                f"transformers' cls token is as wide as the last stage. Received: one of width {stage.dim} in stage {i}"
            )
    return faults


def require_microsoft(variant, argument):
    """Raises ArgumentError, with every reason, unless the authors' code can build the network."""
    if faults := _extensions(variant, "the authors' code"):
        raise ArgumentError(
            f"`{argument}` must be a network that the authors' code can build", argument=argument, details=faults
        )


def require_transformers(variant, argument):
    """Raises ArgumentError, with every reason, unless transformers can build and run the network.

    Reading a folder does not need this: its weights may be complete for a network that transformers can't build.
    """
    faults = _without_weights(variant)
    # It reads the drop path rate of block i in stage i, and raises an IndexError if there is no such block.
    faults += [
        f"transformers needs {i + 1} blocks or more in stage {i}. Received: depth={stage.depth}"
        for i, stage in enumerate(variant.stages)
        if stage.depth <= i
    ]
    if faults:
        raise ArgumentError(f"`{argument}` must be a network that transformers can build", argument=argument, details=faults)


def _conv(key, path, channels, stage):
    shape = (stage.dim, channels, stage.kernel_size, stage.kernel_size)
    return [Weight(f"{key}.weight", f"{path}/kernel", shape, _CONV), Weight(f"{key}.bias", f"{path}/bias", (stage.dim,))]


def _depthwise(key, path, dim):
    return [Weight(f"{key}.weight", f"{path}/kernel", (dim, 1, 3, 3), _DEPTHWISE)]


def _linear(key, path, dim, units, bias=True):
    kernel = Weight(f"{key}.weight", f"{path}/kernel", (units, dim), _LINEAR)
    return [kernel, Weight(f"{key}.bias", f"{path}/bias", (units,))] if bias else [kernel]


def _layer_norm(key, path, dim):
    return [Weight(f"{key}.weight", f"{path}/gamma", (dim,)), Weight(f"{key}.bias", f"{path}/beta", (dim,))]


def _batch_norm(key, path, dim):
    return _layer_norm(key, path, dim) + [
        Weight(f"{key}.running_mean", f"{path}/moving_mean", (dim,)),
        Weight(f"{key}.running_var", f"{path}/moving_variance", (dim,)),
    ]


def counters(weights):
    """Returns the keys of BatchNorm's batch counters, which PyTorch saves, but uses only with `momentum=None`."""
    return {f"{key.removesuffix('running_mean')}num_batches_tracked" for key, *_ in weights if key.endswith(".running_mean")}


# === Recognising checkpoints ===


def layout_name(state_dict):
    """Returns the name of the layout with the most keys. Keys of the other are reported later, as unused."""
    prefixes = {"transformers": "cvt.", "microsoft": "stage"}
    counts = {name: sum(key.startswith(prefix) for key in state_dict) for name, prefix in prefixes.items()}
    name = max(counts, key=counts.get)
    if not counts[name]:
        first_keys = ", ".join(sorted(state_dict)[:3])
        raise CheckpointFileError(f"holds no CvT with a head: no key begins with stage or cvt. Its first keys: {first_keys}")
    return name


def sizes(shapes, layout):
    """Returns the numbers of classes and channels.

    They default to 1000 and 3 if their arrays are missing or malformed: that is reported later, with all other faults.
    """
    bias, kernel = (shapes.get(f"{layout.head}.{name}", ()) for name in ("bias", "weight"))
    embedding = shapes.get(f"{layout.embedding}.weight", ())
    if len(bias) == 1 and len(kernel) == 2 and bias != kernel[:1]:
        raise CheckpointError(
            f"{layout.head}.weight and {layout.head}.bias must have equally many classes. Received: shapes {kernel} and {bias}"
        )
    num_classes = bias[0] if len(bias) == 1 else kernel[0] if len(kernel) == 2 else 1000
    if not num_classes:
        raise CheckpointError(f"{layout.head}.weight and {layout.head}.bias must have at least one class. Received: 0")
    return num_classes, embedding[1] if len(embedding) == 4 else 3


def paper_network(shapes):
    """Returns the name of the paper's network with the widths, kernels and depths of an authors' state dict, or `None`.

    Shapes do not show heads and strides. Biases and the cls token are not looked for, as a state dict that lost them looks like
    that of a network without them.
    """
    sizes, depths = _widths_and_kernels(shapes), _depths(shapes)
    for name in PAPER:
        stages = VARIANTS[name].stages
        if [(stage.dim, stage.kernel_size) for stage in stages] == sizes and [stage.depth for stage in stages] == depths:
            return name
    return None


def why_no_paper_network(shapes):
    """Explains why `paper_network` returns `None`."""
    sizes, depths = _widths_and_kernels(shapes), _depths(shapes)
    if None in sizes:
        key = f"stage{sizes.index(None)}.patch_embed.proj.weight"
        return f"{key}: its shape must have 4 axes. Received: {shapes[key]}" if key in shapes else f"missing: {key}"
    alike = [name for name in PAPER if [(stage.dim, stage.kernel_size) for stage in VARIANTS[name].stages] == sizes]
    if not alike:
        return (
            f"the stages' widths and kernels, {', '.join(map(str, sizes))}, are those of no network of the paper, and the "
            "weights do not show heads and strides: give `variant`"
        )
    papers = ", ".join(f"{[stage.depth for stage in VARIANTS[name].stages]} of {name}" for name in alike)
    return (
        f"blocks are missing or unused: its stages have {depths} blocks, and the paper's networks of these widths have "
        f"{papers}. If no block is missing, give `variant`"
    )


def _widths_and_kernels(shapes):
    """Returns (width, kernel size) of each stage, or `None` where the embedding's kernel is missing or malformed."""
    kernels = [shapes.get(f"stage{i}.patch_embed.proj.weight", ()) for i in range(len(_depths(shapes)))]
    return [(shape[0], shape[2]) if len(shape) == 4 else None for shape in kernels]


def _depths(shapes):
    """Returns the depth of each stage, by the highest number of a block; 0 for a stage without blocks."""
    depths = {}
    for match in filter(None, (re.match(r"stage(\d{1,3})\.(?:blocks\.(\d{1,3})\.)?", key) for key in shapes)):
        stage, depth = int(match[1]), int(match[2] or -1) + 1
        depths[stage] = max(depths.get(stage, 0), depth)
    return [depths.get(i, 0) for i in range(max(depths, default=-1) + 1)]
