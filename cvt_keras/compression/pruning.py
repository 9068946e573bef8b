"""Pruning: sets the smallest weights to zero during training (Zhu & Gupta, arXiv 1710.01878)."""

from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

from cvt_keras.compression import tfmot
from cvt_keras.compression.kernels import describe, kernels, share_of_zeros
from cvt_keras.compression.options import Layers, Pattern, Pruning, Schedule
from cvt_keras.errors import RecipeError, RunError
from cvt_keras.training.compressor import Compressor

# Share of the training in which zeros are added. In the rest, the other weights recover the accuracy.
RAMP = 0.5
UPDATES = 20  # of the masks, at least, if there are as many steps


class MagnitudePruning(Compressor):
    """Prunes kernels with tfmot's schedules and masks. Masks are updated before a step, and applied before and after it.

    Args:
        sparsity: share of zeros in each kernel, between 0 and 1. `None` means 0.7, or 0.5 with `"2:4"`, which allows no
            other.
        pattern: `"unstructured"`; `"2:4"`, two zeros in every four weights along the input axis; or `"4x1"`, blocks of four
            inputs of one output, in Dense layers only.
        schedule: `"polynomial"`, from 0 to `sparsity` over the first half of the training; or `"constant"`, `sparsity` from
            the first step. `None` means `"polynomial"`. With `"2:4"` it must be `None`: the first step sets all zeros.
        frequency: steps between updates of the masks, with `"polynomial"`. `None` means at least 20 updates, or one per step
            in a short training.
        layers: names, a predicate or `None`, as in `kernels`.
        after: `settings` of the compression that the starting weights come from, or `None`.

    Raises:
        RecipeError: for an argument out of range.
    """

    refused: ClassVar = {
        "prune": "start from the run that it was made from",
        "cluster": "training would move its equal values apart. Prune first, then cluster",
        "qat": "its quantisation ranges are fixed. Prune first, then run qat",
    }

    def __init__(
        self,
        sparsity: float | None = None,
        pattern: Pattern = "unstructured",
        schedule: Schedule | None = None,
        frequency: int | None = None,
        layers: Layers = None,
        after: dict[str, Any] | None = None,
    ) -> None:
        options = {"sparsity": sparsity, "pattern": pattern, "schedule": schedule, "frequency": frequency, "layers": layers}
        Pruning(**options).require()  # type: ignore[arg-type]  # a predicate has no flag
        if sparsity is None:
            sparsity = 0.5 if pattern == "2:4" else 0.7
        if pattern != "2:4":
            schedule = schedule or "polynomial"
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
                "`ema` must be 0 with pruning: an average of networks with different zeros has few zeros. "
                f"Received: ema={recipe.ema}",
                argument="ema",
            )

    def start(self, classifier, batches, steps, epochs):
        chosen = self._kernels(classifier)
        # Counts from 1: tfmot sets the zeros of 2:4 at step 1 only.
        self._step = tf.Variable(1, dtype=tf.int64, trainable=False, name="step")
        masks = [tf.Variable(tf.ones(kernel.shape), trainable=False, name="mask") for kernel in chosen.values()]
        thresholds = [tf.Variable(0.0, trainable=False, name="threshold") for _ in masks]
        self.variables = [self._step, *masks]
        schedule, ramp = self._schedule(steps * epochs)
        # The epoch in which the last zeros are set.
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

        # Both return None: Keras can't handle the operations that tfmot returns.
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
            if self.layers is not None and (convolutions := [path for path in chosen if path not in matrices]):
                raise RecipeError(
                    f"`layers` must name Dense layers with the pattern 4x1. Received: {convolutions[0]}, a convolution",
                    argument="layers",
                )
            chosen = matrices
        if self.pattern != "unstructured" and (unfit := [path for path in chosen if chosen[path].shape[-2] % 4]):
            raise RecipeError(
                f"`layers` must name layers whose inputs are a multiple of 4 with the pattern {self.pattern}. "
                f"Received: {unfit[0]}, with {chosen[unfit[0]].shape[-2]} inputs",
                argument="layers",
                hint="Name the other layers with --layers",
            )
        group = 4 if self.pattern == "4x1" else 1
        for path, kernel in chosen.items():
            groups = kernel.value.shape.num_elements() // group
            # tfmot rounds the same way.
            if round(groups * (1 - self.sparsity)) == groups:
                raise RecipeError(
                    f"`sparsity` must be at least {0.5 / groups:.2g} for {path} to have a zero. "
                    f"Received: sparsity={self.sparsity}",
                    argument="sparsity",
                )
        return chosen

    def _schedule(self, steps):
        """Returns tfmot's schedule, and the number of steps until its last update.

        Raises:
            RecipeError: if nothing would be pruned.
        """
        if self.schedule != "polynomial":
            # One update: afterwards the zeros are the smallest weights anyway.
            return self.parts.ConstantSparsity(self.sparsity, begin_step=1, end_step=1), 0
        if steps < 1 / RAMP:
            raise RecipeError(
                f"`schedule` must be constant in a training of {steps} step: polynomial adds zeros in the first half of the "
                f"steps. Received: schedule={self.schedule}",
                argument="schedule",
                hint="Give more --epochs, or --schedule constant",
            )
        frequency = self.frequency or max(1, int(steps * RAMP) // UPDATES)
        ramp = int(steps * RAMP) // frequency * frequency  # ends with an update
        if ramp == 0:
            raise RecipeError(
                f"`frequency` must be at most {int(steps * RAMP)} in a training of {steps} steps: zeros are added in the first "
                f"half of the steps. Received: frequency={frequency}",
                argument="frequency",
            )
        schedule = self.parts.PolynomialDecay(0.0, self.sparsity, begin_step=1, end_step=1 + ramp, frequency=frequency)
        return schedule, ramp

    def on_train_batch_begin(self, batch, logs=None):
        self._update()

    def on_train_batch_end(self, batch, logs=None):
        self._hold()

    def check(self, classifier):
        chosen = self._kernels(classifier)
        sparsity_by_layer = {path: float(share_of_zeros([kernel])) for path, kernel in chosen.items()}
        for path, kernel in chosen.items():
            # tfmot rounds to whole blocks.
            tolerance = (4 if self.pattern == "4x1" else 1) / kernel.value.shape.num_elements()
            if abs(sparsity_by_layer[path] - self.sparsity) > tolerance + 1e-9:
                raise RunError(
                    f"{path} has {sparsity_by_layer[path]:.2%} zeros instead of {self.sparsity:.0%}, so no model was written: "
                    "many of its weights are equal, or all are 0",
                    argument="layers",
                    hint="Name the other layers with --layers, in another --run-dir",
                )
            if not _follows(self.pattern, np.asarray(kernel)):
                raise RunError(f"the zeros of {path} do not follow the pattern {self.pattern}, so no model was written")
        return {"sparsity": float(share_of_zeros(chosen.values())), "sparsity_by_layer": sparsity_by_layer}


def _follows(pattern, kernel):
    """Whether a kernel's zeros follow the pattern along its input axis, the second to last."""
    if pattern == "unstructured":
        return True
    inputs = np.moveaxis(kernel, -2, -1).reshape(-1, kernel.shape[-2])
    groups = inputs[:, : inputs.shape[1] // 4 * 4].reshape(-1, 4)
    zeros = (groups == 0).sum(axis=1)
    return bool(np.isin(zeros, (2,) if pattern == "2:4" else (0, 4)).all())
