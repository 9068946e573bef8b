"""Candidates of a search: the recipes in its space that are within the budget."""

import dataclasses
import random

from cvt_keras.search import space as spaces
from cvt_keras.variants import get_variant, macs


class Candidates:
    """Recipes that a search may try.

    Args:
        recipe: the `Recipe` to vary.
        space: name -> `Range` or `Choice`, of `cvt_keras.search.space`.
        num_classes: number of classes.
        max_macs: maximum multiply-accumulates per image, or `None`.

    Attributes:
        own: the recipe's own values, or `None` if one of them is outside the space.
        outside: the names whose own value is outside the space.
        smallest: name -> value, for the names that change the MACs, of the smallest network.
    """

    def __init__(self, recipe, space, num_classes, max_macs=None):
        self.recipe, self.space, self.num_classes, self.max_macs = recipe, space, num_classes, max_macs
        own = spaces.values_of(recipe, space)
        self.outside = [name for name, value in own.items() if value is None]
        self.own = None if self.outside else own
        self.smallest = spaces.smallest(space)

    def of(self, values):
        """The recipe for a trial's values. With Hyperband it has the epochs of the trial's round.

        Raises:
            RecipeError: for invalid values.
        """
        recipe = spaces.apply(self.recipe, {name: values[name] for name in self.space})
        return dataclasses.replace(recipe, epochs=values.get("tuner/epochs", recipe.epochs))

    def macs(self, values):
        """Multiply-accumulates per image. `None` for an invalid network, and if the recipe's `weights` fix the network."""
        if self.recipe.weights is not None:
            return None
        try:
            # Builds only the network, not the recipe, whose checks would take most of the time.
            variant = get_variant(spaces.network(self.recipe, {name: values[name] for name in self.space}))
            return macs(variant, (*self.recipe.preprocessing.image_size, 3), self.num_classes)
        except ValueError:
            return None

    def fits(self, values):
        """Whether the network is valid and within the budget."""
        cost = self.macs(values)
        if self.recipe.weights is not None:
            return True
        return cost is not None and (self.max_macs is None or cost <= self.max_macs)

    def shrunk(self, values, seed):
        """Shrinks a candidate until it is within the budget: one size after another is redrawn among the smaller ones.

        Returns:
            A dict. If even the smallest network of the space is over the budget, the smallest.
        """
        generator, values = random.Random(seed), dict(values)
        while not self.fits(values):
            larger = [name for name, smallest in self.smallest.items() if values[name] != smallest]
            if not larger:
                break
            name = generator.choice(larger)
            axis, smallest = self.space[name], self.smallest[name]
            if isinstance(axis, spaces.Choice):
                index = axis.values.index(values[name])
                smaller = axis.values[:index] if smallest == axis.values[0] else axis.values[index + 1 :]
                values[name] = axis.kind(generator.choice(smaller))
            else:
                values[name] = spaces.rounded(generator.uniform(smallest, values[name]), axis)
        return values

    def canonical(self, values):
        """Rounds values, and makes those that train the same network equal, so that duplicates are recognised."""
        space = self.space
        canonical = {name: spaces.rounded(value, space[name]) if name in space else value for name, value in values.items()}
        if "rand_augment_magnitude" in space and canonical.get("rand_augment") == 0:  # then the magnitude has no effect
            own, axis = self.recipe.rand_augment_magnitude, space["rand_augment_magnitude"]
            canonical["rand_augment_magnitude"] = axis.kind(own if own in axis else axis.ends[0])
        return canonical

    def is_own(self, values):
        """Whether these are the recipe's own values."""
        return self.own is not None and all(values[name] == value for name, value in self.own.items())

    def left_out(self):
        """The reason why the recipe itself is not tried, or `None`."""
        if self.outside:
            return f"its {', '.join(self.outside)} {'is' if len(self.outside) == 1 else 'are'} outside the space"
        return None if self.fits(self.own) else f"it needs {self.macs(self.own):,} MACs per image, more than the budget"
