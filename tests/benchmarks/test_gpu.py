import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow as tf

from benchmarks import gpu
from benchmarks.gpu import Arguments
from cvt_keras.data import augment, sources
from cvt_keras.training import RECIPES

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
LONG = dataclasses.replace(RECIPES["cifar10_long"], batch_size=4)  # the recipe with CutMix

# Trains on one batch, and compares with `train_on_batch` of Keras.
ONE_STEP = """
import dataclasses, sys

import gpu
assert "tensorflow" not in sys.modules
import jax, keras, numpy as np
from cvt_keras import Stage, Variant
from cvt_keras.training import RECIPES

jax.config.update("jax_disable_most_optimizations", True)
variant = Variant((Stage(8, 1, 2, mlp_ratio=1.0),), whitening=2)
recipe = dataclasses.replace(
    RECIPES["cifar10_long"], variant=variant, image_size=8, batch_size=8, precision="float32", ema=0.9, xla="on"
)
images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3)).cumsum(axis=2).astype("uint8")
labels = np.arange(8, dtype="int32")

ours = gpu.compiled_classifier(recipe, images)
train = jax.jit(lambda state, *data: gpu.train_epoch(ours, recipe, state, *data, epoch=1))
state, logs = train(gpu.initial_state(ours), images, labels)

@jax.jit
def first_batch(*data):
    draws = jax.tree.map(lambda values: values[0], gpu.epoch_draws(recipe, len(images), epoch=1))
    return gpu.augmented_batch(recipe, *data, draws)


theirs = gpu.compiled_classifier(recipe, images)
expected = theirs.train_on_batch(*first_batch(images, labels), return_dict=True)

groups = theirs.trainable_variables, theirs.non_trainable_variables, theirs.optimizer.variables
for values, variables in zip(state, groups):
    for value, variable in zip(values, variables, strict=True):
        np.testing.assert_allclose(value, variable.numpy(), rtol=1e-5, atol=1e-5, err_msg=variable.path)
for name, value in logs.items():
    np.testing.assert_allclose(value, expected[name], rtol=1e-5)
averages = theirs.optimizer._model_variables_moving_average
for value, average in zip(gpu.weights(ours, state), averages, strict=True):
    np.testing.assert_allclose(value, average.numpy(), rtol=1e-5, atol=1e-5)
predicted = theirs.predict(images.astype("float32"), verbose=0).argmax(-1)
trained = [variable.value for variable in theirs.trainable_variables]
ours.optimizer.use_ema = False
hits = gpu.validation_hits(ours, (trained, state[1]), images, predicted)
assert hits == 8, hits
"""


def _images(n=64, height=8, width=12):
    return np.random.default_rng(0).integers(0, 256, (n, height, width, 3)).astype("uint8")


def test_flip_is_the_projects():
    images, mirrored = _images(), np.arange(64) % 3 == 0
    np.testing.assert_array_equal(gpu.flip(images, mirrored), augment.flip(tf.constant(images), mirrored))


def test_crop_is_the_projects():
    images = _images()
    offsets = tf.random.stateless_uniform((2, 64, 1), (0, 1), 0, 7, tf.int32)[:, :, 0]  # as `augment.crop` draws them
    np.testing.assert_array_equal(gpu.crop(images, offsets.numpy(), 3), augment.crop(tf.constant(images), (0, 1), 3))


def test_cutmix_is_the_projects():
    images, labels, seed = _images().astype("float32"), np.eye(64, dtype="float32"), (0, 1)
    share_seed, box_seed = augment._split(seed, 2)  # as `augment.cutmix` draws them
    shares, places = augment._beta(64, share_seed, 0.2), tf.random.stateless_uniform((2, 64), box_seed)
    mixed = gpu.cutmix(images, labels, shares.numpy(), places.numpy())
    for ours, theirs in zip(mixed, augment.cutmix(tf.constant(images), tf.constant(labels), seed, 0.2), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_an_epoch_draws_each_image_once_and_mirrors_it_in_every_second_epoch():
    count = 401  # the last image of the order is left out
    epochs = [jax.tree.map(np.asarray, gpu.epoch_draws(LONG, count, epoch)) for epoch in range(3)]
    mirrored = []
    for draws in epochs:
        assert draws["chosen"].shape == draws["mirrored"].shape == (100, 4)
        assert len(np.unique(draws["chosen"])) == 400
        mirrored.append(dict(zip(draws["chosen"].ravel().tolist(), draws["mirrored"].ravel().tolist())))
        assert set(draws["offsets"].ravel()) == set(range(2 * LONG.crop_padding + 1))
        assert 0 < draws["shares"].min() < 0.1 and 0.9 < draws["shares"].max() <= 1
    shown = set.intersection(*map(set, mirrored))
    assert all(mirrored[0][image] != mirrored[1][image] != mirrored[2][image] for image in shown)
    assert 0.4 < np.mean(list(mirrored[0].values())) < 0.6
    assert not np.array_equal(epochs[0]["chosen"], epochs[2]["chosen"])
    assert not np.array_equal(epochs[0]["offsets"], epochs[2]["offsets"])
    other = gpu.epoch_draws(dataclasses.replace(LONG, seed=1), count, 0)
    assert not np.array_equal(epochs[0]["chosen"], other["chosen"])


@pytest.mark.parametrize("change", [{"flip": False}, {"crop_padding": 0}, {"cutmix": 0.0}])
def test_each_augmentation_of_a_recipe_counts(change):
    images, labels = _images(16, 8, 8), np.arange(16) % 10
    batches = []
    for recipe in (LONG, dataclasses.replace(LONG, **change)):
        draws = jax.tree.map(lambda values: values[0], gpu.epoch_draws(LONG, 16, 0))
        batches.append(gpu.augmented_batch(recipe, images, labels, draws)[0])
    assert batches[0].shape == batches[1].shape == (4, 8, 8, 3)
    assert not np.array_equal(*batches)


def test_augmentation_that_it_lacks_is_refused():
    with pytest.raises(ValueError, match=r"erase=0\.25"):
        gpu.compiled_classifier(RECIPES["cifar10_50"], _images(4, 32, 32))


def test_a_step_is_the_projects():
    environment = {**os.environ, "KERAS_BACKEND": "jax", "PYTHONPATH": f"{ROOT / 'benchmarks'}{os.pathsep}{ROOT}"}
    finished = subprocess.run([sys.executable, "-c", ONE_STEP], capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stderr


def test_packed_images_are_the_projects(cifar10_dir, tmp_path):
    data = gpu.load(gpu.pack(tmp_path / "new", str(cifar10_dir)))
    source = sources.load("cifar10", str(cifar10_dir))
    for images, labels, split in zip(data[:4:2], data[1:4:2], (source.train, source.validation), strict=True):
        np.testing.assert_array_equal(images, split.images)
        np.testing.assert_array_equal(labels, split.labels)
    assert data.note == "validation images, one seed"  # TFDS stores PNG files
    assert list(map(len, data.limit(32, 16)[:4])) == [32, 32, 16, 16]


def test_time_to_accuracy():
    seconds = {"seconds": 1.0, "seconds_with_compilation": 3.0}
    rows = [{"epoch": i + 1, "validation_accuracy": hits / 5_000, **seconds} for i, hits in enumerate((3_999, 4_450, 4_400))]
    table = gpu.time_to_accuracy(rows, (80, 88, 89, 90))
    assert table == {"80": table["89"], "88": table["89"], "89": {"epoch": 2, **seconds}, "90": None}


def test_the_share_of_the_peak_needs_a_known_device():
    for device, peak in {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}.items():
        result = gpu.with_share_of_peak({"device": device, "training_flops": peak / 4})
        assert (result["peak_flops"], result["share_of_peak"]) == (peak, 0.25)
    result = {"device": "AMD EPYC, 2 cores", "training_flops": 1e9}
    assert gpu.with_share_of_peak(result) == result


def test_groups_stand_for_their_parts():
    assert Arguments().part_names == tuple(gpu.PARTS)
    assert Arguments(("cifar10_long", "train")).part_names == ("cifar10_long", "cifar10")
    for settings in ({"parts": ("cvt_14",)}, {"minutes": 0}, {"train_minutes": -1}, {"data": Path("none.npz")}):
        [(name, value)] = settings.items()
        with pytest.raises(ValueError, match=f"{name}=|cvt_14"):
            Arguments(**{name: value})


def _lines(text):
    return [json.loads(line) for line in text.splitlines()]


def test_a_part_that_fails_says_so(monkeypatch, capsys):
    def part(arguments):
        yield {"value": 1}
        raise ValueError("no value")

    monkeypatch.setitem(gpu.PARTS, "cifar10", part)
    with pytest.raises(SystemExit) as exit:
        gpu.run_part("cifar10", Arguments())
    assert exit.value.code == 1
    assert _lines(capsys.readouterr().out) == [
        {"part": "cifar10", "value": 1},
        {"part": "cifar10", "error": "ValueError: no value"},
    ]


def test_the_other_parts_go_on_until_the_time_is_over(monkeypatch, capsys, tmp_path):
    called = {}

    def run(name, arguments):
        called[name] = arguments.train_minutes
        return int(name == "cvt_cifar")

    monkeypatch.setattr(gpu, "run_in_process", run)
    monkeypatch.setattr(gpu.environment, "require_backend", lambda backend: None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert gpu.main(Arguments(cache_dir=tmp_path)) == 1
    assert tuple(called) == ("device", *gpu.PARTS) and set(called.values()) == {10}
    assert gpu.main(Arguments(("train",), minutes=5, cache_dir=tmp_path)) == 0
    assert 4 < called["cifar10"] < 5  # the training ends within the time
    called.clear()
    assert gpu.main(Arguments(("train",), minutes=1e-9, cache_dir=tmp_path)) == 0
    assert list(called) == ["device"]
    assert ["skipped" in line for line in _lines(capsys.readouterr().out)] == [True, True]
    monkeypatch.setattr(gpu, "run_in_process", lambda name, arguments: 2)
    assert gpu.main(Arguments(cache_dir=tmp_path)) == 2


def test_without_a_gpu_it_exits_with_2(capsys):
    with pytest.raises(SystemExit) as exit:
        gpu.run_part("device", Arguments())
    assert exit.value.code == 2
    assert "--smoke" in capsys.readouterr().err
    gpu.run_part("device", Arguments(smoke=True))
    [line] = _lines(capsys.readouterr().out)
    assert line["device"]


@pytest.mark.slow  # a minute on two cores
def test_smoke_runs_every_part_without_tensorflow(tmp_path):
    for name in ("tensorflow", "tensorflow_datasets"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('hidden')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    environment.pop("KERAS_BACKEND", None)
    command = [sys.executable, str(SCRIPT), "--smoke", "--cache-dir", str(tmp_path / "cache")]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert finished.returncode == 0, finished.stderr
    lines = _lines(finished.stdout)
    assert {line["part"] for line in lines} == {"device", *gpu.PARTS}
    for part in gpu.GROUPS["speed"]:
        [line] = [line for line in lines if line["part"] == part]
        assert 0 < line["images_per_second_min"] <= line["images_per_second"] <= line["images_per_second_max"]
        assert 0 < line["share_of_matrix_product"] < 1
    for part in gpu.GROUPS["train"]:
        settings, *epochs, summary = [line for line in lines if line["part"] == part]
        assert settings["recipe"]["variant"] == "cvt_tiny" and "mean nothing" in settings["note"]
        assert [line["epoch"] for line in epochs] == [1, 2]
        assert all(line["seconds"] < line["seconds_with_compilation"] for line in epochs)
        assert summary["epochs_trained"] == 2 and summary["images_per_second"] > 0 and summary["note"] == settings["note"]
