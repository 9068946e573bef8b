"""Recipes, optimizers and the training run.

Names are imported at first use: `run` needs TensorFlow, the recipes and `training.optimizers` do not.
"""

from typing import TYPE_CHECKING

from cvt_keras import lazy

if TYPE_CHECKING:
    from cvt_keras.errors import RecipeError
    from cvt_keras.training.loop import run
    from cvt_keras.training.plan import RunResult
    from cvt_keras.training.recipes import RECIPES, Recipe

__all__ = ["RECIPES", "Recipe", "RecipeError", "RunResult", "run"]

if not TYPE_CHECKING:  # with `__getattr__`, a type checker would accept any name
    __getattr__, __dir__ = lazy.attach(
        __name__, {"recipes": ("RECIPES", "Recipe", "RecipeError"), "plan": ("RunResult",), "loop": ("run",)}
    )
