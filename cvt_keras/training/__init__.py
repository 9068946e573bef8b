"""Recipes, optimizers and the training run.

`run` is found when it is asked for: it needs TensorFlow, `training.optimizers` and `training.recipes` do not.
"""

__all__ = ["RECIPES", "Recipe", "RecipeError", "run"]


def __getattr__(name):
    if name == "run":
        from cvt_keras.training.loop import run

        return run
    if name in __all__:
        from cvt_keras.training import recipes

        return getattr(recipes, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
