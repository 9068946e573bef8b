"""Serves a page that classifies images in the browser by a run's .tflite files: python -m export.web RUN"""

import dataclasses
import errno
import os
import sys
from pathlib import Path
from typing import Annotated

try:
    import tyro
    from cvt_keras.export import command
    from cvt_keras.export.web.samples import Samples
    from cvt_keras.export.web.server import LABELS, RUNTIME, WEB, Server, artifacts
except ImportError as error:
    sys.exit(f"export.web: {error}. Is all of requirements.txt installed?")


@dataclasses.dataclass(frozen=True)
class Arguments:
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run folder, exported."""
    port: int = 8000
    """Where to serve, on this machine alone; 0 is any free one."""
    data_dir: str | None = None
    """Where the run's data set lies now, if not where it was: a test image of each class is shown."""


def main(argv):
    """Runs the command line -> its exit code."""
    command.raise_on_sigterm()
    try:
        arguments = tyro.cli(Arguments, prog="python -m export.web", description=__doc__.partition(":")[0], args=argv)
        run_dir = arguments.run
        if not (run_dir / "recipe.json").exists():
            return _fail(f"`RUN` must be a run folder, which train.py writes. Received: {run_dir}", 2)
        if not 0 <= arguments.port < 2**16:
            return _fail(f"`port` must be within 0 and {2**16 - 1}. Received: port={arguments.port}", 2)
        for there, what in ((artifacts(run_dir), ".tflite file to run"), ((run_dir / LABELS).exists(), LABELS)):
            if not there:
                return _fail(f"{run_dir} has no {what}: python -m export {run_dir} first", 1)
        if missing := [name for name in RUNTIME if not (WEB / name).exists()]:
            return _fail(f"{missing[0]} is not installed: npm ci --prefix {os.path.relpath(WEB)}", 1)
        return _serve(arguments)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return _fail(f"port {arguments.port} is in use: choose another with --port", 1)
        return _fail(error, 1)
    except KeyboardInterrupt as stop:
        return command.stopped("export.web", stop)


def _serve(arguments):
    samples = None
    with Server(arguments.run, arguments.port, lambda: samples()) as server:
        samples = Samples(arguments.run, arguments.data_dir, lambda why: _fail(f"the page has no samples: {why}", 0))
        try:
            print(f"{arguments.run} is served at {server.url} until Ctrl-C", flush=True)
            server.serve_forever()
        finally:
            samples.stop()
    return 0


def _fail(message, code):
    return command.fail("export.web", message, code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
