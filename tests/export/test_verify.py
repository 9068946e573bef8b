import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf

from cvt_keras import Preprocessing
from cvt_keras.errors import ExportError
from cvt_keras.export import saved_model, verify
from cvt_keras.export.verify import BOUNDS, DEFAULT_FORMATS, FORMATS, TFLITE_FORMATS, Bounds, compare
from cvt_keras.preprocessing import Calibration

LABELS = np.arange(1000) % 10


def _answers(probabilities, **more):
    floats = {"float_tensors": np.array([], str), "float_reasons": np.array([], str)}
    return {"probabilities": probabilities, "milliseconds": 1.0, "runtime": "none", **floats, **more}


def _confident(labels):
    return np.eye(10)[labels] * 0.9 + 0.01


def _wrong(n):
    """Probabilities with the first `n` images wrong."""
    labels = LABELS.copy()
    labels[:n] = (labels[:n] + 1) % 10
    return _confident(labels)


@pytest.fixture
def file(tmp_path):
    (tmp_path / "a.tflite").write_bytes(bytes(100))
    return tmp_path / "a.tflite"


@pytest.mark.parametrize(
    "name, lost, passed", [("int8", 10, True), ("int8", 11, False), ("dynamic_int8", 2, True), ("dynamic_int8", 3, False)]
)
def test_top1_may_drop_to_the_bound(name, lost, passed, file):
    artifact = compare(name, file, "export/a.tflite", LABELS, _confident(LABELS), _answers(_wrong(lost)))
    assert artifact.passed == passed
    assert artifact.top1 == artifact.agreement == pytest.approx(1 - lost / 1000)
    assert (artifact.bytes, artifact.images) == (100, 1000)


def test_bounds_can_be_overridden(file):
    bounds = Bounds(0.005, 0.2)
    assert compare("int8", file, "", LABELS, _confident(LABELS), _answers(_wrong(3))).passed
    assert compare("int8", file, "", LABELS, _confident(LABELS), _answers(_wrong(3)), bounds).broken == ["max_abs_diff"]
    artifact = compare("int8", file, "", LABELS, _confident(LABELS), _answers(_wrong(6)), Bounds(0.005))
    assert artifact.broken == ["top1_drop"] and artifact.bounds["top1_drop"] == 0.005


def test_fewer_than_three_images_break_no_bound(file):
    few = slice(0, 20)
    assert compare("int8", file, "", LABELS[few], _confident(LABELS)[few], _answers(_wrong(2)[few])).passed
    assert not compare("int8", file, "", LABELS[few], _confident(LABELS)[few], _answers(_wrong(3)[few])).passed


@pytest.mark.parametrize("images, broken", [(2, []), (3, ["max_abs_diff"])])
def test_the_report_names_the_image_that_differs_most(images, broken, file):
    probabilities = _confident(LABELS)
    probabilities[123, 4] += 2e-3
    probabilities[: images - 1, 4] += 1e-3
    artifact = compare("float32", file, "", LABELS, _confident(LABELS), _answers(probabilities))
    assert (artifact.broken, artifact.passed, artifact.worst_image) == (broken, not broken, 123)
    assert artifact.max_abs_diff == pytest.approx(2e-3)
    assert artifact.bounds == {"top1_drop": 0.0, "max_abs_diff": 1e-4, "reference_max_abs_diff": 1e-4}


@pytest.mark.parametrize(
    "name, difference, passed",
    [
        ("float32", 1e-5, True),
        ("float32", 1e-3, False),
        ("dynamic_int8", 0.05, True),
        ("int8", 0.2, True),
        ("int8", 0.3, False),
    ],
)
def test_disagreeing_kernels_fail(name, difference, passed, file):
    reference = _confident(LABELS)[:200]
    reference[:3] -= difference
    artifact = compare(name, file, "", LABELS, _confident(LABELS), _answers(_confident(LABELS), reference=reference))
    assert artifact.broken == ([] if passed else ["reference_max_abs_diff"])
    assert artifact.reference_max_abs_diff == pytest.approx(difference)


def test_float_tensors_of_an_integer_file_are_listed_with_reasons(file):
    floats = {"float_tensors": np.array(["mean"]), "float_reasons": np.array(["the converter keeps MEAN in floats here"])}
    artifact = compare("int8", file, "", LABELS, _confident(LABELS), _answers(_confident(LABELS), **floats))
    assert artifact.float_tensors == {"mean": "the converter keeps MEAN in floats here"}
    assert compare("float16", file, "", LABELS, _confident(LABELS), _answers(_confident(LABELS), **floats)).float_tensors == {}


def test_nan_probabilities_raise(file):
    probabilities = _confident(LABELS)
    probabilities[7, 7] = np.nan
    with pytest.raises(ExportError) as error:
        compare("int8", file, "", LABELS, _confident(LABELS), _answers(probabilities))
    assert "int8" in error.value.summary and "NaN" in error.value.summary


@pytest.fixture
def threads_stay(monkeypatch):
    for name in ("set_intra_op_parallelism_threads", "set_inter_op_parallelism_threads"):
        monkeypatch.setattr(tf.config.threading, name, lambda threads: None)  # TensorFlow has started already


@pytest.mark.usefixtures("threads_stay")
@pytest.mark.parametrize("wrong", ["serving_bytes", "logits"])
def test_a_signature_that_disagrees_counts_as_a_difference(wrong, tmp_path):
    def signature(name, input_name, spec):
        probabilities = tf.constant([[0.25, 0.75] if name == wrong else [0.75, 0.25]])

        def serve(images):
            rows = tf.repeat(probabilities, tf.shape(images)[0], axis=0)
            return {"logits": tf.math.log(rows)} if name == "logits" else {"probabilities": rows, "unsure": rows[:, 0] < 0}

        return tf.function(serve).get_concrete_function(tf.TensorSpec(*spec, name=input_name))

    images = ((None, 4, 4, 3), tf.uint8)
    arguments = {"serving_default": ("images", images), "logits": ("images", images)}
    arguments["serving_bytes"] = ("image_bytes", ((None,), tf.string))
    signatures = {name: signature(name, *rest) for name, rest in arguments.items()}
    tf.saved_model.save(tf.Module(), str(tmp_path / "1"), signatures)
    answers = verify.answer(tmp_path / "1", np.zeros((5, 4, 4, 3), "uint8"))
    np.testing.assert_allclose(answers["probabilities"], [[0.25, 0.75]] * 5, atol=1e-6)


@pytest.mark.usefixtures("threads_stay")
def test_serving_bytes_of_a_network_that_crops_agrees(tmp_path):
    # A network whose probabilities show every pixel.
    network = keras.Sequential([keras.Input((5, 8, 3)), keras.layers.Rescaling(1 / 51), keras.layers.Flatten()])
    network.preprocessing = Preprocessing(image_size=(5, 8), resize="crop", crop_pct=0.6)
    saved_model.write(network, [""] * 120, tmp_path / "1")
    images = np.random.default_rng(0).integers(0, 256, (5, 5, 8, 3)).astype("uint8")
    answers = verify.answer(tmp_path / "1", images, network.preprocessing.crop_from)
    expected = tf.nn.softmax(images.reshape(5, -1).astype("float32") / 51)
    np.testing.assert_allclose(answers["probabilities"], expected, rtol=1e-3)


@pytest.mark.usefixtures("threads_stay")
@pytest.mark.parametrize(
    "fault, class_names, threshold",
    [
        ("`classes` contradicts", ["b", "a", "c"], 0.4),
        ("`unsure` contradicts", ["a", "b", "c"], 0.9),
        (None, ["a", "b", "c"], 0.4),
    ],
)
def test_classes_and_unsure_must_match_the_probabilities(fault, class_names, threshold, tmp_path):
    network = keras.Sequential([keras.Input((1, 1, 3)), keras.layers.Rescaling(1 / 255), keras.layers.Flatten()])
    network.preprocessing = Preprocessing(image_size=(1, 1))
    network.add(holder := keras.layers.Identity())
    holder.calibration = Calibration(temperature=2.0, threshold=0.4)
    saved_model.write(network, ["a", "b", "c"], tmp_path / "1")
    images = np.array([[[[255, 0, 0]]]] * 4, "uint8")  # probabilities of 0.45, 0.27 and 0.27
    calibration = {"temperature": 2.0, "threshold": threshold}
    with pytest.raises(ExportError, match=fault) if fault else contextlib.nullcontext():
        verify.answer(tmp_path / "1", images, class_names=class_names, calibration=calibration)


def test_a_temperature_below_one_widens_the_bounds():
    bounds = Bounds(0.005, 0.2, 0.25)
    assert bounds.scaled_for(2.0) == bounds.scaled_for(1.0) == bounds
    assert bounds.scaled_for(0.8) == Bounds(0.005, 0.25, 0.3125)
    assert bounds.scaled_for(0.1) == bounds.scaled_for(0.5) == Bounds(0.005, 0.4, 0.5)
    assert Bounds(0.0).scaled_for(0.5) == Bounds(0.0)


def test_the_farthest_answer_of_the_signatures_counts():
    nan, default = np.nan, np.array([[0.75, 0.25]] * 5)
    near = np.array([[0.75 + 2e-5, 0.25 - 2e-5]] * 5)  # a smaller difference must not hide a larger one
    far = np.array([[0.25, 0.75], [0.75, 0.25], [nan, nan], [0.75, 0.25], [0.25, 0.75]])
    default[4] = nan
    expected = [far[0], near[1], far[2], near[3], default[4]]
    np.testing.assert_array_equal(verify._farthest(default, far, near), expected)
    np.testing.assert_array_equal(verify._farthest(default, near, far), expected)
    same = np.array([[0.75, 0.25]])
    np.testing.assert_array_equal(verify._farthest(same, same + 1e-6, same), same)


@pytest.mark.parametrize("size, parts", [((32, 32), [500, 500, 1]), ((160, 640), [5] * 200 + [1]), ((1000, 1000), [1] * 1001)])
def test_batches_shrink_as_images_grow(size, parts):
    images = np.broadcast_to(np.uint8(0), (1001, *size, 3))
    assert [len(batch) for batch in verify.batches(images)] == parts


def test_a_file_that_does_not_run_raises(file):
    np.save(file.with_name("images.npy"), np.zeros((2, 32, 32, 3), "uint8"))
    with pytest.raises(ExportError) as error:
        verify.verify("float32", file, "", file.with_name("images.npy"), LABELS[:2], _confident(LABELS)[:2])
    assert "float32" in error.value.summary


@pytest.mark.parametrize(
    "code, stderr, why",
    [
        (1, "Traceback\nValueError: no model\n", "ValueError: no model"),
        (1, "I0000 00:00:1 port.cc:153] oneDNN\n", "exit code 1"),
        (-9, "I0000 00:00:1 port.cc:153] oneDNN\n", "killed by SIGKILL"),
        (1, "ValueError: no model\nWARNING: All log messages before\nE0000 00:00:1 cuInit\n\n", "ValueError: no model"),
    ],
)
def test_why_ended_names_the_last_line_or_the_signal(code, stderr, why):
    assert verify.why_ended(code, stderr) == why


def test_every_format_has_bounds():
    assert list(BOUNDS) == list(FORMATS) == ["saved_model", "float32", "float16", "dynamic_int8", "int8", "onnx"]
    assert FORMATS[1:-1] == TFLITE_FORMATS and FORMATS[:-1] == DEFAULT_FORMATS
    assert all(bounds.top1_drop <= 0.01 for bounds in BOUNDS.values())
