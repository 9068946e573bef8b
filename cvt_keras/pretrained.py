"""Exports a CvT to PyTorch, and converts published weights to a `.keras` file: cvt-keras convert SOURCE OUT.keras

`cvt_keras.conversion` reads published weights; `CvT.from_pretrained` calls it.
"""

import dataclasses
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from cvt_keras import environment, runs
from cvt_keras.conversion import configs, layouts
from cvt_keras.conversion.layouts import LAYOUTS
from cvt_keras.errors import ArgumentError, RunError, first_line
from cvt_keras.variants import get_variant

if TYPE_CHECKING:
    import keras

    from cvt_keras.variants import Variant

# Keras and the model are imported by the functions that need them: the command answers --help without.


def to_torch_state_dict(
    model: "keras.Model", layout: Literal["microsoft", "transformers"] = "microsoft"
) -> dict[str, np.ndarray[Any, Any]]:
    """Returns a PyTorch state dict of NumPy arrays, for `torch.from_numpy` or safetensors' `save_file`.

    LoRA's updates are merged into the kernels.

    Args:
        model: a `CvT`, or a classifier around one.
        layout: `"microsoft"` for the authors' code, or `"transformers"`.

    Returns:
        A dict key -> NumPy array: float32, and BatchNorm's int64 `num_batches_tracked`, which is 0.

    Raises:
        ArgumentError: for an unknown layout, a model without a head, a model that Keras' `quantize` changed, or a network that
            the other code can't build, with the reasons. It is a `ValueError`.
    """
    if layout not in LAYOUTS:
        raise ArgumentError(f"`layout` must be one of {', '.join(LAYOUTS)}. Received: layout={layout!r}", argument="layout")
    import keras

    from cvt_keras.conversion.checkpoint import is_quantized
    from cvt_keras.model import cvt_of

    model = _with_head(cvt_of(model))
    if is_quantized(model):
        raise ArgumentError("`model` must have float kernels. Received: one that Keras' `quantize` changed", argument="model")
    if layout == "transformers":
        layouts.require_transformers(model.variant, "model")
    else:
        layouts.require_microsoft(model.variant, "model")
    activation = LAYOUTS[layout].activation
    if model.variant.activation != activation:
        warnings.warn(
            f"This network uses {model.variant.activation}, but code for the layout {layout!r} always uses {activation}: its "
            f"outputs will differ a little. Train with activation={activation!r} in the `Variant` to avoid this.",
            stacklevel=2,
        )
    variables = {variable.path: variable for variable in model.weights}
    for layer in model._flatten_layers():
        if getattr(layer, "lora_enabled", False):
            variables[f"{layer.path}/kernel"] = layer.kernel  # includes LoRA's update
    weights = LAYOUTS[layout].weights(model.variant, model.num_classes, model.input_shape[-1])
    state_dict = {}
    for key, path, _, axes in weights:
        array = keras.ops.convert_to_numpy(variables[path]).astype("float32", copy=False)
        state_dict[key] = np.ascontiguousarray(np.transpose(array, np.argsort(axes)) if axes else array)
    return {**state_dict, **{key: np.zeros((), "int64") for key in sorted(layouts.counters(weights))}}


def transformers_config(model_or_variant: "keras.Model | Variant") -> dict[str, Any]:
    """Returns the config.json, as a dict, with which transformers builds the same network.

    Args:
        model_or_variant: a `CvT`, a classifier around one, or a variant.

    Raises:
        ArgumentError: for a network that transformers can't build, with the reasons, or one without a head.
    """
    import keras

    from cvt_keras.model import cvt_of, preprocessing_of

    config: dict[str, Any] = {"model_type": "cvt", "architectures": ["CvtForImageClassification"]}
    if isinstance(model_or_variant, keras.Model):
        model = _with_head(cvt_of(model_or_variant))
        names = preprocessing_of(model_or_variant).class_names or [f"LABEL_{i}" for i in range(model.num_classes)]
        config["num_channels"] = model.input_shape[-1]
        config["id2label"] = {str(i): name for i, name in enumerate(names)}
        config["label2id"] = {name: i for i, name in enumerate(names)}
        model_or_variant = model.variant
    variant = get_variant(model_or_variant)
    layouts.require_transformers(variant, "model_or_variant")
    return config | configs.config_of(variant)


def transformers_processor(model: "keras.Model") -> dict[str, Any]:
    """Returns the preprocessor_config.json, as a dict, with which transformers prepares images for `model`.

    Args:
        model: a `CvT`, or a classifier around one.

    Raises:
        ArgumentError: for a model that crops images to a rectangle, which transformers can't do.
    """
    from cvt_keras.model import cvt_of, preprocessing_of

    preprocessing, model = preprocessing_of(model), cvt_of(model)
    channels = model.input_shape[-1]
    height, width = model.input_shape[1:3]
    if None in (height, width):
        height, width = preprocessing.image_size or (224, 224)
    size = {"height": height, "width": width}
    resizing: dict[str, Any]
    if preprocessing.resize == "stretch":
        resizing = {"image_processor_type": "ViTImageProcessor", "size": size}  # it can stretch to any size
    elif height == width:
        shortest_edge = preprocessing.replace(image_size=(height, width)).crop_from[0]
        resizing = {
            "image_processor_type": "CLIPImageProcessor",  # ConvNextImageProcessor crops below 384 pixels only
            "size": {"shortest_edge": shortest_edge},
            "do_center_crop": True,
            "crop_size": size,
            "crop_pct": preprocessing.crop_pct,
        }
    else:
        raise ArgumentError(
            f"`model` must stretch images, or have a square input. Received: resize=crop to {height}x{width}", argument="model"
        )
    return {
        "do_resize": True,
        **resizing,
        "resample": {"bilinear": 2, "bicubic": 3}[preprocessing.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean or [0.5] * channels),
        "image_std": list(preprocessing.std or [0.5] * channels),
    }


def _with_head(model):
    """Returns the model. Raises ArgumentError if it has no head, which PyTorch's classifiers need."""
    if not model.num_classes:
        raise ArgumentError("`model` must have a head. Received: num_classes=0", argument="model")
    return model


# === The command line ===


@dataclasses.dataclass(frozen=True)
class Arguments:
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A PyTorch checkpoint, a folder or file that transformers saved, a hub id such as microsoft/cvt-13, or a .keras file."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.keras")]
    """The file to write, which must not exist yet."""
    variant: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """The network, if it can't be read from the checkpoint: cvt_13, cvt_21 or cvt_w24."""
    which: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Weights to read if the file holds several: ema, or a name or prefix in the file."""


def parse(argv):
    """Reads the command line. Raises ArgumentError unless the file to write ends in .keras."""
    description = "Convert PyTorch weights of a CvT to a file for keras.saving.load_model."
    arguments = tyro.cli(Arguments, prog="cvt-keras convert", description=description, args=argv)
    if arguments.out.suffix != ".keras":
        raise ArgumentError(f"`OUT.keras` must end in .keras. Received: {arguments.out}", argument="out")
    return arguments


def main(argv):
    """The command `cvt-keras convert`."""
    arguments = parse(argv)
    out = arguments.out
    if out.exists():
        raise ArgumentError(
            f"`OUT.keras` must not exist yet: remove it, or choose another name. Received: {out}", argument="out"
        )
    if not out.absolute().parent.is_dir():
        raise ArgumentError(f"`OUT.keras` must be in an existing folder. Received: {out}", argument="out")
    try:
        tempfile.TemporaryFile(dir=out.absolute().parent).close()
    except OSError as error:
        raise ArgumentError(f"`OUT.keras` must be in a writable folder. Received: {out}", argument="out") from error
    environment.start()
    from cvt_keras.model import CvT

    print(f"reading {arguments.source}", flush=True)
    model = CvT.from_pretrained(arguments.source, variant=arguments.variant, which=arguments.which)
    print(f"writing {out}", flush=True)
    try:
        with runs.whole(out) as temporary_file:
            model.save(temporary_file)
    except OSError as error:
        raise RunError(f"{out} can't be written: {error.strerror or first_line(error)}") from error
    size = "x".join(map(str, model.preprocessing.image_size or ["any size"]))
    print(
        f"{out}: {model.count_params():,} weights, {model.num_classes} classes, images of {size}, "
        f"{model.variant.activation}, {out.stat().st_size / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    from cvt_keras import cli

    sys.exit(cli.run("convert", sys.argv[1:]))
