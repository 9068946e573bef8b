import keras
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from layer_battery import Case, check_config, check_layers

from cvt_keras import Calibration, Stage, Variant, build_classifier, calibration_of, preprocessing_of
from cvt_keras.compression.quantization import QuantizationAwareTraining, _kernels
from cvt_keras.export import tflite
from cvt_keras.model import set_calibration
from cvt_keras.quantized import layers
from cvt_keras.quantized.layers import (
    FakeQuantize,
    QuantizedActivation,
    QuantizedAttention,
    QuantizedBatchNorm,
    QuantizedBlock,
    QuantizedConcatenation,
    QuantizedConv,
    QuantizedLayerNorm,
    QuantizedResidualConv,
    QuantizedStem,
    QuantizedTokenEmbedding,
    QuantizedWhitening,
)
from cvt_keras.quantized.model import float_form, quantize, quantized_cvt_of

# Class, arguments, input shapes, output shapes, numbers of trainable values, and numbers of limits: a minimum and a maximum for
# each activation, and for each channel of a kernel.
LAYERS = {
    "activations": (FakeQuantize, {}, [(2, 4, 4, 3)], [(2, 4, 4, 3)], [], [1, 1]),
    "kernels": (FakeQuantize, {"axis": 2}, [(3, 3, 4, 1)], [(3, 3, 4, 1)], [], [4, 4]),
    "known": (FakeQuantize, {"limits": [0.0, 1.0]}, [(2, 5)], [(2, 5)], [], []),
    "conv": (
        QuantizedConv,
        {"filters": 6, "kernel_size": 3, "stride": 2, "padding": 1},
        [(2, 8, 8, 4)],
        [(2, 4, 4, 6)],
        [216, 6],
        [6, 6, 1, 1],
    ),
    "conv in floats": (QuantizedConv, {"filters": 6, "quantized": False}, [(2, 8, 8, 4)], [(2, 8, 8, 6)], [24, 6], []),
    "depthwise": (QuantizedConv, {"kernel_size": 3, "padding": 1}, [(2, 8, 8, 4)], [(2, 8, 8, 4)], [36, 4], [4, 4, 1, 1]),
    "open conv": (QuantizedConv, {"filters": 2, "rounds_output": False}, [(2, 8, 8, 4)], [(2, 8, 8, 2)], [8, 2], [2, 2]),
    "norm": (QuantizedLayerNorm, {}, [(2, 4, 4, 8)], [(2, 4, 4, 8)], [8, 8], [1] * 18),
    "open norm": (QuantizedLayerNorm, {"rounds_output": False}, [(2, 4, 4, 8)], [(2, 4, 4, 8)], [8, 8], [1] * 16),
    "batch norm": (QuantizedBatchNorm, {}, [(2, 4, 4, 8)], [(2, 4, 4, 8)], [8, 8], [1, 1]),
    "gelu": (QuantizedActivation, {"activation": "gelu"}, [(2, 6)], [(2, 6)], [], [1, 1]),
    "open gelu": (QuantizedActivation, {"activation": "gelu", "rounds_output": False}, [(2, 6)], [(2, 6)], [], []),
    "quick gelu": (QuantizedActivation, {"activation": "quick_gelu"}, [(2, 6)], [(2, 6)], [], [1] * 4),
    # The kernel is no trained weight.
    "whitening": (QuantizedWhitening, {}, [(2, 8, 8, 3)], [(2, 7, 7, 24)], [24], [288, 24, 24] + [1] * 4),
    "whitening in floats": (
        QuantizedWhitening,
        {"kernel_size": 1, "activation": "quick_gelu", "quantized": False},
        [(2, 8, 8, 3)],
        [(2, 8, 8, 6)],
        [6],
        [18],
    ),
    "stem": (QuantizedStem, {"dim": 5}, [(2, 8, 8, 3)], [(2, 8, 8, 5)], [135, 5], [5, 5, 1, 1, 1, 1]),
    "residual conv": (QuantizedResidualConv, {"dim": 3}, [(2, 8, 8, 3)], [(2, 8, 8, 3)], [81, 3], [3, 3] + [1] * 6),
    "residual conv with cls token": (
        QuantizedResidualConv,
        {"dim": 3, "activation": "quick_gelu", "grid": [4, 4]},
        [(2, 17, 1, 3)],
        [(2, 17, 1, 3)],
        [81, 3],
        [3, 3] + [1] * 8,
    ),
    "concatenation": (QuantizedConcatenation, {}, [(2, 1, 1, 3), (2, 4, 4, 3)], [(2, 17, 1, 3)], [], [1, 1]),
    "embedding": (QuantizedTokenEmbedding, {"dim": 8}, [(2, 8, 8, 3)], [(2, 4, 4, 8)], [216, 8, 8, 8], [8, 8] + [1] * 20),
    "embedding with cls token": (
        QuantizedTokenEmbedding,
        {"dim": 8, "cls_token": True},
        [(2, 8, 8, 3)],
        [(2, 17, 1, 8)],
        [216, 8, 8, 8, 8],
        [8, 8] + [1] * 18 + [1, 1],
    ),
    "embedding with batch norm": (
        QuantizedTokenEmbedding,
        {"dim": 8, "norm_type": "batch"},
        [(2, 8, 8, 3)],
        [(2, 4, 4, 8)],
        [216, 8],
        [8, 8, 1, 1],
    ),
    "pooled embedding with batch norm": (
        QuantizedTokenEmbedding,
        {"dim": 8, "stride": 3, "padding": 0, "pool": True, "norm_type": "batch", "activation": "quick_gelu"},
        [(2, 8, 8, 3)],
        [(2, 2, 2, 8)],
        [216, 8, 8, 8],
        [8, 8] + [1] * 8,
    ),
    "pooled embedding with cls token": (
        QuantizedTokenEmbedding,
        {"dim": 8, "cls_token": True, "pool": True},
        [(2, 8, 8, 3)],
        [(2, 17, 1, 8)],
        [216, 8, 8, 8, 8],
        [8, 8] + [1] * 22,
    ),
    "attention": (
        QuantizedAttention,
        {"dim": 8, "heads": 2},
        [(2, 4, 4, 8)],
        [(2, 4, 4, 8)],
        [72, 8] * 3 + [64, 8] * 4,
        [8, 8, 1, 1] * 7 + [1] * 4,
    ),
    "attention with cls token": (
        QuantizedAttention,
        {"dim": 8, "heads": 2, "grid": [4, 4]},
        [(2, 17, 1, 8)],
        [(2, 17, 1, 8)],
        [72, 8] * 3 + [64, 8] * 4,
        [8, 8, 1, 1] * 4 + [8, 8] * 3 + [1] * 10,
    ),
    "linear attention": (
        QuantizedAttention,
        {"dim": 8, "heads": 2, "projection": "linear"},
        [(2, 4, 4, 8)],
        [(2, 4, 4, 8)],
        [64, 8] * 4,
        [8, 8, 1, 1] * 4 + [1] * 4,
    ),
    "block": (
        QuantizedBlock,
        {"dim": 8, "heads": 2, "mlp_dim": 16, "drop_path_rate": 0.1},
        [(2, 4, 4, 8)],
        [(2, 4, 4, 8)],
        [8] * 4 + [72, 8] * 3 + [64, 8] * 4 + [128, 16, 128, 8],
        [1] * 36 + [8, 8, 1, 1] * 7 + [1] * 4 + [16, 16, 1, 1, 8, 8, 1, 1] + [1] * 8,
    ),
    "block with batch norm, convolution and cls token": (
        QuantizedBlock,
        {
            "dim": 8,
            "heads": 2,
            "mlp_dim": 16,
            "norm_type": "batch",
            "attention_scale": "head",
            "mlp_conv": True,
            "grid": [4, 4],
        },
        [(2, 17, 1, 8)],
        [(2, 17, 1, 8)],
        [8] * 2 + [72, 8] * 3 + [64, 8] * 4 + [128, 16, 144, 16, 128, 8],
        # Limits of norm1, attention, fc1, depthwise without an output, its concatenation, fc2, activation and two sums
        [1, 1] + [8, 8, 1, 1] * 4 + [8, 8] * 3 + [1] * 10 + [16, 16, 1, 1] + [16, 16] + [1, 1] + [8, 8, 1, 1] + [1] * 8,
    ),
}


CASES = {
    name: Case(cls, arguments, shapes, output_shapes, sum(weights), sum(limits))
    for name, (cls, arguments, shapes, output_shapes, weights, limits) in LAYERS.items()
}


def test_battery(tmp_path):
    for case in CASES.values():
        check_config(case)
    check_layers([*CASES.values()], "float32", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_battery_of_each_layer_alone_with_xla(name, tmp_path):
    check_layers([CASES[name]], "float32", tmp_path, compiled=True)


def test_fake_quantisation_rounds_to_256_values_and_clips():
    layer = FakeQuantize()
    layer.build((None,))
    layer.minimum.assign(-1.0)
    layer.maximum.assign(3.0)
    x = np.linspace(-2, 4, 10_001).astype("float32")
    rounded = np.asarray(layer(x))
    assert len(np.unique(rounded)) == 256
    assert 0 in rounded
    np.testing.assert_allclose(rounded, np.clip(x, rounded.min(), rounded.max()), atol=4 / 255 / 2 + 1e-6)
    assert rounded.max() - rounded.min() == pytest.approx(4, abs=1e-5)


def test_kernels_are_symmetric_and_each_channel_has_its_own_steps():
    layer = FakeQuantize(axis=2)
    kernel = np.random.default_rng(0).normal(size=(3, 3, 4, 1), scale=[[[1], [10], [100], [1000]]]).astype("float32")
    layer.build(kernel.shape)
    largest = np.abs(kernel).max(axis=(0, 1, 3))
    layer.minimum.assign(-largest)
    layer.maximum.assign(largest)
    steps = np.asarray(layer(kernel)) / (largest[:, None] / 127)
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-3)
    np.testing.assert_allclose(np.abs(steps).max(axis=(0, 1, 3)), 127, rtol=1e-5)


def test_kernels_are_rounded_alike_on_jax(monkeypatch):
    layer = FakeQuantize(axis=2)
    kernel = np.random.default_rng(0).normal(size=(3, 3, 4, 1)).astype("float32")
    layer.build(kernel.shape)
    expected = layer(kernel)
    # Keras' own rounding, instead of TensorFlow's.
    monkeypatch.setattr("keras.src.backend.backend", lambda: "jax")
    np.testing.assert_allclose(layer(kernel), expected, atol=1e-6)


def test_the_gradient_goes_through_and_ends_at_the_limits():
    layer = FakeQuantize(limits=(0.0, 1.0))
    x = tf.constant([-1.0, 0.3, 0.6, 2.0])
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tf.reduce_sum(layer(x))
    np.testing.assert_array_equal(tape.gradient(y, x), [0, 1, 1, 0])


def test_the_observer_is_called_in_training_only():
    layer = FakeQuantize()
    seen = []
    layer.build((None,))
    layer.observer = lambda x, minimum, maximum: seen.append((minimum, maximum)) or x
    x = np.ones(3, "float32")
    layer(x, training=False)
    assert not seen
    layer(x, training=True)
    assert seen == [(layer.minimum, layer.maximum)]


def _trained_classifier(variant, **kwargs):
    """A classifier whose weights and statistics are so large that each counts, with negative scales among its norms'."""
    classifier = build_classifier(variant, 10, (32, 32, 3), mean=[0.5, 0.4, 0.3], std=[0.2, 0.25, 0.3], **kwargs)
    random = np.random.default_rng(0)
    for variable in classifier.weights:
        if variable.name in ("gamma", "beta", "bias", "moving_mean", "moving_variance"):
            variable.assign(np.asarray(variable) + random.uniform(0.1, 0.5, variable.shape))
        if variable.name == "gamma":
            variable.assign(np.asarray(variable) * random.choice([-1, 1], variable.shape))
        if variable.name == "cls_token" or (variable.name == "kernel" and len(variable.shape) == 2):
            variable.assign(random.normal(size=variable.shape, scale=0.5 * variable.shape[0] ** -0.5))
    return classifier


# A pooled and a strided stage, with every field that is not in the paper.
FIELDS = {"heads": 2, "depth": 1, "mlp_conv": True}
NOT_IN_THE_PAPER = {
    "batch norm": Variant(
        (
            Stage(dim=8, mlp_ratio=1.0, stride_kv=4, pool=True, residual_convs=1, **FIELDS),
            Stage(dim=12, **FIELDS),
        ),
        "gelu",
        whitening=2,
        norm="batch",
        attention_scale="head",
    ),
    "batch norm, cls tokens": Variant(
        (
            Stage(dim=8, cls_token=True, residual_convs=2, **FIELDS),
            Stage(dim=8, cls_token=True, pool=True, residual_convs=1, **FIELDS),
        ),
        "gelu",
        whitening=2,
        norm="batch",
        attention_scale="head",
    ),
    "layer norm, cls token before the last stage": Variant(
        (
            Stage(dim=8, cls_token=True, pool=True, residual_convs=1, **FIELDS),
            Stage(dim=8, **FIELDS),
        ),
        "quick_gelu",
        stem=(6,),
        whitening=1,
        attention_scale="head",
    ),
}
VARIANTS = {
    "stem, pooled head": Variant((Stage(dim=8, depth=1, heads=1), Stage(dim=8, depth=1, heads=2)), "gelu", stem=(4, 4)),
    "cvt_tiny": "cvt_tiny",  # with a cls token
    "no bias, no projection": Variant(
        (Stage(dim=8, depth=1, heads=1, qkv_bias=False), Stage(dim=8, depth=1, heads=2, projection="linear"))
    ),
    "cls token before the last stage": Variant(
        (Stage(dim=8, depth=1, heads=1, cls_token=True), Stage(dim=8, depth=1, heads=1))
    ),
    **NOT_IN_THE_PAPER,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_folded_network_is_the_same_function(variant):
    classifier = _trained_classifier(VARIANTS[variant])
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)).astype("float32")
    folded = float_form(quantize(classifier))
    logits = np.asarray(classifier(images))
    assert np.ptp(logits, axis=0).max() > 0.01  # the images count
    np.testing.assert_allclose(folded(images), logits, rtol=1e-5, atol=1e-5)
    assert not [layer for layer in folded._flatten_layers() if isinstance(layer, FakeQuantize)]
    assert not [layer for layer in folded._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]


def test_preprocessing_and_variant_are_kept():
    classifier = _trained_classifier("cvt_tiny", class_names=[str(i) for i in range(10)])
    for made in (quantize(classifier), float_form(quantize(classifier))):
        assert made.get_layer("cvt") is quantized_cvt_of(made)
        assert preprocessing_of(made) == preprocessing_of(classifier)
        assert quantized_cvt_of(made).variant == classifier.get_layer("cvt").variant
    assert quantized_cvt_of(classifier) is None


def test_the_normalisation_is_not_trainable():
    made = quantize(_trained_classifier("cvt_tiny"))
    trained = {variable.path for variable in made.trainable_variables}
    assert trained and not [path for path in trained if "normalization" in path]


def test_the_quantized_network_is_float32_under_any_global_policy(tmp_path):
    quantize(_trained_classifier("cvt_tiny")).save(tmp_path / "model.keras")
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        made = keras.saving.load_model(tmp_path / "model.keras")
        policies = {
            layer.compute_dtype for layer in quantized_cvt_of(made)._flatten_layers(include_self=False) if layer.weights
        }
    finally:
        keras.config.set_dtype_policy("float32")
    assert policies == {"float32"}


def test_average_pooling_is_refused():
    variant = Variant((Stage(dim=8, depth=1, heads=1, projection="avg"),))
    with pytest.raises(ValueError, match=r"`projection` must be dw_bn or linear.*avg"):
        quantize(build_classifier(variant, 2, (32, 32, 3)))


def test_softmax_and_sigmoid_have_tflites_fixed_steps():
    for quantizer in (QuantizedAttention(8, 1).weights_quantizer, QuantizedActivation("quick_gelu").sigmoid_quantizer):
        rounded = quantizer(np.array([0.0, 0.3 / 256, 0.7 / 256, 0.5, 1.0], "float32"))
        np.testing.assert_array_equal(rounded, [0, 0, 1 / 256, 0.5, 255 / 256])


def test_every_layer_is_in_the_battery():
    own = {value for value in vars(layers).values() if isinstance(value, type) and value.__module__ == layers.__name__}
    assert own == {case.cls for case in CASES.values()}


def test_the_scores_scale_is_in_the_querys_projection():
    attention = QuantizedAttention(16, 2)
    attention.build((None, 4, 4, 16))
    assert (attention.proj_q.scale, attention.proj_k.scale) == (0.25, 1.0)
    assert QuantizedAttention(16, 4, attention_scale="head").proj_q.scale == 0.5
    np.testing.assert_allclose(attention.proj_q.kernel, 0.25 * np.asarray(attention.proj_q.conv.kernel))
    layer = QuantizedConv(3, quantized=False, scale=0.5)
    x = np.random.default_rng(0).normal(size=(1, 2, 2, 4)).astype("float32")
    layer.build(x.shape)
    layer.conv.bias.assign([1.0, 2.0, 3.0])
    expected = 0.5 * (x @ np.asarray(layer.conv.kernel)[0, 0] + np.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(layer(x), expected, atol=1e-6)


def _calibrated(classifier, images):
    """The fake-quantised form of a classifier, with the ranges of these images, and what trained it."""
    training = QuantizationAwareTraining()
    network = training.wrap(classifier)
    training.start(network, tf.data.Dataset.from_tensors((images, np.zeros((len(images), 10)))), 1, 1)
    return network, training


@pytest.mark.parametrize(
    "variant",
    [
        Variant((Stage(dim=8, depth=1, heads=1, projection="linear"), Stage(dim=8, depth=1, heads=2, cls_token=True))),
        *NOT_IN_THE_PAPER.values(),
    ],
    ids=["linear projection, cls token at the end", *NOT_IN_THE_PAPER],
)
def test_the_whole_network_becomes_integers(variant, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 32, 3)).astype("float32")
    classifier = _trained_classifier(variant)
    if variant.whitening:  # some filters are zeros, as for grey images
        kernel = classifier.get_layer("cvt").get_layer("whitening").kernel
        kernel.assign(np.where(np.arange(kernel.shape[-1]) % 3, kernel, 0))
    network, _ = _calibrated(classifier, images)
    set_calibration(network, Calibration(temperature := 0.5))
    interpreter = Interpreter(
        model_content=tflite.convert(network, [str(i) for i in range(10)], "int8"),
        experimental_op_resolver_type=OpResolverType.BUILTIN_REF,
    )
    interpreter.allocate_tensors()
    assert {tensor["dtype"] for tensor in interpreter.get_tensor_details()} <= {np.uint8, np.int8, np.int32, np.int64}
    [pixels], [output] = interpreter.get_input_details(), interpreter.get_output_details()
    for image, expected in zip(images[:4], keras.ops.softmax(network(images[:4]) / temperature)):
        interpreter.set_tensor(pixels["index"], image[None].astype("uint8"))
        interpreter.invoke()
        probabilities = interpreter.get_tensor(output["index"])[0] / 256
        np.testing.assert_allclose(probabilities, expected, atol=0.02)
    network.save(tmp_path / "model.keras")
    reloaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(reloaded(images[:4]), network(images[:4]))
    assert calibration_of(reloaded) == Calibration(temperature)


def test_training_leaves_the_whitening_kernel_as_it_is():
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3)).astype("float32")
    network, training = _calibrated(_trained_classifier(NOT_IN_THE_PAPER["batch norm"]), images)
    network.trainable = False
    network.trainable = True
    whitening = quantized_cvt_of(network).get_layer("whitening")
    before = {variable.path: np.asarray(variable) for variable in (whitening.kernel, whitening.bias)}
    limits = np.asarray(whitening.kernel_quantizer.maximum)
    network.compile("sgd", keras.losses.CategoricalCrossentropy(from_logits=True), run_eagerly=True)
    network.fit(images, np.eye(10, dtype="float32")[:8], batch_size=8, verbose=0, callbacks=[training])
    np.testing.assert_array_equal(whitening.kernel, before[whitening.kernel.path])
    np.testing.assert_array_equal(whitening.kernel_quantizer.maximum, limits)
    assert np.all(np.asarray(whitening.bias) != before[whitening.bias.path])
    # Whitening and norms are not among the kernels whose zeros are counted and kept.
    kernels = _kernels(network)
    assert "stage0_conv0/conv" in kernels
    assert not [path for path in kernels if set(path.split("/")) & {"whitening", "norm", "norm1"}]
    assert "whitening/kernel_quantizer" in training.check(network)["ranges"]


def test_a_batch_norm_scales_and_shifts_each_channel_and_trains_both():
    layer = QuantizedBatchNorm()
    layer.build((None, 2, 2, 3))
    layer.gamma.assign([-0.3, 1e-3, 7.0])
    layer.beta.assign([0.1, 0.2, 0.3])
    layer.output_quantizer.minimum.assign(-30.0)
    layer.output_quantizer.maximum.assign(30.0)
    x = np.random.default_rng(0).normal(size=(2, 2, 2, 3)).astype("float32")
    with tf.GradientTape() as tape:
        y = layer(x)
    np.testing.assert_allclose(y, x * [-0.3, 1e-3, 7.0] + [0.1, 0.2, 0.3], atol=60 / 255 / 2 + 1e-3)
    gamma, beta = tape.gradient(y, [layer.gamma.value, layer.beta.value])
    np.testing.assert_allclose(gamma, x.sum(axis=(0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(beta, [8, 8, 8])


@pytest.mark.parametrize("name", ["embedding", "attention", "block", "gelu"])
def test_a_config_of_an_older_file_loads(name):
    case = CASES[name]
    config = case.cls(**case.arguments).get_config()
    new = {"pool", "norm_type", "attention_scale", "mlp_conv", "rounds_output"}
    new |= {"activation"} if name == "embedding" else set()
    assert case.cls.from_config({key: value for key, value in config.items() if key not in new}).get_config() == config
