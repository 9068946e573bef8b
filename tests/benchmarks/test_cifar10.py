import csv
import dataclasses
from pathlib import Path

import keras
import numpy as np
import pytest
from eager import eagerly

from benchmarks import cifar10
from cvt_keras import VARIANTS, Preprocessing, Stage, Variant, macs
from cvt_keras.data import sources
from cvt_keras.data.pipeline import evaluation_batches
from cvt_keras.data.split import Source, Split
from cvt_keras.layers import Whitening
from cvt_keras.training.objective import adapt_whitening
from cvt_keras.training.recipes import SMOKE

RESULTS = Path(__file__).parents[2] / "docs" / "results"
PREPROCESSING = Preprocessing((0.5,) * 3, (0.25,) * 3, tuple("abcdefghij"))


def _split(count, seed=0):
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 10
    return Split(random.integers(0, 256, (count, 32, 32, 3)).astype("uint8"), labels.astype("int64"))


def test_the_macs_of_the_cnn_are_those_of_its_layers():
    classifier, cost = cifar10.cnn(PREPROCESSING, 32)
    counted = 0
    for layer in classifier.layers:
        if hasattr(layer, "proj"):
            kernel, positions = layer.proj.kernel, np.prod(layer.input.shape[1:3])  # stride 1 and even padding
        elif hasattr(layer, "kernel"):
            kernel, positions = layer.kernel, np.prod(layer.output.shape[1:-1])
        else:
            continue
        counted += int(positions * np.prod(kernel.shape))
    assert cost == counted
    assert f"{cost / 1e6:.1f}" == "54.2"
    assert classifier.output_shape == (None, 10)


def test_changes_do_what_their_names_say():
    variant = VARIANTS["cvt_cifar"]
    changed = {name: change(variant) for name, change in cifar10.CHANGES.items()}
    assert changed.pop("") == changed.pop(cifar10.NO_BLOCKS) == variant
    assert len(set(changed.values()) | {variant}) == len(changed) + 1
    cost = {name: macs(network, (32, 32, 3), 10) - macs(variant, (32, 32, 3), 10) for name, network in changed.items()}
    for name in ("linear projection", "full keys and values", "cls token"):
        assert cost[name] > 0, name
    for name in ("strided embeddings", "no residual convolution", "no convolution in the MLP"):
        assert cost[name] < 0, name
    for name in ("layer norm", "attention scaled by the whole width", "random start"):
        assert cost[name] == 0, name
    assert changed["cls token"].stages[-1].cls_token and not changed["no whitening"].whitening


def test_without_blocks_the_rest_of_the_network_stays():
    recipe = dataclasses.replace(SMOKE, variant="cvt_cifar")
    source = Source("cifar10", _split(0), _split(0), _split(0), PREPROCESSING.class_names, (0.5,) * 3, (0.25,) * 3)
    classifier, cost = cifar10.build("recipe", cifar10.NO_BLOCKS, recipe, source)
    whole, whole_cost = cifar10.build("recipe", "", recipe, source)
    names = [variable.path for variable in whole.trainable_variables]
    assert [variable.path for variable in classifier.trainable_variables] == [name for name in names if "_block" not in name]
    assert any("_block" in name for name in names)
    # Whitening, the embeddings, the residual convolution and the head.
    sides = (31**2, 12 * 24), (31**2, 9 * 24 * 48), (15**2, 9 * 48 * 128), (7**2, 9 * 128 * 128), (7**2, 9 * 128 * 256)
    assert cost == sum(positions * weights for positions, weights in sides) + 256 * 10 < whole_cost


def test_mirrored_views_are_averaged():
    split = _split(20)
    pixels = keras.Input((32, 32, 3))
    classifier = keras.Model(pixels, keras.layers.Dense(10)(keras.layers.Flatten()(pixels / 255.0)))
    top1, cross_entropy, mirrored = cifar10.measure(classifier, split)
    images = split.images.astype("float32")
    probabilities = [keras.ops.convert_to_numpy(keras.ops.softmax(classifier(x))) for x in (images, images[:, :, ::-1])]
    assert top1 == np.mean(probabilities[0].argmax(axis=1) == split.labels)
    assert mirrored == np.mean(sum(probabilities).argmax(axis=1) == split.labels)
    assert cross_entropy == pytest.approx(-np.log(probabilities[0][np.arange(20), split.labels]).mean(), rel=1e-4)


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """The arguments of a run of a tiny network on a few images, in one step."""
    splits = _split(32), _split(20, 1), _split(10, 2)
    source = Source("cifar10", *splits, PREPROCESSING.class_names, (0.5,) * 3, (0.25,) * 3, note="noise")
    monkeypatch.setattr(sources, "load", lambda *args, **kwargs: source)
    monkeypatch.setattr(cifar10, "CNN_WIDTHS", (4, 4))
    variant = Variant((Stage(8, 1, 1, pool=True),), whitening=2, norm="batch")
    recipe = dataclasses.replace(SMOKE, variant=variant, epochs=1, train_limit=None)
    monkeypatch.setitem(cifar10.RECIPES, "tiny", recipe)
    with eagerly():
        yield cifar10.Arguments(recipe="tiny", seeds=(3,), runs=tmp_path / "runs", csv=tmp_path / "cifar10.csv")


def _rows(file):
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


@pytest.mark.parametrize(
    "changes, measured",
    [
        ({}, ["validation", "test"]),
        ({"network": "cnn"}, ["validation", "test"]),
        ({"change": cifar10.NO_BLOCKS, "validation_only": True}, ["validation"]),
        ({"change": "no whitening", "all_images": True}, ["test"]),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_a_run_adds_a_row_and_is_skipped_from_then_on(arguments, changes, measured, monkeypatch, capsys):
    arguments = dataclasses.replace(arguments, **changes)
    cifar10.main(arguments)
    (row,) = _rows(arguments.csv)
    assert list(row) == list(_rows(RESULTS / "cifar10.csv")[0])
    assert (row["network"], row["change"], row["seed"]) == (changes.get("network", "custom"), arguments.change, "3")
    assert row["train_images"] == ("52" if arguments.all_images else "32")
    for split in ("validation", "test"):
        for column in ("percent", "mirrored_percent", "cross_entropy"):
            assert (row[f"{split}_{column}"] != "") == (split in measured)
    assert float(row["images_per_second"]) > 0 and 0 <= float(row["training_percent"]) <= 100
    monkeypatch.delattr(cifar10, "run_once")
    capsys.readouterr()
    cifar10.main(arguments)
    assert f"already in {arguments.csv}" in capsys.readouterr().out


def test_a_row_without_test_results_is_measured_again(arguments, monkeypatch):
    def run_once(arguments, recipe, source, run_dir):
        return {"validation_percent": "1", "test_percent": "2" if len(source.test) else ""}

    monkeypatch.setattr(cifar10, "run_once", run_once)
    stored = []
    for validation_only in (True, False, True):
        cifar10.main(dataclasses.replace(arguments, validation_only=validation_only))
        stored.append([row["test_percent"] for row in _rows(arguments.csv)])
    assert stored == [[""], ["2"], ["2"]]


def test_each_setting_of_a_run_is_in_its_row_and_tells_it_from_others(arguments, monkeypatch):
    recipes = []
    monkeypatch.setattr(cifar10, "run_once", lambda arguments, recipe, *rest: recipes.append(recipe) or {"test_percent": "1"})
    settings = {"epochs": 2, "peak_learning_rate": 0.1, "weight_decay": 0.2, "crop_padding": 1, "label_smoothing": 0.3}
    cifar10.main(arguments)
    for name, value in settings.items():
        cifar10.main(dataclasses.replace(arguments, **{name: value}))
    rows = _rows(arguments.csv)
    assert len(rows) == len(recipes) == 1 + len(settings)
    for (name, value), row, recipe in zip(settings.items(), rows[1:], recipes[1:]):
        assert row[name] == str(value) and getattr(recipe, name) == value


def _embedding_dtype(classifier):
    return next(layer for layer in classifier._flatten_layers() if layer.name == "stage0_embed").compute_dtype


@pytest.mark.parametrize("network", ["recipe", "cnn"])
def test_a_network_is_built_in_a_precision(arguments, network):
    classifier, _ = cifar10.build(network, cifar10.NO_BLOCKS, cifar10.RECIPES["tiny"], sources.load(), "mixed_float16")
    assert classifier.dtype_policy.name == "mixed_float16"
    assert (_embedding_dtype(classifier), classifier.output.dtype) == ("float16", "float32")


def test_a_network_trains_in_the_precision_of_the_recipe_and_is_measured_in_float32(arguments, monkeypatch):
    recipe = dataclasses.replace(cifar10.RECIPES["tiny"], precision="mixed_float16", xla="off")
    trained = []
    monkeypatch.setattr(cifar10, "adapt_whitening", lambda classifier, *args: trained.append(classifier))
    classifier, *_ = cifar10.fit("cnn", "", recipe, sources.load())
    assert [_embedding_dtype(model) for model in (trained[0], classifier)] == ["float16", "float32"]
    assert isinstance(trained[0].optimizer, keras.optimizers.LossScaleOptimizer)
    for variable, value in zip(classifier.weights, trained[0].get_weights(), strict=True):
        np.testing.assert_array_equal(variable, value)  # one epoch: the best is the last


def test_a_setting_that_only_a_run_has_is_refused(arguments):
    for name, value in {"ema": 0.5, "class_weights": "auto", "early_stopping": 1, "weights": "a.keras"}.items():
        recipe = dataclasses.replace(cifar10.RECIPES["tiny"], **{name: value})
        with pytest.raises(ValueError, match=f"Received: {name}={value}"):
            cifar10.fit("cnn", "", recipe, sources.load())


def test_the_cnn_is_whitened_as_a_network_is():
    classifier, _ = cifar10.cnn(PREPROCESSING, 32)
    split = _split(20)
    adapt_whitening(classifier, evaluation_batches(split, 10, Preprocessing(image_size=(32, 32))))
    expected = Whitening()
    expected.adapt((split.images / 255 - 0.5) / 0.25)
    kernels = (keras.ops.convert_to_numpy(layer.kernel) for layer in (classifier.get_layer("whitening"), expected))
    np.testing.assert_allclose(*kernels, atol=1e-4)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"change": "no attention"}, "change='no attention'"),
        ({"change": "cls token", "network": "cnn"}, "change='cls token', network='cnn'"),
        ({"all_images": True, "validation_only": True}, "validation_only=True, all_images=True"),
        ({"all_images": True, "train_limit": 9}, "train_limit=9, all_images=True"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        cifar10.main(cifar10.Arguments(**changes))
