"""The recipes that a search may try: those of its space, within the budget."""

import dataclasses
import random

from cvt_keras.search import space as spaces
from cvt_keras.variants import get_variant, macs


class Candidates:
    """What a search may try.

    Args:
        recipe: the `Recipe` that is varied.
        space: name -> `Range` or `Choice`, of `cvt_keras.search.space`.
        num_classes: of the images.
        max_macs: multiply-accumulates of one image that a network may take, or `None`.

    Attributes:
        own: the values of the recipe itself, or `None` where it lies outside the space.
        outside: names of which its value is not in the space.
        least: name -> value, of the smallest network.
    """

    def __init__(self, recipe, space, num_classes, max_macs=None):
        self.recipe, self.space, self.num_classes, self.max_macs = recipe, space, num_classes, max_macs
        own = spaces.values_of(recipe, space)
        self.outside = [name for name, value in own.items() if value is None]
        self.own = None if self.outside else own
        self.least = spaces.sizes(space)

    def of(self, values):
        """The recipe of a trial's values: with Hyperband for as many epochs as its round has.

        Raises:
            RecipeError: for values that no run can have.
        """
        recipe = spaces.apply(self.recipe, {name: values[name] for name in self.space})
        return dataclasses.replace(recipe, epochs=values.get("tuner/epochs", recipe.epochs))

    def macs(self, values):
        """Multiply-accumulates of one image; `None` for a network that can't be, and where the weights bring it."""
        if self.recipe.weights is not None:
            return None
        try:
            # Without the recipe around it, of which most of the time would go into its checks.
            variant = get_variant(spaces.network(self.recipe, {name: values[name] for name in self.space}))
            return macs(variant, (self.recipe.image_size, self.recipe.image_size, 3), self.num_classes)
        except ValueError:
            return None

    def fits(self, values):
        """Whether its network can be, and is within the budget."""
        cost = self.macs(values)
        if self.recipe.weights is not None:
            return True
        return cost is not None and (self.max_macs is None or cost <= self.max_macs)

    def shrunk(self, values, seed):
        """The same within the budget: what makes a network large is drawn anew below what it is, one after the other.

        Returns:
            A dict; one that does not fit where even the smallest network of the space does not.
        """
        draw, values = random.Random(seed), dict(values)
        while not self.fits(values) and (larger := [name for name, least in self.least.items() if values[name] != least]):
            name = draw.choice(larger)
            where, least = self.space[name], self.least[name]
            if isinstance(where, spaces.Choice):
                place = where.values.index(values[name])
                cheaper = where.values[:place] if least == where.values[0] else where.values[place + 1 :]
                values[name] = where.kind(draw.choice(cheaper))
            else:
                values[name] = spaces.rounded(draw.uniform(least, values[name]), where)
        return values

    def settled(self, values):
        """The values as they are trained, so that they are compared with what was."""
        space = self.space
        settled = {name: spaces.rounded(value, space[name]) if name in space else value for name, value in values.items()}
        if "rand_augment_magnitude" in space and settled.get("rand_augment") == 0:  # of nothing: all are the same
            own, where = self.recipe.rand_augment_magnitude, space["rand_augment_magnitude"]
            settled["rand_augment_magnitude"] = where.kind(own if own in where else where.ends[0])
        return settled

    def is_own(self, values):
        """Whether these are the recipe's."""
        return self.own is not None and all(values[name] == value for name, value in self.own.items())

    def left_out(self):
        """Why the recipe itself is not among the trials, or `None`."""
        if self.outside:
            return f"its {', '.join(self.outside)} {'is' if len(self.outside) == 1 else 'are'} not in the space"
        return None if self.fits(self.own) else f"it takes {self.macs(self.own):,} MACs an image"
