import dataclasses
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf

from cvt_keras import Stage, Variant, build_classifier
from cvt_keras.compression.quantization import QuantizationAwareTraining
from cvt_keras.errors import RecipeError, RunError
from cvt_keras.layers import DropPath
from cvt_keras.quantized.layers import FakeQuantize, QuantizedConv
from cvt_keras.training.recipes import SMOKE

IMAGES = np.random.default_rng(0).integers(20, 200, (32, 32, 32, 3)).astype("float32")
LABELS = np.eye(10, dtype="float32")[np.arange(32) % 10]


def _batches():
    return tf.data.Dataset.from_tensor_slices((IMAGES, LABELS)).batch(16)


def _pruned():
    """A classifier with half of its weights zero, and with a channel of zeros in the second block's `fc1`."""
    classifier = build_classifier("cvt_tiny", 10, (32, 32, 3), mean=[0.5] * 3, std=[0.25] * 3)
    random = np.random.default_rng(0)
    for variable in classifier.trainable_variables:
        if variable.name == "kernel":
            variable.assign(np.asarray(variable) * (random.random(variable.shape) < 0.5))
    kernel = classifier.get_layer("cvt").get_layer("stage1_block0").mlp.fc1.kernel
    kernel.assign(np.asarray(kernel) * (np.arange(kernel.shape[1]) > 0))
    return classifier


def _fit(training, network, images=IMAGES):
    network.compile(keras.optimizers.SGD(0.01), keras.losses.CategoricalCrossentropy(from_logits=True), jit_compile=False)
    validation_data = IMAGES, LABELS
    network.fit(images, LABELS, batch_size=16, shuffle=False, verbose=0, callbacks=[training], validation_data=validation_data)


def _limits(layer):
    return np.asarray(layer.minimum), np.asarray(layer.maximum)


def _normalization(network):
    return network.get_layer("cvt").get_layer("normalization").output_quantizer


def _kernels(network):
    return [layer.conv.kernel for layer in network._flatten_layers() if isinstance(layer, QuantizedConv)]


def _zeros(kernels):
    return [np.asarray(kernel) == 0 for kernel in kernels]


@pytest.fixture(scope="module")
def trained():
    """A pruned network after two steps on images of half the brightness, with its zeros kept.

    `limits` are the first ones of the normalised images, `inverse` those of the last norm, and `zeros` the masks before the
    training.
    """
    training = QuantizationAwareTraining(keep_zeros=True)
    network = training.wrap(_pruned())
    training.start(network, _batches(), 2, 1)
    limits = _limits(_normalization(network))
    inverse = _limits(network.get_layer("cvt").get_layer("norm").quantizers["inverse"])
    zeros = _zeros(_kernels(network))
    _fit(training, network, IMAGES / 2)
    return SimpleNamespace(training=training, network=network, limits=limits, inverse=inverse, zeros=zeros)


def test_the_first_limits_are_those_of_the_training_images(trained):
    normalized = (IMAGES / 255 - 0.5) / 0.25
    np.testing.assert_allclose(trained.limits, (normalized.min(), normalized.max()), atol=0.02)
    assert trained.inverse[0] == 0 < trained.inverse[1]


def test_in_training_the_limits_follow_the_batches_slowly(trained):
    batches = (IMAGES.reshape(2, -1).max(axis=1) / 2 / 255 - 0.5) / 0.25
    expected = trained.limits[1]
    for maximum in batches:  # a moving average of 0.999
        expected = 0.999 * expected + 0.001 * max(maximum, 0)
    after = _limits(_normalization(trained.network))[1]
    assert after == pytest.approx(expected, abs=1e-4)
    assert after < trained.limits[1]


def test_a_kernels_limits_are_those_of_the_final_kernel(trained):
    convs = [layer for layer in trained.network._flatten_layers() if isinstance(layer, QuantizedConv)]
    assert len(convs) > 20
    for conv in convs:
        axes = (0, 1, 2) if conv.filters else (0, 1, 3)
        minimum, maximum = _limits(conv.kernel_quantizer)
        expected = np.abs(np.asarray(conv.kernel)).max(axis=axes)
        np.testing.assert_allclose(maximum, np.maximum(expected, 1e-6), rtol=1e-6)  # a scale can't be 0
        np.testing.assert_array_equal(minimum, -maximum)
    silent = trained.network.get_layer("cvt").get_layer("stage1_block0").fc1.kernel_quantizer
    assert _limits(silent)[1][0] == pytest.approx(1e-6)


def test_prediction_moves_no_limit(trained):
    before = trained.network.get_weights()
    trained.network.predict(IMAGES * 1.2, verbose=0)
    for variable, value in zip(trained.network.weights, before):
        np.testing.assert_array_equal(np.asarray(variable), value)


def test_zeros_of_a_pruned_network_stay(trained):
    for kernel, zeros in zip(_kernels(trained.network), trained.zeros, strict=True):
        assert (np.asarray(kernel)[zeros] == 0).all()
    assert trained.training.check(trained.network)["sparsity"] > 0.45
    assert len(trained.training.variables) == len(trained.zeros)


def test_the_network_reloads_from_a_file(trained, tmp_path):
    trained.network.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras", compile=False)
    np.testing.assert_array_equal(again.predict(IMAGES, verbose=0), trained.network.predict(IMAGES, verbose=0))


def test_ranges_are_reported_by_path(trained):
    ranges = trained.training.check(trained.network)["ranges"]
    layers = [layer for layer in trained.network._flatten_layers() if isinstance(layer, FakeQuantize) and layer.limits is None]
    assert len(ranges) == len(layers)
    assert ranges["stage1_block0/attention/scores_quantizer"][0] < 0


def test_lost_zeros_are_an_error(trained):
    kernel = trained.network.get_layer("cvt").get_layer("stage0_block0").fc1.conv.kernel
    value = np.asarray(kernel).copy()
    kernel.assign(np.ones(kernel.shape))
    try:
        with pytest.raises(RunError) as failure:
            trained.training.check(trained.network)
    finally:
        kernel.assign(value)
    assert "stage0_block0/fc1" in failure.value.summary


def test_a_range_of_nan_is_an_error(trained):
    maximum = trained.network.get_layer("cvt").get_layer("norm").quantizers["inverse"].maximum
    value = np.asarray(maximum).copy()
    maximum.assign(np.nan)
    try:
        with pytest.raises(RunError) as failure:
            trained.training.check(trained.network)
    finally:
        maximum.assign(value)
    assert failure.value.argument == "peak_learning_rate"
    assert "norm/inverse_quantizer" in failure.value.summary


def test_calibration_moves_no_weight_and_zeros_are_kept_on_request_only(monkeypatch):
    training = QuantizationAwareTraining()
    network = training.wrap(_pruned())
    before = [np.asarray(variable) for variable in network.trainable_variables]
    monkeypatch.setattr("cvt_keras.compression.quantization.CALIBRATION_IMAGES", 32)
    training.start(network, iter(_batches().repeat()), 2, 1)  # endless, so that only the limit ends it
    for variable, value in zip(network.trainable_variables, before):
        np.testing.assert_array_equal(np.asarray(variable), value)
    assert not training.variables
    zeros = _zeros(_kernels(network))
    _fit(training, network)
    assert not all((np.asarray(kernel)[mask] == 0).all() for kernel, mask in zip(_kernels(network), zeros))
    assert training.check(network)["sparsity"] < 0.45


def test_calibration_is_without_stochastic_depth():
    """In training it multiplies what it keeps, here by 1 / (1 - 0.9)."""
    with_depth, without = (
        build_classifier(Variant((Stage(dim=16, depth=2, heads=1, drop_path=rate),)), 10, (32, 32, 3)) for rate in (0.9, 0.0)
    )
    for variable, value in zip(without.trainable_variables, with_depth.trainable_variables, strict=True):
        variable.assign(value)
    ranges, rates = [], []
    for classifier in (with_depth, without):
        training = QuantizationAwareTraining()
        network = training.wrap(classifier)
        training.start(network, _batches(), 2, 1)
        ranges.append(training.check(network)["ranges"])
        rates.append(max(layer.rate for layer in network._flatten_layers() if isinstance(layer, DropPath)))
    assert ranges[0] == ranges[1]
    assert rates == [0.9, 0.0]


def test_half_precision_is_refused():
    with pytest.raises(RecipeError) as refusal:
        QuantizationAwareTraining().require(dataclasses.replace(SMOKE, precision="mixed_bfloat16"))
    assert refusal.value.argument == "precision" and "mixed_bfloat16" in refusal.value.summary
    QuantizationAwareTraining(after={"method": "prune"}).require(dataclasses.replace(SMOKE, precision="float32"))


def test_a_clustered_run_is_refused():
    with pytest.raises(RecipeError) as refusal:
        QuantizationAwareTraining(after={"method": "cluster"}).require(dataclasses.replace(SMOKE, precision="float32"))
    assert refusal.value.argument == "run" and "cluster" in refusal.value.summary


def test_a_network_without_quantised_form_is_refused():
    variant = Variant((Stage(dim=8, depth=1, heads=1, projection="avg"),))
    with pytest.raises(RecipeError) as refusal:
        QuantizationAwareTraining().wrap(build_classifier(variant, 2, (32, 32, 3)))
    assert refusal.value.argument == "variant" and "avg" in refusal.value.summary
