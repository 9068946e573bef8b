"""The config files of published weights -> `Variant` and `Preprocessing`."""

import contextlib
import json
import math
import re

from cvt_keras.conversion import state_dicts
from cvt_keras.errors import CheckpointError, first_line
from cvt_keras.preprocessing import Preprocessing
from cvt_keras.variants import VARIANTS, Stage, Variant, is_integer

# Both sources trained with ImageNet's mean and std. The authors' yaml files say so, their weight files don't.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Both sources tested 224x224 on the middle of 256, and larger inputs on stretched images, all bicubic.
_CROP_PCT = 0.875
_STRETCHED_FROM = 384
_RESAMPLES = range(6)  # Pillow's numbers

_SPEC_FIELDS = {
    "dim": "DIM_EMBED",
    "depth": "DEPTH",
    "heads": "NUM_HEADS",
    "kernel_size": "PATCH_SIZE",
    "stride": "PATCH_STRIDE",
    "padding": "PATCH_PADDING",
    "mlp_ratio": "MLP_RATIO",
    "drop_path": "DROP_PATH_RATE",
    "projection": "QKV_PROJ_METHOD",
    "qkv_bias": "QKV_BIAS",
    "stride_q": "STRIDE_Q",
    "stride_kv": "STRIDE_KV",
    "cls_token": "CLS_TOKEN",
}
CONFIG_FIELDS = {
    "dim": "embed_dim",
    "depth": "depth",
    "heads": "num_heads",
    "kernel_size": "patch_sizes",
    "stride": "patch_stride",
    "padding": "patch_padding",
    "mlp_ratio": "mlp_ratio",
    "drop_path": "drop_path_rate",
    "projection": "qkv_projection_method",
    "qkv_bias": "qkv_bias",
    "stride_q": "stride_q",
    "stride_kv": "stride_kv",
    "cls_token": "cls_token",
}


def variant_from_microsoft(spec):
    """Returns the `Variant` that a `MODEL.SPEC` of the authors' yaml files describes.

    Args:
        spec: the dict, with a list entry for each stage under `DIM_EMBED` and the like.

    Raises:
        ValueError: for a setting that is not supported: another projection kernel than 3, dropout, a position embedding.
    """
    _require_off(spec, ("DROP_RATE", "ATTN_DROP_RATE", "POS_EMBED"))
    _require_kernel(spec, "KERNEL_QKV", "PADDING_Q", "PADDING_KV")
    return _variant(spec, _SPEC_FIELDS, "quick_gelu")


def variant_from_transformers(config):
    """Returns the `Variant` that a `CvtConfig` describes.

    `layer_norm_eps` is ignored, as in transformers, whose LayerNorms have PyTorch's 1e-5.

    Args:
        config: the dict of config.json. Missing entries default to CvT-13's, as in `CvtConfig`.

    Raises:
        ValueError: for a setting that is not supported: another projection kernel than 3, or dropout.
    """
    config = {**config_of(VARIANTS["cvt_13"]), "drop_rate": [], "attention_drop_rate": [], **config}
    for name in (*CONFIG_FIELDS.values(), "kernel_qkv", "padding_q", "padding_kv", "drop_rate", "attention_drop_rate"):
        if not isinstance(config[name], list):
            raise ValueError(f"`{name}` must be a list with an entry for each stage. Received: {config[name]}")
    _require_off(config, ("drop_rate", "attention_drop_rate"))
    _require_kernel(config, "kernel_qkv", "padding_q", "padding_kv")
    return _variant(config, CONFIG_FIELDS, "gelu")


def config_of(variant):
    """Returns the entries of transformers' config.json that describe a variant's stages, each a list."""
    config = {name: [getattr(stage, field) for stage in variant.stages] for field, name in CONFIG_FIELDS.items()}
    for name, kind in {"mlp_ratio": float, "drop_path_rate": float, "qkv_bias": bool, "cls_token": bool}.items():
        config[name] = [kind(value) for value in config[name]]  # transformers refuses 4 for 4.0
    same = {"kernel_qkv": 3, "padding_q": 1, "padding_kv": 1, "drop_rate": 0.0, "attention_drop_rate": 0.0}
    return config | {name: [value] * len(variant.stages) for name, value in same.items()}


def _require_off(spec, names):
    for name in names:
        if any(spec.get(name, [])):
            raise ValueError(f"`{name}` must be 0 in every stage. Received: {spec[name]}")


def _require_kernel(spec, kernel, *paddings):
    kernels = {*spec[kernel], *(2 * padding + 1 for name in paddings for padding in spec[name])}
    if kernels != {3} or not spec[kernel]:
        raise ValueError(f"`{kernel}` must be 3, padded by 1. Received: {spec[kernel]}")


def _variant(spec, fields, activation):
    lengths = {name: len(spec[name]) for name in fields.values()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"every list must have an entry for each stage. Received: {lengths}")
    for name in (fields["qkv_bias"], fields["cls_token"]):
        if not all(isinstance(value, bool) for value in spec[name]):
            raise ValueError(f"`{name}` must be true or false in every stage. Received: {spec[name]}")
    stages = zip(*(spec[name] for name in fields.values()))
    return Variant(tuple(Stage(**dict(zip(fields, values))) for values in stages), activation=activation)


def read(file, channels):
    """Reads config.json, and preprocessor_config.json beside it if it exists. Returns a `Variant` and a `Preprocessing`.

    Args:
        file: the path of config.json.
        channels: channels of the images.

    Raises:
        CheckpointError: for a missing file or an invalid entry.
    """
    if not file.exists():
        raise CheckpointError(
            f"{file.name} is missing beside it, and the weights do not show heads and strides: add it, or give `variant`"
        )
    with _named(f"{file.name} is not a valid config of a CvT"):
        config = _read_object(file)
        if config.get("model_type") != "cvt":
            raise ValueError(f"`model_type` must be cvt. Received: {config.get('model_type')}")
        variant = variant_from_transformers(config)
        labels = config.get("id2label") or {}
        if not isinstance(labels, dict) or not all(isinstance(name, str) for name in labels.values()):
            raise ValueError(f"`id2label` must hold names. Received: {labels}")
        names = [labels.get(str(i)) for i in range(len(labels))]
    preprocessing = published_preprocessing(variant, channels, "")
    # LABEL_0, ... are transformers' defaults, not names.
    unnamed = None in names or all(name == f"LABEL_{i}" for i, name in enumerate(names))
    preprocessing = preprocessing.replace(class_names=None if unnamed else names)
    file = file.with_name(state_dicts.PROCESSOR)
    if file.exists():
        with _named(f"{file.name} is not a valid config of an image processor"):
            preprocessing = preprocessing.replace(**_processor(_read_object(file), preprocessing, channels))
    return variant, preprocessing


def _read_object(file):
    contents = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(contents, dict):
        raise ValueError(f"it must hold a JSON object. Received: {type(contents).__name__}")
    return contents


@contextlib.contextmanager
def _named(fault):
    """Turns an error into a CheckpointError of one line that names the file."""
    try:
        yield
    except (ValueError, TypeError, OverflowError, OSError) as error:
        raise CheckpointError(f"{fault}: {first_line(error)}") from error


def _processor(config, default, channels):
    """Returns the fields of a `Preprocessing` that a preprocessor_config.json describes, except class names."""
    config = {name: value for name, value in config.items() if value is not None}
    statistics = {"mean": config.get("image_mean", default.mean), "std": config.get("image_std", default.std)}
    if not config.get("do_normalize", True):
        statistics = {"mean": [0.0] * channels, "std": [1.0] * channels}
    if config.get("rescale_offset"):
        raise ValueError(f"`rescale_offset` is not supported. Received: {config['rescale_offset']}")
    factor = config.get("rescale_factor", 1 / 255)
    if not _is_number(factor) or not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"`rescale_factor` must be a positive number. Received: {factor}")
    scale = 255 * factor if config.get("do_rescale", True) else 255
    for name, values in statistics.items():
        if not isinstance(values, (list, tuple)) or not all(map(_is_number, values)):
            raise ValueError(f"`image_{name}` must be a list of {channels} numbers. Received: {values}")
        statistics[name] = [value / scale for value in values]
    Preprocessing(**statistics).require_channels(channels)
    return {**statistics, **_resizing(config, default)}


def _resizing(config, default):
    """Returns the fields of a `Preprocessing` for the size of the images and how to resize them.

    Configs name the class that reads them. Classes differ in what they do by default, and in what one number means as `size`.
    """
    kind = config.get("image_processor_type") or config.get("feature_extractor_type") or "ConvNext"  # CvT's
    is_convnext = str(kind).startswith("ConvNext")
    crop_size = config.get("crop_size") if config.get("do_center_crop", True) else None
    size = config.get("size", {"shortest_edge": default.image_size[0]})
    sides = _sides(size)
    image_size = sides if crop_size is None else _sides(crop_size)
    if isinstance(size, dict):
        keeps_aspect = "shortest_edge" in size
    else:
        keeps_aspect = is_integer(size) and (is_convnext or crop_size is not None)
    if crop_size is None:
        crops = keeps_aspect and min(sides) < _STRETCHED_FROM
        crop_pct = 1.0 if crops and not is_convnext else _CROP_PCT
    else:
        crops = keeps_aspect or sides != image_size
        crop_pct = _fraction(min(image_size), min(sides)) if crops else _CROP_PCT
    resample = config.get("resample", 3 if is_convnext or crop_size is not None else 2)
    if not is_integer(resample) or resample not in _RESAMPLES:
        raise ValueError(f"`resample` must be one of {', '.join(map(str, _RESAMPLES))}. Received: {resample}")
    return {
        "image_size": image_size,
        "resize": "crop" if crops and config.get("do_resize", True) else "stretch",
        "crop_pct": config.get("crop_pct", crop_pct),
        "interpolation": "bicubic" if resample in (1, 3) else "bilinear",  # 1 is Lanczos; bicubic is the nearest to it
    }


def _sides(size):
    """Returns height and width for any form of `size` or `crop_size`."""
    if isinstance(size, dict):
        sides = [size["shortest_edge"]] * 2 if "shortest_edge" in size else [size.get("height"), size.get("width")]
    else:
        sides = list(size) if isinstance(size, (list, tuple)) else [size, size]
    if len(sides) != 2 or not all(is_integer(side) and side > 0 for side in sides):
        raise ValueError(f"`size` must be a side in pixels, or height and width. Received: {size}")
    return sides


def _fraction(crop, resized):
    """Returns the `crop_pct` for which `int(crop / crop_pct)` is `resized`; 1 if the image would be padded to `crop`."""
    if resized <= crop:
        return 1.0
    fraction = crop / resized
    return fraction if int(crop / fraction) == resized else math.nextafter(fraction, 0)


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def published_preprocessing(variant, channels, name):
    """Returns the preprocessing of the published weights, for sources without a config.

    Args:
        variant: the network.
        channels: channels of the images. Mean and std are ImageNet's for 3, and unknown for others.
        name: name of the file of weights. The authors' names contain the image size.
    """
    match = re.search(r"(?:^|[-_.])(\d{2,4})x(\d{2,4})(?:$|[-_.])", name)
    widest = variant.stages[-1].dim == VARIANTS["cvt_w24"].stages[-1].dim
    size = [384 if widest else 224] * 2
    if match and min(int(side) for side in match.groups()) >= variant.min_side:  # smaller numbers mean something else
        size = [int(side) for side in match.groups()]
    mean, std = (list(IMAGENET_MEAN), list(IMAGENET_STD)) if channels == 3 else (None, None)
    resize = "stretch" if min(size) >= _STRETCHED_FROM else "crop"
    return Preprocessing(mean, std, image_size=size, resize=resize, crop_pct=_CROP_PCT, interpolation="bicubic")
