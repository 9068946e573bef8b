"""The command `cvt-keras web`: serves a page that classifies images in the browser by a run's .tflite files."""

import dataclasses
import errno
import shlex
import sys
from pathlib import Path
from typing import Annotated

import tyro

from cvt_keras import cli, runs
from cvt_keras.errors import ArgumentError, MissingPackageError, RunError, UserError

from .samples import Samples
from .server import LABELS, RUNTIME, WEB, Server, artifacts


@dataclasses.dataclass(frozen=True)
class Arguments:
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run folder, exported."""
    port: int = 8000
    """Where to serve, on this machine only; 0 is any free port."""
    data_dir: str | None = None
    """Where the run's data set lies now, if not where it was. The page shows a test image of each class."""


def parse(argv):
    """Reads the command line. Raises a `UserError` for a port that no machine has."""
    description = "Serve a page that classifies images in the browser by a run's .tflite files."
    arguments = tyro.cli(Arguments, prog="cvt-keras web", description=description, args=argv)
    if not 0 <= arguments.port < 2**16:
        raise ArgumentError(f"`port` must be within 0 and {2**16 - 1}. Received: port={arguments.port}", argument="port")
    return arguments


def main(argv):
    arguments = parse(argv)
    run_dir, port = arguments.run, arguments.port
    runs.require_run(run_dir)
    for exists, what in ((artifacts(run_dir), ".tflite file to run"), ((run_dir / LABELS).exists(), LABELS)):
        if not exists:
            raise RunError(
                f"{run_dir} has no {what}",
                argument="run_dir",
                hint=f"Export it first: cvt-keras export {shlex.quote(str(run_dir))}",
            )
    if missing := [name for name in RUNTIME if not (WEB / name).exists()]:
        raise MissingPackageError(
            f"LiteRT.js is not installed: {missing[0]} is missing", hint=f"Node.js installs it: {installation()}"
        )
    try:
        server = Server(run_dir, port, lambda: samples())
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"`port` is in use: {port}", argument="port", hint="Choose another with --port") from error
        raise
    with server:
        samples = Samples(run_dir, arguments.data_dir, _warn)
        try:
            print(f"{run_dir} is served at {server.url} until Ctrl-C", flush=True)
            server.serve_forever()
        finally:
            samples.stop()


def installation():
    """The command line that installs LiteRT.js where the page looks for it."""
    folder = WEB.relative_to(Path.cwd()) if WEB.is_relative_to(Path.cwd()) else WEB
    return f"npm ci --prefix {shlex.quote(str(folder))}"


def _warn(line):
    print(f"cvt-keras web: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(cli.run("web", sys.argv[1:]))
