import numpy as np
import pytest

from cvt_keras.evaluation import metrics, per_class

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


def test_classes_average_to_the_whole():
    random = np.random.default_rng(0)
    logits, labels = random.integers(0, 3, (200, 6)), random.integers(0, 6, 200)  # many ties
    rows = per_class(logits, labels, "abcdef")
    assert np.average([row["top1"] for row in rows], weights=[row["images"] for row in rows]) == metrics(logits, labels)["top1"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_refused(value):
    logits = np.eye(6)[:4]
    logits[2, 3] = value
    with pytest.raises(FloatingPointError, match="logits"):
        metrics(logits, LABELS)


def test_per_class_counts_each_class():
    logits = np.eye(3)[[0, 1, 1, 1]]
    rows = per_class(logits, np.array([0, 0, 1, 1]), ("a", "b", "c"))
    assert rows == [
        {"name": "a", "top1": 0.5, "images": 2},
        {"name": "b", "top1": 1.0, "images": 2},
        {"name": "c", "top1": None, "images": 0},
    ]
