"""CvT, the convolutional vision transformer (arXiv 2103.15808), for Keras 3.

The public names are imported when they are first used, so that `import cvt_keras` takes no more time than `import keras`, and
commands answer `--help` without either.
"""

import importlib
from typing import TYPE_CHECKING

from cvt_keras import registration as _registration  # noqa: F401 - for its effect

if TYPE_CHECKING:
    from cvt_keras.layers import (
        MLP,
        AverageProjection,
        ConvAttention,
        ConvProjection,
        ConvStem,
        ConvTokenEmbedding,
        CvTBlock,
        DropPath,
        PixelNormalization,
    )
    from cvt_keras.model import CvT, build_classifier, preprocessing_of
    from cvt_keras.preprocessing import Preprocessing
    from cvt_keras.variants import VARIANTS, Stage, Variant, macs

__version__ = "0.2.0"

__all__ = [
    "MLP",
    "VARIANTS",
    "AverageProjection",
    "ConvAttention",
    "ConvProjection",
    "ConvStem",
    "ConvTokenEmbedding",
    "CvT",
    "CvTBlock",
    "DropPath",
    "PixelNormalization",
    "Preprocessing",
    "Stage",
    "Variant",
    "build_classifier",
    "macs",
    "preprocessing_of",
]

_MODULES = {
    **dict.fromkeys(("VARIANTS", "Stage", "Variant", "macs"), "variants"),
    **dict.fromkeys(("CvT", "build_classifier", "preprocessing_of"), "model"),
    "Preprocessing": "preprocessing",
}  # of the other names: layers


def __getattr__(name):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'layers')}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
