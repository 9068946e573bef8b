"""Classifies images with a run, a `.keras` file, or an exported file.

Names are imported on first use: finding a run and `--help` need neither Keras nor TensorFlow.
"""

from typing import TYPE_CHECKING

from cvt_keras import lazy

if TYPE_CHECKING:
    from cvt_keras.predict.classifier import Classifier, Prediction, load_run
    from cvt_keras.predict.evaluation import Evaluation, evaluate

__all__ = ["Classifier", "Evaluation", "Prediction", "evaluate", "load_run"]

if not TYPE_CHECKING:  # with `__getattr__`, a type checker would accept any name
    __getattr__, __dir__ = lazy.attach(
        __name__, {"classifier": ("Classifier", "Prediction", "load_run"), "evaluation": ("Evaluation", "evaluate")}
    )
