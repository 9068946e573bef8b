import csv
import dataclasses
import shutil
import signal
import time
import types

import keras
import numpy as np
import pytest

from cvt_keras import build_classifier, runs
from cvt_keras.errors import DivergedError, RecipeError, RunError
from cvt_keras.training.callbacks import BestWeights, Checkpoints, EarlyStopping, HaltOnNaN, StopAfterStep, Stopwatch
from cvt_keras.training.compressor import Compressor
from cvt_keras.training.optimizers import make_optimizer
from cvt_keras.training.recipes import SMOKE

pytestmark = pytest.mark.usefixtures("eager")
DATA = {"note": "", "train images": 8}


@pytest.mark.parametrize("validated", [True, False])
def test_the_stopwatch_separates_training_from_validation(validated, monkeypatch):
    times = iter([100.0, 130.0, 135.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    watch = Stopwatch()
    watch.on_epoch_begin(0)
    if validated:
        watch.on_test_begin()
    watch.on_epoch_end(0)
    assert watch.train_seconds == 30
    assert watch.seconds == (35 if validated else 30)


def test_a_loss_of_nan_names_its_step():
    halt = HaltOnNaN("lower the rate")
    halt.on_epoch_begin(2)
    halt.on_train_batch_end(6, {"loss": 1.0})
    with pytest.raises(DivergedError) as error:
        halt.on_train_batch_end(7, {"loss": float("nan")})
    assert "step 8 of epoch 3" in error.value.summary
    assert error.value.hint == "lower the rate"
    with pytest.raises(DivergedError) as error:
        halt.on_test_end({"loss": float("inf")})
    assert "last step of epoch 3" in error.value.summary


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", ["on_train_batch_end", "on_test_batch_end"])
def test_a_signal_waits_for_the_end_of_the_step(heard, number, step):
    with pytest.raises(KeyboardInterrupt), StopAfterStep() as stop:
        getattr(stop, step)(0)
        signal.raise_signal(number)
        assert not heard
        getattr(stop, step)(1)
    assert heard == [number]
    with pytest.raises(KeyboardInterrupt):  # the previous handler is back
        signal.raise_signal(number)


def _compiled(ema=0.0, precision="float32"):
    """A small compiled network, images and labels."""
    recipe = dataclasses.replace(SMOKE, ema=ema, optimizer="muon")
    model = build_classifier("cvt_tiny", 3, (16, 16, 3), dtype=precision)
    model.compile(make_optimizer(recipe, model, 10), "mse", metrics=["accuracy"])
    model.optimizer.build(model.trainable_variables)
    images, labels = np.random.default_rng(0).uniform(0, 255, (8, 16, 16, 3)), np.eye(3)[np.arange(8) % 3]
    return model, images, labels


def test_the_best_weights_are_the_averaged_ones_of_the_best_epoch():
    model, images, labels = _compiled(ema=0.9)
    best = BestWeights()
    model.fit(
        images,
        labels,
        batch_size=4,
        epochs=1,
        validation_data=(images, labels),
        verbose=0,
        callbacks=[best, keras.callbacks.SwapEMAWeights()],
    )
    # `fit` leaves the averages in the model.
    for ours, theirs in zip(best.weights, model.get_weights()):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_of_epochs_with_equal_accuracy_the_lowest_loss_is_kept():
    best = BestWeights()
    best.set_model(build_classifier("cvt_tiny", 3, (16, 16, 3)))
    is_kept = []
    for accuracy, loss in ((0.5, 1.0), (0.5, 1.0), (0.5, 0.5), (0.4, 0.1), (0.5, 0.6), (0.75, 2.0)):
        before = best.weights
        best.on_test_end({"accuracy": accuracy, "loss": loss})
        is_kept.append(best.weights is not before)
    assert is_kept == [True, False, True, False, False, True]  # among equals in both the earliest
    assert (best.score, best.loss) == (0.75, 2.0)


@pytest.mark.parametrize("precision", ["float32", "mixed_float16"])
def test_a_checkpoint_holds_every_variable(tmp_path, precision):
    (tmp_path / "checkpoints").mkdir()
    model, images, labels = _compiled(ema=0.9, precision=precision)

    def callbacks():
        stopwatch, best = Stopwatch(), BestWeights()
        return stopwatch, best, Checkpoints(tmp_path, DATA, stopwatch, best)

    stopwatch, best, checkpoints = callbacks()
    checkpoints.restore(model)
    assert checkpoints.history == []
    swap = keras.callbacks.SwapEMAWeights()
    model.fit(
        images,
        labels,
        batch_size=4,
        epochs=2,
        validation_data=(images, labels),
        verbose=0,
        callbacks=[stopwatch, best, swap, checkpoints],
    )
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["epoch-0002"]

    keras.utils.set_random_seed(1)
    other, *_ = _compiled(ema=0.9, precision=precision)
    _, other_best, restored = callbacks()
    restored.restore(other)
    with np.load(tmp_path / "checkpoints" / "epoch-0002" / "state.npz") as stored:
        saved = dict(stored)
    names = " ".join(saved)
    for part in ("cls_token", "moving_variance", "seed_generator_state", "iteration", "momentum", "velocity", "average"):
        assert part in names, part
    assert ("dynamic_scale" in names) == (precision == "mixed_float16")
    for variable, value in zip([*other.variables, *other.optimizer.variables], saved.values()):
        np.testing.assert_array_equal(np.asarray(variable), value)
    assert restored.history == checkpoints.history
    assert [row["epoch"] for row in restored.history] == [1, 2]
    assert (other_best.score, other_best.loss) == (best.score, best.loss)
    assert best.loss == min(row["val_loss"] for row in checkpoints.history if row["val_accuracy"] == best.score)
    for ours, theirs in zip(other_best.weights, best.weights):
        np.testing.assert_array_equal(ours, theirs)
    with open(tmp_path / "history.csv") as file:
        assert [float(row["val_loss"]) for row in csv.DictReader(file)] == [row["val_loss"] for row in restored.history]


@pytest.fixture(scope="module")
def model():
    return _compiled()[0]


@pytest.fixture(scope="module")
def run_dir(eager, tmp_path_factory):
    """A run folder with a checkpoint, to be copied."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "checkpoints").mkdir()
    model, images, labels = _compiled()
    stopwatch, best = Stopwatch(), BestWeights()
    checkpoints = Checkpoints(folder, DATA, stopwatch, best)
    model.fit(images, labels, validation_data=(images, labels), verbose=0, callbacks=[stopwatch, best, checkpoints])
    return folder


@pytest.fixture
def checkpoint(run_dir, tmp_path):
    """The folder of a checkpoint. The run folder is `tmp_path`."""
    shutil.copytree(run_dir, tmp_path, dirs_exist_ok=True)
    return tmp_path / "checkpoints" / "epoch-0001"


def _restore(run_dir, model, data=DATA):
    Checkpoints(run_dir, data, Stopwatch(), BestWeights()).restore(model)


def test_the_newest_checkpoint_has_the_highest_number(checkpoint, tmp_path, model):
    state = runs.read_json(checkpoint / "state.json")
    for name in ("epoch-9999", "epoch-10000", "epoch-9999 (copy)"):
        shutil.copytree(checkpoint, checkpoint.with_name(name))
        runs.write_json(checkpoint.with_name(name) / "state.json", {**state, "best_score": name})
    best = BestWeights()
    Checkpoints(tmp_path, DATA, Stopwatch(), best).restore(model)
    assert best.score == "epoch-10000"


def test_a_checkpoint_with_other_class_weights_is_refused(checkpoint, tmp_path, model):
    _restore(tmp_path, model)  # without class weights
    with pytest.raises(RecipeError) as error:
        _restore(tmp_path, model, data={**DATA, "class weights": [1.0, 2.0]})
    assert error.value.argument == "class_weights"


def test_a_checkpoint_of_an_older_version_has_no_loss(checkpoint, tmp_path, model):
    state = runs.read_json(checkpoint / "state.json")
    loss = state.pop("best_loss")
    runs.write_json(checkpoint / "state.json", state)
    best = BestWeights()
    Checkpoints(tmp_path, DATA, Stopwatch(), best).restore(model)
    assert best.loss == loss  # from the history


def test_a_checkpoint_of_another_network_is_refused(checkpoint, tmp_path):
    with pytest.raises(RecipeError) as error:
        _restore(tmp_path, _compiled(ema=0.5)[0])
    assert error.value.argument == "run_dir"
    assert str(checkpoint) in error.value.summary


def test_a_checkpoint_of_other_data_is_refused(checkpoint, tmp_path, model):
    with pytest.raises(RecipeError) as error:
        _restore(tmp_path, model, data={**DATA, "train images": 9})
    assert error.value.argument == "data_dir"
    assert "train images: 8 in the run, now 9" in error.value.summary


@pytest.mark.parametrize("name", ["state.npz", "best.npz", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "changed"])
def test_a_damaged_checkpoint_is_named(checkpoint, tmp_path, model, name, damage):
    file = checkpoint / name
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "changed" and name == "state.json":
        file.write_text("[]")
    elif damage == "changed":
        file.write_bytes(data[:300] + bytes(255 - byte for byte in data[300:400]) + data[400:])
    else:
        file.write_bytes(data[: len(data) // 2] if damage == "truncated" else b"")
    with pytest.raises(RunError) as error:
        _restore(tmp_path, model)
    assert str(checkpoint) in error.value.summary
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "patience, first_epoch, scores, due",
    [
        (2, 0, [(0.5, 1.0), (0.4, 1.0)], False),
        (2, 0, [(0.5, 1.0), (0.4, 0.9), (0.5, 1.0)], True),
        (2, 0, [(0.5, 1.0), (0.4, 0.9), (0.5, 0.9)], False),  # equal accuracy, lower loss
        (0, 0, [(0.5, 1.0)] * 9, False),
        (1, 2, [(0.9, 0.1), (0.8, 1.0)], False),  # before the first epoch that counts
        (1, 2, [(0.9, 0.1), (0.8, 1.0), (0.5, 1.0)], False),
        (1, 2, [(0.9, 0.1), (0.8, 1.0), (0.5, 1.0), (0.5, 1.0)], True),
        (1, 0, [], False),
    ],
)
def test_training_stops_after_epochs_without_improvement(patience, first_epoch, scores, due, capsys):
    history = [{"epoch": i, "val_accuracy": score, "val_loss": loss} for i, (score, loss) in enumerate(scores, start=1)]
    stop = EarlyStopping(patience, types.SimpleNamespace(history=history), first_epoch)
    assert stop.is_due == due
    stop.set_model(types.SimpleNamespace(stop_training=False))
    stop.set_params({"epochs": 30})
    stop.on_epoch_end(len(history) - 1)
    assert stop.model.stop_training == due
    assert ("early stopping after epoch" in capsys.readouterr().out) == due


def test_weights_before_the_first_epoch_that_counts_are_not_kept():
    classifier = build_classifier("cvt_tiny", 10, (16, 16, 3))
    best = BestWeights(first_epoch=1)
    best.set_model(classifier)
    for epoch, accuracy in enumerate((0.9, 0.5)):
        best.on_epoch_begin(epoch)
        best.on_test_end({"accuracy": accuracy, "loss": 1.0})
        assert (best.weights is None) == (epoch == 0)
    assert best.score == 0.5


def test_without_compression_nothing_changes():
    classifier = build_classifier("cvt_tiny", 10, (16, 16, 3))
    nothing = Compressor()
    nothing.require(SMOKE)
    nothing.start(classifier, None, 1, 1)
    assert nothing.wrap(classifier) is classifier
    assert (nothing.settings, nothing.variables, nothing.first_epoch, nothing.check(classifier)) == (None, (), 0, None)
