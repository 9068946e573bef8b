"""The hook by which a method of `cvt_keras.compression` takes part in training."""

from typing import ClassVar

import keras

from cvt_keras.errors import RecipeError


class Compressor(keras.callbacks.Callback):
    """Makes a network smaller as it trains. This one does nothing; those of `cvt_keras.compression` do.

    `cvt_keras.training.run` calls `require`, `wrap` and `start` before the first step, the callback's methods in training, and
    `wrap` and `check` on the trained network.

    Args:
        settings: the entry `compression` of recipe.json, with the name of the `method`; `None` for no compression.
        after: the `settings` of the compression that made the weights to start from, or `None`.

    Attributes:
        settings: the same, with `after` in them if there is one.
        refused: the `method` of a compression that must not come before this one -> the reason, and what to do.
        variables: what a checkpoint must hold beside the variables of model and optimizer.
        first_epoch: the first epoch whose weights may be kept, counted from 0. Before it the network is not small enough yet.
    """

    refused: ClassVar[dict[str, str]] = {}
    variables = ()
    first_epoch = 0

    def __init__(self, settings=None, after=None):
        super().__init__()
        self.settings = {**settings, "after": after} if after else settings

    def require(self, recipe):
        """Raises unless this compression fits the recipe. Called before anything is read.

        Args:
            recipe: the run's, with nothing left `auto`.

        Raises:
            RecipeError: if it can't be combined with the recipe, or with the compression before it.
        """
        if self.settings is not None and recipe.freeze is not None:
            raise RecipeError(
                f"`freeze` must be None with compression, which changes every layer. Received: freeze={recipe.freeze}",
                argument="freeze",
            )
        before = ((self.settings or {}).get("after") or {}).get("method")
        if before in self.refused:
            raise RecipeError(
                f"`run` must not be compressed by {before} already: {self.refused[before]}. Received: {before}",
                argument="run",
            )

    def wrap(self, classifier):
        """Returns the network that is trained and saved in place of `classifier`, with its weights."""
        return classifier

    def start(self, classifier, batches, steps, epochs):
        """Prepares the network. Called when its weights are in place, before the first step and before a run is resumed.

        Args:
            classifier: what `wrap` returned.
            batches: the training images without augmentation, from `evaluation_batches`.
            steps: per epoch.
            epochs: of the training.

        Raises:
            RecipeError: if it would do nothing, or can't be done.
        """

    def check(self, classifier):
        """Returns what report.json holds about the trained network as `compression`, or `None`.

        Raises:
            RunError: if the network is not as small as it should be.
        """
        return None
