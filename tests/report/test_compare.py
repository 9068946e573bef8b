import itertools
import json
import re
from pathlib import Path

import pytest

from cvt_keras.errors import DataError
from cvt_keras.report import compare, figures, metrics
from cvt_keras.report.predictions import Row

HISTORY = [
    {"epoch": epoch, "val_accuracy": accuracy, "val_loss": 1.0, "val_cross_entropy": 0.9, "cross_entropy": 1.0}
    for epoch, accuracy in enumerate([0.5, 0.75, 0.6], start=1)
]
SPLIT = {"top1": 0.5, "top5": None, "loss": 0.5, "ece": 0.0625, "images": 4}  # as of version 0.1
REPORT = {
    **{"dataset": "digits", "data_note": "8x8 pixels", "variant": "cvt_tiny", "class_names": ["a", "b"], "device": "a CPU"},
    **{"parameters": 1_250_000, "macs": 54_900_000, "train_images": 100, "train_seconds": 600.0},
    **{"train_images_per_second": 222.0, "versions": {"keras": "3.15.1"}, "epochs": 3, "kept_epoch": 2},
    **{"recipe": {}, "validation": {**SPLIT, "top1": 0.75}, "test": SPLIT},
    "per_class": [{"name": "a", "top1": 1.0, "images": 4}, {"name": "b", "top1": None, "images": 0}],
}
CALIBRATION = {
    **{"split": "test", "temperature": 0.875, "threshold": 0.5, "keep": 0.95, "ece_before": 0.0625, "ece": 0.03125},
    **{"sure_of_right": 0.75, "sure_of_wrong": None},
}
ARTIFACT = {
    **{"name": "int8", "bytes": 1_740_000, "milliseconds": 0.4, "top1": 0.5, "agreement": 0.986, "images": 4},
    **{"passed": True, "runtime": "LiteRT 2"},
}


def _run(name="one", exports=(), settings=None, **changes):
    return compare.Run(name, Path("runs") / name, {**REPORT, **changes}, settings or {"seed": 0}, HISTORY, list(exports))


def _predictions(correct):
    """A prediction per character: "+" for a correct one."""
    return [Row(f"{i}", "a", "a" if sign == "+" else "b") for i, sign in enumerate(correct)]


def _compared(*compared, **correct):
    return compare.compare(compared, lambda run: _predictions(correct[run.name]))


# === McNemar's test ===


def test_the_mid_p_value_is_that_of_the_paper():
    # Bentur et al. in table 1 of Fagerland, Lydersen and Laake: 1 and 7 discordant pairs.
    assert compare.mid_p(1, 7) == compare.mid_p(7, 1) == pytest.approx((2 * (1 + 8) - 8) / 2**8)
    assert compare.mid_p(2, 2) == pytest.approx(1 - 6 / 2**4 / 2)
    assert compare.mid_p(0, 0) == 1
    assert compare.mid_p(0, 5) == pytest.approx(1 / 2**5)


def test_the_test_is_about_the_images_that_only_one_network_classifies_correctly():
    result = compare.mcnemar(_predictions("++++--+-"), reversed_ := _predictions("+--++--+")[::-1])
    assert result == {"images": 8, "only_run_correct": 2, "only_baseline_correct": 3, "p_value": compare.mid_p(2, 3)}
    assert compare.mcnemar(reversed_, _predictions("++++--+-"))["only_run_correct"] == 3


def test_other_images_or_labels_can_not_be_tested():
    ours = _predictions("+-")
    assert compare.mcnemar(ours, ours[:1]) is None
    assert compare.mcnemar(ours, [ours[0], ours[1]._replace(image="2")]) is None
    assert compare.mcnemar(ours, [ours[0], ours[1]._replace(label="b")]) is None


def test_each_run_is_tested_against_the_first():
    tests = _compared(_run("one"), _run("two"), _run("three"), one="++--", two="-+++", three="++--")["mcnemar"]
    assert [(test["run"], test["baseline"]) for test in tests] == [("two", "one"), ("three", "one")]
    assert (tests[0]["only_run_correct"], tests[0]["only_baseline_correct"], tests[1]["p_value"]) == (2, 1, 1.0)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"test": None}, "two was not evaluated on its test images"),
        ({"dataset": "cifar10"}, "the data sets differ: digits and cifar10"),
        ({"data_note": ""}, "the data sets differ: 8x8 pixels and no note"),
        ({"class_names": ["a", "c"]}, "the classes differ"),
        ({"test": {**SPLIT, "images": 5_000}}, "the test images differ: 4 and 5,000"),
    ],
)
def test_runs_whose_reports_differ_are_compared_without_a_test(changes, reason):
    def predict(run):
        raise AssertionError("nothing must be computed")

    comparison = compare.compare([_run("one"), _run("two", **changes)], predict)
    assert comparison["mcnemar"] == [{"run": "two", "baseline": "one", "reason": reason}]
    assert len(comparison["runs"]) == 2
    if "test" in changes and changes["test"] is None:
        [test] = compare.compare([_run("two", **changes), _run("one")], predict)["mcnemar"]
        assert test["reason"] == reason


def test_folders_of_images_are_told_apart_by_their_digests():
    folder = {"dataset": "folder", "data_note": ""}
    one, two = _run("one", **folder), _run("two", **folder | {"data_note": "tested on about a tenth"})
    assert "p_value" in _compared(one, two, one="++--", two="++-+")["mcnemar"][0]
    assert _compared(one, two, one="++--", two="++---")["mcnemar"][0]["reason"] == "the test images differ"


@pytest.mark.parametrize("broken, asked", [("one", ["one"]), ("two", ["one", "two", "three"])])
def test_without_the_predictions_the_reason_says_why(broken, asked):
    calls = []

    def predict(run):
        calls.append(run.name)
        if run.name == broken:
            raise DataError("the images are missing")
        return _predictions("++--")

    tests = compare.compare([_run("one"), _run("two"), _run("three")], predict)["mcnemar"]
    assert tests[0]["reason"] == f"the predictions of {broken} are unknown: the images are missing"
    assert ("reason" in tests[1]) == (broken == "one")
    assert calls == asked  # no second try, which may take minutes


# === Settings ===


def test_the_settings_that_differ_are_named_by_field():
    variant = {"stages": [{"dim": 8, "pool": True}], "activation": "gelu"}
    ours = {"seed": 0, "dataset": "auto", "variant": variant, "image_size": [32, 32], "weights": None}
    wider = {**variant, "stages": [{"dim": 16, "pool": True}, {"dim": 32}]}
    theirs = {**ours, "dataset": "digits", "variant": wider, "image_size": [32, 64], "weights": "w.keras"}
    theirs["compression"] = {"method": "qat"}
    machine = {"device": "a GPU", "backend": "jax", "devices": 4}  # reports of older versions lack the last two
    comparison = _compared(_run("one", settings=ours), _run("two", settings=theirs, **machine), one="++--", two="++--")
    assert comparison["differences"] == {
        "variant.stages[0].dim": [8, 16],
        "image_size": [[32, 32], [32, 64]],
        "weights": [None, "w.keras"],
        "device": ["a CPU", "a GPU"],
        "backend": ["tensorflow", "jax"],
        "devices": [1, 4],
        "variant.stages[1].dim": [None, 32],
        "compression.method": [None, "qat"],
    }
    assert compare.differences_text(comparison)["weights"] == ["-", "w.keras"]
    assert compare.differences_text(comparison)["image_size"] == ["[32, 32]", "[32, 64]"]


def test_a_compressed_run_is_noted():
    settings = {"seed": 0, "weights": "runs/one/model.keras"}
    recipe = {"compression": {"method": "cluster", "clusters": 16}}
    notes = _compared(_run("one"), _run("two", settings=settings, recipe=recipe), one="+", two="+")["notes"]
    expected = "two is compressed, and its epochs come after those of runs/one/model.keras. Clustered (clusters 16)."
    assert notes == [expected]


# === Output ===


@pytest.fixture
def compared():
    return [_run("one", [ARTIFACT, {**ARTIFACT, "name": "float32"}]), _run("<two>", [ARTIFACT], test=None, per_class=None)]


@pytest.fixture
def comparison(compared):
    return _compared(*compared)


def test_the_comparison_survives_json_and_has_intervals(comparison):
    assert json.loads(json.dumps(comparison)) == comparison
    one, two = comparison["runs"]
    assert one["test"]["top1_interval"] == metrics.wilson(0.5, 4)
    assert two["validation"]["top1_interval"] == metrics.wilson(0.75, 4)
    assert [row["top1_interval"] for row in one["per_class"]] == [metrics.wilson(1.0, 4), None]
    assert two["test"] is None and two["per_class"] == []
    assert (one["folder"], one["epochs"], one["kept_epoch"], one["device"]) == ("runs/one", 3, 2, "a CPU")


def test_the_table_has_a_row_per_run_with_the_same_columns(comparison):
    one, two = compare.table(comparison)
    assert list(one) == list(two)
    assert (one["test_top1"], one["test_top1_low"]) == (0.5, metrics.wilson(0.5, 4)[0])
    assert one["test_macro_f1"] is two["test_top1"] is two["test_top1_high"] is two["p_value"] is two["float32_bytes"] is None
    assert (two["int8_bytes"], two["int8_milliseconds"], two["int8_top1"]) == (1_740_000, 0.4, 0.5)
    rows = compare.table(_compared(_run("one"), _run("two"), one="++--", two="-+++"))
    assert [(row["only_run_correct"], row["only_baseline_correct"]) for row in rows] == [(None, None), (2, 1)]


def test_the_table_has_the_calibration():
    one, two = compare.table(_compared(_run("one"), _run("two", calibration=CALIBRATION), one="+", two="+"))
    names = [name for name in two if name.startswith("calibration_")]
    assert [two[name] for name in names] == ["test", 0.875, 0.5, 0.0625, 0.03125, 0.75, None]
    assert [one[name] for name in names] == [None] * 7


def _page(tmp_path, compared, comparison):
    compare.write(tmp_path / "page.html", compared, comparison)
    text = (tmp_path / "page.html").read_text()
    assert re.findall(r'src="([^,]*),', text) == ["data:image/png;base64"] and "<script" not in text and "href" not in text
    text = re.sub(r"\s+", " ", re.sub("<[^>]*>", "|", text.partition("</style>")[2]))
    return re.sub(r"[| ]*\|[| ]*", "|", text)


def test_the_page_shows_everything(tmp_path):
    compared = [
        _run("one", [ARTIFACT]),
        _run("two", settings={"seed": 1}, calibration=CALIBRATION),
        _run("three", dataset="folder"),
    ]
    text = _page(tmp_path, compared, _compared(*compared, one="++--", two="-+++"))
    for part in (
        *("3 runs compared", "50.00%", "15.0% to 85.0%", "0.5000", "1.25 M", "54.9 M", "10.0 min", "222", "n/a"),
        *("|Calibration|", "|two|test|0.875|6.2%|3.1%|50.0%|25.0%|n/a|"),
        *("|two|2|1|0.625|4|", "|No test for|three|: the data sets differ: digits and folder.|", "against|one|"),
        *("|seed|0|1|0|", "|dataset|digits|digits|folder|"),
        *("int8", "1.74", "98.60%", "LiteRT 2", "passed", "100.0% (51.0% to 100.0%)", "no test images"),
    ):
        assert part in text, part


def test_the_page_of_runs_without_tests_exports_or_differences_leaves_them_out(tmp_path, compared, comparison):
    text = _page(tmp_path, compared, comparison)
    assert "&lt;two&gt;" in text and "not evaluated" in text and "only this run is correct" not in text
    assert "Nothing: all settings" in text and "Exports" in text
    plain = [_run("one", test=None, per_class=None), _run("two", test=None, per_class=None)]
    text = _page(tmp_path, plain, _compared(*plain))
    assert "Exports" not in text and "Test images" not in text and "per class" not in text and "|Calibration|" not in text


def test_small_p_values_are_no_zero():
    assert [compare.p_text(value) for value in (0.0004, 0.001, 0.25)] == ["<0.001", "0.001", "0.250"]


def test_curves_lie_over_each_other_and_mark_the_kept_epochs():
    names = ["_a$b$c", *(f"run {i}" for i in range(8))]
    kept = [2, None, *[3] * 7]
    figure = figures.compared_curves([HISTORY] * 9, kept, names)
    accuracy, validation, training = figure.axes
    lines = [line for line in accuracy.lines if len(line.get_xdata()) == 3]
    assert [tuple(line.get_ydata()) for line in lines] == [(0.5, 0.75, 0.6)] * 9
    styles = [(line.get_color(), line.get_linestyle()) for line in lines]
    assert all(one != other for one, other in itertools.combinations(styles, 2))
    rings = [line for line in accuracy.lines if len(line.get_xdata()) == 1]
    assert len(rings) == 8 and (rings[0].get_xdata()[0], rings[0].get_ydata()[0]) == (2, 0.75)
    assert accuracy.get_ylim()[1] < 1  # ends at the data
    sure = figures.compared_curves([[{**row, "val_accuracy": 1.0} for row in HISTORY]] * 2, [1, 1], names[:2])
    assert 1 < sure.axes[0].get_ylim()[1] < 1.02  # there is no accuracy above 100%
    assert len(validation.lines) == 17 and len(training.lines) == 9
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [f"{i}: {name}" for i, name in enumerate(names, start=1)]
    assert figures.png(figure).startswith(b"\x89PNG")
