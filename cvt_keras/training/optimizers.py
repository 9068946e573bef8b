"""Learning-rate schedule and optimizer, on Keras alone."""

import math
import re

import keras
from keras import ops


def decays(variable):
    """Whether weight decay applies: to kernels, depthwise ones too; not to the cls token, norms and biases."""
    return variable.name == "kernel"


@keras.saving.register_keras_serializable(package="cvt_keras")
class WarmupThenDecay(keras.optimizers.schedules.LearningRateSchedule):
    """Rises linearly to `peak` in `warmup_steps`, then falls to 0 at `steps`.

    Args:
        peak: the highest rate.
        steps: of the whole training.
        warmup_steps: of them in the rise; under `steps`.
        decay: `"linear"`, `"cosine"` (a half cosine), or `"constant"` (not at all).
    """

    def __init__(self, peak, steps, warmup_steps=0, decay="linear"):
        self.peak = peak
        self.steps = steps
        self.warmup_steps = warmup_steps
        self.decay = decay

    def __call__(self, step):
        step = ops.cast(step, "float32")
        left = ops.clip((self.steps - step) / (self.steps - self.warmup_steps), 0.0, 1.0)  # 1 at the peak, 0 at the end
        if self.decay == "cosine":
            left = 0.5 - 0.5 * ops.cos(math.pi * left)
        elif self.decay == "constant":
            left = 1.0
        # The first step already moves: at a rate of 0 it would only cost time.
        return self.peak * ops.minimum((step + 1) / max(1, self.warmup_steps), left)

    def get_config(self):
        return {"peak": self.peak, "steps": self.steps, "warmup_steps": self.warmup_steps, "decay": self.decay}


def learning_rate(recipe, steps):
    """The schedule of a recipe.

    Args:
        recipe: its `peak_learning_rate`, `warmup` and `decay` are read.
        steps: of the whole training.

    Returns:
        A `WarmupThenDecay`, which takes a step counted from 0.
    """
    warmup_steps = min(round(recipe.warmup * steps), steps - 1)
    return WarmupThenDecay(recipe.peak_learning_rate, steps, warmup_steps, recipe.decay)


def rate_scales(variables, decay):
    """Layer-wise decay of the learning rate: the nearer to the image, the less a layer changes (arXiv 2106.08254, section 3).

    The head and its norm learn at the full rate, each block at `decay` times the rate of the one after it; a stage's embedding
    goes with its first block, a stem before all.

    Args:
        variables: a network's, named as in `CvT`.
        decay: over 0 and at most 1, which is no decay.

    Returns:
        A list with a factor for each variable.
    """
    places = [_place(variable.path) for variable in variables]
    ranks = {place: rank for rank, place in enumerate(sorted(set(places), reverse=True))}
    return [decay ** ranks[place] for place in places]


def _place(path):
    """(stage, block): what lies nearer to the image comes first."""
    if block := re.search(r"(?:^|/)stage(\d+)_(?:embed|block(\d+))/", path):
        return int(block[1]), int(block[2] or 0)
    return (-1, 0) if re.search(r"(?:^|/)stem\d+/", path) else (math.inf, 0)


class _ScaledRates:
    """Gives each variable its own learning rate, and with it its own weight decay; Keras has one for all.

    Args:
        rate_scales: a factor for each trainable variable, in their order; `None` scales nothing.
    """

    def __init__(self, *args, rate_scales=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.rate_scales = rate_scales

    def update_step(self, gradient, variable, learning_rate):
        if self.rate_scales is not None:
            learning_rate = learning_rate * self.rate_scales[self._get_variable_index(variable)]
        super().update_step(gradient, variable, learning_rate)

    def _apply_weight_decay(self, variables):
        if self.rate_scales is None:
            super()._apply_weight_decay(variables)
            return
        for variable in filter(self._use_weight_decay, variables):
            rate = ops.cast(self.learning_rate * self.rate_scales[self._get_variable_index(variable)], variable.dtype)
            variable.assign(variable - variable * self._weight_decay_of(variable) * rate)

    def _weight_decay_of(self, variable):
        return self.weight_decay or 0.0

    def get_config(self):
        return {**super().get_config(), "rate_scales": self.rate_scales}


@keras.saving.register_keras_serializable(package="cvt_keras")
class AdamW(_ScaledRates, keras.optimizers.AdamW):
    """Keras' AdamW, with a learning rate for each variable."""


@keras.saving.register_keras_serializable(package="cvt_keras")
class Muon(_ScaledRates, keras.optimizers.Muon):
    """Keras' Muon, which takes 2-D kernels alone, for convolutions too.

    A kernel `(height, width, in, out)` is updated as the matrix `(height * width * in, out)` that it multiplies patches by
    (Jordan et al., kellerjordan.github.io/posts/muon). AdamW takes the rest: the head, depthwise kernels, whose matrix would
    have one column, the cls token, norms and biases.
    """

    def _should_use_adamw(self, variable):
        if len(variable.shape) == 4 and variable.shape[-1] > 1:
            return False
        return super()._should_use_adamw(variable)

    def _weight_decay_of(self, variable):
        return (self.adam_weight_decay if self._should_use_adamw(variable) else self.weight_decay) or 0.0

    def _muon_update_step(self, gradient, variable, lr, m):
        self.assign_add(m, ops.add(gradient, m * (self.momentum - 1)))
        direction = ops.add(gradient, self.momentum * m) if self.nesterov else m
        matrix = ops.reshape(direction, (-1, direction.shape[-1]))  # (h, w, in, out) -> (h*w*in, out)
        update = self.lr_adjust(lr * self.zeropower_via_newtonschulz5(matrix, self.ns_steps))
        self.assign_sub(variable, ops.reshape(update, variable.shape))  # and back


def make_optimizer(recipe, model, steps):
    """The optimizer of a recipe, with weight decay where `decays` says so.

    Args:
        recipe: its `optimizer`, `peak_learning_rate`, `adamw_ratio`, `layer_decay`, `warmup`, `decay`, `weight_decay`,
            `gradient_clip` and `ema` are read.
        model: a built model.
        steps: of the whole training.

    Returns:
        A Keras optimizer, not built yet.
    """
    settings = {
        "learning_rate": learning_rate(recipe, steps),
        "weight_decay": recipe.weight_decay,
        "global_clipnorm": recipe.gradient_clip or None,
        "use_ema": recipe.ema > 0,
        "ema_momentum": recipe.ema,
        "rate_scales": rate_scales(model.trainable_variables, recipe.layer_decay) if recipe.layer_decay < 1 else None,
    }
    if recipe.optimizer == "muon":
        optimizer = Muon(
            **settings, adam_weight_decay=recipe.weight_decay, adam_lr_ratio=recipe.adamw_ratio, exclude_layers=["(^|/)head/"]
        )
    else:
        optimizer = AdamW(**settings)
    optimizer.exclude_from_weight_decay(var_list=[v for v in model.trainable_variables if not decays(v)])
    return optimizer
