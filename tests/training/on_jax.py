"""Trains on JAX in a process of its own, alone or in a group: python on_jax.py JOBS, a JSON list of the arguments of `run`.

A job may have `stop_after`, a number of epochs, after which it stops as by Ctrl-C.
"""

import json
import os
import sys

os.environ["KERAS_BACKEND"] = "jax"

from cvt_keras import environment
from cvt_keras.training import Recipe, distributed, loop


def stopping_after(epochs):
    class Stopping(loop.EarlyStopping):
        def on_epoch_end(self, epoch, logs=None):
            if epoch + 1 == epochs:
                raise KeyboardInterrupt

    return Stopping


def main(jobs):
    environment.start(*environment.TRAINING_BACKENDS)
    if group := distributed.find():
        distributed.join(group)
    early_stopping = loop.EarlyStopping
    for job in jobs:
        stop_after = job.pop("stop_after", None)
        loop.EarlyStopping = stopping_after(stop_after) if stop_after else early_stopping
        recipe = Recipe.from_settings(job.pop("recipe"))
        try:
            loop.run(recipe, evaluate_test=False, **job)
        except KeyboardInterrupt:
            assert stop_after


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
