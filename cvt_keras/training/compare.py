"""The command `cvt-keras compare`: reads runs, and calls `cvt_keras.report.compare`."""

import csv
import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from cvt_keras import cli, runs
from cvt_keras.errors import ArgumentError

PAGE = Path("compare.html")


@dataclasses.dataclass(frozen=True)
class Arguments:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")]
    """Two or more run folders. The first is the one that the others are compared with."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="PAGE")] = None
    """Page to write; an existing one is replaced. Defaults to compare.html, or to no page with --csv or --json."""
    csv: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print a row per run as CSV."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the comparison as JSON."""
    data_dir: str | None = None
    """Folder of the data set, if it has moved. Only used for runs of older versions, which lack predictions.csv."""


def parse(argv):
    """Parses the command line. Raises an `ArgumentError` for an invalid value."""
    description = "Compare runs: accuracy with intervals, McNemar's test, curves, settings and exports."
    arguments = tyro.cli(Arguments, prog="cvt-keras compare", description=description, args=argv)
    if len(arguments.runs) < 2:
        raise ArgumentError(
            f"`runs` must be two or more run folders. Received: {len(arguments.runs)}",
            argument="runs",
        )
    folders = [folder.resolve() for folder in arguments.runs]
    for i, folder in enumerate(folders):
        if folder in folders[:i]:
            raise ArgumentError(f"`runs` must be different folders. Received twice: {arguments.runs[i]}", argument="runs")
    if arguments.csv and arguments.json:
        raise ArgumentError("`csv` can't be combined with `json`", argument="csv", hint="Use --csv or --json")
    return arguments


def main(argv):
    arguments = parse(argv)
    for folder in arguments.runs:
        runs.require_finished(folder, argument="runs")
    path = arguments.out or (None if arguments.csv or arguments.json else PAGE)
    if path is not None:
        runs.require_writable_file(path, argument="out")
    from cvt_keras.report import compare
    from cvt_keras.training.recomputed import predictions_of

    compared = [_read(folder, name) for folder, name in zip(arguments.runs, _names(arguments.runs))]
    comparison = compare.compare(compared, lambda run: predictions_of(run, arguments.data_dir))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        compare.write(path, compared, comparison)
    if arguments.json:
        print(json.dumps(comparison, indent=2))
    elif arguments.csv:
        rows = compare.table(comparison)
        table = csv.DictWriter(sys.stdout, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    else:
        _show(comparison)
        print(f"the page is in {path}")


def _read(folder, name):
    from cvt_keras.report.compare import Run
    from cvt_keras.training.recipes import read_recipe

    export = folder / runs.EXPORT / runs.REPORT
    return Run(
        name=name,
        folder=folder,
        report=runs.read_json(folder / runs.REPORT),
        settings=read_recipe(folder).settings(),  # an older recipe.json lacks some
        history=runs.read_history(folder),
        exports=runs.read_json(export).get("artifacts", []) if export.exists() else [],
    )


def _names(folders):
    """The names of the folders or, where two have the same, their paths."""
    names = [folder.resolve().name for folder in folders]
    return [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders)]


def _show(comparison):
    """Prints the table of the runs, then the reasons for missing tests, the notes and the settings that differ."""
    from cvt_keras.report import compare, page

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)  # fits 80 columns
    for name in (
        "run",
        "top-1",
        "95% interval",
        "cross-\nentropy",
        "only this\ncorrect",
        "only run 1\ncorrect",
        "p",
        "minutes",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for number, (run, row) in enumerate(zip(comparison["runs"], compare.table(comparison)), start=1):
        print(f"run {number}: {run['name']}")
        split = "test" if run["test"] else "validation"
        tested = row["p_value"] is not None
        table.add_row(
            f"{number}",
            f"{row[f'{split}_top1']:.2%}" + ("" if run["test"] else "*"),
            page.interval(run[split]),
            f"{row[f'{split}_loss']:.4f}",
            *((f"{row['only_run_correct']:,}", f"{row['only_baseline_correct']:,}") if tested else ("", "")),
            compare.p_text(row["p_value"]) if tested else "",
            f"{row['train_seconds'] / 60:.1f}",
        )
    Console().print(table)
    if not all(run["test"] for run in comparison["runs"]):
        print("* on the validation images: the run was not evaluated on its test images")
    if any("reason" not in test for test in comparison["mcnemar"]):
        print("p: McNemar's test (mid-p) against run 1, on the same test images")
    for number, test in enumerate(comparison["mcnemar"], start=2):
        if "reason" in test:
            print(f"run {number} can't be tested against run 1: {test['reason']}")
    for note in comparison["notes"]:
        print(note)
    if comparison["differences"]:
        print("settings that differ, in the order of the runs:")
    for name, values in compare.differences_text(comparison).items():
        print(f"  {name}: {', '.join(values)}")


if __name__ == "__main__":
    sys.exit(cli.run("compare", sys.argv[1:]))
