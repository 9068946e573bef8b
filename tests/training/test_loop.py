import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from eager import eagerly
from jax.errors import JaxRuntimeError
from PIL import Image

from cvt_keras import VARIANTS, CvT, Preprocessing, Stage, Variant, attention, calibration_of, preprocessing_of, runs
from cvt_keras.data import sources, tfds
from cvt_keras.data.pipeline import evaluation_batches
from cvt_keras.data.split import Split
from cvt_keras.data.tfds import CIFAR10_CLASSES
from cvt_keras.errors import (
    BusyError,
    DistributedError,
    DivergedError,
    OccupiedError,
    OutOfMemoryError,
    RecipeError,
    RunError,
)
from cvt_keras.layers import Whitening
from cvt_keras.quantized.model import quantize
from cvt_keras.report import figures, metrics
from cvt_keras.training import distributed, loop, plan
from cvt_keras.training.compressor import Compressor
from cvt_keras.variants import macs, to_dict

ROOT = Path(__file__).parent.parent.parent
# The fixture `result` and the process that is killed are traced, as for a user; so is the step with XLA.
pytestmark = pytest.mark.usefixtures("eager")


def run(*args, **kwargs):
    """Trains and returns the report."""
    return loop.run(*args, **kwargs).report


def test_a_run_returns_what_its_folder_holds(result):
    assert result.history == runs.read_history(result.run_dir)
    assert json.loads((result.run_dir / "report.json").read_text()) == dataclasses.asdict(result.report)


def test_a_run_leaves_its_folder(finished, recipe):
    report, run_dir = finished
    stored = json.loads((run_dir / "recipe.json").read_text())
    assert stored["variant"] == to_dict(VARIANTS["cvt_tiny"])
    assert (stored["precision"], stored["xla"]) == ("float32", "off")
    assert stored["epochs"] == recipe.epochs
    rows = runs.read_history(run_dir)
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[0]["learning_rate"] > rows[1]["learning_rate"]
    for row in rows:
        assert row["val_loss"] == row["val_cross_entropy"] > 0
        assert 0 < row["train_seconds"] < row["seconds"]
    assert report.train_seconds == pytest.approx(sum(row["seconds"] for row in rows))
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["epoch-0002"]
    assert {path.name for path in (run_dir / "plots").iterdir()} == {
        *("curves.png", "confusion.png", "calibration.png", "most_wrong.png")
    }
    assert f"{report.test['top1']:.1%}" in (run_dir / "report.html").read_text()


def test_the_most_wrong_images_have_the_maps_of_their_predictions(finished, recipe, monkeypatch, capsys):
    classifier = keras.saving.load_model(finished[1] / "model.keras")
    images = np.random.default_rng(0).integers(0, 256, (40, 48, 48, 3)).astype("uint8")
    source = Split(images, np.random.default_rng(1).integers(0, 10, 40))
    settled = types.SimpleNamespace(test=source, num_classes=10, recipe=recipe)
    logits = loop._logits(classifier, source, settled)
    worst = metrics.worst(logits, source.labels, figures.MOST_WRONG_IMAGES)
    drawn = loop._maps(classifier, settled, logits)
    assert list(drawn) == worst.tolist()
    pixels, maps = zip(*drawn.values())
    seen = np.concatenate([batch for batch, _ in evaluation_batches(source.take(worst), 10, recipe.preprocessing)])
    np.testing.assert_array_equal(pixels, seen)
    np.testing.assert_allclose(maps, attention.grad_cam(classifier, seen, logits[worst].argmax(axis=1)), atol=1e-6)
    assert loop._maps(quantize(classifier), settled, logits) == {}
    right = Split(images, logits.argmax(axis=1))
    assert loop._maps(classifier, types.SimpleNamespace(test=right, num_classes=10, recipe=recipe), logits) == {}
    with Image.open(finished[1] / "plots" / "most_wrong.png") as picture:
        assert picture.height > 1.2 * picture.width  # an overlay below each image

    def out_of_memory(*arguments):
        raise tf.errors.ResourceExhaustedError(None, None, "no memory")

    monkeypatch.setattr(attention, "grad_cam", out_of_memory)
    assert loop._maps(classifier, settled, logits) == {}
    assert "too little memory for the Grad-CAM" in capsys.readouterr().err


def _tensorboard_accuracies(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard" / "validation"))
    events.Reload()
    return [float(tf.make_ndarray(event.tensor_proto)) for event in events.Tensors("epoch_accuracy")]


def test_tensorboard_has_a_value_for_each_epoch(finished):
    _, run_dir = finished
    assert _tensorboard_accuracies(run_dir) == pytest.approx([row["val_accuracy"] for row in runs.read_history(run_dir)])


def test_the_report_has_all_fields(finished, recipe):
    report, _ = finished
    assert set(dataclasses.asdict(report)) == {
        *("dataset", "data_note", "variant", "recipe", "epochs", "seed", "image_size", "class_names", "parameters", "macs"),
        *("train_seconds", "train_images_per_second", "test", "validation", "per_class", "device", "versions"),
        *("confusion", "train_images", "compression", "data_warnings", "left_out", "class_weights"),
        *("epochs_trained", "kept_epoch", "test_images", "train_images_per_class", "calibration"),
        *("backend", "devices"),
    }
    assert report.compression is None
    assert report.train_images == recipe.train_limit
    assert (report.dataset, report.variant, report.image_size) == ("cifar10", "cvt_tiny", [32, 32])
    assert report.test["images"] == 100
    assert report.validation["images"] == 128  # the recipe's validation_limit
    assert report.train_seconds > 0
    assert report.train_images_per_second > 0
    assert report.versions["keras"] == keras.__version__
    assert [row["name"] for row in report.per_class] == report.class_names
    assert np.sum(report.confusion) == 100
    assert np.trace(report.confusion) == round(100 * report.test["top1"])


def test_the_saved_model_has_the_scores_of_the_report(finished, recipe):
    report, run_dir = finished
    model = keras.saving.load_model(run_dir / "model.keras")
    assert not model.compiled
    assert isinstance(model.get_layer("cvt"), CvT)
    test = tfds.cifar10(recipe.data_dir, recipe.preprocessing, recipe.pixel_cache).test.limit(100)
    scores = metrics.evaluate(model.predict(np.asarray(test.images, "float32"), verbose=0), test.labels)
    assert scores["top1"] == report.test["top1"]
    assert scores["loss"] == pytest.approx(report.test["loss"], rel=1e-5)
    assert report.parameters == sum(int(np.prod(v.shape)) for v in model.trainable_variables)


def test_the_saved_model_is_calibrated_on_the_validation_images(finished, recipe):
    report, run_dir = finished
    model = keras.saving.load_model(run_dir / "model.keras")
    source = tfds.cifar10(recipe.data_dir, recipe.preprocessing, recipe.pixel_cache)
    validation, test = source.validation.limit(recipe.validation_limit), source.test.limit(100)
    logits = [model.predict(np.asarray(split.images, "float32"), verbose=0) for split in (validation, test)]
    calibration = metrics.fit_calibration(logits[0], validation.labels, recipe.keep)
    stored = calibration_of(model)
    assert stored.temperature == pytest.approx(calibration.temperature, rel=1e-3)
    assert stored.threshold == pytest.approx(calibration.threshold, rel=1e-3)
    expected = metrics.calibration_report(logits[1], test.labels, stored, recipe.keep, "test")
    measured = dict(report.calibration)
    assert measured.pop("split") == expected.pop("split") == "test"
    assert measured == pytest.approx(expected, rel=1e-3)
    assert report.calibration["ece_before"] == pytest.approx(report.test["ece"])
    settled = types.SimpleNamespace(recipe=dataclasses.replace(recipe, keep=0.5))
    evaluated = [loop._Evaluated(split, rows) for split, rows in zip((validation, test), logits)]
    settled.source = types.SimpleNamespace(class_names=report.class_names)
    settled.num_classes = 10
    assert loop._scores(settled, *evaluated, stored)["calibration"]["keep"] == 0.5


def test_training_learns(finished):
    report, _ = finished
    assert report.validation["top1"] > 0.2  # chance is 0.1


def test_the_best_validation_epoch_is_kept(recipe, tmp_path, monkeypatch):
    class SpoilLastEpoch(loop.Stopwatch):
        """Spoils the weights of the last epoch before they are validated."""

        def on_epoch_begin(self, epoch, logs=None):
            super().on_epoch_begin(epoch, logs)
            self.epoch = epoch

        def on_test_begin(self, logs=None):
            super().on_test_begin(logs)
            if self.epoch == recipe.epochs - 1:
                self.model.get_layer("cvt").get_layer("head").bias.assign(1e6 * np.eye(10)[0])

    monkeypatch.setattr(loop, "Stopwatch", SpoilLastEpoch)
    report = run(recipe, tmp_path / "run", evaluate_test=False)
    assert report.calibration["split"] == "validation"
    first, last = (row["val_accuracy"] for row in runs.read_history(tmp_path / "run"))
    assert first > last == pytest.approx(0.1, abs=0.01)
    assert report.validation["top1"] == pytest.approx(first, abs=1e-4)


def test_a_seed_gives_the_same_run(short, tmp_path):
    first, again, other = (
        run(dataclasses.replace(short, seed=seed), tmp_path / name, evaluate_test=False)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    # Equal except for rounding: threads add in any order.
    assert first.validation["loss"] == pytest.approx(again.validation["loss"], rel=1e-5)
    assert first.validation["loss"] != pytest.approx(other.validation["loss"], rel=1e-4)
    assert (first.test, first.per_class, first.confusion) == (None, None, None)
    assert [path.name for path in (tmp_path / "a" / "plots").iterdir()] == ["curves.png"]
    assert "top-1, validation" in (tmp_path / "a" / "report.html").read_text()


@pytest.fixture
def fitted(monkeypatch):
    """The list of the models that were trained."""
    models = []
    fit = keras.Model.fit
    monkeypatch.setattr(keras.Model, "fit", lambda self, *args, **kwargs: models.append(self) or fit(self, *args, **kwargs))
    return models


@pytest.mark.parametrize("precision, xla", [("mixed_bfloat16", "on"), ("mixed_float16", "off")])
def test_mixed_precision_with_and_without_xla_saves_a_float32_model(short, precision, xla, tmp_path, fitted):
    variant = Variant((Stage(8, 1, 1, kernel_size=7, stride=4, padding=2),))  # small, as XLA compiles slowly
    # Only here are these two traced.
    traced = {"layer_decay": 0.5, "label_smoothing": 0.1} if xla == "on" else {}
    mixed = dataclasses.replace(short, precision=precision, xla=xla, variant=variant, validation_limit=64, **traced)
    with eagerly(xla != "on"):  # XLA compiles traced steps only
        report = run(mixed, tmp_path / "run", evaluate_test=False)
    assert report.recipe["precision"] == precision
    [trained] = fitted
    assert trained.jit_compile == (xla == "on")
    assert trained.get_layer("cvt").dtype_policy.name == precision
    scaled = isinstance(trained.optimizer, keras.optimizers.LossScaleOptimizer)
    assert scaled == (precision == "mixed_float16")
    model = keras.saving.load_model(tmp_path / "run" / "model.keras")
    assert {layer.dtype_policy.name for layer in model._flatten_layers()} == {"float32"}


def test_label_smoothing_image_size_resizing_and_moving_average_take_effect(short, tmp_path):
    resizing = {"resize": "crop", "crop_pct": 0.75, "interpolation": "bicubic"}
    change = {"label_smoothing": 0.5, "image_size": (16, 24), "ema": 0.9, **resizing}
    report = run(dataclasses.replace(short, **change), tmp_path / "run", evaluate_test=False)
    [row] = runs.read_history(tmp_path / "run")
    assert row["loss"] != pytest.approx(row["cross_entropy"], rel=1e-3)
    assert row["val_cross_entropy"] == pytest.approx(report.validation["loss"], rel=1e-4)  # without label smoothing
    assert report.image_size == [16, 24]
    assert {name: report.recipe[name] for name in resizing} == resizing
    # The average is validated and saved. The checkpoint also has the raw weights.
    model = keras.saving.load_model(tmp_path / "run" / "model.keras")
    assert model.input_shape == (None, 16, 24, 3)
    assert {name: value for name, value in preprocessing_of(model).get_config().items() if name in resizing} == resizing
    checkpoint = tmp_path / "run" / "checkpoints" / "epoch-0001"
    with np.load(checkpoint / "state.npz") as state, np.load(checkpoint / "best.npz") as best:
        raw, averaged = list(state.values()), list(best.values())
    for ours, theirs in zip(model.get_weights(), averaged):
        np.testing.assert_array_equal(ours, theirs)
    assert not all(np.array_equal(*pair) for pair in zip(raw, averaged))


def test_a_recipe_may_have_a_variant_without_a_name(short, tmp_path):
    variant = Variant((Stage(8, 1, 1, kernel_size=7, stride=4, padding=2),))
    report = run(dataclasses.replace(short, variant=variant), tmp_path / "run", evaluate_test=False)
    assert report.variant == "custom"
    assert report.recipe["variant"] == to_dict(variant)


def _exhaust(text):
    def exhaust(*args, **kwargs):
        raise tf.errors.ResourceExhaustedError(None, None, f"{text}\nand a page more")

    return exhaust


@pytest.mark.parametrize(("module", "name"), [(keras.Model, "fit"), (loop, "_build"), (loop, "_logits")])
def test_an_out_of_memory_error_names_the_batch_size(short, tmp_path, monkeypatch, module, name):
    monkeypatch.setattr(module, name, _exhaust("OOM when allocating"))
    with pytest.raises(OutOfMemoryError) as error:
        run(short, tmp_path / "run")
    assert error.value.argument == "batch_size"
    assert "32 images" in error.value.summary
    assert "a --batch-size below 32 or an --image-size below 32" in error.value.hint


def test_a_full_disk_is_not_reported_as_too_little_memory(short, tmp_path, monkeypatch):
    monkeypatch.setattr(keras.Model, "fit", _exhaust("events.v2; No space left on device"))
    with pytest.raises(OSError, match=f"{tmp_path}/run can't be written: events.v2; No space left on device$"):
        run(short, tmp_path / "run")


def test_a_lost_connection_to_another_process_is_named(short, tmp_path, monkeypatch):
    plan_ = plan.settle(short, tmp_path / "run")
    lost = JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer")
    monkeypatch.setattr(loop.environment, "errors", lambda: (tf.errors.OpError, JaxRuntimeError))
    with pytest.raises(JaxRuntimeError), loop._named_errors(plan_):
        raise lost
    monkeypatch.setattr(distributed, "count", lambda: 2)
    with pytest.raises(DistributedError) as error, loop._named_errors(plan_):
        raise lost
    assert error.value.summary.startswith("another process died") and distributed.LOST in error.value.summary
    assert "--resume" in error.value.hint
    broken = tf.errors.UnknownError(None, None, "photos/connections/a.jpg; peer")  # of the images that this process reads
    for other, kind in (
        (broken, tf.errors.UnknownError),
        (JaxRuntimeError("RESOURCE_EXHAUSTED: memory\npeer"), OutOfMemoryError),
    ):
        with pytest.raises(kind), loop._named_errors(plan_):
            raise other


def test_a_run_folder_that_only_process_0_sees_is_refused(short, tmp_path):
    plan_ = plan.settle(short, tmp_path / "run")
    with pytest.raises(RunError) as error:
        loop._require_shared(plan_)
    assert error.value.argument == "run_dir" and str(tmp_path / "run") in error.value.summary
    (tmp_path / "run").mkdir()
    loop._require_shared(plan_)


def test_a_page_without_test_results_is_replaced_after_a_kill(short, untested, monkeypatch):
    def kill(run_dir):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop.page, "write", kill)
        run(short, untested, resume=True)
    assert not (untested / "report.html").exists()  # with it the run would count as finished
    report = run(short, untested, resume=True)
    assert f"{report.test['top1']:.1%}" in (untested / "report.html").read_text()


@pytest.mark.skipif(runs.fcntl is None, reason="Windows has no such locks")
def test_a_run_folder_is_for_one_process_at_a_time(finished, recipe, tmp_path):
    _, run_dir = finished
    unfinished = shutil.copytree(run_dir, tmp_path / "unfinished")
    (unfinished / "report.html").unlink()
    (tmp_path / "new").mkdir()
    for folder, resume in ((unfinished, True), (tmp_path / "new", False)):
        with runs.lock(folder), pytest.raises(BusyError):
            run(recipe, folder, resume=resume)


def test_a_run_that_another_process_starts_in_the_meantime_is_not_overwritten(recipe, tmp_path, monkeypatch):
    load = sources.load

    def start_another_run(*args, **kwargs):
        (tmp_path / "recipe.json").write_text("{}")
        return load(*args, **kwargs)

    monkeypatch.setattr(sources, "load", start_another_run)
    with pytest.raises(OccupiedError) as error:
        run(recipe, tmp_path)
    assert error.value.argument == "run_dir"
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]


KILLED = """
import dataclasses, json, os, signal, sys
import tensorflow as tf
from cvt_keras import Stage, Variant
from cvt_keras.training import Recipe, loop, run

tf.config.experimental.enable_op_determinism()
tf.config.run_functions_eagerly(sys.argv[1] == "eager")
data_dir, run_dir, uninterrupted_dir = sys.argv[2:]

class Killer(loop.Stopwatch):
    def on_epoch_begin(self, epoch, logs=None):
        super().on_epoch_begin(epoch, logs)
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == (1, 1):
            os.kill(os.getpid(), signal.SIGKILL)

if not os.path.exists(run_dir):
    loop.Stopwatch = Killer
stages = (Stage(8, 2, 1, kernel_size=7, stride=4, padding=2, drop_path=0.5), Stage(16, 1, 2, cls_token=True))
recipe = Recipe(
    variant=Variant(stages, "gelu", whitening=2), dataset="cifar10", data_dir=data_dir, train_limit=64, validation_limit=32,
    test_limit=32, epochs=3, batch_size=32, ema=0.9, label_smoothing=0.1, mixup=0.2, seed=7,
)
run(recipe, run_dir, resume=True)
run(recipe, uninterrupted_dir)
"""


@pytest.mark.parametrize("mode", ["eager", pytest.param("traced", marks=pytest.mark.slow)])
def test_a_killed_run_is_resumed_bit_by_bit(cifar10_dir, tmp_path, mode):
    names = "resumed", "uninterrupted"
    command = [sys.executable, "-c", KILLED, mode, str(cifar10_dir), *(str(tmp_path / name) for name in names)]
    killed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in (tmp_path / "resumed" / "checkpoints").glob("epoch-*")] == ["epoch-0001"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("resuming after epoch 1 of 3") == 1

    for file in ("state.npz", "best.npz"):
        stored = [np.load(tmp_path / name / "checkpoints" / "epoch-0003" / file) for name in names]
        assert stored[0].files == stored[1].files
        for name in stored[0].files:
            np.testing.assert_array_equal(stored[0][name], stored[1][name], err_msg=name)
    timed = {"train_seconds", "seconds"}
    histories = [
        [{name: value for name, value in row.items() if name not in timed} for row in runs.read_history(tmp_path / name)]
        for name in names
    ]
    assert histories[0] == histories[1]
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in names]
    assert reports[0]["test"] == reports[1]["test"]
    accuracies = [_tensorboard_accuracies(tmp_path / name) for name in names]
    assert accuracies[0] == accuracies[1] and len(accuracies[0]) == 3


def test_a_loss_of_nan_ends_the_run(recipe, tmp_path):
    diverging = dataclasses.replace(recipe, peak_learning_rate=1e30, gradient_clip=0)
    with pytest.raises(DivergedError, match=r"step \d+ of epoch 1") as error:
        run(diverging, tmp_path / "run")
    assert "1e+30" in error.value.hint
    assert not (tmp_path / "run" / "model.keras").exists()


def test_an_error_before_the_first_step_leaves_no_folder(short, tmp_path, monkeypatch):
    def refuse(*_):
        raise RecipeError("no")

    monkeypatch.setattr(loop, "_starting_classifier", refuse)
    with pytest.raises(RecipeError):
        run(short, tmp_path / "a" / "b" / "run")
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    with pytest.raises(RecipeError):
        run(short, tmp_path / "mine")
    assert (tmp_path / "mine").is_dir()


# === Whitening ===


@pytest.fixture(scope="module")
def whitened(short):
    """A recipe of a small network with a whitening layer."""
    stage = Stage(8, 1, 1, stride=4, pool=True, residual_convs=1, mlp_conv=True)
    variant = Variant((stage,), "gelu", whitening=2, norm="batch", attention_scale="head", identity_init=True)
    return dataclasses.replace(short, variant=variant, ema=0.9, weight_decay=1.0)


@pytest.fixture(scope="module")
def whitened_dir(whitened, tmp_path_factory):
    """The folder of a run of `whitened`, to be read only."""
    return loop.run(whitened, tmp_path_factory.mktemp("runs") / "whitened", evaluate_test=False).run_dir


def _kernel(classifier):
    return np.array(classifier.get_layer("cvt").get_layer("whitening").kernel)


def _saved_kernel(run_dir):
    return _kernel(keras.saving.load_model(run_dir / "model.keras"))


@pytest.fixture
def first_kernel(monkeypatch):
    """A function that returns the whitening kernel with which a run would start to train."""

    def kernel_of(recipe, run_dir, **kwargs):
        started = []
        monkeypatch.setattr(keras.Model, "fit", lambda self, *args, **kwargs: started.append(_kernel(self)))
        settled = plan.settle(recipe, run_dir, **kwargs)
        run_dir.mkdir(exist_ok=True)
        loop.fit(settled)
        [kernel] = started
        return kernel

    return kernel_of


def test_the_whitening_kernel_comes_from_the_first_training_images(whitened, first_kernel, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "WHITENING_IMAGES", 40)
    source = tfds.cifar10(whitened.data_dir, whitened.preprocessing, whitened.pixel_cache)
    expected = Whitening(2)
    expected.adapt(((np.asarray(source.train.images[:40]) / 255.0 - source.mean) / source.std).astype("float32"))
    kernel = first_kernel(whitened, tmp_path / "run")
    np.testing.assert_allclose(kernel, expected.kernel, atol=1e-4)
    # Precision and seed don't change it.
    other = dataclasses.replace(whitened, precision="mixed_bfloat16", seed=1)
    np.testing.assert_array_equal(first_kernel(other, tmp_path / "other"), kernel)


def test_training_does_not_change_the_whitening_kernel(whitened, first_kernel, whitened_dir, tmp_path):
    kernel = first_kernel(whitened, tmp_path / "run")
    np.testing.assert_array_equal(_saved_kernel(whitened_dir), kernel)
    bias = keras.saving.load_model(whitened_dir / "model.keras").get_layer("cvt").get_layer("whitening").bias
    assert np.all(np.array(bias) != 0)


def test_the_whitening_kernel_is_no_parameter_and_has_no_part_in_the_optimizer(whitened_dir):
    model = keras.saving.load_model(whitened_dir / "model.keras")
    assert [variable.name for variable in model.get_layer("cvt").get_layer("whitening").trainable_variables] == ["bias"]
    report = json.loads((whitened_dir / "report.json").read_text())
    assert report["parameters"] == sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)
    with np.load(whitened_dir / "checkpoints" / "epoch-0001" / "state.npz") as state:
        kernels = {name: value for name, value in state.items() if value.shape == (2, 2, 3, 24)}
    assert [name[5:] for name in kernels] == ["kernel"]  # no momentum, no moving average
    np.testing.assert_array_equal(*kernels.values(), _kernel(model))


def test_a_resumed_run_adapts_the_whitening_again_only_without_a_finished_epoch(
    whitened, whitened_dir, first_kernel, tmp_path, monkeypatch
):
    kernel = _saved_kernel(whitened_dir)
    unfinished = shutil.copytree(whitened_dir, tmp_path / "run")
    (unfinished / "model.keras").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Whitening, "adapt", None)
        run(whitened, unfinished, resume=True, evaluate_test=False)
    np.testing.assert_array_equal(_saved_kernel(unfinished), kernel)
    shutil.rmtree(unfinished / "checkpoints")
    (unfinished / "model.keras").unlink()
    np.testing.assert_array_equal(first_kernel(whitened, unfinished, resume=True), kernel)


@pytest.mark.parametrize("compressed", [False, True], ids=["fine-tuned", "compressed"])
def test_weights_keep_their_whitening_kernel(whitened, whitened_dir, first_kernel, tmp_path, monkeypatch, compressed):
    monkeypatch.setattr(Whitening, "adapt", None)
    # On other images, from which another kernel would come.
    recipe = dataclasses.replace(whitened, weights=str(whitened_dir / "model.keras"), variant=None, train_limit=32)
    compressor = Compressor({"method": "prune"}) if compressed else None
    kernel = first_kernel(recipe, tmp_path / "run", compressor=compressor)
    np.testing.assert_array_equal(kernel, _saved_kernel(whitened_dir))
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # a resume without a finished epoch reads the weights again
    kernel = first_kernel(recipe, tmp_path / "run", compressor=compressor, resume=True)
    np.testing.assert_array_equal(kernel, _saved_kernel(whitened_dir))


# === Starting from weights ===


def _same_backbone(run_dir, weights):
    """Whether the layers before the head equal those of `weights`, and whether the head does."""
    # Not the statistics of BatchNorm: they change even at a learning rate of 0.
    ours = keras.saving.load_model(run_dir / "model.keras").get_layer("cvt").trainable_weights
    theirs = CvT.from_pretrained(weights, num_classes=10).trainable_weights
    same = {a.path: np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True)}
    return all(value for path, value in same.items() if not path.startswith("head/")), same["head/kernel"]


def test_fine_tuning_starts_from_the_weights(short, weights, tmp_path, capsys):
    recipe = dataclasses.replace(short, weights=weights, variant=None, image_size=48, peak_learning_rate=0.0)
    report = run(recipe, tmp_path / "run", evaluate_test=False)
    assert report.calibration["split"] == "validation"
    classifier = keras.saving.load_model(tmp_path / "run" / "model.keras")
    assert classifier.input_shape == (None, 48, 48, 3)
    assert preprocessing_of(classifier) == Preprocessing((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), CIFAR10_CLASSES, (48, 48))
    # At a learning rate of 0 nothing trains. The weights have as many classes, but other ones.
    assert _same_backbone(tmp_path / "run", weights) == (True, False)
    assert (report.variant, report.image_size) == ("cvt_tiny", [48, 48])
    assert report.recipe["weights"] == weights
    printed = capsys.readouterr().out
    assert f"starting from {weights}: cvt_tiny (activation quick_gelu)" in printed
    assert "head: new" in printed
    assert report.recipe["variant"] == to_dict(VARIANTS["cvt_tiny"])
    assert report.macs == macs("cvt_tiny", (48, 48, 3), 10)


def test_weights_with_the_same_classes_keep_their_head(short, weights, tmp_path, capsys):
    model = CvT.from_pretrained(weights)
    model.preprocessing = model.preprocessing.replace(class_names=CIFAR10_CLASSES)
    model.save(tmp_path / "cifar.keras")
    same_classes = dataclasses.replace(short, weights=str(tmp_path / "cifar.keras"), variant=None, peak_learning_rate=0.0)
    run(same_classes, tmp_path / "run", evaluate_test=False)
    assert _same_backbone(tmp_path / "run", same_classes.weights) == (True, True)
    assert "head: loaded from the weights" in capsys.readouterr().out


def test_with_weights_the_activation_comes_from_them_and_not_from_the_variants_name(short, weights, tmp_path):
    gelu = dataclasses.replace(VARIANTS["cvt_tiny"], activation="gelu")
    CvT(gelu, 10, (16, 16, 3)).save(tmp_path / "gelu.keras")
    recipe = dataclasses.replace(short, weights=str(tmp_path / "gelu.keras"), variant="cvt_tiny")
    report = run(recipe, tmp_path / "run", evaluate_test=False)
    assert report.calibration["split"] == "validation"
    assert report.recipe["variant"]["activation"] == "gelu"
    assert report.variant == "cvt_tiny-gelu"
    assert run(recipe, tmp_path / "run", resume=True, evaluate_test=False) == report
