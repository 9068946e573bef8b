"""Learning-rate schedule and optimizers. Imports Keras only."""

import math
import re

import keras
from keras import ops


def decays(variable):
    """Whether weight decay applies to a variable: only to kernels, not to the cls token, norms and biases."""
    return variable.name == "kernel"


@keras.saving.register_keras_serializable(package="cvt_keras")
class WarmupThenDecay(keras.optimizers.schedules.LearningRateSchedule):
    """Rises linearly to `peak` in `warmup_steps`, then falls to 0 at `steps`.

    Args:
        peak: the highest learning rate.
        steps: number of steps of the whole training.
        warmup_steps: number of steps of the rise; less than `steps`.
        decay: `"linear"`, `"cosine"` (half a period), or `"constant"` (no decay).
    """

    def __init__(self, peak, steps, warmup_steps=0, decay="linear"):
        self.peak = peak
        self.steps = steps
        self.warmup_steps = warmup_steps
        self.decay = decay

    def __call__(self, step):
        step = ops.cast(step, "float32")
        fall = ops.clip((self.steps - step) / (self.steps - self.warmup_steps), 0.0, 1.0)  # 1 at the peak, 0 at the end
        if self.decay == "cosine":
            fall = 0.5 - 0.5 * ops.cos(math.pi * fall)
        elif self.decay == "constant":
            fall = 1.0
        rise = (step + 1) / max(1, self.warmup_steps)  # not 0 at the first step, which would be wasted
        return self.peak * ops.minimum(rise, fall)

    def get_config(self):
        return {"peak": self.peak, "steps": self.steps, "warmup_steps": self.warmup_steps, "decay": self.decay}


def learning_rate(recipe, steps):
    """The schedule of a recipe.

    Args:
        recipe: a `Recipe`; `peak_learning_rate`, `warmup` and `decay` are used.
        steps: number of steps of the whole training.

    Returns:
        A `WarmupThenDecay`; its steps count from 0.
    """
    warmup_steps = min(round(recipe.warmup * steps), steps - 1)
    return WarmupThenDecay(recipe.peak_learning_rate, steps, warmup_steps, recipe.decay)


def rate_scales(variables, decay):
    """Layer-wise decay of the learning rate: layers near the image learn slower (arXiv 2106.08254, section 3).

    The head and its norm have the full rate. Each block has `decay` times the rate of the next one. The embedding of a stage
    and its residual convolutions count with its first block; whitening and stem come before all blocks.

    Args:
        variables: the variables of a `CvT`.
        decay: greater than 0 and at most 1; 1 is no decay.

    Returns:
        A list with a factor for each variable.
    """
    depths = [_depth(variable.path) for variable in variables]
    ranks = {depth: rank for rank, depth in enumerate(sorted(set(depths), reverse=True))}
    return [decay ** ranks[depth] for depth in depths]


def _depth(path):
    """(stage, block) of a variable: lower is nearer to the image."""
    if block := re.search(r"(?:^|/)stage(\d+)_(?:embed|conv\d+|block(\d+))/", path):
        return int(block[1]), int(block[2] or 0)
    return (-1, 0) if re.search(r"(?:^|/)(?:whitening|stem\d+)/", path) else (math.inf, 0)


class _ScaledRates:
    """Scales the learning rate, and with it the weight decay, of each variable. Keras has one rate for all.

    Args:
        rate_scales: a factor per trainable variable, in the same order; `None` for no scaling.
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
    """Keras' AdamW with `rate_scales`."""


@keras.saving.register_keras_serializable(package="cvt_keras")
class Muon(_ScaledRates, keras.optimizers.Muon):
    """Keras' Muon, extended from 2-D kernels to convolutions, with `rate_scales`.

    A kernel `(height, width, in, out)` is updated as the matrix `(height * width * in, out)`
    (Jordan et al., kellerjordan.github.io/posts/muon). AdamW updates the other variables: the head, depthwise kernels, whose
    matrix would have one column, the cls token, norms and biases.
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
        self.assign_sub(variable, ops.reshape(update, variable.shape))  # (h*w*in, out) -> (h, w, in, out)


def make_optimizer(recipe, model, steps):
    """The optimizer of a recipe. Weight decay applies to the variables that `decays` selects.

    Args:
        recipe: a `Recipe`; `optimizer`, `peak_learning_rate`, `adamw_ratio`, `layer_decay`, `warmup`, `decay`, `weight_decay`,
            `adamw_weight_decay`, `gradient_clip` and `ema` are used.
        model: a built model.
        steps: number of steps of the whole training.

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
        adamw_decay = recipe.weight_decay if recipe.adamw_weight_decay is None else recipe.adamw_weight_decay
        optimizer = Muon(
            **settings, adam_weight_decay=adamw_decay, adam_lr_ratio=recipe.adamw_ratio, exclude_layers=["(^|/)head/"]
        )
    else:
        optimizer = AdamW(**settings)
    optimizer.exclude_from_weight_decay(var_list=[v for v in model.trainable_variables if not decays(v)])
    return optimizer
