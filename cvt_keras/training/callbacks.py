"""Callbacks that Keras lacks: NaN guard, clean stop, timing, best weights, exact checkpoints."""

import math
import shutil
import time
import zipfile

import keras
import numpy as np

from cvt_keras import environment, runs, signals
from cvt_keras.errors import DivergedError, RecipeError, RunError
from cvt_keras.report.metrics import best_epoch, merit
from cvt_keras.training import distributed

CLASS_WEIGHTS = "class weights"  # key of a checkpoint's `data`
DEFAULT_MACHINE = {"backend": "tensorflow", "devices": 1}  # older versions did not store it


class HaltOnNaN(keras.callbacks.Callback):
    """Raises at the first step whose loss is NaN or infinite, before a checkpoint is written.

    Args:
        advice: the `hint` of the error.
    """

    def __init__(self, advice):
        super().__init__()
        self.advice = advice
        self.epoch = 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        # Keras reports the mean loss of the epoch so far, which stays NaN after one NaN.
        self._require_finite(logs["loss"], f"at step {batch + 1}")

    def on_test_end(self, logs=None):
        self._require_finite(logs["loss"], "after the last step")

    def _require_finite(self, loss, when):
        if not math.isfinite(loss):
            raise DivergedError(f"the loss is NaN or infinite {when} of epoch {self.epoch + 1}", hint=self.advice)


class StopAfterStep(signals.Held, keras.callbacks.Callback):
    """Delays Ctrl-C and SIGTERM to the end of the step. Use it as a context around `fit` and as a callback of it."""

    def __init__(self):
        signals.Held.__init__(self, "this step")
        keras.callbacks.Callback.__init__(self)

    def on_train_batch_end(self, batch, logs=None):
        self.answer()

    def on_test_batch_end(self, batch, logs=None):
        self.answer()


class Stopwatch(keras.callbacks.Callback):
    """Measures the time of each epoch, with and without its validation.

    Attributes:
        train_seconds: seconds of the training batches of the current epoch.
        seconds: seconds of the whole epoch.
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
    """Keeps the weights of the epoch with the highest validation accuracy and, among equals, the lowest validation loss.

    The same rule as `report.metrics.best_epoch`. With few validation images many epochs have the same accuracy. It must come
    before Keras' `SwapEMAWeights`, which swaps the averaged weights out again at the end of a validation.

    Args:
        first_epoch: the first epoch that counts, from 0.

    Attributes:
        score: the best validation accuracy, in 0..1.
        loss: the validation loss of the same epoch.
        weights: the result of `model.get_weights()`.
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
        # Python floats, as in history.csv, which a resumed run compares with.
        accuracy, loss = float(logs["accuracy"]), float(logs["loss"])
        if self._epoch >= self.first_epoch and merit(accuracy, loss) > merit(self.score, self.loss):
            self.score, self.loss = accuracy, loss
            self.weights = self.model.get_weights()


class EarlyStopping(keras.callbacks.Callback):
    """Stops after a number of epochs without improvement, by the rule of `BestWeights`.

    Keras' `EarlyStopping` compares a single metric, and starts anew after a resume. This one reads the stored history.

    Args:
        patience: the number of epochs; 0 never stops.
        checkpoints: the `Checkpoints`, which must come before this callback.
        first_epoch: the first epoch that counts, from 0.
    """

    def __init__(self, patience, checkpoints, first_epoch=0):
        super().__init__()
        self.patience = patience
        self.checkpoints = checkpoints
        self.first_epoch = first_epoch

    @property
    def is_due(self):
        """Whether training must stop after the epochs so far."""
        return is_early_stop_due(self.checkpoints.history, self.patience, self.first_epoch)

    def on_epoch_end(self, epoch, logs=None):
        if self.is_due and epoch + 1 < self.params["epochs"]:
            best = best_epoch(self.checkpoints.history, self.first_epoch)["epoch"]
            print(f"early stopping after epoch {epoch + 1} of {self.params['epochs']}: epoch {best} is the best", flush=True)
            self.model.stop_training = True


def is_early_stop_due(history, patience, first_epoch=0):
    """Whether the last `patience` epochs brought no improvement; see `EarlyStopping`."""
    if not patience or len(history) <= first_epoch:
        return False
    return len(history) - best_epoch(history, first_epoch)["epoch"] >= patience


class TensorBoard(keras.callbacks.TensorBoard):
    """Keras' TensorBoard, with a flush after each epoch. Keras flushes every two minutes, and a kill loses the rest."""

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        for writer in self._writers.values():
            writer.flush()


class Checkpoints(keras.callbacks.Callback):
    """Writes a checkpoint after each epoch. A run that is resumed from it ends like an uninterrupted one.

    A checkpoint is a folder such as `epoch-0003`. It is written atomically, and then replaces the one before. It holds the raw
    weights, the states of the random seeds, the variables of the optimizer with the moving average, and the best weights.
    `state.json` holds the best score and loss, the history, `data` and `machine`. After the checkpoint `history.csv` is
    written. Of several processes, the first writes, and the others wait for it.

    Args:
        run_dir: the run folder.
        data: a dict that identifies the images and labels; see `Source.fingerprint`.
        stopwatch, best: the `Stopwatch` and the `BestWeights`, which must come before this callback.
        extra: variables to store besides those of the model and the optimizer.
        devices: number of devices to train on.

    Attributes:
        history: a dict per finished epoch.
        machine: what the result depends on besides the recipe and the images: backend and number of devices.
        former_machine: `machine` in the restored checkpoint, or `None`.
    """

    # Why not Keras' `BackupAndRestore`: it leaves out the seed state of dropout, so the weights differ after a resume. After
    # `SwapEMAWeights` it saves the averaged weights. It deletes its backup when training stops gracefully. It writes weights
    # and metadata one after the other, so a kill between them leaves parts that do not match.

    def __init__(self, run_dir, data, stopwatch, best, extra=(), devices=1):
        super().__init__()
        self.extra = extra
        self.run_dir = run_dir
        self.data = data
        self.machine = {"backend": environment.backend(), "devices": devices}
        self.former_machine = None
        self.stopwatch = stopwatch
        self.best = best
        self.history = []

    def restore(self, model):
        """Loads the newest checkpoint, if there is one, into a compiled model with a built optimizer and into the callbacks.

        Raises:
            RecipeError: if the checkpoint belongs to other data, or to another network or optimizer.
            RunError: if it is damaged.
        """
        stored = _stored(self.run_dir)
        if not stored:
            return
        newest = stored[-1]
        try:
            values, best = _arrays(newest / "state.npz"), _arrays(newest / "best.npz")
            state = runs.read_json(newest / "state.json")
            data, history, score = (state[name] for name in ("data", "history", "best_score"))
            self.former_machine = state.get("machine", DEFAULT_MACHINE)
        except (OSError, ValueError, LookupError, TypeError, EOFError, zipfile.BadZipFile, RunError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise RunError(f"{newest} is damaged: {reason}", hint="Remove it to start again from epoch 1") from error
        changed = [name for name, value in self.data.items() if data.get(name) != value]
        if changed:
            differences = "; ".join(f"{name}: {data.get(name)!r} in the run, now {self.data[name]!r}" for name in changed)
            if changed == [CLASS_WEIGHTS]:
                raise RecipeError(
                    f"the run in {self.run_dir} can't be resumed with other class weights: {differences}",
                    argument="class_weights",
                    hint="Use the same --class-weights as before, or train in another --run-dir",
                )
            raise RecipeError(
                f"the run in {self.run_dir} can't be resumed with other images: {differences}",
                argument="data_dir",
                hint="Restore the former images, or train in another --run-dir",
            )
        variables = self._state(model)
        if {name: value.shape for name, value in values.items()} != {name: tuple(v.shape) for name, v in variables.items()}:
            raise RecipeError(
                f"{newest} belongs to another network or optimizer", argument="run_dir", hint="Train in another --run-dir"
            )
        for name, variable in variables.items():
            variable.assign(values[name])
        self.history, self.best.score, self.best.weights = runs.from_one(history), score, list(best.values()) or None
        self.best.loss = state.get("best_loss", _loss_of_first(self.history[self.best.first_epoch :], score))
        if distributed.is_first():
            runs.write_csv(self.run_dir / runs.HISTORY, self.history)  # a kill may have come before it was written

    def share_state(self, model):
        """Gives all processes of a group the state of the first, so that they start from the same to the last bit."""
        if distributed.count() == 1:
            return
        variables = list(self._state(model).values())
        for variable, value in zip(variables, distributed.broadcast([np.asarray(v) for v in variables])):
            variable.assign(value)

    def on_epoch_end(self, epoch, logs=None):
        row = {
            "epoch": epoch + 1,
            "learning_rate": float(np.asarray(self.model.optimizer.learning_rate)),
            **{name: float(value) for name, value in logs.items()},
            "train_seconds": self.stopwatch.train_seconds,
            "seconds": self.stopwatch.seconds,
        }
        self.history = [*self.history, row]
        if distributed.is_first():
            self._write(epoch)
        distributed.wait(f"checkpoint {epoch}")

    def _write(self, epoch):
        with runs.whole_folder(self._folder / f"epoch-{epoch + 1:04d}") as unfinished:
            np.savez(unfinished / "state.npz", **{name: np.asarray(v) for name, v in self._state(self.model).items()})
            np.savez(unfinished / "best.npz", *(self.best.weights or ()))
            best = {"best_score": self.best.score}
            if self.best.weights is not None:  # otherwise the loss is infinite, which JSON can't store
                best["best_loss"] = self.best.loss
            state = {**best, "history": self.history, "data": self.data, "machine": self.machine}
            runs.write_json(unfinished / "state.json", state)
        for older in _stored(self.run_dir)[:-1]:
            shutil.rmtree(older)
        runs.write_csv(self.run_dir / runs.HISTORY, self.history)

    @property
    def _folder(self):
        return self.run_dir / runs.CHECKPOINTS

    def _state(self, model):
        """All variables that training changes, by index and name.

        Not by path: in a second model of the same process, Keras gives layers other numbers.
        """
        # `model.variables` includes the states of the random seeds.
        variables = [*model.variables, *model.optimizer.variables, *self.extra]
        return {f"{i:04d} {variable.name}": variable for i, variable in enumerate(variables)}


def stored_data(run_dir):
    """The `data` of the newest checkpoint in a run folder, or `None` if there is no checkpoint or it is damaged."""
    return _stored_entry(run_dir, "data")


def stored_machine(run_dir):
    """The `machine` of the newest checkpoint in a run folder, or `{}` if there is no checkpoint."""
    return (_stored_entry(run_dir, "machine") or DEFAULT_MACHINE) if _stored(run_dir) else {}


def stored_history(run_dir):
    """The history in the newest checkpoint of a run folder, a dict per epoch; `[]` without one, or if it is damaged."""
    return runs.from_one(_stored_entry(run_dir, "history") or [])


def _stored_entry(run_dir, name):
    stored = _stored(run_dir)
    try:
        return runs.read_json(stored[-1] / "state.json")[name] if stored else None
    except (OSError, LookupError, TypeError, RunError):
        return None  # `Checkpoints.restore` raises for it


def _loss_of_first(history, score):
    """The validation loss of the first epoch with this validation accuracy: older versions kept its weights."""
    return next((row["val_loss"] for row in history if row["val_accuracy"] == score), math.inf)


def _stored(run_dir):
    """The checkpoints in a run folder, oldest first."""
    folders = [path for path in (run_dir / runs.CHECKPOINTS).glob("epoch-*") if path.name.removeprefix("epoch-").isdecimal()]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("epoch-")))


def _arrays(path):
    with np.load(path) as stored:
        return dict(stored)
