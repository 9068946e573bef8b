import subprocess
import sys

import numpy as np
import pytest

from cvt_keras.report.metrics import CALIBRATION_BINS, confusion, metrics, per_class, predictions, reliability, worst

LABELS = np.array([0, 1, 2, 5])


def _logits(probabilities):
    return np.log(np.asarray(probabilities))


def test_metrics_by_hand():
    probabilities = [
        [0.5, 0.1, 0.1, 0.1, 0.1, 0.1],
        [0.5, 0.3, 0.05, 0.05, 0.05, 0.05],
        [0.1, 0.1, 0.5, 0.1, 0.1, 0.1],
        [0.3, 0.2, 0.2, 0.15, 0.1, 0.05],
    ]
    result = metrics(_logits(probabilities), LABELS)
    assert result["top1"] == 0.5
    assert result["top5"] == 0.75
    assert result["loss"] == pytest.approx(-np.mean(np.log([0.5, 0.3, 0.5, 0.05])))
    # Three images at 0.5, two of them right; one at 0.3, wrong.
    assert result["ece"] == pytest.approx((abs(2 - 1.5) + 0.3) / 4)
    assert result["images"] == 4


def test_logits_need_no_scale():
    logits = np.array([[1000.0, 0.0], [0.0, 1000.0]])
    result = metrics(logits, np.array([0, 0]))
    assert result["loss"] == pytest.approx(500)
    assert result["top1"] == 0.5


def test_top5_of_few_classes_means_nothing():
    assert metrics(np.eye(5), np.arange(5))["top5"] is None


def test_a_tie_is_no_hit():
    assert metrics(np.zeros((4, 6)), LABELS)["top1"] == 0
    assert [row["top1"] for row in per_class(np.zeros((4, 6)), LABELS, "abcdef")] == [0, 0, 0, None, None, 0]
    assert not np.any(predictions(np.zeros((4, 6)), LABELS) == LABELS)
    assert np.trace(confusion(np.zeros((4, 6)), LABELS, 6)) == 0
    assert len(worst(np.zeros((4, 6)), LABELS, n=9)) == 4


def test_classes_average_to_the_whole():
    random = np.random.default_rng(0)
    logits, labels = random.integers(0, 3, (200, 6)), random.integers(0, 6, 200)  # many ties
    rows = per_class(logits, labels, "abcdef")
    assert np.average([row["top1"] for row in rows], weights=[row["images"] for row in rows]) == metrics(logits, labels)["top1"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_refused(value):
    logits = np.eye(6)[:4]
    logits[2, 3] = value
    for figure in (metrics, predictions, reliability, lambda *both: worst(*both, n=1)):
        with pytest.raises(FloatingPointError, match="logits"):
            figure(logits, LABELS)


def test_per_class_by_hand():
    logits = np.eye(4)[[0, 1, 1, 1, 0]]
    rows = per_class(logits, np.array([0, 0, 1, 1, 2]), ("a", "b", "c", "d"))
    assert rows == [
        {"name": "a", "top1": 0.5, "precision": 0.5, "f1": 0.5, "images": 2},
        {"name": "b", "top1": 1.0, "precision": pytest.approx(2 / 3), "f1": pytest.approx(0.8), "images": 2},
        {"name": "c", "top1": 0.0, "precision": None, "f1": 0.0, "images": 1},
        {"name": "d", "top1": None, "precision": None, "f1": None, "images": 0},
    ]
    # As JSON has them.
    assert {type(value) for row in rows for value in row.values()} == {str, float, int, type(None)}


def test_confusion_has_a_row_for_each_label():
    logits = np.eye(3)[[0, 1, 1, 1]]
    assert confusion(logits, np.array([0, 0, 0, 1]), 4).tolist() == [[1, 2, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_a_prediction_is_the_highest_logit():
    logits = np.array([[1.0, 3.0, 2.0], [3.0, 1.0, 3.0], [3.0, 1.0, 3.0]])
    assert predictions(logits, np.array([2, 0, 1])).tolist() == [1, 2, 0]


def test_the_worst_are_wrong_and_in_order():
    probabilities = [[0.4, 0.6], [0.9, 0.1], [0.1, 0.9], [0.3, 0.7]]
    assert worst(_logits(probabilities), np.zeros(4, int), n=9).tolist() == [2, 3, 0]
    assert worst(_logits(probabilities), np.zeros(4, int), n=2).tolist() == [2, 3]
    assert worst(_logits(probabilities)[1:2], np.zeros(1, int), n=2).tolist() == []


def test_reliability_sorts_by_confidence():
    # The last bin holds a confidence of 1 too.
    probabilities = [[0.5, 0.5 - 1e-9, 1e-9], [0.52, 0.47, 0.01], [1 - 2e-15, 1e-15, 1e-15]]
    confidence, accuracy, images = reliability(_logits(probabilities), np.array([0, 1, 0]))
    assert images.tolist() == [0] * 7 + [2] + [0] * 6 + [1]
    assert confidence[[7, 14]] == pytest.approx([0.51, 1])
    assert accuracy[[7, 14]].tolist() == [0.5, 1]
    assert np.isnan(confidence).sum() == np.isnan(accuracy).sum() == CALIBRATION_BINS - 2


def test_without_scikit_learn_the_error_says_what_to_install():
    code = "import sys; sys.modules['sklearn'] = None; import cvt_keras.evaluation"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: The figures of a run need scikit-learn: pip install scikit-learn" in result.stderr
