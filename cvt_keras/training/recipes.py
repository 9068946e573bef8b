"""Recipes: all settings of a training run. Each documents its command, its cost and its result."""

import dataclasses
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro
from tyro.conf import Suppress

from cvt_keras import runs
from cvt_keras.data import sources
from cvt_keras.data.cache import Cache
from cvt_keras.data.images import MAX_PIXELS
from cvt_keras.errors import ArgumentError, RecipeError, RunError
from cvt_keras.preprocessing import Preprocessing, size_text
from cvt_keras.variants import VARIANTS, Variant, get_variant, named, to_dict

COMPRESSIONS = ("prune", "cluster", "qat")
RESIZING = ("resize", "crop_pct", "interpolation")  # fields of a recipe and of `Preprocessing`
_PAIRS = ("image_size", "scale", "ratio")  # fields that are tuples, and lists in recipe.json

# A flag takes a variant's name. Without this tyro would make flags of the fields of a `Variant` as well.
_VARIANT_FLAG = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="NAME",
    instance_from_str=lambda words: None if words[0] == "None" else words[0],
    is_instance=lambda value: value is None or isinstance(value, (str, Variant)),
    str_from_instance=lambda value: [str(value)],
)


def _size_from_flag(words):
    """`224` -> 224, `184x750` -> (184, 750). Any other word is returned as it is, and `Recipe` refuses it."""
    sides = words[0].lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        return words[0]
    return int(sides[0]) if len(sides) == 1 else tuple(map(int, sides))


_SIZE_FLAG = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="N|HxW",
    instance_from_str=_size_from_flag,
    is_instance=lambda value: isinstance(value, (int, tuple)),
    str_from_instance=lambda value: ["x".join(map(str, value)) if isinstance(value, tuple) else str(value)],
)


@dataclass(frozen=True)
class Recipe:
    """Every setting of a run except its folder. From Python, `variant` may also be a `Variant`.

    Raises:
        RecipeError: if a value is invalid. The message names the field and the value.
    """

    # The string under a field is the help of its flag. tyro keeps its line breaks.

    description: Suppress[str] = ""
    # Set by `cvt_keras.compression`: the method and its options. It has no flag here, as compression has its own commands.
    compression: Suppress[dict | None] = None

    # === Network ===
    variant: Annotated[str | Variant | None, _VARIANT_FLAG] = "cvt_cifar"
    """The network: cvt_cifar, cvt_cifar_large, cvt_13, cvt_21, cvt_w24, or cvt_tiny for tests.
    None: the network of --weights."""
    weights: str | None = None
    """Pretrained weights: a .pth of microsoft/CvT, a transformers folder or file, a hub id (microsoft/cvt-13) or a .keras file.
    Sets the input's mean and std and how images are resized, too. The head is new unless the classes match."""
    image_size: Annotated[int | tuple[int, int], _SIZE_FLAG] = 32
    """Size of the network's input in pixels: N for a square, or height and width, as in 184x750.
    Images of another size are resized."""
    resize: Literal["auto", "stretch", "crop"] = "auto"
    """stretch: resize to --image-size, whatever the aspect ratio. crop: keep the aspect ratio and cut out the middle;
    training cuts out random areas. auto: as the weights were trained; without --weights, stretch."""
    crop_pct: float | None = None
    """With crop: the size of the middle as a fraction of the resized image, as in 0.875 for 224 of 256.
    None: that of the weights, otherwise 0.875."""
    interpolation: Literal["auto", "bilinear", "bicubic"] = "auto"
    """The filter for resizing, with antialiasing. auto: as the weights were trained; without --weights, bilinear."""

    # === Data ===
    dataset: Annotated[str, tyro.conf.arg(metavar=f"{{{','.join(sources.NAMES)}}}")] = "auto"
    """auto: cifar10 if it is on disk or can be downloaded, otherwise the digits of scikit-learn."""
    data_dir: str | None = None
    """For --dataset folder: your folder of images, with one subfolder per class.
    For the other data sets: the tensorflow-datasets folder; defaults to TFDS_DATA_DIR or ~/tensorflow_datasets."""
    train_limit: int | None = None
    """Train on the first N images only."""
    validation_limit: int | None = None
    """Validate on the first N images only."""
    test_limit: int | None = None
    """Test on the first N images only."""
    skip_broken: bool = False
    """Skip files of an image folder that can't be read, and count them in the report."""
    class_weights: Annotated[str, tyro.conf.arg(metavar="auto|none|FILE")] = "none"
    """The weight of each class in the loss. auto: inversely proportional to its number of training images.
    FILE: JSON, {"class": weight}."""
    cache: Literal["disk", "memory", "off"] = "disk"
    """Where decoded images are kept. disk: in files, for later commands too; needs little memory. memory: for this command.
    off: not kept; images of a folder are decoded at each use, other data sets are refused."""
    cache_dir: str | None = None
    """The folder for --cache disk and off; defaults to the user's cache folder, ~/.cache/cvt-keras on Linux."""

    # === Augmentation ===
    flip: bool = True
    """Mirror each image left to right in every second epoch; a random half is mirrored in the first epoch.
    Always off for data sets of digits or letters."""
    crop_padding: int = 4
    """With stretch: random crops. Pad each side by N reflected pixels, then crop to the original size; 0 is off."""
    scale: tuple[float, float] = (0.08, 1.0)
    """With crop: the smallest and the largest random area in training, as fractions of the image's area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """With crop: the smallest and the largest aspect ratio of the random area, width / height.
    It is relative to the aspect ratio of --image-size: for 48x96, 1 is an area twice as wide as high."""
    rand_augment: int = 0
    """RandAugment: number of operations per image; 0 is off."""
    rand_augment_magnitude: float = 5.0
    """RandAugment: strength of the operations, 0 to 10."""
    erase: float = 0.0
    """Random erasing: probability of replacing a box of the image with noise."""
    mixup: float = 0.0
    """Mixup: alpha of Beta(alpha, alpha), which gives the mixing weight; 0 is off."""
    cutmix: float = 0.0
    """CutMix: alpha of Beta(alpha, alpha), which gives the box area; 0 is off.
    With both mixup and cutmix, each image gets one of the two."""

    # === Optimization ===
    epochs: int = 10
    """Passes over the training images."""
    early_stopping: int = 0
    """Stop after N epochs without better validation accuracy; 0 is off. The learning-rate schedule still spans all epochs."""
    freeze: Annotated[str | None, tyro.conf.arg(metavar="backbone|N")] = None
    """Needs --weights. backbone: train only the head. N: freeze the first N stages."""
    batch_size: int = 128
    """Images per training step."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """muon: Muon for matrices and convolutions, AdamW for the other parameters. adamw: AdamW for all parameters."""
    peak_learning_rate: float = 2e-3
    """The learning rate after the warm-up."""
    adamw_ratio: float = 0.5
    """With muon: the learning rate of AdamW as a fraction of Muon's."""
    layer_decay: float = 1.0
    """Layer-wise learning-rate decay: each block's rate as a fraction of the next block's; 1 is off."""
    warmup: float = 0.1
    """Fraction of steps with linear warm-up."""
    decay: Literal["linear", "cosine", "constant"] = "linear"
    """After the warm-up, the learning rate falls to 0 (linear, cosine) or stays constant."""
    weight_decay: float = 0.05
    """Decoupled weight decay; applies to kernels only."""
    adamw_weight_decay: float | None = None
    """With muon: the weight decay of the kernels that AdamW trains, those of the head and of depthwise convolutions.
    None: the same as --weight-decay."""
    gradient_clip: float = 1.0
    """Clip the global norm of the gradients to this value; 0 is off."""
    label_smoothing: float = 0.0
    """Fraction of each label spread evenly over all classes."""
    ema: float = 0.0
    """Decay of the moving average of the weights; 0 is off. The average is validated and saved.
    Batch norm statistics are not averaged."""

    # === Answers ===
    keep: float = 0.95
    """The share of right answers that stay sure. An answer is unsure if its probability is below a threshold: the highest one
    that keeps this share of the right answers for validation images."""

    # === Machine ===
    seed: int = 0
    """Seed for the initial weights, data order, augmentation and stochastic depth."""
    precision: Literal["auto", "float32", "mixed_bfloat16", "mixed_float16"] = "auto"
    """auto: float32 on a CPU; on a GPU mixed_bfloat16 if the GPU supports it, otherwise mixed_float16."""
    xla: Literal["auto", "on", "off"] = "auto"
    """Compile with XLA. auto: on with a GPU; off on a CPU, where it is slower."""

    def __post_init__(self) -> None:
        for name in ("data_dir", "cache_dir", "weights", "class_weights"):
            if isinstance(getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(getattr(self, name)))  # as in recipe.json
        if isinstance(self.freeze, int) and not isinstance(self.freeze, bool):
            object.__setattr__(self, "freeze", str(self.freeze))  # as the flag gives it
        for name in _PAIRS:
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))  # as the flag gives it
        for name, hint in get_type_hints(type(self)).items():
            if name not in _PAIRS:
                _check_type(name, getattr(self, name), hint)
        _check_image_size(self.image_size)
        self._check_pixels()
        _check_bounds("scale", self.scale, most=1)
        _check_bounds("ratio", self.ratio)
        try:
            if self.variant is not None:
                get_variant(self.variant)
        except (ValueError, TypeError) as error:
            raise RecipeError(str(error), argument="variant") from error
        try:
            sources.check_name(self.dataset)
        except ArgumentError as error:
            raise RecipeError(error.summary, argument=error.argument, hint=error.hint) from error
        if self.compression is not None and self.compression.get("method") not in COMPRESSIONS:
            raise RecipeError(
                f"`compression` must have a `method`, one of {', '.join(COMPRESSIONS)}. "
                f"Received: compression={self.compression}",
                argument="compression",
            )
        for name in ("epochs", "batch_size", "train_limit", "validation_limit", "test_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"`{name}` must be at least 1. Received: {name}={value}", argument=name)
        for name in (
            *("seed", "crop_padding", "rand_augment", "mixup", "cutmix", "early_stopping"),
            *("peak_learning_rate", "adamw_ratio", "weight_decay", "adamw_weight_decay", "gradient_clip"),
        ):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise RecipeError(f"`{name}` must be a finite number, at least 0. Received: {name}={value}", argument=name)
        if self.seed >= 2**32:
            raise RecipeError(f"`seed` must be less than 2**32. Received: seed={self.seed}", argument="seed")
        for name in ("warmup", "label_smoothing", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise RecipeError(
                    f"`{name}` must be at least 0 and less than 1. Received: {name}={getattr(self, name)}", argument=name
                )
        if not 0 < self.keep <= 1:
            raise RecipeError(f"`keep` must be greater than 0 and at most 1. Received: keep={self.keep}", argument="keep")
        if not 0 < self.layer_decay <= 1:
            raise RecipeError(
                f"`layer_decay` must be greater than 0 and at most 1. Received: layer_decay={self.layer_decay}",
                argument="layer_decay",
            )
        for name, most in {"erase": 1, "rand_augment_magnitude": 10}.items():
            if not 0 <= getattr(self, name) <= most:
                raise RecipeError(
                    f"`{name}` must be between 0 and {most}. Received: {name}={getattr(self, name)}", argument=name
                )

        if not self.class_weights:
            raise RecipeError(
                "`class_weights` must be auto, none or a file. Received: class_weights=''", argument="class_weights"
            )
        if self.freeze is not None and self.freeze != "backbone" and not re.fullmatch("[1-9][0-9]*", self.freeze):
            raise RecipeError(
                f"`freeze` must be backbone, or a number of stages from 1. Received: freeze={self.freeze}",
                argument="freeze",
            )
        if self.freeze is not None and self.weights is None:
            raise RecipeError(
                f"`freeze` needs `weights`: frozen layers would stay random. Received: freeze={self.freeze}, weights=None",
                argument="freeze",
                hint="Add --weights, or leave out --freeze",
            )

    def _check_pixels(self) -> None:
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise RecipeError(
                f"`crop_pct` must be greater than 0 and at most 1. Received: crop_pct={self.crop_pct}", argument="crop_pct"
            )
        preprocessing = self.preprocessing
        size = preprocessing.crop_from if preprocessing.resize == "crop" else preprocessing.image_size or ()
        name = "image_size" if self.crop_pct is None or preprocessing.resize == "stretch" else "crop_pct"
        if math.prod(size) > MAX_PIXELS:
            raise RecipeError(
                f"`{name}` must leave images of at most {MAX_PIXELS:,} pixels. Received: {name}={getattr(self, name)}, "
                f"which needs {size_text(size)} pixels",
                argument=name,
            )

    @property
    def preprocessing(self) -> Preprocessing:
        """How to prepare images for the network, without mean, std and class names, which come from the data set.

        Fields of `RESIZING` that are open get the defaults of `Preprocessing`.
        """
        size = self.image_size
        settled = {name: getattr(self, name) for name in RESIZING if name not in self.open_resizing}
        return Preprocessing(image_size=size if isinstance(size, tuple) else (size, size), **settled)

    @property
    def open_resizing(self) -> tuple[str, ...]:
        """The fields of `RESIZING` that come from the weights."""
        return tuple(name for name in RESIZING if getattr(self, name) in ("auto", None))

    def resized_like(self, preprocessing: Preprocessing) -> "Recipe":
        """The recipe with the values of a `Preprocessing` for the fields in `open_resizing`."""
        return dataclasses.replace(self, **{name: getattr(preprocessing, name) for name in self.open_resizing})

    @property
    def pixel_cache(self) -> Cache:
        """Where decoded images are kept."""
        return Cache(self.cache, self.cache_dir)

    @property
    def variant_name(self) -> str:
        """The variant's name, plus its activation if that differs from the named variant's.

        A variant without a name is called after the weights; without weights, `custom`.
        """
        if isinstance(self.variant, str):
            return self.variant
        for name, known in VARIANTS.items():
            if self.variant and dataclasses.replace(known, activation=self.variant.activation) == self.variant:
                return name if known == self.variant else f"{name}-{self.variant.activation}"
        if not self.weights:
            return "custom"
        # The last part of a path or hub id, without the file's suffix.
        last = re.split(r"[/\\]", self.weights.rstrip("/\\"))[-1]
        return re.sub(r"\.(pth|pt|bin|safetensors|keras)$", "", last)

    def settings(self) -> dict[str, Any]:
        """The fields as JSON values: the content of `recipe.json`.

        The variant is written in full. `description` is left out, as flags may have changed what it describes. `compression` is
        left out if it is `None`.
        """
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in _PAIRS:
            if isinstance(settings[name], tuple):
                settings[name] = list(settings[name])
        del settings["description"]
        if self.compression is None:
            del settings["compression"]
        return {**settings, "variant": None if self.variant is None else to_dict(get_variant(self.variant))}

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> "Recipe":
        """The recipe with these settings, and the default for each missing one.

        Raises:
            RecipeError: if `settings` is not a dict, or has an unknown key or an invalid value.
        """
        if not isinstance(settings, dict):
            raise RecipeError(f"`settings` must be a dict. Received: {settings!r}", argument="settings")
        unknown = set(settings) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise RecipeError(
                f"`settings` must be fields of a recipe: {', '.join(cls().settings())}. Received: {', '.join(sorted(unknown))}",
                argument="settings",
            )
        if isinstance(settings.get("variant"), dict):
            try:
                variant = get_variant(settings["variant"])
            except (ValueError, TypeError) as error:
                raise RecipeError(str(error), argument="variant") from error
            settings = {**settings, "variant": named(variant)}
        return cls(**settings)


def read_recipe(run_dir, hint=None):
    """Reads the recipe of a run.

    Args:
        run_dir: the run folder.
        hint: the `hint` of the error.

    Raises:
        RunError: if its recipe.json is damaged.
    """
    path = Path(run_dir) / runs.RECIPE
    try:
        settings = runs.read_json(path)
    except RunError as error:
        error.hint = hint
        raise
    try:
        recipe = Recipe.from_settings(settings)
    except (TypeError, RecipeError) as error:
        raise RunError(f"{path} is damaged: {error}", hint=hint) from error
    return recipe


def _check_image_size(value):
    sides = value if isinstance(value, tuple) and len(value) == 2 else (value,)
    if not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
        raise RecipeError(
            f"`image_size` must be a side in pixels, or height and width. Received: image_size={value!r}",
            argument="image_size",
            hint="Use a number, such as --image-size 224, or height x width, such as --image-size 184x750",
        )


def _check_bounds(name, value, most=math.inf):
    if (
        not isinstance(value, tuple)
        or len(value) != 2
        or not all(isinstance(bound, (int, float)) and not isinstance(bound, bool) and math.isfinite(bound) for bound in value)
        or not 0 < value[0] <= value[1] <= most
    ):
        limit = "" if most == math.inf else f", at most {most}"
        raise RecipeError(
            f"`{name}` must be two numbers greater than 0{limit}, the smaller first. Received: {name}={value!r}",
            argument=name,
            hint=f"Use two numbers, such as --{name} {' '.join(f'{bound:.4g}' for bound in getattr(Recipe, name))}",
        )


def _check_type(name, value, hint):
    """Raises for a value of the wrong type: Python would accept `epochs=2.5`, and treat `flip="no"` as true."""
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise RecipeError(f"`{name}` must be one of {get_args(hint)}. Received: {name}={value!r}", argument=name)
        return
    kinds = get_args(hint) or (hint,)
    taken = (*kinds, int) if float in kinds else kinds
    # In Python, True is an int.
    if not isinstance(value, taken) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join("None" if kind is NoneType else kind.__name__ for kind in kinds)
        raise RecipeError(f"`{name}` must be {expected}. Received: {name}={value!r}", argument=name)


CIFAR10 = Recipe(
    """Ten epochs on CIFAR-10.

    cvt-keras train cifar10
    88.0 +- 0.2% test top-1 (n=3, JPEG copy of the data), 14 minutes on two cores of an AMD EPYC in float32.
    """,
    crop_padding=3,
    peak_learning_rate=4.5e-3,
    weight_decay=0.6,
    adamw_weight_decay=0.05,
    label_smoothing=0.1,
)

CIFAR10_50 = Recipe(
    """Fifty epochs on CIFAR-10, with random erasing.

    cvt-keras train cifar10_50
    89.8% test top-1 (n=1, JPEG copy of the data), five times as long as the recipe cifar10.
    """,
    epochs=50,
    crop_padding=4,
    erase=0.25,
    peak_learning_rate=4.5e-3,
    weight_decay=0.3,  # less than in ten epochs, as it acts for more steps; not tuned
    adamw_weight_decay=0.05,
    label_smoothing=0.1,
)

CIFAR10_LONG = Recipe(
    """Sixty epochs of a larger network on CIFAR-10, for a GPU.

    cvt-keras train cifar10_long
    Not run by this command yet. benchmarks/networks.py trained the network with nearly these settings: 91.7% validation top-1
    after 48 epochs (n=1, JPEG copy of the data), 2 minutes on an NVIDIA H100 in bfloat16.
    """,
    variant="cvt_cifar_large",
    epochs=60,
    batch_size=256,
    cutmix=0.2,  # most boxes are tiny or nearly the whole image: two in five images are really mixed
    peak_learning_rate=2.25e-3,
    weight_decay=0.6,
    adamw_weight_decay=0.05,
    label_smoothing=0.1,
)

REFERENCE = Recipe(
    """The settings of the project that this one reimplements: the paper's CvT-13 at 32x32, Adam, no augmentation.

    cvt-keras train reference
    Two epochs: 53.4% test top-1 (n=1, JPEG copy of the data), about 4 minutes each on two cores of an Intel Xeon in float32.
    """,
    variant="cvt_13",
    flip=False,
    crop_padding=0,
    optimizer="adamw",  # without weight decay: Adam
    peak_learning_rate=1e-3,
    warmup=0.0,
    decay="constant",
    weight_decay=0.0,
    gradient_clip=0.0,
)

FINETUNE = Recipe(
    """Fine-tunes published weights, or your own. Not measured with published weights yet.

    cvt-keras train finetune --weights microsoft/cvt-13
    For a GPU: an image of 224x224 costs CvT-13 80 times as much as one of 32x32 costs cvt_cifar.
    """,
    variant=None,  # that of the weights
    image_size=224,
    crop_padding=28,  # an eighth of 224, as 4 is of 32
    # Published weights are resized by crop. 0.08, for training from scratch, often leaves the object out: few epochs and few
    # images can't make up for that.
    scale=(0.35, 1.0),
    batch_size=64,
    optimizer="adamw",
    peak_learning_rate=5e-4,  # of the head; the first block of CvT-13 learns at 0.75**13 of it, a 42nd
    layer_decay=0.75,
    decay="cosine",
    label_smoothing=0.1,
)

SMOKE = Recipe(
    """A few steps of the tiny network of the tests, to check the installation. Its accuracy means nothing.

    cvt-keras train smoke
    Half a minute on two cores, mostly for starting TensorFlow.
    """,
    variant="cvt_tiny",
    epochs=2,
    batch_size=32,
    train_limit=256,
    validation_limit=128,
    test_limit=256,
)

RECIPES = {
    "cifar10": CIFAR10,
    "cifar10_50": CIFAR10_50,
    "cifar10_long": CIFAR10_LONG,
    "finetune": FINETUNE,
    "reference": REFERENCE,
    "smoke": SMOKE,
}
