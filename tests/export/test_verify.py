import numpy as np
import pytest

from cvt_keras.errors import ExportError
from cvt_keras.export import verify
from cvt_keras.export.verify import BOUNDS, FORMATS, TFLITE_FORMATS, Bounds, compare

LABELS = np.arange(1000) % 10


def _found(probabilities, **more):
    floats = {"float_tensors": np.array([], str), "float_reasons": np.array([], str)}
    return {"probabilities": probabilities, "milliseconds": 1.0, "runtime": "none", **floats, **more}


def _sure(labels):
    return np.eye(10)[labels] * 0.9 + 0.01


def _wrong(n):
    """All right but for the first `n`."""
    labels = LABELS.copy()
    labels[:n] = (labels[:n] + 1) % 10
    return _sure(labels)


@pytest.fixture
def file(tmp_path):
    (tmp_path / "a.tflite").write_bytes(bytes(100))
    return tmp_path / "a.tflite"


@pytest.mark.parametrize(
    "name, lost, passed", [("int8", 10, True), ("int8", 11, False), ("dynamic_int8", 2, True), ("dynamic_int8", 3, False)]
)
def test_top1_may_fall_by_so_much(name, lost, passed, file):
    artifact = compare(name, file, "export/a.tflite", LABELS, _sure(LABELS), _found(_wrong(lost)))
    assert artifact.passed == passed
    assert artifact.top1 == artifact.agreement == pytest.approx(1 - lost / 1000)
    assert (artifact.bytes, artifact.images) == (100, 1000)


def test_other_bounds_can_be_given(file):
    bounds = Bounds(0.005, 0.2)
    assert compare("int8", file, "", LABELS, _sure(LABELS), _found(_wrong(3))).passed
    assert compare("int8", file, "", LABELS, _sure(LABELS), _found(_wrong(3)), bounds).broken == ["max_abs_diff"]
    artifact = compare("int8", file, "", LABELS, _sure(LABELS), _found(_wrong(6)), Bounds(0.005))
    assert artifact.broken == ["top1_drop"] and artifact.bounds["top1_drop"] == 0.005


def test_fewer_than_three_images_are_chance(file):
    few = slice(0, 20)
    found = _found(_wrong(2)[few])
    assert compare("int8", file, "", LABELS[few], _sure(LABELS)[few], found).passed
    assert not compare("int8", file, "", LABELS[few], _sure(LABELS)[few], _found(_wrong(3)[few])).passed


@pytest.mark.parametrize("images, broken", [(2, []), (3, ["max_abs_diff"])])
def test_the_image_that_differs_most_is_named(images, broken, file):
    probabilities = _sure(LABELS)
    probabilities[123, 4] += 2e-3
    probabilities[: images - 1, 4] += 1e-3
    artifact = compare("float32", file, "", LABELS, _sure(LABELS), _found(probabilities))
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
def test_kernels_that_disagree_fail(name, difference, passed, file):
    reference = _sure(LABELS)[:200]
    reference[:3] -= difference
    artifact = compare(name, file, "", LABELS, _sure(LABELS), _found(_sure(LABELS), reference=reference))
    assert artifact.broken == ([] if passed else ["reference_max_abs_diff"])
    assert artifact.reference_max_abs_diff == pytest.approx(difference)


def test_a_float_in_an_integer_file_is_listed_with_its_reason(file):
    floats = {"float_tensors": np.array(["mean"]), "float_reasons": np.array(["the converter keeps MEAN in floats here"])}
    artifact = compare("int8", file, "", LABELS, _sure(LABELS), _found(_sure(LABELS), **floats))
    assert artifact.float_tensors == {"mean": "the converter keeps MEAN in floats here"}
    assert compare("float16", file, "", LABELS, _sure(LABELS), _found(_sure(LABELS), **floats)).float_tensors == {}


def test_answers_that_are_no_numbers_are_no_answers(file):
    probabilities = _sure(LABELS)
    probabilities[7, 7] = np.nan
    with pytest.raises(ExportError) as error:
        compare("int8", file, "", LABELS, _sure(LABELS), _found(probabilities))
    assert "int8" in error.value.summary and "NaN" in error.value.summary


@pytest.mark.parametrize("side, parts", [(32, [500, 500, 1]), (320, [5] * 200 + [1]), (1000, [1] * 1001)])
def test_batches_are_as_large_as_their_images_allow(side, parts):
    images = np.broadcast_to(np.uint8(0), (1001, side, side, 3))
    assert [len(batch) for batch in verify.batches(images)] == parts


def test_what_does_not_run_is_told(file):
    np.save(file.with_name("images.npy"), np.zeros((2, 32, 32, 3), "uint8"))
    with pytest.raises(ExportError) as error:
        verify.verify("float32", file, "", file.with_name("images.npy"), LABELS[:2], _sure(LABELS)[:2])
    assert "float32" in error.value.summary


@pytest.mark.parametrize(
    "code, stderr, why",
    [
        (1, "Traceback\nValueError: no model\n", "ValueError: no model"),
        (1, "I0000 00:00:1 port.cc:153] oneDNN\n", "it ended with 1"),
        (-9, "I0000 00:00:1 port.cc:153] oneDNN\n", "it was ended by SIGKILL"),
        (1, "ValueError: no model\nWARNING: All log messages before\nE0000 00:00:1 cuInit\n\n", "ValueError: no model"),
    ],
)
def test_the_reason_is_what_the_process_died_of(code, stderr, why):
    assert verify.why_ended(code, stderr) == why


def test_every_format_has_bounds():
    assert list(BOUNDS) == list(FORMATS) == ["saved_model", "float32", "float16", "dynamic_int8", "int8"]
    assert FORMATS[1:] == TFLITE_FORMATS
    assert all(bounds.top1_drop <= 0.01 for bounds in BOUNDS.values())
