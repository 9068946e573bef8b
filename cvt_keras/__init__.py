"""CvT, the convolutional vision transformer (arXiv 2103.15808), for Keras 3.

The public names are imported when they are first used, so that `import cvt_keras` takes no more time than `import keras`, and
commands answer `--help` without either.
"""

from typing import TYPE_CHECKING

from cvt_keras import lazy
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
        ResidualConv,
        Whitening,
    )
    from cvt_keras.model import CvT, build_classifier, calibration_of, preprocessing_of
    from cvt_keras.predict import Classifier, Prediction, load_run
    from cvt_keras.preprocessing import Calibration, Preprocessing
    from cvt_keras.variants import VARIANTS, Stage, Variant, macs

__version__ = "0.8.0"

__all__ = [
    "MLP",
    "VARIANTS",
    "AverageProjection",
    "Calibration",
    "Classifier",
    "ConvAttention",
    "ConvProjection",
    "ConvStem",
    "ConvTokenEmbedding",
    "CvT",
    "CvTBlock",
    "DropPath",
    "PixelNormalization",
    "Prediction",
    "Preprocessing",
    "ResidualConv",
    "Stage",
    "Variant",
    "Whitening",
    "build_classifier",
    "calibration_of",
    "load_run",
    "macs",
    "preprocessing_of",
]

if not TYPE_CHECKING:  # with `__getattr__` a type checker would accept any name
    __getattr__, __dir__ = lazy.attach(
        __name__,
        {
            "layers": (
                *("AverageProjection", "ConvAttention", "ConvProjection", "ConvStem", "ConvTokenEmbedding"),
                *("CvTBlock", "DropPath", "MLP", "PixelNormalization", "ResidualConv", "Whitening"),
            ),
            "model": ("CvT", "build_classifier", "calibration_of", "preprocessing_of"),
            "predict.classifier": ("Classifier", "Prediction", "load_run"),
            "preprocessing": ("Calibration", "Preprocessing"),
            "variants": ("VARIANTS", "Stage", "Variant", "macs"),
        },
    )
