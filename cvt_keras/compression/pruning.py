"""Pruning: the weights of least magnitude become zeros as the network goes on learning (Zhu & Gupta, arXiv 1710.01878)."""

from typing import ClassVar

import numpy as np
import tensorflow as tf

from cvt_keras.compression import tfmot
from cvt_keras.compression.kernels import describe, kernels, share_of_zeros
from cvt_keras.errors import RecipeError, RunError
from cvt_keras.training.compressor import Compressor

PATTERNS = ("unstructured", "2:4", "4x1")
SCHEDULES = ("polynomial", "constant")
# Of the training: in the rest the zeros stay where they are, and the other weights make up for them.
RAMP = 0.5
UPDATES = 20


class MagnitudePruning(Compressor):
    """Prunes kernels by tfmot's schedules and masks, which are set at the start of a step and held at both of its ends.

    Args:
        sparsity: share of zeros in each kernel, over 0 and under 1; with `"2:4"` it is 0.5.
        pattern: `"unstructured"`; `"2:4"`, two zeros of each four weights along the input axis; or `"4x1"`, blocks of four
            inputs of one output, which a Dense has.
        schedule: `"polynomial"`, the default: from none to `sparsity` over the first half of the training; `"constant"`:
            `sparsity` from the first step. `"2:4"` has none, and is there from the first step too.
        frequency: steps between updates of the masks, with `"polynomial"`; `None` makes it at least 20, if the steps do.
        layers: names or a predicate, see `kernels`.
        after: `settings` of the compression that the weights come from, or `None`.

    Raises:
        RecipeError: for an argument out of its range.
    """

    refused: ClassVar = {
        "prune": "start from the run before it",
        "cluster": "training would move its values apart. Prune first, then cluster",
        "qat": "the ranges are set. Prune first, then train for quantisation",
    }

    def __init__(self, sparsity=0.7, pattern="unstructured", schedule=None, frequency=None, layers=(), after=None):
        if not 0 < sparsity < 1:
            raise RecipeError(f"`sparsity` must be over 0 and under 1: the share of zeros. Received: sparsity={sparsity}")
        for name, value, known in (("pattern", pattern, PATTERNS), ("schedule", schedule, (*SCHEDULES, None))):
            if value not in known:
                raise RecipeError(f"`{name}` must be one of {', '.join(filter(None, known))}. Received: {name}={value}")
        if pattern == "2:4":
            if sparsity != 0.5:
                raise RecipeError(
                    f"`sparsity` must be 0.5 with the pattern 2:4, which has two zeros in four. Received: sparsity={sparsity}"
                )
            if schedule:
                raise RecipeError(
                    f"`schedule` must be left out with the pattern 2:4, which is there from the first step. "
                    f"Received: schedule={schedule}"
                )
        else:
            schedule = schedule or "polynomial"
        if frequency is not None:
            if frequency < 1:
                raise RecipeError(f"`frequency` must be at least 1 step. Received: frequency={frequency}")
            if schedule != "polynomial":
                raise RecipeError(
                    "`frequency` must be left out where all zeros are there from the first step: they stay where they are. "
                    f"Received: frequency={frequency}, with {schedule or pattern}"
                )
        self.sparsity = sparsity
        self.pattern = pattern
        self.schedule = schedule
        self.frequency = frequency
        self.layers = layers
        settings = {
            "method": "prune",
            "sparsity": sparsity,
            "pattern": pattern,
            "schedule": schedule,
            "frequency": frequency,
            "layers": describe(layers),
        }
        super().__init__(settings, after)
        self.parts = tfmot.load()

    def require(self, recipe):
        super().require(recipe)
        if recipe.ema:
            raise RecipeError(
                "`ema` must be 0 with pruning: an average over steps with other zeros has hardly any. "
                f"Received: ema={recipe.ema}"
            )

    def start(self, classifier, batches, steps, epochs):
        chosen = self._kernels(classifier)
        # tfmot sets 2:4 at step 1 alone, so steps are counted from 1 for all.
        self._step = tf.Variable(1, dtype=tf.int64, trainable=False, name="step")
        masks = [tf.Variable(tf.ones(kernel.shape), trainable=False, name="mask") for kernel in chosen.values()]
        thresholds = [tf.Variable(0.0, trainable=False, name="threshold") for _ in masks]
        self.variables = [self._step, *masks]
        schedule, ramp = self._schedule(steps * epochs)
        # From the epoch in which the last zeros come.
        self.first_epoch = ramp // steps
        pruning = self.parts.Pruning(
            training_step_fn=lambda: self._step,
            pruning_vars=[
                (kernel.value, mask, threshold) for kernel, mask, threshold in zip(chosen.values(), masks, thresholds)
            ],
            pruning_schedule=schedule,
            block_size=(4, 1) if self.pattern == "4x1" else (1, 1),
            block_pooling_type="AVG",
            sparsity_m_by_n=(2, 4) if self.pattern == "2:4" else None,
        )

        # They return nothing: what tfmot gives are operations, which Keras could not take.
        @tf.function(autograph=False)
        def update():
            pruning.conditional_mask_update()
            pruning.weight_mask_op()

        @tf.function(autograph=False)
        def hold():
            pruning.weight_mask_op()
            self._step.assign_add(1)

        self._update, self._hold = update, hold

    def _kernels(self, classifier):
        chosen = kernels(classifier, self.layers)
        if self.pattern == "4x1":
            matrices = {path: kernel for path, kernel in chosen.items() if len(kernel.shape) == 2}
            if self.layers and (others := [path for path in chosen if path not in matrices]):
                raise RecipeError(f"`layers` must name Dense layers with the pattern 4x1. Received: {others[0]}, a convolution")
            chosen = matrices
        if self.pattern != "unstructured" and (odd := [path for path in chosen if chosen[path].shape[-2] % 4]):
            raise RecipeError(
                f"`layers` must name layers whose inputs come in fours with the pattern {self.pattern}. "
                f"Received: {odd[0]}, with {chosen[odd[0]].shape[-2]} inputs: name the others by --layers"
            )
        group = 4 if self.pattern == "4x1" else 1
        for path, kernel in chosen.items():
            groups = kernel.value.shape.num_elements() // group
            # As tfmot rounds it.
            if round(groups * (1 - self.sparsity)) == groups:
                raise RecipeError(
                    f"`sparsity` must be at least {0.5 / groups:.2g} for {path} to have a zero. Received: {self.sparsity}"
                )
        return chosen

    def _schedule(self, steps):
        """tfmot's schedule and the steps until it is at its end.

        Raises:
            RecipeError: if it would do nothing.
        """
        if self.schedule != "polynomial":
            # Once: the zeros would be the least in magnitude ever after.
            return self.parts.ConstantSparsity(self.sparsity, begin_step=1, end_step=1), 0
        if steps < 1 / RAMP:
            raise RecipeError(
                f"`schedule` must be constant in a training of {steps} step, which has no half for the zeros to come in: "
                f"give it more --epochs, or --schedule constant. Received: schedule={self.schedule}"
            )
        frequency = self.frequency or max(1, int(steps * RAMP) // UPDATES)
        ramp = int(steps * RAMP) // frequency * frequency  # its last step must be one of an update
        if ramp == 0:
            raise RecipeError(
                f"`frequency` must be at most {int(steps * RAMP)} in a training of {steps} steps, half of which the "
                f"zeros take to come: nothing would be pruned. Received: frequency={frequency}"
            )
        schedule = self.parts.PolynomialDecay(0.0, self.sparsity, begin_step=1, end_step=1 + ramp, frequency=frequency)
        return schedule, ramp

    def on_train_batch_begin(self, batch, logs=None):
        self._update()

    def on_train_batch_end(self, batch, logs=None):
        self._hold()

    def check(self, classifier):
        chosen = self._kernels(classifier)
        found = {path: float(share_of_zeros([kernel])) for path, kernel in chosen.items()}
        for path, kernel in chosen.items():
            # A block more or less: tfmot rounds to whole ones.
            tolerance = (4 if self.pattern == "4x1" else 1) / kernel.value.shape.num_elements()
            if abs(found[path] - self.sparsity) > tolerance + 1e-9:
                raise RunError(
                    f"{path} has {found[path]:.2%} zeros in place of {self.sparsity:.0%}: nothing was written. Many of its "
                    "weights are equal, or all are 0: leave it out by --layers"
                )
            if not _follows(self.pattern, np.asarray(kernel)):
                raise RunError(f"the zeros of {path} do not lie as {self.pattern} has them: nothing was written")
        return {"sparsity": float(share_of_zeros(chosen.values())), "sparsity_by_layer": found}


def _follows(pattern, kernel):
    """Whether the zeros of a kernel lie as they should: along the input axis, the last but one."""
    if pattern == "unstructured":
        return True
    inputs = np.moveaxis(kernel, -2, -1).reshape(-1, kernel.shape[-2])
    groups = inputs[:, : inputs.shape[1] // 4 * 4].reshape(-1, 4)
    zeros = (groups == 0).sum(axis=1)
    return bool(np.isin(zeros, (2,) if pattern == "2:4" else (0, 4)).all())
