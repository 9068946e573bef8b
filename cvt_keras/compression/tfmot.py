"""Imports tensorflow-model-optimization (tfmot), when it is first needed. No other module imports it.

Importing tfmot turns `tf.keras` into Keras 2, unless `tf.keras` was used before. It also sets an environment variable, which
child processes inherit. `load` prevents both. tfmot's functions for whole models (`prune_low_magnitude`, `cluster_weights`,
`quantize_model`) refuse a Keras 3 model or have no effect on it. This project uses the parts below them, which work on plain
TensorFlow variables: schedules and masks of pruning, centroids of clustering, and the quantizers.
"""

import os
from types import SimpleNamespace

from cvt_keras.errors import MissingPackageError

_KERAS_2 = "TF_USE_LEGACY_KERAS"


def load():
    """Imports the parts that this project uses.

    Returns:
        A namespace of `PolynomialDecay`, `ConstantSparsity` and `Pruning`; `ClusteringAlgorithm`, `GradientAggregation` and
        `KmeansPlusPlusCentroidsInitialisation`; `AllValuesQuantizer`, `LastValueQuantizer` and `MovingAverageQuantizer`.

    Raises:
        MissingPackageError: if tfmot is not installed.
    """
    import tensorflow as tf

    tf.keras.__version__  # noqa: B018 - the first use of tf.keras fixes it to Keras 3
    before = os.environ.get(_KERAS_2)
    try:
        from tensorflow_model_optimization.python.core.clustering.keras.cluster_config import GradientAggregation
        from tensorflow_model_optimization.python.core.clustering.keras.clustering_algorithm import ClusteringAlgorithm
        from tensorflow_model_optimization.python.core.clustering.keras.clustering_centroids import (
            KmeansPlusPlusCentroidsInitialisation,
        )
        from tensorflow_model_optimization.python.core.quantization.keras.quantizers import (
            AllValuesQuantizer,
            LastValueQuantizer,
            MovingAverageQuantizer,
        )
        from tensorflow_model_optimization.python.core.sparsity.keras.pruning_impl import Pruning
        from tensorflow_model_optimization.python.core.sparsity.keras.pruning_schedule import ConstantSparsity, PolynomialDecay
    except ImportError as error:
        raise MissingPackageError(
            f"compression needs tensorflow-model-optimization: {error}",
            hint="Install it: pip install tensorflow-model-optimization==0.8.1 tf_keras",
        ) from error
    finally:
        if before is None:
            os.environ.pop(_KERAS_2, None)
        else:
            os.environ[_KERAS_2] = before
    return SimpleNamespace(
        AllValuesQuantizer=AllValuesQuantizer,
        ClusteringAlgorithm=ClusteringAlgorithm,
        ConstantSparsity=ConstantSparsity,
        GradientAggregation=GradientAggregation,
        KmeansPlusPlusCentroidsInitialisation=KmeansPlusPlusCentroidsInitialisation,
        LastValueQuantizer=LastValueQuantizer,
        MovingAverageQuantizer=MovingAverageQuantizer,
        PolynomialDecay=PolynomialDecay,
        Pruning=Pruning,
    )
