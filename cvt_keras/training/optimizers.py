"""Learning-rate schedule and optimizer, on Keras alone."""

import keras


def decays(variable):
    """Whether weight decay applies: to kernels, depthwise ones too; not to the cls token, norms and biases."""
    return variable.name == "kernel"


def learning_rate(recipe, steps):
    """Rises linearly from 0 over the first `recipe.warmup` of the steps, then falls by a half cosine to 0.

    Args:
        recipe: its `peak_learning_rate` and `warmup` are read.
        steps: of the whole training.
    """
    warmup_steps = max(1, round(recipe.warmup * steps))
    return keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0,
        decay_steps=max(1, steps - warmup_steps),
        warmup_target=recipe.peak_learning_rate,
        warmup_steps=warmup_steps,
    )


def make_optimizer(recipe, model, steps):
    """AdamW for `model`, with weight decay where `decays` says so.

    Args:
        recipe: its `peak_learning_rate`, `warmup`, `weight_decay` and `gradient_clip` are read.
        model: a built model.
        steps: of the whole training.
    """
    optimizer = keras.optimizers.AdamW(
        learning_rate(recipe, steps), weight_decay=recipe.weight_decay, global_clipnorm=recipe.gradient_clip or None
    )
    optimizer.exclude_from_weight_decay(var_list=[v for v in model.trainable_variables if not decays(v)])
    return optimizer
