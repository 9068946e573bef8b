import csv
from types import SimpleNamespace

import keras
import numpy as np
import pytest

from benchmarks import cifar10
from cvt_keras import VARIANTS, Preprocessing, Stage, Variant, macs
from cvt_keras.data.split import Split
from cvt_keras.layers import Whitening
from cvt_keras.training import Recipe

PREPROCESSING = Preprocessing((0.5,) * 3, (0.25,) * 3, tuple("abcdefghij"))


def _split(count, seed=0):
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 10
    return Split(random.integers(0, 256, (count, 32, 32, 3)).astype("uint8"), labels.astype("int64"))


def test_the_macs_of_the_cnn_are_those_of_its_layers():
    classifier, multiplies = cifar10.cnn(PREPROCESSING, 32)
    counted = 0
    for layer in classifier.layers:
        if hasattr(layer, "proj"):
            kernel, positions = layer.proj.kernel, np.prod(layer.input.shape[1:3])  # stride 1 and even padding
        elif hasattr(layer, "kernel"):
            kernel, positions = layer.kernel, np.prod(layer.output.shape[1:-1])
        else:
            continue
        counted += int(positions * np.prod(kernel.shape))
    assert multiplies == counted
    assert f"{multiplies / 1e6:.1f}" == "54.2"
    assert classifier.output_shape == (None, 10)


def test_ablations_change_what_they_name():
    variant = VARIANTS["cvt_cifar"]
    changed = {name: change(variant) for name, change in cifar10.ABLATIONS.items()}
    assert changed.pop("") == variant
    assert len(set(changed.values()) | {variant}) == len(changed) + 1
    cost = {name: macs(network, (32, 32, 3), 10) - macs(variant, (32, 32, 3), 10) for name, network in changed.items()}
    for name in ("linear projection", "full keys and values", "cls token"):
        assert cost[name] > 0, name
    for name in ("strided embeddings", "no residual convolution", "no convolution in the MLP"):
        assert cost[name] < 0, name
    for name in ("layer norm", "attention scaled by the whole width", "random start"):
        assert cost[name] == 0, name
    assert changed["cls token"].stages[-1].cls_token and not changed["no whitening"].whitening


def test_whitening_is_computed_from_normalised_images():
    classifier, _ = cifar10.cnn(PREPROCESSING, 32)
    split = _split(20)
    cifar10.adapt_whitening(classifier, split, Recipe())
    expected = Whitening()
    expected.adapt((split.images / 255 - 0.5) / 0.25)
    kernels = (keras.ops.convert_to_numpy(layer.kernel) for layer in (classifier.get_layer("whitening"), expected))
    np.testing.assert_allclose(*kernels, atol=1e-4)


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


def test_a_run_trains_and_measures():
    tiny = Variant((Stage(8, 1, 1, pool=True),), whitening=2, norm="batch")
    recipe = Recipe(variant=tiny, epochs=1, batch_size=16, xla="off", image_size=32)
    source = SimpleNamespace(mean=(0.5,) * 3, std=(0.25,) * 3, class_names=tuple("abcdefghij"), test=_split(20, 1))
    row = cifar10.run_once(cifar10.Arguments(validation_only=True), recipe, source, _split(32), _split(20, 2))
    assert row["macs_millions"] == f"{macs(tiny, (32, 32, 3), 10) / 1e6:.1f}"
    for column in ("percent", "mirrored_percent", "cross_entropy"):
        assert float(row[f"validation_{column}"]) >= 0
        assert row[f"test_{column}"] == ""
    assert 0 <= float(row["training_percent"]) <= 100


def test_runs_that_the_file_has_are_skipped(tmp_path):
    file = tmp_path / "cifar10.csv"
    row = dict.fromkeys(cifar10.KEY, "1")
    assert not cifar10.is_stored(None, row) and not cifar10.is_stored(file, row)
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, [*cifar10.KEY, "test_percent"])
        writer.writeheader()
        writer.writerow({**row, "test_percent": "90"})
    assert cifar10.is_stored(file, {**row, "seed": 1})
    assert not cifar10.is_stored(file, {**row, "seed": 2})


def test_an_unknown_change_is_refused():
    with pytest.raises(ValueError, match="change='no attention'"):
        cifar10.main(cifar10.Arguments(change="no attention"))
