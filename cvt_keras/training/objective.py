"""What a network is trained for: its loss, its metrics, and the start from the images. Runs on every backend of Keras."""

import keras
import numpy as np

from cvt_keras.training.optimizers import make_optimizer

WHITENING_IMAGES = 5_000  # enough for the covariance of small patches


class _CountingImages:
    """A metric in which all images count the same, except those of weight 0, which fill up a batch."""

    def update_state(self, y_true, y_pred, sample_weight=None):
        counts = None if sample_weight is None else keras.ops.cast(sample_weight > 0, "float32")
        return super().update_state(y_true, y_pred, sample_weight=counts)


class Accuracy(_CountingImages, keras.metrics.CategoricalAccuracy):
    """Top-1 accuracy."""


class CrossEntropy(_CountingImages, keras.metrics.CategoricalCrossentropy):
    """The mean cross-entropy, without the weights of classes."""


def compile_classifier(classifier, recipe, steps):
    """Compiles a classifier as a recipe says.

    Args:
        classifier: a `keras.Model` of logits.
        recipe: a `Recipe`; `precision` and `xla` are not `"auto"`.
        steps: the number of steps of the whole training.
    """
    classifier.compile(
        optimizer=make_optimizer(recipe, classifier, steps),
        loss=keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=recipe.label_smoothing),
        # The loss depends on label smoothing. The plain cross-entropy can be compared between runs.
        weighted_metrics=[Accuracy(name="accuracy"), CrossEntropy(from_logits=True, name="cross_entropy")],
        jit_compile=recipe.xla == "on",
    )
    # `fit` would create these variables in its first step, and trace the step a second time, which is slow.
    classifier.optimizer.build(classifier.trainable_variables)
    blank = np.zeros((1, classifier.output_shape[-1]), "float32")
    classifier.compute_loss(None, blank, blank)
    classifier.compute_metrics(None, blank, blank)  # `fit` resets the metrics


def adapt_whitening(classifier, batches):
    """Sets the kernel of the whitening layer, if the classifier has one.

    Args:
        classifier: a classifier of raw pixels, with the layer `normalization`.
        batches: an iterable of tuples that begin with float32 pixels `(batch, height, width, 3)` in 0..255, such as
            `evaluation_batches` of the first `WHITENING_IMAGES` training images.
    """
    whitening = next((layer for layer in classifier._flatten_layers() if layer.name == "whitening"), None)
    if whitening is not None:
        normalize = classifier.get_layer("normalization")
        whitening.adapt(normalize(pixels) for pixels, *_ in batches)
