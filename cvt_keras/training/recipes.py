"""What a training run is made of. A recipe is a document: the command, what it costs, and what it gave."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

from tyro.conf import Suppress

from cvt_keras.variants import get_variant


class RecipeError(ValueError):
    """A setting that no run can have. The message is one line that names it."""


@dataclass(frozen=True)
class Recipe:
    """Every setting of a run but where it is written.

    Raises:
        RecipeError: for a value that no run can have, naming it.
    """

    # The string under a field is its flag's help in train.py.

    description: Suppress[str] = ""

    variant: str = "cvt_cifar"
    """cvt_cifar, cvt_cifar_large, cvt_13, cvt_21, cvt_w24, or cvt_tiny, the tests' own."""
    dataset: Literal["cifar10"] = "cifar10"
    """What to train on."""
    data_dir: str | None = None
    """TFDS' folder; without it TFDS_DATA_DIR, or ~/tensorflow_datasets."""
    epochs: int = 10
    """Passes over the training images."""
    batch_size: int = 128
    """Images a step."""
    seed: int = 0
    """Of weights, data order, augmentation and stochastic depth."""
    precision: Literal["auto", "float32", "mixed_bfloat16", "mixed_float16"] = "auto"
    """auto: float32 on a CPU; on a GPU mixed_bfloat16 where it has it, else mixed_float16."""
    xla: Literal["auto", "on", "off"] = "auto"
    """auto: on with a GPU, off on a CPU, where it is slower."""
    train_limit: int | None = None
    """Train on the first N images only."""
    test_limit: int | None = None
    """Test on the first N images only."""
    flip: bool = True
    """Mirror half of the images."""
    crop_padding: int = 4
    """Pad by so many reflected pixels and crop the original size at random; 0 is off."""
    peak_learning_rate: float = 1.5e-3
    """Reached after the warm-up, then decayed to 0 by a half cosine."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 0.05
    """Decoupled, times the learning rate; of kernels alone."""
    gradient_clip: float = 1.0
    """Largest norm of all gradients together; 0 is off."""

    def __post_init__(self):
        try:
            get_variant(self.variant)
        except ValueError as error:
            raise RecipeError(str(error)) from error
        for name, choices in get_type_hints(type(self)).items():
            if get_origin(choices) is Literal and getattr(self, name) not in get_args(choices):
                raise RecipeError(f"`{name}` must be one of {get_args(choices)}. Received: {name}={getattr(self, name)!r}")
        for name in ("epochs", "batch_size", "train_limit", "test_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"`{name}` must be at least 1. Received: {name}={value}")
        for name in ("seed", "crop_padding", "peak_learning_rate", "weight_decay", "gradient_clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise RecipeError(f"`{name}` must be a number that is not negative. Received: {name}={getattr(self, name)}")
        if self.seed >= 2**32:
            raise RecipeError(f"`seed` must be under 2**32. Received: seed={self.seed}")
        if not 0 <= self.warmup < 1:
            raise RecipeError(f"`warmup` must be at least 0 and under 1. Received: warmup={self.warmup}")

    def settings(self):
        """The fields as a dict, without the description, which is of the recipe as written and not of what flags made of it."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "description"}


CIFAR10 = Recipe(
    """Ten epochs on CIFAR-10, the default.

    python train.py cifar10
    About 3.5 minutes an epoch on two cores of an AMD EPYC in float32. With --epochs 3: 68.0% test top-1 (n=1, JPEG copy).
    """,
)

SMOKE = Recipe(
    """A few steps of the tests' network, to see that everything is in its place. Its accuracy means nothing.

    python train.py smoke
    """,
    variant="cvt_tiny",
    epochs=2,
    batch_size=32,
    train_limit=256,
    test_limit=256,
)

RECIPES = {"cifar10": CIFAR10, "smoke": SMOKE}
