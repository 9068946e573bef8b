"""Smaller networks by the parts of tensorflow-model-optimization that work on Keras 3: pruning, clustering, quantisation.

The names are imported when they are first used: all of them need TensorFlow, and `--help` does not.
"""

from typing import TYPE_CHECKING

from cvt_keras import lazy

if TYPE_CHECKING:
    from cvt_keras.compression.clustering import WeightClustering
    from cvt_keras.compression.methods import compress
    from cvt_keras.compression.pruning import MagnitudePruning
    from cvt_keras.compression.quantization import QuantizationAwareTraining

__all__ = ["MagnitudePruning", "QuantizationAwareTraining", "WeightClustering", "compress"]

if not TYPE_CHECKING:  # a type checker would take any name for one of ours
    __getattr__, __dir__ = lazy.attach(
        __name__,
        {
            "clustering": ("WeightClustering",),
            "methods": ("compress",),
            "pruning": ("MagnitudePruning",),
            "quantization": ("QuantizationAwareTraining",),
        },
    )
