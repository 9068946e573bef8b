"""Compares runs: their metrics, McNemar's test, curves, settings and exports."""

from dataclasses import dataclass
from pathlib import Path

from scipy.stats import binom

from cvt_keras.errors import UserError
from cvt_keras.report import figures, metrics, page

_SCORES = ("top1", "top5", "macro_f1", "balanced_accuracy", "loss", "ece", "images")
_CALIBRATION = ("split", "temperature", "threshold", "ece_before", "ece", "sure_of_right", "sure_of_wrong")


@dataclass(frozen=True)
class Run:
    """A finished run, as its folder describes it.

    Args:
        name: a short name; no two runs of a comparison have the same.
        folder: the run folder.
        report: the content of report.json.
        settings: every setting of its recipe.
        history: a dict per epoch, as `runs.read_history` returns it.
        exports: the dicts of the artifacts in export/report.json.
    """

    name: str
    folder: Path
    report: dict
    settings: dict
    history: list[dict]
    exports: list[dict]


def compare(compared, predict):
    """Compares runs with the first of them.

    Args:
        compared: two or more `Run`s.
        predict: a function from a `Run` to its list of `Row`, which may raise a `UserError`. It is called only for runs
            that may have the same test images as the first.

    Returns:
        A dict that survives JSON:
        - `runs`: a dict per run: name, folder, size of the network, times, `exports`, and metrics with `top1_interval`:
          `validation`, `test` (`None` if it was not evaluated) and `per_class`, all before calibration; `calibration` as in
          report.json, `None` for a run of version 0.6 or older.
        - `mcnemar`: a dict for each run but the first, as `mcnemar` returns it, with `run` and `baseline`, their names. If the
          test is not possible, it has a `reason` in place of the numbers.
        - `differences`: setting -> its values, one per run. Nested settings have names such as `variant.stages[0].dim`.
        - `notes`: sentences for the reader.
    """
    return {
        "runs": [_summary(run) for run in compared],
        "mcnemar": _tests(compared, predict),
        "differences": _differences(compared),
        "notes": [note for run in compared if (note := _compression_note(run))],
    }


def mcnemar(baseline, predictions):
    """McNemar's test of two networks on the same images, as the mid-p test.

    Counts the images that only one of the two classifies correctly. If both networks are equally good, each such image is as
    likely to be one's as the other's. The mid-p value is less conservative than the exact one, and holds the level where the
    test with continuity correction does not (Fagerland, Lydersen and Laake, "The McNemar test for binary matched-pairs data",
    2013).

    Args:
        baseline, predictions: lists of `Row` for the same images, in any order.

    Returns:
        A dict: `images`, `only_run_correct`, `only_baseline_correct` and `p_value`. `None` if the images or labels differ.
    """
    pairs = list(zip(sorted(baseline), sorted(predictions)))
    if len(baseline) != len(predictions) or any(first[:2] != second[:2] for first, second in pairs):
        return None
    correct = [(first.prediction == first.label, second.prediction == second.label) for first, second in pairs]
    only_baseline, only_run = correct.count((True, False)), correct.count((False, True))
    return {
        "images": len(pairs),
        "only_run_correct": only_run,
        "only_baseline_correct": only_baseline,
        "p_value": mid_p(only_run, only_baseline),
    }


def mid_p(first, second):
    """The two-sided mid-p value of McNemar's test.

    Args:
        first, second: the number of images that only one of the two networks classifies correctly.
    """
    if first + second == 0:
        return 1.0
    observed = binom.pmf(first, first + second, 0.5)
    if first == second:
        return float(1 - observed / 2)
    return float(2 * binom.cdf(min(first, second), first + second, 0.5) - observed)


def write(path, compared, comparison):
    """Writes a comparison as one self-contained HTML page.

    Args:
        path: the page.
        compared: the `Run`s.
        comparison: what `compare` returned.
    """
    kept_epochs = [row["kept_epoch"] for row in comparison["runs"]]
    figure = figures.compared_curves([run.history for run in compared], kept_epochs, [run.name for run in compared])
    same_classes = len({tuple(run.report["class_names"]) for run in compared}) == 1
    tested = [row for row in comparison["runs"] if same_classes and row["per_class"]]
    page.render(
        page.TEMPLATES / "compare.html",
        path,
        **comparison | {"differences": differences_text(comparison)},
        curves=page.data_uri(figures.png(figure)),
        p_text=p_text,
        tested=[row["name"] for row in tested],
        classes=list(zip(*(row["per_class"] for row in tested))),
    )


def table(comparison):
    """The rows of a comparison as a table: a dict per run, all with the same keys."""
    tests = {test["run"]: test for test in comparison["mcnemar"]}
    artifacts = list(dict.fromkeys(artifact["name"] for row in comparison["runs"] for artifact in row["exports"]))
    rows = []
    for run in comparison["runs"]:
        nested = ("validation", "test", "per_class", "calibration", "exports")
        row = {name: value for name, value in run.items() if name not in nested}
        for split in ("test", "validation"):
            scores = run[split] or {}
            low, high = scores.get("top1_interval", (None, None))
            row |= {f"{split}_{name}": scores.get(name) for name in _SCORES}
            row |= {f"{split}_top1_low": low, f"{split}_top1_high": high}
        row |= {f"calibration_{name}": (run["calibration"] or {}).get(name) for name in _CALIBRATION}
        row |= {name: tests.get(run["name"], {}).get(name) for name in ("only_run_correct", "only_baseline_correct", "p_value")}
        exports = {artifact["name"]: artifact for artifact in run["exports"]}
        for name in artifacts:
            row |= {f"{name}_{field}": exports.get(name, {}).get(field) for field in ("bytes", "milliseconds", "top1")}
        rows.append(row)
    return rows


def p_text(p_value):
    """A p value as text."""
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}"


def differences_text(comparison):
    """The `differences` of a comparison with text in place of values; a dash in place of `None`."""
    return {
        name: ["-" if value is None else page.plain(value) for value in values]
        for name, values in comparison["differences"].items()
    }


def _summary(run):
    report = run.report
    fields = ("dataset", "variant", "parameters", "macs", "train_images", "train_seconds", "train_images_per_second")
    return {
        "name": run.name,
        "folder": str(run.folder),
        **{name: report[name] for name in fields},
        "device": page.machine(report),
        "epochs": len(run.history),
        "kept_epoch": page.kept_epoch(report, run.history),
        "validation": _with_interval(report["validation"]),
        "test": _with_interval(report["test"]) if report["test"] else None,
        "per_class": [_with_interval(scores) for scores in report["per_class"] or ()],
        "calibration": report.get("calibration"),
        "exports": run.exports,
    }


def _with_interval(scores):
    """Adds `top1_interval`, which reports of older versions lack."""
    unknown = scores["top1"] is None
    return {**scores, "top1_interval": None if unknown else metrics.wilson(scores["top1"], scores["images"])}


def _tests(compared, predict):
    first, *others = compared
    reasons = [_why_not_comparable(first, run) for run in others]
    baseline, unknown = (None, "") if all(reasons) else _answers(first, predict)
    tests = []
    for run, reason in zip(others, reasons):
        result, reason = None, reason or unknown
        if not reason:
            predictions, reason = _answers(run, predict)
            if not reason:
                result = mcnemar(baseline, predictions)
                reason = "" if result else "the test images differ"
        tests.append({"run": run.name, "baseline": first.name, **(result or {"reason": reason})})
    return tests


def _answers(run, predict):
    """The list of `Row` and "", or `None` and the reason why there is none."""
    try:
        return predict(run), ""
    except UserError as error:
        return None, f"the predictions of {run.name} are unknown: {error.summary}"


def _why_not_comparable(first, run):
    """Why two reports can't be of the same test images; empty if they may be."""
    for one in (first, run):
        if not one.report["test"]:
            return f"{one.name} was not evaluated on its test images"
    ours, theirs = first.report, run.report
    if ours["dataset"] != theirs["dataset"]:
        return f"the data sets differ: {ours['dataset']} and {theirs['dataset']}"
    # The images of a folder have digests. Those of other data sets have numbers, so the data must be the same.
    if ours["dataset"] != "folder" and ours["data_note"] != theirs["data_note"]:
        return f"the data sets differ: {ours['data_note'] or 'no note'} and {theirs['data_note'] or 'no note'}"
    if set(ours["class_names"]) != set(theirs["class_names"]):
        return "the classes differ"
    if ours["test"]["images"] != theirs["test"]["images"]:
        return f"the test images differ: {ours['test']['images']:,} and {theirs['test']['images']:,}"
    return ""


def _differences(compared):
    """The settings, data, device and versions in which the runs differ: name -> a value per run, `None` where it has none."""
    flat = []
    for run in compared:
        report = run.report
        others = {name: report[name] for name in ("dataset", "train_images", "device", "versions")}
        others |= {"backend": report.get("backend", "tensorflow"), "devices": report.get("devices", 1)}
        flat.append(dict(_flat({**run.settings, **others})))
    names = dict.fromkeys(name for values in flat for name in values)
    rows = {name: [values.get(name) for values in flat] for name in names}
    return {name: values for name, values in rows.items() if any(value != values[0] for value in values)}


def _flat(value, name=""):
    """Yields the pairs (name, value) of the leaves of nested dicts, and of lists that hold dicts."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for i, item in enumerate(value):
            yield from _flat(item, f"{name}[{i}]")
    else:
        yield name, value


def _compression_note(run):
    text = page.compression(run.report)
    weights = run.settings.get("weights")
    return text and f"{run.name} is compressed, and its epochs come after those of {weights}. {text}"
