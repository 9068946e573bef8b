"""Recipes, optimizers and the training run.

The names are imported when they are first used: `run` needs TensorFlow, the recipes and `training.optimizers` do not.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cvt_keras.errors import RecipeError
    from cvt_keras.training.loop import run
    from cvt_keras.training.plan import RunResult
    from cvt_keras.training.recipes import RECIPES, Recipe

__all__ = ["RECIPES", "Recipe", "RecipeError", "RunResult", "run"]

_MODULES = {
    "RECIPES": "cvt_keras.training.recipes",
    "Recipe": "cvt_keras.training.recipes",
    "RecipeError": "cvt_keras.errors",
    "RunResult": "cvt_keras.training.plan",
    "run": "cvt_keras.training.loop",
}


def __getattr__(name):
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
