"""What a training run is made of. A recipe is a document: the command, what it costs, and what it gave."""

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
from cvt_keras.errors import ArgumentError, RecipeError, RunError
from cvt_keras.variants import VARIANTS, Variant, get_variant, named, to_dict

COMPRESSIONS = ("prune", "cluster", "qat")


@dataclass(frozen=True)
class Recipe:
    """Every setting of a run but where it is written.

    Raises:
        RecipeError: for a value that no run can have, naming it.
    """

    # The string under a field is its flag's help in train.py.

    description: Suppress[str] = ""
    # Of a run that `cvt_keras.compression` wrote: what it did. No flag: it has a command line of its own.
    compression: Suppress[dict | None] = None

    # === Network ===
    variant: Annotated[str | Variant | None, tyro.conf.arg(constructor=str, metavar="NAME")] = "cvt_cifar"
    """cvt_cifar, cvt_cifar_large, cvt_13, cvt_21, cvt_w24, or cvt_tiny, the tests' own. From Python also a Variant; None:
    that of the weights."""
    weights: str | None = None
    """Where to start from, with a new head for other classes: an authors' .pth, a folder or file of transformers, a hub id such
    as microsoft/cvt-13, or a .keras file. Mean and std are taken from there too."""
    image_size: int = 32
    """Side of the square that the network sees; images of another size are resized."""

    # === Data ===
    dataset: Annotated[str, tyro.conf.arg(metavar=f"{{{','.join(sources.NAMES)}}}")] = "auto"
    """auto: cifar10, or where it can't be had the digits that scikit-learn carries."""
    data_dir: str | None = None
    """TFDS' folder, by default TFDS_DATA_DIR or ~/tensorflow_datasets; for `folder` the one with a folder for each class."""
    train_limit: int | None = None
    """Train on the first N images only."""
    validation_limit: int | None = None
    """Validate on the first N images only."""
    test_limit: int | None = None
    """Test on the first N images only."""
    skip_broken: bool = False
    """Leave out files of a folder that can't be read, and count them in the report."""
    class_weights: Annotated[str, tyro.conf.arg(metavar="auto|none|FILE")] = "none"
    """For unequal classes. auto: weigh each image's loss by the inverse of its class's share; FILE: JSON {class: weight}."""

    # === Augmentation ===
    flip: bool = True
    """Mirror half of the images; off where it would change what they show, as of digits."""
    crop_padding: int = 4
    """Pad by so many reflected pixels and crop the original size at random; 0 is off."""
    rand_augment: int = 0
    """RandAugment's operations on each image; 0 is off."""
    rand_augment_magnitude: float = 5.0
    """How strong they are, 0 to 10."""
    erase: float = 0.0
    """Random erasing: probability that a box of an image becomes noise."""
    mixup: float = 0.0
    """Blend images, with a weight from Beta(mixup, mixup); 0 is off. With cutmix, each image gets one of the two."""
    cutmix: float = 0.0
    """Paste a box of another image, its area from Beta(cutmix, cutmix); 0 is off."""

    # === Optimization ===
    epochs: int = 10
    """Passes over the training images."""
    early_stopping: int = 0
    """Stop after so many epochs without a better one; 0 is off. The learning rate still falls as for all epochs."""
    freeze: Annotated[str | None, tyro.conf.arg(metavar="backbone|N")] = None
    """With --weights, for small sets. backbone: train the last layer only; N: keep the first N stages as they start."""
    batch_size: int = 128
    """Images a step."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """muon: for the matrices, AdamW for the rest."""
    peak_learning_rate: float = 2e-3
    """Reached after the warm-up."""
    adamw_ratio: float = 0.5
    """With muon: the learning rate of the rest, as a share of it."""
    layer_decay: float = 1.0
    """Each block's learning rate as a share of that of the block after it; 1 is off."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises."""
    decay: Literal["linear", "cosine", "constant"] = "linear"
    """The learning rate's way from its peak to 0, or constant."""
    weight_decay: float = 0.05
    """Decoupled, times the learning rate; of kernels alone."""
    gradient_clip: float = 1.0
    """Largest norm of all gradients together; 0 is off."""
    label_smoothing: float = 0.0
    """Share of each label that is spread over all classes."""
    ema: float = 0.0
    """Momentum of the weights' moving average, which is validated and saved in their place; 0 is off. Batch norms' statistics
    stay those of the weights."""

    # === Machine ===
    seed: int = 0
    """Of weights, data order, augmentation and stochastic depth."""
    precision: Literal["auto", "float32", "mixed_bfloat16", "mixed_float16"] = "auto"
    """auto: float32 on a CPU; on a GPU mixed_bfloat16 where it has it, else mixed_float16."""
    xla: Literal["auto", "on", "off"] = "auto"
    """auto: on with a GPU, off on a CPU, where it is slower."""

    def __post_init__(self) -> None:
        for name in ("data_dir", "weights", "class_weights"):
            if isinstance(getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(getattr(self, name)))  # as recipe.json has it
        if isinstance(self.freeze, int) and not isinstance(self.freeze, bool):
            object.__setattr__(self, "freeze", str(self.freeze))  # the flag's form
        for name, hint in get_type_hints(type(self)).items():
            _check_type(name, getattr(self, name), hint)
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
        for name in ("epochs", "batch_size", "image_size", "train_limit", "validation_limit", "test_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"`{name}` must be at least 1. Received: {name}={value}", argument=name)
        for name in (
            *("seed", "crop_padding", "rand_augment", "mixup", "cutmix", "early_stopping"),
            *("peak_learning_rate", "adamw_ratio", "weight_decay", "gradient_clip"),
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise RecipeError(
                    f"`{name}` must be a finite number that is not negative. Received: {name}={getattr(self, name)}",
                    argument=name,
                )
        if self.seed >= 2**32:
            raise RecipeError(f"`seed` must be under 2**32. Received: seed={self.seed}", argument="seed")
        for name in ("warmup", "label_smoothing", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise RecipeError(
                    f"`{name}` must be at least 0 and under 1. Received: {name}={getattr(self, name)}", argument=name
                )
        if not 0 < self.layer_decay <= 1:
            raise RecipeError(
                f"`layer_decay` must be over 0 and at most 1. Received: layer_decay={self.layer_decay}", argument="layer_decay"
            )
        for name, most in {"erase": 1, "rand_augment_magnitude": 10}.items():
            if not 0 <= getattr(self, name) <= most:
                raise RecipeError(
                    f"`{name}` must be within 0 and {most}. Received: {name}={getattr(self, name)}", argument=name
                )

        if not self.class_weights:
            raise RecipeError(
                "`class_weights` must be auto, none or a file. Received: class_weights=''", argument="class_weights"
            )
        if self.freeze is not None and self.freeze != "backbone" and not re.fullmatch("[1-9][0-9]*", self.freeze):
            raise RecipeError(
                f"`freeze` must be backbone or a number of stages, at least 1. Received: freeze={self.freeze}",
                argument="freeze",
            )
        if self.freeze is not None and self.weights is None:
            raise RecipeError(
                f"`freeze` needs `weights`, as random ones would never learn. Received: freeze={self.freeze}, weights=None",
                argument="freeze",
                hint="Give --weights too, or leave out --freeze",
            )

    @property
    def variant_name(self) -> str:
        """The variant's name, with its activation where that is another; without one the weights' name, or `custom`."""
        if isinstance(self.variant, str):
            return self.variant
        for name, known in VARIANTS.items():
            if self.variant and dataclasses.replace(known, activation=self.variant.activation) == self.variant:
                return name if known == self.variant else f"{name}-{self.variant.activation}"
        if not self.weights:
            return "custom"
        # The last part of a path or hub id, without what ends a file's name.
        last = re.split(r"[/\\]", self.weights.rstrip("/\\"))[-1]
        return re.sub(r"\.(pth|pt|bin|safetensors|keras)$", "", last)

    def settings(self) -> dict[str, Any]:
        """The fields as JSON has them, the variant whole: what `recipe.json` holds.

        Without the description, which is of the recipe as written and not of what flags made of it, and with `compression`
        only where there is one.
        """
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del settings["description"]
        if self.compression is None:
            del settings["compression"]
        return {**settings, "variant": None if self.variant is None else to_dict(get_variant(self.variant))}

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> "Recipe":
        """The recipe that `settings` describes; what it leaves out has its default.

        Raises:
            RecipeError: for what is no dict, or a setting that there is not.
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
    """The recipe of a run.

    Args:
        run_dir: the run folder.
        hint: for the error.

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


def _check_type(name, value, hint):
    """Python takes 2.5 epochs, and "no" for yes."""
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise RecipeError(f"`{name}` must be one of {get_args(hint)}. Received: {name}={value!r}", argument=name)
        return
    kinds = get_args(hint) or (hint,)
    taken = (*kinds, int) if float in kinds else kinds
    # To Python, True is an int.
    if not isinstance(value, taken) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join("None" if kind is NoneType else kind.__name__ for kind in kinds)
        raise RecipeError(f"`{name}` must be {expected}. Received: {name}={value!r}", argument=name)


CIFAR10 = Recipe(
    """Ten epochs on CIFAR-10, the default.

    python train.py cifar10
    84.2% test top-1 (n=2, both the same to 0.1, JPEG copy), 33 minutes on two cores of an Intel Xeon in float32.
    """,
)

CIFAR10_LONG = Recipe(
    """Two hundred epochs of the larger network, for a GPU. Not trained yet: what it gives is not known.

    python train.py cifar10_long
    """,
    variant="cvt_cifar_large",
    epochs=200,
    batch_size=256,
    rand_augment=2,
    erase=0.25,
    mixup=0.2,
    cutmix=1.0,
    warmup=0.05,
    decay="cosine",
    label_smoothing=0.1,
    ema=0.999,
)

REFERENCE = Recipe(
    """What the project that this one redoes did: the paper's CvT-13 at 32x32, Adam, no augmentation.

    python train.py reference
    Two epochs: 53.4% test top-1 (n=1, JPEG copy), about 4 minutes each on two cores of an Intel Xeon in float32.
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
    """Fine-tunes published weights, or your own. With published ones not measured yet: what it gives is not known.

    python train.py finetune --weights microsoft/cvt-13
    For a GPU: at 224x224 an image costs CvT-13 80 times what a 32x32 one costs cvt_cifar.
    """,
    variant=None,  # the weights'
    image_size=224,
    crop_padding=28,  # an eighth of a side, as 4 is of 32
    batch_size=64,
    optimizer="adamw",
    peak_learning_rate=5e-4,  # of the head; the first block of CvT-13 learns at 0.75**13 of it, a fortieth
    layer_decay=0.75,
    decay="cosine",
    label_smoothing=0.1,
)

SMOKE = Recipe(
    """A few steps of the tests' network, to see that everything is in its place. Its accuracy means nothing.

    python train.py smoke
    Half a minute on two cores, most of it TensorFlow's start.
    """,
    variant="cvt_tiny",
    epochs=2,
    batch_size=32,
    train_limit=256,
    validation_limit=128,
    test_limit=256,
)

RECIPES = {"cifar10": CIFAR10, "cifar10_long": CIFAR10_LONG, "finetune": FINETUNE, "reference": REFERENCE, "smoke": SMOKE}
