"""CvT as a `keras.Model`, and the classifier that takes raw pixels."""

import math

import keras
import numpy as np
from keras import layers

from cvt_keras.layers import NORM_EPSILON, ConvStem, ConvTokenEmbedding, CvTBlock, linear_initializer
from cvt_keras.variants import get_variant, is_integer, to_dict


@keras.saving.register_keras_serializable(package="cvt_keras")
class CvT(keras.Model):
    """Convolutional vision transformer (Wu et al., arXiv 2103.15808) with a classification head.

    A Functional model. The output of a stage is that of the layer named `stage0`, `stage1`, ...: its grid of tokens, or where
    the stage has a cls token a list of grid and cls token.

    Args:
        variant: a `Variant`, its dict, or a name in `VARIANTS`.
        num_classes: outputs of the head.
        input_shape: `(height, width, channels)` of the normalised images; height and width may be `None`.
        preprocessing: what raw pixels need before they come here, saved with the model: a dict of `mean` and `std` (of pixels
            in 0..1, one number a channel), `class_names` and `image_size` (height, width). What it leaves out is `None`.
        dtype: a dtype policy, `"mixed_bfloat16"` for instance. The head is float32 whatever the policy.

    Input shape: `(batch, height, width, channels)`, normalised floats.
    Output shape: `(batch, num_classes)`, float32 logits.

    Raises:
        ValueError: for an unknown variant, an image smaller than the strides, or an unknown key in `preprocessing`.

    Example:

    ```python
    model = CvT.from_variant("cvt_13", num_classes=1000, input_shape=(224, 224, 3))
    tokens = keras.Model(model.input, model.get_layer("stage1").output)  # (batch, 28, 28, 192)
    ```
    """

    def __init__(
        self, variant, num_classes, input_shape=(224, 224, 3), preprocessing=None, dtype=None, name="cvt", trainable=True
    ):
        variant = get_variant(variant)
        num_classes, input_shape = _plain(num_classes), _plain(input_shape)
        _check_sizes(variant, num_classes, input_shape)
        dtype = keras.dtype_policies.get(dtype or keras.config.dtype_policy())

        # === Functional Model ===
        images = keras.Input(tuple(input_shape), name="images")
        x = images
        for i, dim in enumerate(variant.stem):
            x = ConvStem(dim, activation=variant.activation, dtype=dtype, name=f"stem{i}")(x)
        cls_token = None
        for i, stage in enumerate(variant.stages):
            x, cls_token = _stage(x, stage, variant.activation, dtype, name=f"stage{i}")

        norm = layers.LayerNormalization(epsilon=NORM_EPSILON, dtype=dtype, name="norm")
        if cls_token is None:
            x = layers.GlobalAveragePooling2D(data_format="channels_last", dtype=dtype, name="pool")(norm(x))
        else:
            x = layers.Flatten(data_format="channels_last", dtype=dtype, name="pool")(norm(cls_token))  # -> (B, C)
        # Logits of many classes lie close together: in half precision they would round to ties.
        head = layers.Dense(num_classes, kernel_initializer=linear_initializer(), dtype="float32", name="head")
        super().__init__(images, head(x), name=name, trainable=trainable)

        # === Config ===
        self.dtype_policy = dtype
        self.variant = variant
        self.num_classes = num_classes
        self.preprocessing = _preprocessing(preprocessing)

    @classmethod
    def from_variant(cls, variant, num_classes=1000, input_shape=(224, 224, 3), **kwargs):
        """A network with random weights.

        Args:
            variant: a name in `VARIANTS` or a `Variant`.
            num_classes, input_shape, kwargs: as in `CvT`.

        Raises:
            ValueError: for an unknown name, with the known ones.
        """
        return cls(variant, num_classes, input_shape, **kwargs)

    @classmethod
    def from_pretrained(cls, source, num_classes=None, input_shape=None, variant=None, **kwargs):
        """A network with published weights, or your own.

        Each array of the checkpoint is used exactly once, but those of a head that is replaced, or the checkpoint is refused.
        `preprocessing` says what its images need, so that `build_classifier(model)` takes raw pixels: mean and std, class
        names where the checkpoint has them, and its resolution.

        Args:
            source: an authors' file (`CvT-13-224x224-IN-1k.pth`), also wrapped in `{"model": ...}` or with `module.` in
                front of its keys; a folder that transformers saved, or its `.safetensors` or `.bin` file with `config.json`
                beside it; a hub id (`"microsoft/cvt-13"`), through huggingface_hub and its cache; or a `.keras` file with a
                CvT in it.
            num_classes: outputs; where the checkpoint has another number, the head is a new one with random weights. `None`
                keeps the checkpoint's.
            input_shape: `(height, width, channels)`; any size will do, as there is no position embedding. `None` means the
                checkpoint's resolution, which for the authors' files is in their name.
            variant: a name, a `Variant` or its dict; `None` finds it in the config, or in the weights' shapes, which show no
                heads and strides: those are the paper's then. The activation is that of the source whatever is given,
                QuickGELU for the authors' files and exact GELU for transformers.
            kwargs: as in `CvT`; what `preprocessing` holds takes the place of the checkpoint's.

        Raises:
            ValueError: `cvt_keras.pretrained.CheckpointError` for a damaged file and for missing, unused, mis-shaped or integer
                arrays, each named; else for an argument that does not fit.
            ImportError: if the package that reads the file is missing: PyTorch for `.pth` and `.bin`, safetensors,
                huggingface_hub.
        """
        from cvt_keras import pretrained  # not above: that module imports this one

        if input_shape is not None and (not isinstance(input_shape, (tuple, list)) or len(input_shape) != 3):
            raise ValueError(f"`input_shape` must be (height, width, channels). Received: input_shape={input_shape!r}")
        checkpoint = pretrained.read(source, variant)
        preprocessing = checkpoint.preprocessing | (kwargs.pop("preprocessing", None) or {})
        if num_classes is None:
            num_classes = checkpoint.num_classes
        elif num_classes != checkpoint.num_classes:
            preprocessing["class_names"] = None
        input_shape = tuple(input_shape or (*(preprocessing["image_size"] or (None, None)), checkpoint.channels))
        if input_shape[-1] != checkpoint.channels:
            raise ValueError(
                f"`input_shape` must have the {checkpoint.channels} channels of {source}. Received: input_shape={input_shape}"
            )
        model = cls(checkpoint.variant, num_classes, input_shape, preprocessing=preprocessing, **kwargs)
        checkpoint.load_into(model, head=num_classes == checkpoint.num_classes)
        return model

    def call(self, inputs, training=None, mask=None):
        height, width = inputs.shape[1:3]
        if height is not None and width is not None:
            # Where the model was made for any size, this is the first to see one.
            self.variant.grids(height, width)
        return super().call(inputs, training=training, mask=mask)

    def get_config(self):
        return {
            "variant": to_dict(self.variant),
            "num_classes": self.num_classes,
            "input_shape": list(self.input_shape[1:]),
            "preprocessing": dict(self.preprocessing),
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
            "name": self.name,
            "trainable": self.trainable,
            "frozen_layers": [layer.name for layer in self.layers if not layer.trainable],
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        frozen = config.pop("frozen_layers", [])
        model = cls(**config)
        for name in frozen:
            model.get_layer(name).trainable = False
        return model


def _stage(x, stage, activation, dtype, name):
    """One stage on a grid of tokens -> its grid and its cls token, or `None`."""
    embed = ConvTokenEmbedding(
        stage.dim, stage.kernel_size, stage.stride, stage.padding, stage.cls_token, dtype=dtype, name=f"{name}_embed"
    )
    x = embed(x)
    for j, rate in enumerate(stage.drop_path_rates):
        block = CvTBlock(
            stage.dim,
            stage.heads,
            stage.mlp_dim,
            rate,
            activation,
            stage.projection,
            stage.qkv_bias,
            stage.stride_kv,
            dtype=dtype,
            name=f"{name}_block{j}",
        )
        x = block(*x) if stage.cls_token else block(x)
    # A name for the place, where a reader can cut the network.
    x = layers.Identity(dtype=dtype.name, name=name)(x)  # its config takes no policy, only a policy's name
    return x if stage.cls_token else (x, None)


def _check_sizes(variant, num_classes, input_shape):
    if not is_integer(num_classes) or num_classes < 1:
        raise ValueError(f"`num_classes` must be a positive integer. Received: num_classes={num_classes!r}")
    *sides, channels = input_shape if isinstance(input_shape, list) and len(input_shape) == 3 else (0, 0, 0)
    if not all(side is None or is_integer(side) for side in sides) or not is_integer(channels) or channels < 1:
        raise ValueError(
            "`input_shape` must be (height, width, channels), where height and width may be None. "
            f"Received: input_shape={tuple(input_shape) if isinstance(input_shape, list) else input_shape}"
        )
    # A side that is None is checked in `call`, when an image comes.
    height, width = (variant.stride if side is None else side for side in input_shape[:2])
    variant.grids(height, width)


def _preprocessing(given):
    known = {"mean": None, "std": None, "class_names": None, "image_size": None}
    if unknown := set(given or {}) - set(known):
        raise ValueError(f"`preprocessing` has the keys {', '.join(known)}. Received: {', '.join(sorted(unknown))}")
    return {**known, **{key: _plain(value) for key, value in (given or {}).items()}}


def build_classifier(model_or_variant, num_classes=None, input_shape=None, mean=None, std=None, class_names=None, **kwargs):
    """A classifier of raw pixels: normalisation, then CvT.

    Args:
        model_or_variant: what `CvT.from_variant` takes, or a `CvT`, which is used as it is: it shares its weights, and its
            `preprocessing` becomes what is settled here, for one classifier at a time.
        num_classes: outputs; with a variant it defaults to the number of `class_names`.
        input_shape: `(height, width, channels)`; defaults to the model's, or `(32, 32, 3)` for a variant.
        mean, std: of the pixels in 0..1, one number a channel; default to the model's `preprocessing`, else to 0.5, which maps
            pixels to -1..1.
        class_names: in the order of the outputs; default to the model's.
        kwargs: for `CvT`, when it is made here.

    Returns:
        A `keras.Model` from float pixels in 0..255, `(batch, height, width, channels)`, to float32 logits
        `(batch, num_classes)`. Its CvT is the layer named as the model is, `cvt` by default, and its `preprocessing` says what
        was settled here. Under mixed_float16, `compile` scales the loss; after reloading a `.keras` file it does so only if you
        wrap the optimizer in a `LossScaleOptimizer`, as Keras keeps the policies of layers there but not of a whole graph.

    Raises:
        ValueError: if the arguments disagree with each other or with the model.
    """
    if isinstance(model_or_variant, CvT):
        model = model_or_variant
        fixed = {"num_classes": model.num_classes, "input_shape": model.input_shape[1:]}
        for name, given in {"num_classes": num_classes, "input_shape": input_shape}.items():
            if given is not None and not _agree(given, fixed[name]):
                raise ValueError(f"`{name}` must be the model's, {fixed[name]}. Received: {name}={given}")
        if kwargs:
            raise ValueError(f"The model is there already and takes no more arguments. Received: {', '.join(kwargs)}")
        input_shape = tuple(input_shape or model.input_shape[1:])
    else:
        if num_classes is None:
            if class_names is None or isinstance(class_names, str):
                raise ValueError(
                    "`num_classes` or `class_names` is needed with a variant. "
                    f"Received: num_classes=None, class_names={class_names!r}"
                )
            num_classes = len(class_names)
        input_shape = tuple(input_shape or (32, 32, 3))
        model = CvT(model_or_variant, num_classes, input_shape, **kwargs)

    channels = input_shape[2]
    given = {"mean": mean, "std": std, "class_names": class_names}
    settled = {**model.preprocessing, **{key: _plain(value) for key, value in given.items() if value is not None}}
    for key in ("mean", "std"):
        if settled[key] is None:
            settled[key] = [0.5] * channels
    check_statistics(settled["mean"], settled["std"], channels)
    if isinstance(class_names, str):
        raise ValueError(f"`class_names` must be a list of names. Received: class_names={class_names!r}")
    if None not in input_shape[:2]:
        settled["image_size"] = list(input_shape[:2])
    names = settled["class_names"]
    if names is not None and len(names) != model.num_classes:
        raise ValueError(f"`class_names` must name {model.num_classes} classes. Received: {len(names)} names")
    model.preprocessing = settled

    pixels = keras.Input(input_shape, name="images", dtype="float32")
    # float32 whatever the policy: bfloat16 keeps 8 bits of a pixel, and the mean would take most of them.
    normalize = layers.Normalization(
        mean=[255 * value for value in settled["mean"]],
        variance=[(255 * value) ** 2 for value in settled["std"]],
        dtype="float32",
        name="normalization",
    )
    classifier = keras.Model(pixels, model(normalize(pixels)), name="classifier")
    classifier.dtype_policy = model.dtype_policy  # `compile` reads it, and scales the loss of float16
    return classifier


def check_statistics(mean, std, channels):
    """Raises ValueError unless these can be mean and std of pixels in 0..1: a list each, one number a channel."""
    for name, values in {"mean": mean, "std": std}.items():
        if not isinstance(values, list) or len(values) != channels or not all(map(math.isfinite, values)):
            raise ValueError(f"`{name}` must have one number for each of {channels} channels. Received: {name}={values}")
        if max(map(abs, values)) > 1.01:  # a little more than 1 may come of rounding
            raise ValueError(f"`{name}` is of pixels in 0..1: divide by 255. Received: {name}={values}")
    if min(std) <= 0:
        raise ValueError(f"`std` must be positive. Received: std={std}")


def cvt_of(model):
    """The `CvT` in a model: itself, or a layer of a classifier.

    Raises:
        ValueError: if there is none.
    """
    found = [layer for layer in (model, *getattr(model, "layers", ())) if isinstance(layer, CvT)]
    if not found:
        raise ValueError(f"`model` must be a `CvT` or a classifier around one. Received: {type(model).__name__}")
    return found[0]


def _agree(given, fixed):
    """Whether two sizes are the same, where `None` in the model's stands for any."""
    if isinstance(fixed, tuple):
        return len(given) == len(fixed) and all(b is None or a == b for a, b in zip(given, fixed))
    return given == fixed


def _plain(value):
    """`value` in JSON's types: a list for any other sequence or array, Python's number for NumPy's."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value
