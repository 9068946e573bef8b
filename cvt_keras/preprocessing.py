"""What a classifier needs to know about its images, classes and probabilities, as data: no Keras is imported here."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

RESIZES = ("stretch", "crop")
INTERPOLATIONS = ("bilinear", "bicubic")
CALIBRATION_FILE = "calibration.json"  # in the archive of a .tflite file, and beside a SavedModel's warm-up requests


@dataclass(frozen=True)
class Preprocessing:
    """How to prepare images for a network, and the names of its classes.

    `None` means unknown.

    Args:
        mean, std: one number per channel, for pixels in 0..1: the network sees `(pixel / 255 - mean) / std`.
        class_names: in the order of the outputs.
        image_size: `(height, width)` in pixels.
        resize: how to bring an image to that size. `"stretch"` resizes to that height and width, whatever the aspect ratio.
            `"crop"` keeps the aspect ratio: it scales the image until it just covers `crop_from`, then cuts out the middle.
        crop_pct: with `"crop"`, `image_size` as a fraction of `crop_from`; greater than 0 and at most 1.
        interpolation: `"bilinear"` or `"bicubic"`, both with antialiasing.

    Raises:
        ValueError: for a value of the wrong type or range; the message names it.
    """

    # Any sequence may be passed; each becomes a tuple.
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    class_names: Sequence[str] | None = None
    image_size: Sequence[int] | None = None
    resize: str = "stretch"
    crop_pct: float = 0.875
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        for name in ("mean", "std", "class_names", "image_size"):
            value = getattr(self, name)
            if value is None:
                continue
            value = _plain(value)
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise ValueError(f"`{name}` must be a sequence. Received: {name}={value!r}")
            object.__setattr__(self, name, tuple(map(_plain, value)))
        for name in ("mean", "std"):
            _check_statistic(name, getattr(self, name))
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"`std` must be positive. Received: std={self.std}")
        if self.class_names is not None and not all(isinstance(name, str) for name in self.class_names):
            raise ValueError(f"`class_names` must be strings. Received: class_names={self.class_names}")
        if self.image_size is not None and (
            len(self.image_size) != 2
            or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in self.image_size)
        ):
            raise ValueError(f"`image_size` must be (height, width) in pixels. Received: image_size={self.image_size}")
        for name, known in {"resize": RESIZES, "interpolation": INTERPOLATIONS}.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"`{name}` must be one of {known}. Received: {name}={value!r}")
        object.__setattr__(self, "crop_pct", _plain(self.crop_pct))
        if not isinstance(self.crop_pct, (int, float)) or isinstance(self.crop_pct, bool) or not 0 < self.crop_pct <= 1:
            raise ValueError(f"`crop_pct` must be greater than 0 and at most 1. Received: crop_pct={self.crop_pct!r}")

    @classmethod
    def from_config(cls, config: "Preprocessing | Mapping[str, Any] | None") -> "Preprocessing":
        """Returns a `Preprocessing` from itself or the dict of `get_config`; from `None`, one in which everything is unknown.

        Raises:
            ValueError: for an unknown key or an invalid value.
        """
        return _from_config(cls, "preprocessing", config)

    def get_config(self) -> dict[str, Any]:
        """Returns the fields as JSON types, for `from_config`."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()}

    def replace(self, **fields: Any) -> Self:
        """Returns a copy with these fields changed."""
        return dataclasses.replace(self, **fields)

    @property
    def crop_from(self) -> tuple[int, int]:
        """`(height, width)` of the box that `resize="crop"` scales images to cover: `image_size / crop_pct`, rounded down."""
        if self.image_size is None:
            raise ValueError("`image_size` must be known to crop. Received: image_size=None")
        height, width = (int(side / self.crop_pct) for side in self.image_size)
        return height, width

    def require_channels(self, channels: int) -> None:
        """Raises ValueError unless `mean` and `std` are known and have one number for each of `channels`."""
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is None or len(values) != channels:
                raise ValueError(f"`{name}` must have one number for each of {channels} channels. Received: {name}={values}")


@dataclass(frozen=True)
class Calibration:
    """How to turn a classifier's logits into probabilities that match how often it is right.

    Args:
        temperature: probabilities are `softmax(logits / temperature)`; 1 leaves them as they are. The predicted class is the
            same at every temperature (Guo et al., "On Calibration of Modern Neural Networks", arXiv 1706.04599, section 4.2).
        threshold: an answer whose highest probability is below it is unsure; 0 means that none is.

    Raises:
        ValueError: for a value of the wrong type or range; the message names it.
    """

    temperature: float = 1.0
    threshold: float = 0.0

    def __post_init__(self) -> None:
        for name in ("temperature", "threshold"):
            value = _plain(getattr(self, name))
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise ValueError(f"`{name}` must be a number. Received: {name}={value!r}")
            object.__setattr__(self, name, float(value))
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"`temperature` must be positive and finite. Received: temperature={self.temperature}")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"`threshold` must be between 0 and 1. Received: threshold={self.threshold}")

    @classmethod
    def from_config(cls, config: "Calibration | Mapping[str, Any] | None") -> "Calibration":
        """Returns a `Calibration` from itself or the dict of `get_config`; from `None`, one that changes nothing.

        Raises:
            ValueError: for an unknown key or an invalid value.
        """
        return _from_config(cls, "calibration", config)

    def get_config(self) -> dict[str, float]:
        """Returns the fields as JSON types, for `from_config`."""
        return dataclasses.asdict(self)

    def scaled(self, logits: np.ndarray) -> np.ndarray:
        """Returns `logits / temperature`, float64: logits whose softmax is calibrated."""
        return np.asarray(logits, "float64") / self.temperature

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Returns `softmax(logits / temperature)`, float32, for logits `(..., classes)`."""
        scaled = self.scaled(logits)
        exponentials = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
        return (exponentials / exponentials.sum(axis=-1, keepdims=True)).astype("float32")

    def unsure(self, probabilities: np.ndarray) -> np.ndarray:
        """Returns which answers are unsure, bool `(...)`, for probabilities `(..., classes)`."""
        return np.asarray(probabilities).max(axis=-1) < self.threshold


def _from_config(cls: Any, name: str, config: Any) -> Any:
    """Returns `config` if it is a `cls`, else makes one of its fields. Raises ValueError for an unknown key."""
    if isinstance(config, cls):
        return config
    known = [field.name for field in dataclasses.fields(cls)]
    if unknown := set(config or {}) - set(known):
        raise ValueError(f"`{name}` has the keys {', '.join(known)}. Received: {', '.join(sorted(unknown))}")
    return cls(**(config or {}))


def size_text(image_size: Sequence[int]) -> str:
    """Returns `(height, width)` as text: `224` for a square, otherwise `184x750`."""
    height, width = image_size
    return str(height) if height == width else f"{height}x{width}"


def _plain(value: Any) -> Any:
    """Converts NumPy arrays to lists and NumPy numbers to Python's; returns anything else unchanged."""
    return value.tolist() if hasattr(value, "tolist") else value


def _check_statistic(name: str, values: Sequence[float] | None) -> None:
    if values is None:
        return
    if not values or not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
        raise ValueError(f"`{name}` must have one finite number per channel. Received: {name}={values}")
    if max(map(abs, values)) > 1.01:  # rounding may give a little more than 1
        raise ValueError(f"`{name}` must be for pixels in 0..1: divide it by 255. Received: {name}={values}")
