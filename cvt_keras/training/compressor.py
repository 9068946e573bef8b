"""The hook through which the methods of `cvt_keras.compression` take part in training."""

from typing import ClassVar

import keras

from cvt_keras.errors import RecipeError


class Compressor(keras.callbacks.Callback):
    """Compresses a network during training. This base class does nothing; see its subclasses in `cvt_keras.compression`.

    `cvt_keras.training.run` calls `require`, `wrap` and `start` before the first step, the methods of a Keras callback during
    training, and `wrap` and `check` after it.

    Args:
        settings: the entry `compression` of recipe.json, with the name of the `method`; `None` for no compression.
        after: the `settings` of the earlier compression of the weights, or `None`.

    Attributes:
        settings: the argument, with an entry `after` if there is an earlier compression.
        refused: the `method` of an earlier compression that this one can't follow -> why, and what to do instead.
        variables: variables that a checkpoint must hold besides those of the model and the optimizer.
        first_epoch: the first epoch whose weights may be kept, from 0. Before it the network is not compressed enough.
    """

    refused: ClassVar[dict[str, str]] = {}
    variables = ()
    first_epoch = 0

    def __init__(self, settings=None, after=None):
        super().__init__()
        self.settings = {**settings, "after": after} if after else settings

    def require(self, recipe):
        """Raises unless this compression fits the recipe. Called before weights and images are read.

        Args:
            recipe: the `Recipe` of the run, with every `auto` replaced.

        Raises:
            RecipeError: if it can't be combined with the recipe, or with the earlier compression.
        """
        if self.settings is not None and recipe.freeze is not None:
            raise RecipeError(
                f"`freeze` must be None for compression, which trains every layer. Received: freeze={recipe.freeze}",
                argument="freeze",
            )
        earlier = ((self.settings or {}).get("after") or {}).get("method")
        if earlier in self.refused:
            raise RecipeError(
                f"`run` must not be compressed by {earlier} before: {self.refused[earlier]}. Received: {earlier}",
                argument="run",
            )

    def wrap(self, classifier):
        """Returns the network to train and save instead of `classifier`, with the same weights."""
        return classifier

    def start(self, classifier, batches, steps, epochs):
        """Prepares the network. Called after its weights are loaded, and before the first step or a resume.

        Args:
            classifier: the network that `wrap` returned.
            batches: the training images without augmentation, from `evaluation_batches`.
            steps: training steps per epoch.
            epochs: number of epochs.

        Raises:
            RecipeError: if the compression would have no effect, or is impossible.
        """

    def check(self, classifier):
        """Returns the entry `compression` of report.json for the trained network, or `None`.

        Raises:
            RunError: if the network is not compressed as it should be.
        """
        return None
