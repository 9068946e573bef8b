"""Accuracy, size and speed of compressed runs: python benchmarks/compression.py RUN RUN...

Compares the .tflite files of exported runs with those of the first run, which must not be compressed. Prints a table: accuracy
from the export's report, size in bytes and with gzip, and milliseconds per image by LiteRT on one thread. The files take turns,
so that other load on the machine affects all alike. `--plot` draws accuracy against size.
"""

import dataclasses
import gzip
import importlib.metadata
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from ai_edge_litert.interpreter import Interpreter
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter, ScalarFormatter

from cvt_keras import environment, runs
from cvt_keras.errors import NoRunError, RunError
from cvt_keras.report import figures
from result_tables import write_rows

WARM_UP = 20
PACKAGES = ("ai-edge-litert", "tensorflow", "keras", "tensorflow-model-optimization")
MOST_POINTS = 0.03  # the plot shows files down to this much accuracy below the best one


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Accuracy, bytes and milliseconds of the .tflite files of runs."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")]
    """Folders of exported runs. The others are compared with the first."""
    plot: Path | None = None
    """Draw accuracy against size into this .png file."""
    csv: Path | None = None
    """Also write the table into this CSV file."""
    times: int = 100
    """Timed runs per file and turn."""
    turns: int = 5
    """Turns per file. The result is the median of the turns' medians."""


def files(run_dirs):
    """Lists the .tflite files that passed the export's check, a dict for each.

    Raises:
        NoRunError: for a folder without a run.
        RunError: for a run that is not exported, or was checked on other images than the first; or if the first run is
            compressed, or has no float32 file.
    """
    rows, checked = [], None
    for run_dir in run_dirs:
        runs.require_run(run_dir)
    if runs.read_json(run_dirs[0] / runs.RECIPE).get("compression"):
        raise RunError(f"the first run must not be compressed: the others are compared with it. Received: {run_dirs[0]}")
    for run_dir in run_dirs:
        path = run_dir / runs.EXPORT / runs.REPORT
        if not path.exists():
            raise RunError(f"{run_dir} is not exported. Export it first: cvt-keras export {run_dir}")
        report = runs.read_json(path)
        for artifact in report["artifacts"]:
            file = run_dir / artifact["path"]
            if not artifact["path"].endswith(".tflite"):
                continue
            if not artifact["passed"]:
                print(
                    f"skipped, as it failed the export's check: {run_dir.name} {artifact['name']}, {artifact['top1']:.2%} top-1"
                )
                continue
            images = f"{artifact['images']:,} images of {report['dataset']}"
            checked = checked or images
            if images != checked:
                raise RunError(
                    f"{run_dir} was checked on {images}, and {run_dirs[0]} on {checked}. Export both with the same "
                    "--verify-images"
                )
            data = file.read_bytes()
            rows.append(
                {
                    "run": run_dir.name,
                    "file": artifact["name"],
                    "path": file,
                    "top1": artifact["top1"],
                    "checked": images,
                    "bytes": len(data),
                    "gzip": len(gzip.compress(data, 9)),
                }
            )
    if not rows or (rows[0]["run"], rows[0]["file"]) != (run_dirs[0].name, "float32"):
        raise RunError(f"{run_dirs[0]} has no float32.tflite to compare with. Export it first: cvt-keras export {run_dirs[0]}")
    return rows


def time_files(rows, times, turns):
    """Adds to each row `milliseconds`, the median of its turns' medians, and `deviation`, their standard deviation."""
    medians = {id(row): [] for row in rows}
    for _ in range(turns):
        for row in rows:
            interpreter = Interpreter(str(row["path"]), num_threads=1)
            interpreter.allocate_tensors()
            [network_input] = interpreter.get_input_details()
            pixels = np.random.default_rng(0).integers(0, 256, network_input["shape"], dtype="uint8")
            interpreter.set_tensor(network_input["index"], pixels)
            seconds = []
            for i in range(WARM_UP + times):
                started = time.perf_counter()
                interpreter.invoke()
                if i >= WARM_UP:
                    seconds.append(time.perf_counter() - started)
            medians[id(row)].append(1000 * statistics.median(seconds))
    for row in rows:
        row["milliseconds"] = statistics.median(medians[id(row)])
        row["deviation"] = statistics.pstdev(medians[id(row)])


def csv_row(row, first):
    """Returns a row of the CSV file, as text; points and gzip bytes are relative to the first file."""
    return {
        "run": row["run"],
        "file": row["file"],
        "top1_percent": f"{100 * row['top1']:.2f}",
        "points": f"{100 * (row['top1'] - first['top1']):+.2f}",
        "mb": f"{row['bytes'] / 1e6:.2f}",
        "gzip_mb": f"{row['gzip'] / 1e6:.2f}",
        "percent_of_first_gzip": f"{100 * row['gzip'] / first['gzip']:.1f}",
        "ms": f"{row['milliseconds']:.2f}",
        "ms_deviation": f"{row['deviation']:.2f}",
    }


def table(csv_rows):
    """Returns the rows of the CSV file as a Markdown table."""
    lines = [
        "| run | file | top-1 | points | MB | gzip MB | gzip, relative | ms |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in csv_rows:
        lines.append(
            f"| {row['run']} | `{row['file']}` | {row['top1_percent']}% | {row['points']} | {row['mb']} | {row['gzip_mb']} "
            f"| {row['percent_of_first_gzip']}% | {row['ms']} ± {row['ms_deviation']} |"
        )
    return "\n".join(lines)


def trade(files):
    """Draws accuracy against gzipped size: a point for each file, and a line along the Pareto front.

    Colours are runs, markers are kinds of files. A file far below the best one is drawn on the lower edge, with its accuracy
    as text. Otherwise it would squeeze the other points together.

    Args:
        files: dicts of `run`, `file` (its kind), `top1` and `gzip` (bytes).

    Returns:
        A `Figure`.
    """
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    floor = max(file["top1"] for file in files) - MOST_POINTS
    front = sorted(pareto(files), key=lambda file: file["gzip"])
    [line] = axes.plot(
        [file["gzip"] / 1e6 for file in front],
        [max(floor, file["top1"]) for file in front],
        drawstyle="steps-post",
        color=figures.GREY,
        linewidth=1,
        label="Pareto front",
    )
    names = list(dict.fromkeys(file["run"] for file in files))
    shades = colormaps["tab20"].colors  # ten strong colours, each followed by a pale one
    shades = [*shades[::2], *shades[1::2]]
    colours = {name: shades[i % len(shades)] for i, name in enumerate(names)}
    markers = dict(zip(sorted({file["file"] for file in files}), "osD^"))
    on_the_edge = []  # MB of each
    for file in files:
        point = file["gzip"] / 1e6, max(floor, file["top1"])
        axes.plot(*point, markers[file["file"]], color=colours[file["run"]], markersize=8, alpha=0.8, clip_on=False)
        if file["top1"] < floor:
            # Stacks the labels of neighbours.
            height = 8 + 10 * sum(0.9 < other / point[0] < 1.1 for other in on_the_edge)
            axes.annotate(f"{file['top1']:.1%}", point, xytext=(0, height), textcoords="offset points", ha="center", fontsize=8)
            on_the_edge.append(point[0])
    if on_the_edge:
        axes.set_ylim(bottom=floor)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(ScalarFormatter())
    axes.set_xlabel("MB, gzipped")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    axes.set_title("Top-1 on the test images", loc="left")
    kinds = [
        Line2D([], [], marker=marker, color=figures.GREY, linestyle="", label=kind.replace("_", " "))
        for kind, marker in markers.items()
    ]
    axes.legend(handles=[line, *kinds], frameon=False, loc="lower right", fontsize="small")
    handles = [Line2D([], [], marker="o", color=colour, linestyle="", label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, frameon=False, loc="outside right upper", fontsize="small")
    figures.style(axes)
    return figure


def pareto(files):
    """Returns the Pareto front: the files for which no other file is both at least as accurate and at least as small."""
    return [
        file
        for file in files
        if not any(
            other["top1"] >= file["top1"]
            and other["gzip"] <= file["gzip"]
            and (other["top1"], other["gzip"]) != (file["top1"], file["gzip"])
            for other in files
        )
    ]


def main(argv):
    arguments = tyro.cli(Arguments, prog="python benchmarks/compression.py", args=argv)
    try:
        rows = files(arguments.runs)
    except (RunError, NoRunError) as error:
        sys.exit(f"compression: {error}")
    time_files(rows, arguments.times, arguments.turns)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    print(f"{environment.cpu()}, one thread; {versions}.")
    print(f"ms: the median of {arguments.turns} turns, each the median of {arguments.times} runs, ± their standard deviation.")
    print(f"top-1 on {rows[0]['checked']}, by LiteRT.\n")
    csv_rows = [csv_row(row, rows[0]) for row in rows]
    print(table(csv_rows))
    if arguments.csv:
        write_rows(arguments.csv, csv_rows)  # stored rows may be relative to another first file
    if arguments.plot:
        figures.save(trade(rows), arguments.plot)
        print(f"\n{arguments.plot}")


if __name__ == "__main__":
    main(sys.argv[1:])
