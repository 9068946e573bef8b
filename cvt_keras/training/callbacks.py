"""Callbacks that Keras lacks: NaN guard, clean stop, timing, best weights, exact checkpoints."""

import math
import shutil
import time
import zipfile

import keras
import numpy as np

from cvt_keras import runs, signals
from cvt_keras.errors import DivergedError, RecipeError, RunError
from cvt_keras.report.metrics import best_epoch, merit

CLASS_WEIGHTS = "class weights"  # key of a checkpoint's `data`


class HaltOnNaN(keras.callbacks.Callback):
    """Ends the training at the step whose loss is NaN or infinite, before anything of it is kept.

    Args:
        advice: what to do about it, for the error's `hint`.
    """

    def __init__(self, advice):
        super().__init__()
        self.advice = advice
        self.epoch = 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        # The mean over the epoch so far: once NaN, it stays NaN.
        self._require_finite(logs["loss"], f"at step {batch + 1}")

    def on_test_end(self, logs=None):
        self._require_finite(logs["loss"], "after the last step")

    def _require_finite(self, loss, when):
        if not math.isfinite(loss):
            raise DivergedError(f"the loss is NaN or infinite {when} of epoch {self.epoch + 1}", hint=self.advice)


class StopAfterStep(signals.Held, keras.callbacks.Callback):
    """Holds Ctrl-C and SIGTERM back until the step is done: to be entered around `fit`, and given to it."""

    def __init__(self):
        signals.Held.__init__(self, "this step")
        keras.callbacks.Callback.__init__(self)

    def on_train_batch_end(self, batch, logs=None):
        self.answer()

    def on_test_batch_end(self, batch, logs=None):
        self.answer()


class Stopwatch(keras.callbacks.Callback):
    """Times each epoch, with the validation after it and without.

    Attributes:
        train_seconds: of the training batches of the epoch at hand.
        seconds: of all of it.
    """

    def on_epoch_begin(self, epoch, logs=None):
        self._started = time.perf_counter()
        self.train_seconds = None

    def on_test_begin(self, logs=None):
        self.train_seconds = time.perf_counter() - self._started

    def on_epoch_end(self, epoch, logs=None):
        self.seconds = time.perf_counter() - self._started
        if self.train_seconds is None:
            self.train_seconds = self.seconds


class BestWeights(keras.callbacks.Callback):
    """Keeps the weights of the epoch that `report.metrics.best_epoch` names: highest validation accuracy, then lowest loss.

    With few validation images many epochs have the same accuracy. It must stand before Keras' `SwapEMAWeights`, which takes the
    averaged weights away again at the end of a validation.

    Args:
        first_epoch: counted from 0; those before it are not looked at.

    Attributes:
        score: validation accuracy, a fraction of 1.
        loss: the validation loss of the same epoch.
        weights: as `model.get_weights()` gives them.
    """

    def __init__(self, first_epoch=0):
        super().__init__()
        self.first_epoch = first_epoch
        self.score = -1.0
        self.loss = math.inf
        self.weights = None
        self._epoch = 0

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch

    def on_test_end(self, logs=None):
        # Python's floats, as history.csv has them: a resumed run compares with those.
        accuracy, loss = float(logs["accuracy"]), float(logs["loss"])
        if self._epoch >= self.first_epoch and merit(accuracy, loss) > merit(self.score, self.loss):
            self.score, self.loss = accuracy, loss
            self.weights = self.model.get_weights()


class EarlyStopping(keras.callbacks.Callback):
    """Ends the training after a number of epochs without a better one, by the rule of `BestWeights`.

    Not Keras' own: it compares one metric alone, and forgets on a resume. This one reads the history, which a checkpoint holds.

    Args:
        patience: the number of epochs; 0 never ends it.
        checkpoints: the `Checkpoints`, which stand before this callback.
        first_epoch: counted from 0; those before it don't count.
    """

    def __init__(self, patience, checkpoints, first_epoch=0):
        super().__init__()
        self.patience = patience
        self.checkpoints = checkpoints
        self.first_epoch = first_epoch

    @property
    def is_due(self):
        """Whether the epochs so far end the training."""
        history = self.checkpoints.history
        if not self.patience or len(history) <= self.first_epoch:
            return False
        return len(history) - best_epoch(history, self.first_epoch)["epoch"] >= self.patience

    def on_epoch_end(self, epoch, logs=None):
        if self.is_due and epoch + 1 < self.params["epochs"]:
            best = best_epoch(self.checkpoints.history, self.first_epoch)["epoch"]
            print(f"stopped after epoch {epoch + 1} of {self.params['epochs']}: epoch {best} is still the best", flush=True)
            self.model.stop_training = True


class TensorBoard(keras.callbacks.TensorBoard):
    """Keras' own, which keeps values back for two minutes, so that a run that is killed loses them."""

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        for writer in self._writers.values():
            writer.flush()


class Checkpoints(keras.callbacks.Callback):
    """After each epoch, all that the next one needs: a run that goes on from there ends as if it had never stopped.

    A checkpoint is a folder `epoch-0003` that appears whole; it then takes the place of the one before. It holds the raw
    weights and the seeds' states, the optimizer's variables with the moving average, the best weights so far, and in
    `state.json` the best score and loss, the history and what tells the data from others. After it `history.csv` is written.

    Args:
        run_dir: the run folder.
        data: a dict, equal for the same images and labels alone; see `Source.fingerprint`.
        stopwatch, best: the callbacks whose findings are kept; they stand before this one.
        extra: variables to be kept beside the model's and the optimizer's.

    Attributes:
        history: a dict for each finished epoch.
    """

    # By hand: Keras' `BackupAndRestore` leaves out the seed state of dropout, so that the weights differ after a resume. After
    # `SwapEMAWeights` it saves the averaged weights. It deletes its backup when training stops gracefully. It writes weights
    # and metadata one after the other, so that a kill between them leaves a backup whose parts do not fit together.

    def __init__(self, run_dir, data, stopwatch, best, extra=()):
        super().__init__()
        self.extra = extra
        self.run_dir = run_dir
        self.data = data
        self.stopwatch = stopwatch
        self.best = best
        self.history = []

    def restore(self, model):
        """Sets a compiled model, its optimizer built, and the other callbacks to the newest checkpoint, if there is one.

        Raises:
            RecipeError: if the checkpoint is of other data, or another network or optimizer.
            RunError: if it is broken.
        """
        stored = _stored(self.run_dir)
        if not stored:
            return
        newest = stored[-1]
        try:
            values, best = _arrays(newest / "state.npz"), _arrays(newest / "best.npz")
            state = runs.read_json(newest / "state.json")
            data, history, score = (state[name] for name in ("data", "history", "best_score"))
        except (OSError, ValueError, LookupError, TypeError, EOFError, zipfile.BadZipFile, RunError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise RunError(f"{newest} is damaged: {reason}", hint="Remove it, and training starts from epoch 1") from error
        changed = [name for name, value in self.data.items() if data.get(name) != value]
        if changed:
            differences = ", ".join(f"{name} was {data.get(name)!r} and is {self.data[name]!r}" for name in changed)
            if changed == [CLASS_WEIGHTS]:
                raise RecipeError(
                    f"the run in {self.run_dir} can't be resumed with other class weights: {differences}",
                    argument="class_weights",
                    hint="Give the former weights to --class-weights, or train in another --run-dir",
                )
            raise RecipeError(
                f"the run in {self.run_dir} can't be resumed with other images: {differences}",
                argument="data_dir",
                hint="Bring the former images back, or train in another --run-dir",
            )
        variables = self._state(model)
        if {name: value.shape for name, value in values.items()} != {name: tuple(v.shape) for name, v in variables.items()}:
            raise RecipeError(
                f"{newest} is of another network or optimizer", argument="run_dir", hint="Train anew in another --run-dir"
            )
        for name, variable in variables.items():
            variable.assign(values[name])
        self.history, self.best.score, self.best.weights = runs.from_one(history), score, list(best.values()) or None
        self.best.loss = state.get("best_loss", _loss_of_first(self.history[self.best.first_epoch :], score))
        runs.write_csv(self.run_dir / runs.HISTORY, self.history)  # which the kill may have come before

    def on_epoch_end(self, epoch, logs=None):
        measured = {
            "epoch": epoch + 1,
            "learning_rate": float(np.asarray(self.model.optimizer.learning_rate)),
            **{name: float(value) for name, value in logs.items()},
            "train_seconds": self.stopwatch.train_seconds,
            "seconds": self.stopwatch.seconds,
        }
        self.history = [*self.history, measured]
        with runs.whole_folder(self._folder / f"epoch-{epoch + 1:04d}") as aside:
            np.savez(aside / "state.npz", **{name: np.asarray(v) for name, v in self._state(self.model).items()})
            np.savez(aside / "best.npz", *(self.best.weights or ()))
            best = {"best_score": self.best.score}
            if self.best.weights is not None:  # else it is infinite, which JSON has not
                best["best_loss"] = self.best.loss
            runs.write_json(aside / "state.json", {**best, "history": self.history, "data": self.data})
        for older in _stored(self.run_dir)[:-1]:
            shutil.rmtree(older)
        runs.write_csv(self.run_dir / runs.HISTORY, self.history)

    @property
    def _folder(self):
        return self.run_dir / runs.CHECKPOINTS

    def _state(self, model):
        """All variables that training changes, by place and name.

        Not by path: Keras numbers the layers of a second model in the same process on.
        """
        # The model's with the states of its random seeds.
        variables = [*model.variables, *model.optimizer.variables, *self.extra]
        return {f"{i:04d} {variable.name}": variable for i, variable in enumerate(variables)}


def stored_data(run_dir):
    """The `data` of the newest checkpoint in a run folder, or `None` without one, or with one that is broken."""
    stored = _stored(run_dir)
    try:
        return runs.read_json(stored[-1] / "state.json")["data"] if stored else None
    except (OSError, LookupError, TypeError, RunError):
        return None  # `Checkpoints.restore` tells of it


def _loss_of_first(history, score):
    """The validation loss of the first epoch with this validation accuracy, whose weights older versions kept."""
    return next((row["val_loss"] for row in history if row["val_accuracy"] == score), math.inf)


def _stored(run_dir):
    """The checkpoints in a run folder, oldest first."""
    found = [path for path in (run_dir / runs.CHECKPOINTS).glob("epoch-*") if path.name.removeprefix("epoch-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("epoch-")))


def _arrays(path):
    with np.load(path) as stored:
        return dict(stored)
