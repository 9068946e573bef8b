"""The command `cvt-keras export`: parses flags and calls `cvt_keras.export.export`."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from cvt_keras import cli, environment, runs

from .verify import DEFAULT_FORMATS, FORMATS, checked, summary


@dataclasses.dataclass(frozen=True)
class Arguments:
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run folder."""
    formats: tuple[Literal[FORMATS], ...] = DEFAULT_FORMATS  # type: ignore[valid-type]  # a checker wants literal names
    """Formats to write. onnx needs pip install tf2onnx onnxruntime."""
    data_dir: str | None = None
    """Folder of the run's data set, if it has moved."""
    verify_images: int | None = None
    """Verify on the first N test images only; all by default."""


def parse(argv):
    """Parses the command line. Raises an `ArgumentError` for an invalid value."""
    description = "Export a run to SavedModel, TFLite and ONNX, and verify each file. Writes to RUN/export."
    arguments = tyro.cli(Arguments, prog="cvt-keras export", description=description, args=argv)
    checked(arguments.formats, arguments.verify_images)
    return arguments


def main(argv):
    arguments = parse(argv)
    runs.require_finished(arguments.run, argument="run")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the converter warns about every file
    environment.start("tensorflow")
    from .artifacts import export

    try:
        artifacts = export(arguments.run, arguments.formats, arguments.data_dir, arguments.verify_images)
    except KeyboardInterrupt as stop:
        raise type(stop)("Verified files are kept; the unfinished one is removed") from stop
    console = Console()
    if console.is_terminal:
        console.print(_table(artifacts))
    failed = [artifact for artifact in artifacts if not artifact.passed]
    for artifact in failed:
        broken = ", ".join(f"{name} (at most {artifact.bounds.get(name)})" for name in artifact.broken)
        print(
            f"cvt-keras export: {artifact.name} exceeds its bounds for {broken} and was not written to "
            f"{arguments.run / artifact.path}: {summary(artifact)}. Test image {artifact.worst_image} differs most",
            file=sys.stderr,
        )
    if failed:
        return 1
    print(f"exported into {arguments.run / runs.EXPORT}; the table is in {arguments.run / runs.PAGE}")
    return 0


def _table(artifacts):
    table = Table()
    table.add_column("artifact", no_wrap=True)
    for name in ("MB", "top-1", "same as\nKeras", "largest\ndifference", "ms"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("passed", no_wrap=True)
    for artifact in artifacts:
        table.add_row(
            artifact.name,
            f"{artifact.bytes / 1e6:.2f}",
            f"{artifact.top1:.2%}",
            f"{artifact.agreement:.2%}",
            f"{artifact.max_abs_diff:.2g}",
            f"{artifact.milliseconds:.2f}",
            "yes" if artifact.passed else "no",
        )
    return table


if __name__ == "__main__":
    sys.exit(cli.run("export", sys.argv[1:]))
