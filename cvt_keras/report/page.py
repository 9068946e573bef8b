"""report.html: the report of a run as one self-contained HTML file."""

import base64
import json
from pathlib import Path

from cvt_keras import runs
from cvt_keras.errors import MissingPackageError
from cvt_keras.report import figures, metrics

try:
    import jinja2
except ImportError as error:
    raise MissingPackageError(f"the page of a run needs Jinja2: {error}", hint="Install it: pip install Jinja2") from error

TEMPLATES = Path(__file__).parent / "templates"
COMPRESSED = {"prune": "pruned", "cluster": "clustered", "qat": "trained with int8 rounding"}


def write(run_dir):
    """Writes `report.html` to a run folder, from its report, history and plots, and the report of its export if there is one.

    Args:
        run_dir: the folder of a finished run, of this version or an older one.
    """
    run_dir = Path(run_dir)
    report = runs.read_json(run_dir / runs.REPORT)
    history = runs.read_history(run_dir)
    export = run_dir / runs.EXPORT / runs.REPORT
    names = (figures.CURVES, figures.CONFUSION, figures.CALIBRATION, figures.MOST_WRONG)
    plots = {Path(name).stem: run_dir / runs.PLOTS / name for name in names}
    render(
        TEMPLATES / "run.html",
        run_dir / runs.PAGE,
        report=report,
        machine=machine(report),
        compression=compression(report),
        history=[{name: _rounded(name, value) for name, value in row.items()} for row in history],
        kept_epoch=kept_epoch(report, history),
        epochs=_epochs(report),
        export=runs.read_json(export) if export.exists() else {"artifacts": []},
        classes=classes(report),
        few_images=metrics.FEW_IMAGES,
        pictures={stem: picture(run_dir, path.name) for stem, path in plots.items()},
        numbered={stem for stem, path in plots.items() if path.exists() and figures.is_numbered(path)},
    )


def render(template, path, **values):
    """Renders a Jinja2 template to a file, atomically.

    Args:
        template: a `Path`. The template may extend `base.html` and import `macros.html` of this package.
        path: the page to write.
        values: the template's variables. Their text is escaped.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "unsure": _unsure, "interval": interval, "duration": _duration, "plain": plain}
    text = environment.get_template(template.name).render(values)
    with runs.whole(path) as temporary_path:
        temporary_path.write_text(text, encoding="utf-8")


def picture(folder, name):
    """A figure of a run or a search as a data URI; empty if the file is missing."""
    path = folder / runs.PLOTS / name
    return data_uri(path.read_bytes()) if path.exists() else ""


def data_uri(png):
    """The bytes of a .png as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def compression(report):
    """The compression steps as text; empty for an uncompressed network."""
    settings = report["recipe"].get("compression")
    methods, steps = [], []
    while settings:  # from the last step to the first
        method = settings["method"]
        options = {name: value for name, value in settings.items() if name not in ("method", "after") and value}
        details = ", ".join(f"{name.replace('_', ' ')} {json.dumps(value)}" for name, value in options.items())
        methods.insert(0, method)
        steps.insert(0, f"{COMPRESSED[method]} ({details})" if details else COMPRESSED[method])
        settings = settings.get("after")
    if not steps:
        return ""
    text = ", then ".join(steps)
    text = f"{text[0].upper()}{text[1:]}."
    if "prune" in methods:
        kernels = "all kernels" if methods[-1] == "qat" else "the compressed kernels"
        text += f" {report['compression']['sparsity']:.1%} of the weights in {kernels} are zero."
    return text


def machine(report):
    """The devices and the backend that a run trained on, as text. Reports of older versions lack some of it."""
    devices, backend = report.get("devices", 1), report.get("backend", "tensorflow")
    text = report["device"] if devices == 1 else f"{devices} devices: {report['device']}"
    return f"{text}, JAX" if backend == "jax" else text


def kept_epoch(report, history):
    """The epoch whose weights were kept, from 1, or `None` if it is unknown: an older run may not have stored it."""
    if report.get("kept_epoch") is not None:
        return report["kept_epoch"]
    # A compressed run never keeps the weights of its first epochs, and old files do not say how many.
    if report["recipe"].get("compression") or not history:
        return None
    best = metrics.best_epoch(history)
    # Older versions ignored the loss: of epochs with equal accuracy they kept the earliest.
    ties = sum(row["val_accuracy"] == best["val_accuracy"] for row in history)
    return best["epoch"] if ties == 1 else None


def _epochs(report):
    """The number of epochs, and a sentence about an early stop, which is empty if all epochs were trained."""
    epochs, trained = report["epochs"], report.get("epochs_trained")
    if trained is None or trained >= epochs:
        return f"{epochs}", ""
    patience = report["recipe"].get("early_stopping")
    reason = f": no improvement in {patience} epochs" if patience else ""
    return f"{trained} of {epochs}", f"Training stopped after {trained} of {epochs} epochs{reason}."


def classes(report):
    """The rows of the table of classes.

    Args:
        report: a dict with `class_names` and `per_class`, and optionally other fields of `metrics.Report`.

    Returns:
        A dict per class, the lowest top-1 first and those without test images last. Empty if the report has no such numbers.
    """
    names, weights = report["class_names"], report.get("class_weights")
    images = report.get("train_images_per_class") or [None] * len(names)
    scores = report["per_class"] or [{}] * len(names)
    if not (report["per_class"] or weights or report.get("train_images_per_class")):
        return []
    rows = [
        {"top1": None, **measured, "number": number, "name": name, "train_images": count, "weight": (weights or {}).get(name)}
        for number, (name, count, measured) in enumerate(zip(names, images, scores), start=1)
    ]
    return sorted(rows, key=lambda row: (row["top1"] is None, row["top1"]))


def _rounded(name, value):
    """A value of the history as text."""
    if name == "epoch":
        return f"{value}"
    return f"{value:.1f}" if name.endswith("seconds") else f"{value:.4g}"


def _percent(share, decimals=1):
    return "n/a" if share is None else f"{share:.{decimals}%}"


def _unsure(sure):
    """The share of unsure answers as a percentage, from that of sure ones."""
    return _percent(None if sure is None else 1 - sure)


def interval(scores):
    """The 95% confidence interval of the `top1` of `scores`, as text. Computed, as reports of older versions lack it."""
    if scores.get("top1") is None:
        return "n/a"
    low, high = metrics.wilson(scores["top1"], scores["images"])
    return f"{low:.1%} to {high:.1%}"


def _duration(seconds):
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.1f} s"


def plain(value):
    """A JSON value as text, strings without quotes."""
    return value if isinstance(value, str) else json.dumps(value)
