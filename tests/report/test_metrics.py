import json
import runpy
import sys
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest

from cvt_keras.errors import DivergedError, MissingPackageError
from cvt_keras.preprocessing import Calibration
from cvt_keras.report import metrics
from cvt_keras.report.metrics import (
    CALIBRATION_BINS,
    best_epoch,
    calibration_report,
    confusion,
    evaluate,
    fit_calibration,
    per_class,
    predictions,
    reliability,
    wilson,
    worst,
)

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
    result = evaluate(_logits(probabilities), LABELS)
    assert result["top1"] == 0.5
    assert result["top5"] == 0.75
    assert result["loss"] == pytest.approx(-np.mean(np.log([0.5, 0.3, 0.5, 0.05])))
    # Three images at 0.5, two of them right; one at 0.3, wrong.
    assert result["ece"] == pytest.approx((abs(2 - 1.5) + 0.3) / 4)
    assert result["images"] == 4


def test_large_logits_do_not_overflow():
    logits = np.array([[1000.0, 0.0], [0.0, 1000.0]])
    result = evaluate(logits, np.array([0, 0]))
    assert result["loss"] == pytest.approx(500)
    assert result["top1"] == 0.5


def test_top5_is_none_for_few_classes():
    assert evaluate(np.eye(5), np.arange(5))["top5"] is None


def test_macro_averages_by_hand():
    # Recall 1/2, 1 and 0 of the classes a, b and c; precision 1/2, 2/3 and none. d has no images, but is predicted once.
    logits = np.eye(4)[[0, 1, 1, 1, 0, 3]]
    result = evaluate(logits, np.array([0, 0, 1, 1, 2, 2]))
    assert result["top1"] == 0.5
    assert result["balanced_accuracy"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert result["macro_f1"] == pytest.approx((1 / 2 + 4 / 5 + 0) / 3)
    assert {type(value) for value in result.values()} == {float, int, list, type(None)}  # as JSON has them


def test_rare_classes_count_as_much_as_common_ones():
    labels = np.array([0] * 9 + [1])
    result = evaluate(np.tile([1.0, 0.0], (10, 1)), labels)  # always the common class
    assert result["top1"] == 0.9
    assert result["balanced_accuracy"] == 0.5
    assert result["macro_f1"] == pytest.approx((2 * 0.9 / 1.9 + 0) / 2)


def test_among_equal_logits_the_first_class_counts():
    logits = np.array([[0.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0]] * 3)
    labels = np.array([1, 2, 6])
    assert predictions(logits).tolist() == [1, 1, 1]
    result = evaluate(logits, labels)
    assert (result["top1"], result["top5"]) == (1 / 3, 2 / 3)  # the classes 1, 2, 3, 4 and 5 are the first five
    assert [row["top1"] for row in per_class(logits, labels, "abcdefg")] == [None, 1, 0, None, None, None, 0]
    assert np.argwhere(confusion(logits, labels, 7)).tolist() == [[1, 1], [2, 1], [6, 1]]
    assert worst(logits, labels, n=9).tolist() == [2, 1]
    assert np.nansum(reliability(logits, labels)[1]) == pytest.approx(1 / 3)


def test_all_metrics_agree_on_top1():
    random = np.random.default_rng(0)
    logits, labels = random.integers(0, 3, (200, 6)), random.integers(0, 6, 200)  # many ties
    top1 = evaluate(logits, labels)["top1"]
    assert top1 == np.mean(np.argmax(logits, axis=1) == labels)
    rows = per_class(logits, labels, "abcdef")
    assert np.average([row["top1"] for row in rows], weights=[row["images"] for row in rows]) == pytest.approx(top1)
    assert np.trace(confusion(logits, labels, 6)) / 200 == top1
    assert 1 - len(worst(logits, labels, n=200)) / 200 == pytest.approx(top1)
    _, accuracy, images = reliability(logits, labels)
    assert np.nansum(accuracy * images) / 200 == pytest.approx(top1)


def test_a_network_that_gives_every_class_the_same_logit_has_diverged():
    with pytest.raises(DivergedError, match="every class the same logit"):
        evaluate(np.zeros((4, 6)), LABELS)
    with pytest.raises(DivergedError):  # from image to image the logits may differ
        evaluate(np.tile(np.arange(4.0)[:, None], 6), LABELS)
    logits = np.zeros((4, 6))
    logits[3, 5] = 1e-6
    assert evaluate(logits, LABELS)["top1"] == 0.5


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_raise(value):
    logits = np.eye(6)[:4]
    logits[2, 3] = value
    for metric in (evaluate, reliability, lambda *both: worst(*both, n=1), lambda logits, _: predictions(logits)):
        with pytest.raises(DivergedError, match="logits are NaN or infinite"):
            metric(logits, LABELS)


def test_per_class_by_hand():
    logits = np.eye(4)[[0, 1, 1, 1, 0]]
    rows = per_class(logits, np.array([0, 0, 1, 1, 2]), ("a", "b", "c", "d"))
    assert rows == [
        {"name": "a", "top1": 0.5, "top1_interval": wilson(0.5, 2), "precision": 0.5, "f1": 0.5, "images": 2},
        {
            **{"name": "b", "top1": 1.0, "top1_interval": wilson(1.0, 2), "precision": pytest.approx(2 / 3)},
            **{"f1": pytest.approx(0.8), "images": 2},
        },
        {"name": "c", "top1": 0.0, "top1_interval": wilson(0.0, 1), "precision": None, "f1": 0.0, "images": 1},
        {"name": "d", "top1": None, "top1_interval": None, "precision": None, "f1": None, "images": 0},
    ]
    # As JSON has them.
    assert {type(value) for row in rows for value in row.values()} == {str, float, int, list, type(None)}


# Newcombe, "Two-sided confidence intervals for the single proportion", 1998, table I, method 3.
@pytest.mark.parametrize(
    "right, images, ends",
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_the_wilson_interval_is_that_of_the_literature(right, images, ends):
    assert wilson(right / images, images) == pytest.approx(ends, abs=5e-5)
    assert wilson(1 - right / images, images) == pytest.approx([1 - ends[1], 1 - ends[0]], abs=5e-5)


def test_few_images_are_those_whose_interval_spans_more_than_20_points():
    low, high = wilson(0.9, metrics.FEW_IMAGES)
    assert (round(low, 2), round(high, 2)) == (0.74, 0.97)


def test_the_scores_of_a_split_have_the_interval_of_top1():
    assert evaluate(np.eye(6), np.array([0, 1, 2, 0, 0, 0]))["top1_interval"] == wilson(0.5, 6)


def test_a_class_without_test_images_is_no_division_by_zero():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = per_class(np.eye(3)[[0, 2]], np.array([0, 0]), "abc")
        result = evaluate(np.eye(3)[[0, 2]], np.array([0, 0]))
    assert [(row["top1"], row["images"]) for row in rows] == [(0.5, 2), (None, 0), (None, 0)]
    assert result["balanced_accuracy"] == 0.5 and result["macro_f1"] == pytest.approx(2 / 3)


def test_the_best_epoch_is_the_most_accurate_and_among_equals_the_one_with_the_lowest_loss():
    nan = float("nan")
    scores = [(0.9, 0.1), (0.5, 0.1), (0.8, nan), (0.8, 0.4), (0.8, 0.3), (0.8, 0.3)]
    history = [{"epoch": epoch, "val_accuracy": a, "val_loss": loss} for epoch, (a, loss) in enumerate(scores, start=1)]
    assert best_epoch(history) is history[0]
    assert best_epoch(history, first_epoch=1)["epoch"] == 5
    assert best_epoch(history[:3], first_epoch=2)["epoch"] == 3


def test_reports_of_older_versions_have_defaults_for_what_they_lack(tmp_path):
    folder = Path(__file__).parent.parent / "golden" / "old_runs"
    with tarfile.open(folder / "plain.tar.xz") as archive:
        old = metrics.Report(**json.load(archive.extractfile("plain/report.json")))
    assert (old.data_warnings, old.left_out, old.train_images_per_class) == ([], {}, [])
    assert old.class_weights is old.epochs_trained is old.kept_epoch is old.test_images is None


def test_confusion_has_a_row_for_each_label():
    logits = np.eye(3)[[0, 1, 1, 1]]
    assert confusion(logits, np.array([0, 0, 0, 1]), 4).tolist() == [[1, 2, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_the_worst_are_wrong_and_in_order():
    probabilities = [[0.4, 0.6], [0.9, 0.1], [0.1, 0.9], [0.3, 0.7]]
    assert worst(_logits(probabilities), np.zeros(4, int), n=9).tolist() == [2, 3, 0]
    assert worst(_logits(probabilities), np.zeros(4, int), n=2).tolist() == [2, 3]
    assert worst(_logits(probabilities)[1:2], np.zeros(1, int), n=2).tolist() == []


def test_reliability_sorts_by_confidence():
    # The last bin includes a confidence of exactly 1.
    probabilities = [[0.5, 0.5 - 1e-9, 1e-9], [0.52, 0.47, 0.01], [1, 1e-30, 1e-30]]
    confidence, accuracy, images = reliability(_logits(probabilities), np.array([0, 1, 0]))
    assert images.tolist() == [0] * 7 + [2] + [0] * 6 + [1]
    assert confidence[[7, 14]] == pytest.approx([0.51, 1])
    assert accuracy[[7, 14]].tolist() == [0.5, 1]
    assert np.isnan(confidence).sum() == np.isnan(accuracy).sum() == CALIBRATION_BINS - 2


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackageError) as error:
        runpy.run_path(metrics.__file__)
    assert error.value.hint == "Install it: pip install scikit-learn" and "pip" not in error.value.summary


def _drawn(n, scale=1.0):
    """Logits of which `logits / scale` are calibrated: labels drawn from their probabilities."""
    random = np.random.default_rng(0)
    logits = random.normal(scale=2, size=(n, 4))
    probabilities = Calibration().probabilities(logits)
    labels = np.array([random.choice(4, p=row / row.sum()) for row in probabilities.astype("float64")])
    return logits * scale, labels


@pytest.mark.parametrize("scale", [0.4, 3.0])
def test_the_temperature_undoes_a_scale(scale):
    logits, labels = _drawn(4000, scale)
    calibration = fit_calibration(logits, labels, 0.95)
    assert calibration.temperature == pytest.approx(scale, rel=0.06)
    report = calibration_report(logits, labels, calibration, 0.95, "test")
    assert report["ece"] < 0.02 < 0.1 < report["ece_before"]
    assert report["loss"] < report["loss_before"]
    assert report["ece_before"] == evaluate(logits, labels)["ece"]
    # The error of a share of 4000 images is at most 0.008.
    assert 0.001 < report["ece_before_error"] < 0.01 and 0.001 < report["ece_error"] < 0.01
    np.testing.assert_array_equal(calibration.probabilities(logits).argmax(axis=1), logits.argmax(axis=1))


@pytest.mark.parametrize("keep", [0.5, 0.95, 1.0])
def test_the_threshold_is_the_highest_that_keeps_the_share(keep):
    logits, labels = _drawn(500)
    calibration = fit_calibration(logits, labels, keep)
    right = calibration.probabilities(logits)[logits.argmax(axis=1) == labels]
    assert 1 - calibration.unsure(right).mean() >= keep
    higher = Calibration(calibration.temperature, np.nextafter(np.float32(calibration.threshold), np.float32(1)))
    assert 1 - higher.unsure(right).mean() < keep
    report = calibration_report(logits, labels, calibration, keep, "validation")
    sure = ~calibration.unsure(calibration.probabilities(logits))
    wrong = logits.argmax(axis=1) != labels
    assert (report["sure"], report["sure_of_wrong"]) == (sure.mean(), sure[wrong].mean())
    assert report["sure_of_right"] == 1 - calibration.unsure(right).mean()
    assert (report["keep"], report["split"], report["threshold"]) == (keep, "validation", calibration.threshold)


@pytest.mark.parametrize("n, unsure", [(19, 0), (20, 1), (39, 1), (40, 2), (100, 5)])
def test_the_threshold_drops_as_many_as_it_may(n, unsure):
    logits = np.stack([np.linspace(1, 3, n), np.zeros(n)], axis=1)
    calibration = fit_calibration(logits, np.zeros(n, int), 0.95)
    assert calibration.unsure(calibration.probabilities(logits)).sum() == unsure


def test_a_network_that_has_learnt_nothing_is_not_calibrated():
    random = np.random.default_rng(0)
    logits, labels = random.normal(0, 0.01, (128, 10)), random.integers(0, 10, 128)
    assert fit_calibration(logits, labels, 0.95).temperature == 1
    sure = np.eye(10)[labels] + logits  # but one that is right and not sure enough is
    assert fit_calibration(sure, labels, 0.95).temperature < 0.5


def test_an_int8_file_can_reach_the_threshold():
    logits = np.tile([20.0, 0.0], (1000, 1))
    calibration = fit_calibration(logits, np.zeros(1000, int), 0.95)
    assert calibration.probabilities(logits)[0, 0] > 255 / 256 > calibration.threshold == metrics.MAX_THRESHOLD


def test_few_images_that_are_all_right_or_wrong_can_be_calibrated():
    logits = np.tile([[2.0, 0.0], [0.0, 1.0]], (5, 1))
    right = fit_calibration(logits, np.array([0, 1] * 5), 0.95)
    assert metrics.TEMPERATURES[0] * 2 < right.temperature < 2  # not endless confidence
    wrong = fit_calibration(logits, np.array([1, 0] * 5), 0.95)
    assert wrong.threshold == 0 and wrong.temperature > 10
    assert calibration_report(logits, np.array([1, 0] * 5), wrong, 0.95, "test")["sure_of_right"] is None
    assert calibration_report(logits, np.array([0, 1] * 5), right, 0.95, "test")["sure_of_wrong"] is None
