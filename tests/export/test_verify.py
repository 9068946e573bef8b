import numpy as np
import pytest

from export import verify
from export.verify import BOUNDS, compare

LABELS = np.arange(1000) % 10


def _found(probabilities, **more):
    return {"probabilities": probabilities, "milliseconds": 1.0, "runtime": "none", "float_tensors": [], **more}


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


def test_fewer_than_three_images_are_chance(file):
    few = slice(0, 20)
    found = _found(_wrong(2)[few])
    assert compare("int8", file, "", LABELS[few], _sure(LABELS)[few], found).passed
    assert not compare("int8", file, "", LABELS[few], _sure(LABELS)[few], _found(_wrong(3)[few])).passed


def test_the_image_that_differs_most_is_named(file):
    probabilities = _sure(LABELS)
    probabilities[123, 4] += 1e-3
    artifact = compare("float32", file, "", LABELS, _sure(LABELS), _found(probabilities))
    assert (artifact.passed, artifact.worst_image) == (False, 123)
    assert artifact.max_abs_diff == pytest.approx(1e-3)
    assert artifact.bounds == {"top1_drop": 0.0, "max_abs_diff": 1e-4, "reference_max_abs_diff": 1e-4}


def test_kernels_that_disagree_fail(file):
    for difference, passed in ((1e-5, True), (1e-3, False)):
        found = _found(_sure(LABELS), reference_max_abs_diff=difference)
        assert compare("float32", file, "", LABELS, _sure(LABELS), found).passed == passed


def test_a_float_in_an_integer_file_fails(file):
    found = _found(_sure(LABELS), float_tensors=["mean"])
    artifact = compare("int8", file, "", LABELS, _sure(LABELS), found)
    assert (artifact.passed, artifact.float_tensors) == (False, ["mean"])
    assert compare("float16", file, "", LABELS, _sure(LABELS), found).passed


def test_what_does_not_run_is_told(file):
    with pytest.raises(RuntimeError, match="float32 does not run: "):
        verify.verify("float32", file, "", np.zeros((2, 32, 32, 3), "uint8"), LABELS[:2], _sure(LABELS)[:2])


def test_there_are_bounds_for_every_format():
    assert list(BOUNDS) == ["saved_model", "float32", "float16", "dynamic_int8", "int8"]
    assert all(bounds.top1_drop <= 0.01 for bounds in BOUNDS.values())
