import dataclasses

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


def _started(keep_zeros=False, change=lambda classifier: None):
    classifier = build_classifier("cvt_tiny", 10, (32, 32, 3), mean=[0.5] * 3, std=[0.25] * 3)
    change(classifier)
    training = QuantizationAwareTraining(keep_zeros)
    made = training.wrap(classifier)
    training.start(made, _batches(), 2, 1)
    return training, made


def test_lost_zeros_are_told():
    training, made = _started(True, _prune_half)
    kernel = made.get_layer("cvt").get_layer("stage0_block0").fc1.conv.kernel
    kernel.assign(np.ones(kernel.shape))
    with pytest.raises(RunError) as failure:
        training.check(made)
    assert "stage0_block0/fc1" in failure.value.summary


def _fit(training, made, images=IMAGES):
    made.compile(keras.optimizers.SGD(0.01), keras.losses.CategoricalCrossentropy(from_logits=True))
    made.fit(images, LABELS, batch_size=16, shuffle=False, verbose=0, callbacks=[training], validation_data=(IMAGES, LABELS))


def _limits(layer):
    return np.asarray(layer.minimum), np.asarray(layer.maximum)


def test_the_first_limits_are_those_of_the_training_images():
    _, made = _started()
    minimum, maximum = _limits(made.get_layer("cvt").get_layer("normalization").output_quantizer)
    normalized = (IMAGES / 255 - 0.5) / 0.25
    np.testing.assert_allclose((minimum, maximum), (normalized.min(), normalized.max()), atol=0.02)
    inverse = made.get_layer("cvt").get_layer("norm").quantizers["inverse"]
    assert _limits(inverse)[0] == 0 < _limits(inverse)[1]


def test_calibration_moves_no_weight_and_ends_where_the_images_are_enough(monkeypatch):
    classifier = build_classifier("cvt_tiny", 10, (32, 32, 3))
    training = QuantizationAwareTraining()
    made = training.wrap(classifier)
    before = [np.asarray(variable) for variable in made.trainable_variables]
    monkeypatch.setattr("cvt_keras.compression.quantization.CALIBRATION_IMAGES", 32)
    batches = iter(_batches().repeat())
    training.start(made, batches, 2, 1)  # which would not end by itself
    for variable, value in zip(made.trainable_variables, before):
        np.testing.assert_array_equal(np.asarray(variable), value)


def test_calibration_sees_no_stochastic_depth():
    """Which multiplies what it lets through, here by 1 / (1 - 0.9)."""
    shaken, calm = (
        build_classifier(Variant((Stage(dim=16, depth=2, heads=1, drop_path=rate),)), 10, (32, 32, 3)) for rate in (0.9, 0.0)
    )
    for variable, value in zip(calm.trainable_variables, shaken.trainable_variables, strict=True):
        variable.assign(value)
    found, rates = [], []
    for classifier in (shaken, calm):
        training = QuantizationAwareTraining()
        made = training.wrap(classifier)
        training.start(made, _batches(), 2, 1)
        found.append(training.check(made)["ranges"])
        rates.append(max(layer.rate for layer in made._flatten_layers() if isinstance(layer, DropPath)))
    assert found[0] == found[1]
    assert rates == [0.9, 0.0]


def test_in_training_the_limits_follow_the_batches_slowly():
    training, made = _started()
    quantizer = made.get_layer("cvt").get_layer("normalization").output_quantizer
    maximum = _limits(quantizer)[1]
    _fit(training, made, IMAGES / 2)  # two steps of a moving average of 0.999
    after = _limits(quantizer)[1]
    batch = (IMAGES.reshape(2, -1).max(axis=1) / 2 / 255 - 0.5) / 0.25
    expected = maximum
    for most in batch:
        expected = 0.999 * expected + 0.001 * max(most, 0)
    assert after == pytest.approx(expected, abs=1e-4)
    assert after < maximum


def test_a_kernels_limits_are_those_of_the_kernel_that_is_kept():
    training, made = _started()
    _fit(training, made)
    convs = [layer for layer in made._flatten_layers() if isinstance(layer, QuantizedConv)]
    assert len(convs) > 20
    for conv in convs:
        kernel = np.asarray(conv.kernel)
        axes = (0, 1, 2) if conv.filters else (0, 1, 3)
        minimum, maximum = _limits(conv.kernel_quantizer)
        np.testing.assert_allclose(maximum, np.abs(kernel).max(axis=axes), rtol=1e-6)
        np.testing.assert_array_equal(minimum, -maximum)


def test_validation_moves_no_limit():
    training, made = _started()
    _fit(training, made)
    before = made.get_weights()
    made.predict(IMAGES * 1.2, verbose=0)
    for variable, value in zip(made.weights, before):
        np.testing.assert_array_equal(np.asarray(variable), value)


def _prune_half(classifier):
    random = np.random.default_rng(0)
    for variable in classifier.trainable_variables:
        if variable.name == "kernel":
            variable.assign(np.asarray(variable) * (random.random(variable.shape) < 0.5))


@pytest.mark.parametrize("keep", [True, False])
def test_zeros_of_a_pruned_network_stay_if_they_are_to(keep):
    training, made = _started(keep, _prune_half)
    kernels = [layer.conv.kernel for layer in made._flatten_layers() if isinstance(layer, QuantizedConv) and layer.trainable]
    zeros = [np.asarray(kernel) == 0 for kernel in kernels]
    _fit(training, made)
    kept = [(np.asarray(kernel)[places] == 0).all() for kernel, places in zip(kernels, zeros)]
    assert all(kept) == keep
    assert (training.check(made)["sparsity"] > 0.45) == keep
    assert len(training.variables) == (len(zeros) + 1 if keep else 0)  # normalisation's too


def test_a_channel_of_zeros_has_a_scale():
    def silence(classifier):
        kernel = classifier.get_layer("cvt").get_layer("stage1_block0").mlp.fc1.kernel
        kernel.assign(np.asarray(kernel) * (np.arange(kernel.shape[1]) > 0))

    training, made = _started(True, silence)
    _fit(training, made)
    minimum, maximum = _limits(made.get_layer("cvt").get_layer("stage1_block0").fc1.kernel_quantizer)
    assert maximum[0] == pytest.approx(1e-6) and (minimum < maximum).all()


def test_ranges_are_told_by_their_place():
    training, made = _started()
    ranges = training.check(made)["ranges"]
    known = [layer for layer in made._flatten_layers() if isinstance(layer, FakeQuantize) and layer.limits is None]
    assert len(ranges) == len(known)
    assert ranges["stage1_block0/attention/scores_quantizer"][0] < 0


def test_a_range_that_is_no_number_is_told():
    training, made = _started()
    made.get_layer("cvt").get_layer("norm").quantizers["inverse"].maximum.assign(np.nan)
    with pytest.raises(RunError) as failure:
        training.check(made)
    assert failure.value.argument == "peak_learning_rate"
    assert "norm/inverse_quantizer" in failure.value.summary


def test_it_comes_back_from_a_file(tmp_path):
    training, made = _started()
    _fit(training, made)
    made.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras", compile=False)
    np.testing.assert_array_equal(again.predict(IMAGES, verbose=0), made.predict(IMAGES, verbose=0))


def test_half_precision_is_refused():
    with pytest.raises(RecipeError) as refusal:
        QuantizationAwareTraining().require(dataclasses.replace(SMOKE, precision="mixed_bfloat16"))
    assert refusal.value.argument == "precision" and "mixed_bfloat16" in refusal.value.summary
    QuantizationAwareTraining(after={"method": "prune"}).require(dataclasses.replace(SMOKE, precision="float32"))


def test_a_clustered_run_is_refused():
    with pytest.raises(RecipeError) as refusal:
        QuantizationAwareTraining(after={"method": "cluster"}).require(dataclasses.replace(SMOKE, precision="float32"))
    assert refusal.value.argument == "run" and "cluster" in refusal.value.summary


def test_a_network_without_integer_form_is_refused():
    from cvt_keras import Stage, Variant

    variant = Variant((Stage(dim=8, depth=1, heads=1, projection="avg"),))
    with pytest.raises(RecipeError) as refusal:
        QuantizationAwareTraining().wrap(build_classifier(variant, 2, (32, 32, 3)))
    assert refusal.value.argument == "variant" and "avg" in refusal.value.summary
