"""Smaller networks by the parts of tensorflow-model-optimization that work on Keras 3: pruning, clustering, quantisation.

The names are imported when they are first used: all of them need TensorFlow, and `--help` does not.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cvt_keras.compression.clustering import WeightClustering
    from cvt_keras.compression.methods import compress
    from cvt_keras.compression.pruning import MagnitudePruning
    from cvt_keras.compression.quantization import QuantizationAwareTraining

__all__ = ["MagnitudePruning", "QuantizationAwareTraining", "WeightClustering", "compress"]

_MODULES = {
    "MagnitudePruning": "cvt_keras.compression.pruning",
    "QuantizationAwareTraining": "cvt_keras.compression.quantization",
    "WeightClustering": "cvt_keras.compression.clustering",
    "compress": "cvt_keras.compression.methods",
}


def __getattr__(name):
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
