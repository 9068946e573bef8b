"""A run folder -> report.html: one file to open, to send and to keep, that needs nothing else."""

import base64
import json
from html import escape
from pathlib import Path

from cvt_keras import runs
from cvt_keras.report import figures

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #fff; --quiet: #666; --line: #ddd; --note: #fff4d6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #16181b; --quiet: #9a9a9a; --line: #383b40; --note: #3d3315; }
}
body { margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: var(--ink); background: var(--paper);
       font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.quiet { color: var(--quiet); margin-top: .2rem; }
.note { background: var(--note); padding: .6rem .9rem; border-radius: 6px; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; padding: 0; }
.tile { border: 1px solid var(--line); border-radius: 8px; padding: .6rem 1rem; min-width: 7.5rem; }
.tile b { display: block; font-size: 1.5rem; font-weight: 600; } .tile span { color: var(--quiet); font-size: .85rem; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
.exports td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: var(--quiet); font-weight: 500; }
table.settings td { text-align: left; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--quiet); }
"""

CAPTIONS = {
    figures.CURVES: (
        "Curves",
        "The ring marks the epoch that was kept. Training images are measured during the epoch, augmented.",
    ),
    figures.CONFUSION: ("Confusion", "Test images of each label by what the network took them for."),
    figures.CALIBRATION: ("Calibration", "Of the images that the network is so sure of, how many it gets right."),
    figures.MOST_WRONG: ("Most wrong", "The test images with the highest cross-entropy: mislabelled, odd, or hard."),
}


def write(run_dir):
    """Writes `report.html` from what a run folder holds: report, history and plots, and the exports' report if there is one."""
    run_dir = Path(run_dir)
    report = runs.read_json(run_dir / runs.REPORT)
    history = runs.read_history(run_dir)
    export = run_dir / runs.EXPORT / runs.REPORT
    title = f"{report['variant']} on {report['dataset']}"
    parts = [
        f'<p class="quiet">{escape(report["device"])}</p>',
        _compression(report),
        f'<p class="note">{escape(report["data_note"])}</p>' if report["data_note"] else "",
        _tiles(report),
        _splits(report),
        picture(run_dir, figures.CURVES, *CAPTIONS[figures.CURVES]),
        f"<details><summary>Each epoch in numbers</summary>{_history(history)}</details>",
        _artifacts(runs.read_json(export)["artifacts"]) if export.exists() else "",
        picture(run_dir, figures.CONFUSION, *CAPTIONS[figures.CONFUSION]),
        _classes(report["per_class"]) if report["per_class"] else "",
        picture(run_dir, figures.MOST_WRONG, *CAPTIONS[figures.MOST_WRONG]),
        picture(run_dir, figures.CALIBRATION, *CAPTIONS[figures.CALIBRATION]),
        settings("Settings", report["recipe"]),
        settings("Versions", report["versions"]),
    ]
    write_document(run_dir / runs.PAGE, title, parts)


def write_document(path, title, parts):
    """Writes a page of HTML, whole or not at all: a title, and parts under it, of which the empty ones are left out."""
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
    )
    body = ["<body>", f"<h1>{escape(title)}</h1>", *filter(None, parts), "</body></html>\n"]
    with runs.whole(path) as aside:
        aside.write_text("\n".join([head, *body]), encoding="utf-8")


def _compression(report):
    """What was done to the network, beside what was found in it."""
    settings = report["recipe"].get("compression")
    if not settings:
        return ""
    said = {"prune": "pruned", "cluster": "clustered", "qat": "trained for quantisation"}
    steps, pruned = [], False
    while settings:
        shown = {name: value for name, value in settings.items() if name not in ("method", "after") and value}
        details = ", ".join(f"{name.replace('_', ' ')} {json.dumps(value)}" for name, value in shown.items())
        steps.insert(0, f"{said[settings['method']]}{f' ({details})' if details else ''}")
        pruned |= settings["method"] == "prune"
        settings = settings.get("after")
    said = ", then ".join(steps)
    if pruned:
        which = "all its kernels'" if report["recipe"]["compression"]["method"] == "qat" else "these"
        said += f": {report['compression']['sparsity']:.1%} of {which} weights are zeros"
    return f"<p>{escape(said[0].upper() + said[1:])}.</p>"


def _tiles(report):
    split = "test" if report["test"] else "validation"
    shown = {
        f"top-1, {split}": _percent(report[split]["top1"]),
        f"calibration error, {split}": _percent(report[split]["ece"]),
        "parameters": f"{report['parameters'] / 1e6:.2f} M",
        "multiply-adds an image": f"{report['macs'] / 1e6:,.1f} M",
        "epoch" if report["epochs"] == 1 else "epochs": f"{report['epochs']}",
        "training images": f"{report['train_images']:,}",
        "training": duration(report["train_seconds"]),
        "images a second": f"{report['train_images_per_second']:,.0f}",
    }
    return tiles(shown)


def tiles(shown):
    """A dict of name -> text, drawn large."""
    drawn = [f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in shown.items()]
    return f'<div class="tiles">{"".join(drawn)}</div>'


def _splits(report):
    rows = [
        [split, _percent(of["top1"]), _percent(of["top5"]), f"{of['loss']:.4f}", _percent(of["ece"]), f"{of['images']:,}"]
        for split, of in (("test", report["test"]), ("validation", report["validation"]))
        if of
    ]
    return table(["", "top-1", "top-5", "cross-entropy, nats", "calibration error", "images"], rows)


def _history(history):
    def number(name, value):
        if name == "epoch":
            return f"{value}"
        return f"{float(value):.1f}" if name.endswith("seconds") else f"{float(value):.4g}"

    names = list(history[0]) if history else []
    return table([name.replace("_", " ") for name in names], [[number(*cell) for cell in row.items()] for row in history])


def _classes(per_class):
    names = ["class", "top-1 (recall)", "precision", "F1", "images"]
    rows = [
        [row["name"], _percent(row["top1"]), _percent(row["precision"]), _percent(row["f1"]), f"{row['images']:,}"]
        for row in sorted(per_class, key=lambda row: (row["top1"] is None, row["top1"]))
    ]
    return f"<details open><summary>Classes, the hardest first</summary>{table(names, rows)}</details>"


def _artifacts(artifacts):
    names = ["artifact", "MB", "top-1", "same top-1 as Keras", "largest difference", "ms an image", "images", "runtime", ""]
    rows = [
        [
            artifact["name"].replace("_", " "),
            f"{artifact['bytes'] / 1e6:.2f}",
            f"{artifact['top1']:.2%}",  # bounds are as fine as 0.2 points
            f"{artifact['agreement']:.2%}",
            f"{artifact['max_abs_diff']:.2g}",
            f"{artifact['milliseconds']:.1f}",
            f"{artifact['images']:,}",
            artifact["runtime"],
            "passed" if artifact["passed"] else f"FAILED: {', '.join(artifact['broken'])}",
        ]
        for artifact in artifacts
    ]
    return f"<h2>Exports</h2>{table(names, rows, 'exports')}"


def settings(title, values):
    """A dict of name -> anything that JSON has, folded away under a title."""
    rows = [[name, value if isinstance(value, str) else json.dumps(value)] for name, value in values.items()]
    return f"<details><summary>{title}</summary>{table(['', ''], rows, 'settings')}</details>"


def picture(run_dir, name, title, caption):
    """A picture of a folder's plots with its title and caption, or nothing where there is none."""
    path = run_dir / runs.PLOTS / name
    if not path.exists():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<h2>{title}</h2><p class="quiet">{caption}</p><img alt="{title}: {caption}" src="data:image/png;base64,{data}">'


def table(names, rows, kind=""):
    """Heads and rows of cells of any type, escaped; `kind` is a class of `STYLE`."""

    def row(tag, cells):
        return f"<tr>{''.join(f'<{tag}>{escape(str(cell))}</{tag}>' for cell in cells)}</tr>"

    head = row("th", names) if any(names) else ""
    return f'<div class="scroll"><table class="{kind}">{head}{"".join(row("td", cells) for cells in rows)}</table></div>'


def _percent(share):
    return "n/a" if share is None else f"{share:.1%}"


def duration(seconds):
    """Seconds as people tell them."""
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.1f} s"
