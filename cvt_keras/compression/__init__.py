"""Pruning, clustering and quantisation-aware training, by the parts of tensorflow-model-optimization that work on Keras 3.

The names are imported on first use: all of them need TensorFlow, and `--help` does not.
"""

from typing import TYPE_CHECKING

from cvt_keras import lazy

if TYPE_CHECKING:
    from cvt_keras.compression.clustering import WeightClustering
    from cvt_keras.compression.methods import compress
    from cvt_keras.compression.pruning import MagnitudePruning
    from cvt_keras.compression.quantization import QuantizationAwareTraining

__all__ = ["MagnitudePruning", "QuantizationAwareTraining", "WeightClustering", "compress"]

if not TYPE_CHECKING:  # with `__getattr__` a type checker would accept any name
    __getattr__, __dir__ = lazy.attach(
        __name__,
        {
            "clustering": ("WeightClustering",),
            "methods": ("compress",),
            "pruning": ("MagnitudePruning",),
            "quantization": ("QuantizationAwareTraining",),
        },
    )
