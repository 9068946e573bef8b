"""A recipe and a space for the tests of the search, which train in seconds."""

import dataclasses

from cvt_keras.search.space import Choice, Range
from cvt_keras.training import RECIPES

SMOKE = dataclasses.replace(RECIPES["smoke"], dataset="digits", flip=False)
# The network of the recipe itself takes 840,928 MACs per image.
SPACE = {"peak_learning_rate": Range(1e-3, 8e-3, log=True), "stage0_depth": Choice((1, 2, 3)), "mixup": Range(0.0, 0.4)}
