"""CvT as a `keras.Model`, and the classifier that takes raw pixels."""

from __future__ import annotations

import gc
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers

from cvt_keras.conversion import checkpoint as checkpoints
from cvt_keras.errors import ArgumentError, RunError, first_line
from cvt_keras.layers import (
    ConvStem,
    ConvTokenEmbedding,
    CvTBlock,
    PixelNormalization,
    ResidualConv,
    Whitening,
    linear_initializer,
    make_norm,
)
from cvt_keras.preprocessing import Calibration, Preprocessing
from cvt_keras.variants import Variant, get_variant, is_integer, to_dict


@keras.saving.register_keras_serializable(package="cvt_keras")
class CvT(keras.Model):
    """Convolutional vision transformer (Wu et al., arXiv 2103.15808) with a classification head.

    A Functional model. The layers named `stage0`, `stage1`, ... output the tokens of each stage: its grid, or a list of grid
    and cls token if the stage has one.

    Args:
        variant: a `Variant`, its dict, or a name in `VARIANTS`.
        num_classes: outputs of the head; 0 leaves out the head, and the output is the pooled features, the head's input.
        input_shape: `(height, width, channels)` of the normalised images; height and width may be `None`.
        preprocessing: how to prepare raw pixels for this model, saved with it: a `Preprocessing` or its dict.
        dtype: a dtype policy, `"mixed_bfloat16"` for instance. The head is float32 whatever the policy.

    Input shape: `(batch, height, width, channels)`, normalised floats.
    Output shape: `(batch, num_classes)`, float32 logits; without a head `(batch, channels of the last stage)`, in the policy's
        compute dtype.

    Raises:
        ValueError: for an unknown variant, an image smaller than `Variant.min_side`, or invalid `preprocessing`.

    Example:

    ```python
    model = CvT.from_variant("cvt_13", num_classes=1000, input_shape=(224, 224, 3))
    tokens = model.features(images)["stage1"]  # (batch, 28, 28, 192)
    ```
    """

    def __init__(
        self,
        variant: Variant | str | Mapping[str, Any],
        num_classes: int,
        input_shape: Sequence[int | None] = (224, 224, 3),
        preprocessing: Preprocessing | Mapping[str, Any] | None = None,
        dtype: Any = None,
        name: str = "cvt",
        trainable: bool = True,
    ) -> None:
        variant = get_variant(variant)
        num_classes, input_shape = _plain(num_classes), _plain(input_shape)
        _check_sizes(variant, num_classes, input_shape)
        dtype = keras.dtype_policies.get(dtype or keras.config.dtype_policy())

        # === Functional Model ===
        images = keras.Input(tuple(input_shape), name="images")
        x = images
        if variant.whitening:
            x = Whitening(variant.whitening, variant.activation, dtype=dtype, name="whitening")(x)
        for i, dim in enumerate(variant.stem):
            x = ConvStem(dim, activation=variant.activation, dtype=dtype, name=f"stem{i}")(x)
        cls_token = None
        for i, stage in enumerate(variant.stages):
            x, cls_token = _stage(x, stage, variant, dtype, name=f"stage{i}")

        norm = make_norm(variant.norm, dtype, "norm")
        if cls_token is None:
            x = layers.GlobalAveragePooling2D(data_format="channels_last", dtype=dtype, name="pool")(norm(x))
        else:
            x = layers.Flatten(data_format="channels_last", dtype=dtype, name="pool")(norm(cls_token))  # -> (B, C)
        if num_classes:
            # Logits of many classes are close together: in half precision they would round to ties.
            x = layers.Dense(num_classes, kernel_initializer=linear_initializer(), dtype="float32", name="head")(x)
        super().__init__(images, x, name=name, trainable=trainable)

        # === Config ===
        self.dtype_policy = dtype
        self.variant = variant
        self.num_classes = num_classes
        self.preprocessing = Preprocessing.from_config(preprocessing)
        self._features: Any = None

    @classmethod
    def from_variant(
        cls,
        variant: Variant | str,
        num_classes: int = 1000,
        input_shape: Sequence[int | None] = (224, 224, 3),
        **kwargs: Any,
    ) -> CvT:
        """Returns a network with random weights.

        Args:
            variant: a name in `VARIANTS` or a `Variant`.
            num_classes, input_shape, kwargs: as in `CvT`.

        Raises:
            ValueError: for an unknown name; the message lists the known ones.
        """
        return cls(variant, num_classes, input_shape, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        num_classes: int | None = None,
        input_shape: Sequence[int | None] | None = None,
        variant: Variant | str | Mapping[str, Any] | None = None,
        which: str | None = None,
        **kwargs: Any,
    ) -> CvT:
        """Returns a network with published weights, or your own.

        Every array of the checkpoint is used exactly once, except those of a head that is replaced. A checkpoint that does not
        fit is refused. The model's `preprocessing` has the checkpoint's mean, std, image size, way of resizing and, if known,
        class names, so that `build_classifier(model)` takes raw pixels.

        Args:
            source: one of

                - a file of the authors, such as `CvT-13-224x224-IN-1k.pth`. Its suffix does not matter. The state dict may be
                  nested under a name such as `state_dict`, and its keys may have a prefix such as `module.`.
                - a folder that transformers saved, with or without shards, or its `.safetensors` or `.bin` file with
                  `config.json` beside it.
                - a hub id such as `"microsoft/cvt-13"`, read through huggingface_hub and its cache.
                - a `.keras` file that holds a CvT.
            num_classes: outputs of the head. If the checkpoint has another number, the head is new, with random weights.
                `None` keeps the checkpoint's head, 0 leaves it out.
            input_shape: `(height, width, channels)`. Any size works, because there is no position embedding. Defaults to the
                checkpoint's image size, which the authors' files have in their names.
            variant: a name, a `Variant` or its dict. `None` reads it from the config, or recognises a network of the paper by
                the shapes of the weights. The activation is always the source's: QuickGELU for the authors' files, exact GELU
                for transformers.
            which: which weights to read if a file holds several: `"ema"` for the moving average, or their name or prefix in
                the file, such as `"teacher"`. `None` reads the weights that are not an average, and warns if there is an
                average too.
            kwargs: as in `CvT`; `preprocessing` overrides the checkpoint's, value by value: pass a dict to override some.

        Raises:
            CheckpointError: for a damaged file, and for missing, unused, mis-shaped or integer arrays; it names each.
            ArgumentError: for an argument that does not fit. Both errors are a `ValueError`.
            MissingPackageError: if the package that reads the file is not installed: safetensors or huggingface_hub. It is
                an `ImportError`.
        """
        if input_shape is not None and (not isinstance(input_shape, (tuple, list)) or len(input_shape) != 3):
            raise ArgumentError(
                f"`input_shape` must be (height, width, channels). Received: input_shape={input_shape!r}",
                argument="input_shape",
            )
        checkpoint = checkpoints.read(source, variant, which)
        passed = kwargs.pop("preprocessing", None)
        passed = passed.get_config() if isinstance(passed, Preprocessing) else passed or {}
        overrides = {name: value for name, value in passed.items() if value is not None}
        preprocessing = Preprocessing.from_config({**checkpoint.preprocessing.get_config(), **overrides})
        if num_classes is None:
            num_classes = checkpoint.num_classes
        elif num_classes != checkpoint.num_classes:
            preprocessing = preprocessing.replace(class_names=None)
        input_shape = tuple(input_shape or (*(preprocessing.image_size or (None, None)), checkpoint.channels))
        if input_shape[-1] != checkpoint.channels:
            raise ArgumentError(
                f"`input_shape` must have the {checkpoint.channels} channels of {source}. Received: input_shape={input_shape}",
                argument="input_shape",
            )
        model = cls(checkpoint.variant, num_classes, input_shape, preprocessing=preprocessing, **kwargs)
        checkpoint.load_into(model, head=num_classes == checkpoint.num_classes)
        return model

    def features(self, images: Any, training: bool = False) -> dict[str, Any]:
        """Returns the tokens of each stage.

        Args:
            images: normalised floats `(batch, height, width, channels)`.
            training: whether stochastic depth and BatchNorm run in training mode.

        Returns:
            A dict: `"stage0"`, `"stage1"`, ... -> the stage's grid of tokens `(batch, height, width, dim)`, or a pair of grid
            and cls token `(batch, 1, dim)` if the stage has one.
        """
        self.variant.grids(*images.shape[1:3])
        if self._features is None:
            names = [f"stage{i}" for i in range(len(self.variant.stages))]
            outputs = {name: self.get_layer(name).output for name in names}
            # Bypasses Keras, which would track the layers a second time.
            object.__setattr__(self, "_features", keras.Model(self.inputs[0], outputs, name="features"))
        features = self._features(images, training=training)
        return {name: tuple(tokens) if isinstance(tokens, list) else tokens for name, tokens in features.items()}

    def call(self, inputs, training=None, mask=None):
        height, width = inputs.shape[1:3]
        if height is not None and width is not None:
            # A model of unknown size sees the image's size only here.
            self.variant.grids(height, width)
        return super().call(inputs, training=training, mask=mask)

    def get_config(self):
        return {
            "variant": to_dict(self.variant),
            "num_classes": self.num_classes,
            "input_shape": list(self.input_shape[1:]),
            "preprocessing": self.preprocessing.get_config(),
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
            "name": self.name,
            "trainable": self.trainable,
            "frozen_layers": [layer.name for layer in self.layers if not layer.trainable],
            **({"quantized_layers": quantized} if (quantized := _quantized_layers(self)) else {}),
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        frozen = config.pop("frozen_layers", [])
        quantized = config.pop("quantized_layers", {})
        model = cls(**config)
        if quantized:
            _quantize_again(model, quantized)
        for name in frozen:
            model.get_layer(name).trainable = False
        return model


def _dense_layers(model):
    """The layers that Keras' `quantize` changes, by stable names: `"stage0_block0/proj_q"`, `"head/head"`."""
    return [
        (f"{layer.name}/{part.name}", part)
        for layer in model.layers
        for part in layer._flatten_layers()
        if isinstance(part, layers.Dense)
    ]


def _quantized_layers(model):
    """How Keras' `quantize` changed the layers. The config holds it, so that a reloaded model has the same variables."""
    return {
        path: [layer.quantization_mode, keras.saving.serialize_keras_object(layer.quantization_config)]
        for path, layer in _dense_layers(model)
        if layer.quantization_mode
    }


def _quantize_again(model, quantized):
    """Applies the changes that `_quantized_layers` returned. Keras then loads the values of the variables."""
    # Keras runs the garbage collector after each layer: a quarter of a second, unless TensorFlow's objects are frozen.
    gc.freeze()
    try:
        for path, layer in _dense_layers(model):
            if path in quantized:
                mode, settings = quantized[path]
                layer.quantize(mode, config=keras.saving.deserialize_keras_object(settings))
    finally:
        gc.unfreeze()


def embedding_settings(stage, variant):
    """The arguments that `ConvTokenEmbedding` and its 8-bit form share."""
    return {
        "dim": stage.dim,
        "kernel_size": stage.kernel_size,
        "stride": stage.stride,
        "padding": stage.padding,
        "cls_token": stage.cls_token,
        "pool": stage.pool,
        "norm_type": variant.norm,
        "activation": variant.activation,
    }


def block_settings(stage, variant, drop_path_rate):
    """The arguments that `CvTBlock` and its 8-bit form share."""
    return {
        "dim": stage.dim,
        "heads": stage.heads,
        "mlp_dim": stage.mlp_dim,
        "drop_path_rate": drop_path_rate,
        "activation": variant.activation,
        "projection": stage.projection,
        "stride_kv": stage.stride_kv,
        "norm_type": variant.norm,
        "attention_scale": variant.attention_scale,
        "mlp_conv": stage.mlp_conv,
    }


def _stage(x, stage, variant, dtype, name):
    """Applies a stage to a grid of tokens. Returns its grid, and its cls token or `None`."""
    common = {"identity_init": variant.identity_init, "dtype": dtype}
    x = ConvTokenEmbedding(**embedding_settings(stage, variant), **common, name=f"{name}_embed")(x)
    for j in range(stage.residual_convs):
        conv = ResidualConv(stage.dim, variant.activation, dtype=dtype, name=f"{name}_conv{j}")
        x = conv(*x) if stage.cls_token else conv(x)
    for j, rate in enumerate(stage.drop_path_rates):
        settings = block_settings(stage, variant, rate)
        block = CvTBlock(**settings, qkv_bias=stage.qkv_bias, **common, name=f"{name}_block{j}")
        x = block(*x) if stage.cls_token else block(x)
    # Names the stage's output, so that the network can be cut there.
    x = layers.Identity(dtype=dtype.name, name=name)(x)  # its config can hold a policy's name only
    return x if stage.cls_token else (x, None)


def _check_sizes(variant, num_classes, input_shape):
    if not is_integer(num_classes) or num_classes < 0:
        raise ValueError(f"`num_classes` must be a positive integer, or 0 for no head. Received: num_classes={num_classes!r}")
    *sides, channels = input_shape if isinstance(input_shape, list) and len(input_shape) == 3 else (0, 0, 0)
    if not all(side is None or is_integer(side) for side in sides) or not is_integer(channels) or channels < 1:
        raise ValueError(
            "`input_shape` must be (height, width, channels), where height and width may be None. "
            f"Received: input_shape={tuple(input_shape) if isinstance(input_shape, list) else input_shape}"
        )
    # `call` checks a side that is None here.
    height, width = (variant.min_side if side is None else side for side in input_shape[:2])
    variant.grids(height, width)


def build_classifier(
    model_or_variant: CvT | Variant | str | Mapping[str, Any],
    num_classes: int | None = None,
    input_shape: Sequence[int | None] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    class_names: Sequence[str] | None = None,
    **kwargs: Any,
) -> keras.Model:
    """Returns a classifier of raw pixels: normalisation, then CvT.

    Args:
        model_or_variant: a variant, as in `CvT.from_variant`, or a `CvT`, whose weights the classifier then shares.
        num_classes: number of classes; with a variant, it defaults to the number of `class_names`.
        input_shape: `(height, width, channels)`; defaults to the model's, or `(32, 32, 3)` for a variant.
        mean, std: one number per channel, for pixels in 0..1. They default to the model's `preprocessing`, or else to 0.5,
            which maps pixels to -1..1.
        class_names: in the order of the outputs; default to the model's.
        kwargs: arguments of `CvT`; only with a variant.

    Returns:
        A `keras.Model` from float pixels in 0..255, `(batch, height, width, channels)`, to float32 logits
        `(batch, num_classes)`. Its CvT is a layer with the model's name, `cvt` by default. `preprocessing_of(classifier)`
        returns the resulting `Preprocessing`. Under mixed_float16, `compile` scales the loss. After reloading a `.keras` file,
        wrap the optimizer in a `LossScaleOptimizer` yourself: Keras saves the policies of layers, but not that of a Functional
        model.

    Raises:
        ValueError: if the arguments disagree with each other or with the model.
    """
    if isinstance(class_names, str):
        raise ValueError(f"`class_names` must be a list of names. Received: class_names={class_names!r}")
    if isinstance(model_or_variant, CvT):
        model = _require_agreement(model_or_variant, num_classes, input_shape, kwargs)
        image_shape: tuple[Any, ...] = tuple(input_shape or model.input_shape[1:])
    else:
        if num_classes is None:
            if class_names is None:
                raise ValueError("`num_classes` or `class_names` is needed with a variant. Received: num_classes=None")
            num_classes = len(class_names)
        image_shape = tuple(input_shape or (32, 32, 3))
        model = CvT(model_or_variant, num_classes, image_shape, **kwargs)
    if not model.num_classes:
        raise ValueError("`model_or_variant` must have a head. Received: num_classes=0")

    channels = image_shape[2]
    passed = {"mean": mean, "std": std, "class_names": class_names}
    preprocessing = model.preprocessing.replace(**{name: value for name, value in passed.items() if value is not None})
    for name in ("mean", "std"):
        if getattr(preprocessing, name) is None:
            preprocessing = preprocessing.replace(**{name: (0.5,) * channels})
    preprocessing.require_channels(channels)
    if None not in image_shape[:2]:
        preprocessing = preprocessing.replace(image_size=image_shape[:2])
    names = preprocessing.class_names
    if names is not None and len(names) != model.num_classes:
        raise ValueError(f"`class_names` must name {model.num_classes} classes. Received: {len(names)} names")

    pixels = keras.Input(image_shape, name="images", dtype="float32")
    normalize = PixelNormalization(preprocessing, name="normalization")
    classifier = keras.Model(pixels, model(normalize(pixels)), name="classifier")
    classifier.dtype_policy = model.dtype_policy  # `compile` reads it to scale the loss in float16
    return classifier


def _require_agreement(model, num_classes, input_shape, kwargs):
    """Returns the model. Raises ValueError if the arguments of `build_classifier` contradict it."""
    fixed = {"num_classes": model.num_classes, "input_shape": model.input_shape[1:]}
    for name, value in {"num_classes": num_classes, "input_shape": input_shape}.items():
        if value is not None and not _agree(value, fixed[name]):
            raise ValueError(f"`{name}` must be the model's, {fixed[name]}. Received: {name}={value}")
    if kwargs:
        raise ValueError(
            f"`model_or_variant` is a model, so no arguments of `CvT` may be passed. Received: {', '.join(kwargs)}"
        )
    return model


def preprocessing_of(model: keras.Model) -> Preprocessing:
    """Returns the `Preprocessing` of a model.

    Args:
        model: a classifier of raw pixels, quantised or not, or a `CvT`.

    Raises:
        ValueError: if it has none.
    """
    if preprocessing := checkpoints.preprocessing_in(model):
        return preprocessing
    raise ValueError(f"`model` must be a `CvT` or a classifier around one. Received: {type(model).__name__}")


def calibration_of(model: keras.Model) -> Calibration:
    """Returns the `Calibration` of a classifier; one that changes nothing if it has none, as in files of older versions."""
    holder = _calibration_holder(model)
    return Calibration() if holder is None else holder.calibration


def set_calibration(model: keras.Model, calibration: Calibration) -> None:
    """Stores a `Calibration` in a classifier, which then saves it. Its logits stay the same.

    Args:
        model: a classifier of raw pixels, quantised or not.
        calibration: a `Calibration`.

    Raises:
        ValueError: if the model is no such classifier.
    """
    holder = _calibration_holder(model)
    if holder is None:
        raise ValueError(f"`model` must be a classifier of raw pixels around a `CvT`. Received: {type(model).__name__}")
    holder.calibration = calibration


def _calibration_holder(model):
    """The layer that holds the `Calibration` of a classifier, or `None`: `PixelNormalization`, or a quantised network."""
    parts = getattr(model, "layers", ())
    return next((part for part in parts if isinstance(getattr(part, "calibration", None), Calibration)), None)


def load_classifier(file: str | Path) -> keras.Model:
    """Loads the classifier in a `.keras` file, to predict with.

    A file with a bare `CvT`, as `cvt-keras convert` writes it, gets the normalisation in front that its `Preprocessing` says.

    Args:
        file: its path.

    Returns:
        A classifier of raw pixels, as `build_classifier` returns it, quantised or not.

    Raises:
        RunError: if the file is damaged, or holds another model.
    """
    if not zipfile.is_zipfile(file):
        raise RunError(f"{file} is damaged", hint="If a run wrote it, remove it and resume the run, which writes it again")
    try:
        model = keras.saving.load_model(file, compile=False)
        preprocessing = preprocessing_of(model)
        if isinstance(model, CvT):
            height, width, channels = model.input_shape[1:]
            if preprocessing.image_size is None and None in (height, width):
                raise ValueError("it does not say how large its images are")
            size = preprocessing.image_size or (height, width)
            model = build_classifier(model, input_shape=(height or size[0], width or size[1], channels))
        return model
    except MemoryError:
        raise
    except Exception as error:
        raise RunError(f"{file} can't be read: {first_line(error)}") from error


def cvt_of(model: keras.Model) -> CvT:
    """Returns the `CvT` in a model: the model itself, or a layer of a classifier.

    Raises:
        ValueError: if there is none.
    """
    for part in (model, *getattr(model, "layers", ())):
        if isinstance(part, CvT):
            return part
    raise ValueError(f"`model` must be a `CvT` or a classifier around one. Received: {type(model).__name__}")


def _agree(value, fixed):
    """Whether a value equals the model's. `None` in the model's shape matches any size."""
    if isinstance(fixed, tuple):
        return len(value) == len(fixed) and all(b is None or a == b for a, b in zip(value, fixed))
    return value == fixed


def _plain(value):
    """Converts sequences and arrays to lists, and NumPy numbers to Python's."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value
