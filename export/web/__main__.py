"""The command `cvt-keras web`: serves a page that classifies images in the browser with a run's .tflite files."""

import dataclasses
import errno
import shlex
import sys
from pathlib import Path
from typing import Annotated

import tyro

from cvt_keras import cli, runs
from cvt_keras.errors import ArgumentError, MissingPackageError, RunError, UserError
from cvt_keras.training.recipes import RESIZING, read_recipe

from .samples import Samples
from .server import LABELS, RUNTIME, WEB, Server, artifacts


@dataclasses.dataclass(frozen=True)
class Arguments:
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The folder of an exported run."""
    port: int = 8000
    """Port to serve on, for this machine only; 0 picks a free one."""
    data_dir: str | None = None
    """Folder of the run's data set, if it has moved. The page offers a test image of each class."""


def parse(argv):
    """Reads the command line. Raises an `ArgumentError` for a port out of range."""
    description = "Serve a page that classifies images in the browser with a run's .tflite files."
    arguments = tyro.cli(Arguments, prog="cvt-keras web", description=description, args=argv)
    if not 0 <= arguments.port < 2**16:
        raise ArgumentError(f"`port` must be within 0 and {2**16 - 1}. Received: port={arguments.port}", argument="port")
    return arguments


def main(argv):
    arguments = parse(argv)
    run_dir, port = arguments.run, arguments.port
    runs.require_run(run_dir, argument="run")
    for exists, missing in ((artifacts(run_dir), ".tflite file"), ((run_dir / LABELS).exists(), LABELS)):
        if not exists:
            raise RunError(
                f"`run` has no {missing}: {run_dir}",
                argument="run",
                hint=f"Export it first: cvt-keras export {shlex.quote(str(run_dir))}",
            )
    if missing_files := [name for name in RUNTIME if not (WEB / name).exists()]:
        raise MissingPackageError(
            f"LiteRT.js is not installed: {missing_files[0]} is missing", hint=f"Install it with Node.js: {installation()}"
        )
    preprocessing = read_recipe(run_dir).preprocessing
    resizing = {name: getattr(preprocessing, name) for name in RESIZING}
    try:
        server = Server(run_dir, port, resizing, lambda: samples())
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"`port` is in use: {port}", argument="port", hint="Choose another with --port") from error
        raise
    with server:
        samples = Samples(run_dir, arguments.data_dir, _warn)
        try:
            print(f"serving {run_dir} at {server.url} (Ctrl-C to stop)", flush=True)
            server.serve_forever()
        finally:
            samples.stop()


def installation():
    """Returns the command that installs LiteRT.js where the page looks for it."""
    folder = WEB.relative_to(Path.cwd()) if WEB.is_relative_to(Path.cwd()) else WEB
    return f"npm ci --prefix {shlex.quote(str(folder))}"


def _warn(line):
    print(f"cvt-keras web: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(cli.run("web", sys.argv[1:]))
