"""CvT, the convolutional vision transformer (arXiv 2103.15808), for Keras 3."""

from cvt_keras.compression import layers as _compressed  # noqa: F401 - registers what a compressed run's model.keras holds
from cvt_keras.layers import (
    MLP,
    AverageProjection,
    ConvAttention,
    ConvProjection,
    ConvStem,
    ConvTokenEmbedding,
    CvTBlock,
    DropPath,
)
from cvt_keras.model import CvT, build_classifier
from cvt_keras.variants import VARIANTS, Stage, Variant, macs

__version__ = "0.1.0"

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
    "Stage",
    "Variant",
    "build_classifier",
    "macs",
]
