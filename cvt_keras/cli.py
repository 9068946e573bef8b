"""The command `cvt-keras`: the table of its commands, and their exit codes.

A command's module has `parse(argv)`, which reads and checks the arguments, and `main(argv)`, which does the work or raises.
It is imported when its command is called. To keep `--help` fast it imports Keras and TensorFlow after parsing the flags.

Exit codes:
    0: success.
    1: failure. Standard error says why, and how to fix it.
    2: a wrong argument.
    130, 143: stopped by Ctrl-C, by SIGTERM.
"""

import contextlib
import dataclasses
import importlib
import os
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

from cvt_keras import signals
from cvt_keras.errors import RunError, UserError

MOST_DETAILS = 10  # lines of an error's `details` that are printed
PROGRAM = "CVT_KERAS_PROGRAM"  # environment variable: the words before a command's arguments, if another command started it
# Arguments that are positional on the command line. Each other argument has a flag of its name.
POSITIONAL = {"RECIPE", "run", "runs", "source", "out", "images"}


class Command(NamedTuple):
    module: str
    purpose: str
    before: tuple[str, ...] = ()  # arguments of the module's `main` before the user's


COMMANDS = {
    "train": Command("cvt_keras.training.__main__", "Train a network and write a run folder"),
    "launch": Command("cvt_keras.training.launch", "Train by several processes on this machine"),
    "search": Command("cvt_keras.search.__main__", "Search for a good recipe with keras-tuner"),
    "prune": Command("cvt_keras.compression.__main__", "Prune a run: set its smallest weights to zero", ("prune",)),
    "cluster": Command("cvt_keras.compression.__main__", "Cluster a run: give each kernel a few distinct values", ("cluster",)),
    "qat": Command("cvt_keras.compression.__main__", "Train a run further for int8 (quantisation-aware training)", ("qat",)),
    "compare": Command("cvt_keras.training.compare", "Compare runs: accuracy, curves, settings, exports"),
    "export": Command("cvt_keras.export.__main__", "Export a run to SavedModel, TFLite and ONNX, and verify each file"),
    "predict": Command("cvt_keras.predict.__main__", "Classify images with a run or an exported file, or evaluate it"),
    "convert": Command("cvt_keras.pretrained", "Convert published PyTorch weights to a .keras file"),
    "classify": Command("cvt_keras.export.serving.client", "Classify images with a TF Serving server"),
    "web": Command("cvt_keras.export.web.__main__", "Serve a web page that classifies images in the browser"),
}


def main(argv=None):
    """Runs a command line.

    Args:
        argv: the arguments after `cvt-keras`; defaults to those of this process.

    Returns:
        The exit code.

    Raises:
        SystemExit: by tyro, for flags that it rejects and after `--help`.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0
    if argv[0] == "--version":
        import cvt_keras

        print(cvt_keras.__version__)
        return 0
    if argv[0] not in COMMANDS:
        print(f"cvt-keras: `COMMAND` must be one of {', '.join(COMMANDS)}. Received: {argv[0]}", file=sys.stderr)
        return 2
    return run(argv[0], argv[1:])


def run(name, argv):
    """Runs the command `name` with its arguments. Prints the errors that it raises, and returns the exit code."""
    command = COMMANDS[name]
    try:
        signals.raise_on_sigterm()
        module = importlib.import_module(command.module)
        return module.main([*command.before, *argv]) or 0
    except (Exception, KeyboardInterrupt) as error:
        return failed(name, error)


def failed(name, error):
    """Prints an error that ended the command `name`, and returns the exit code. Raises an error that is a bug."""
    if isinstance(error, UserError):
        # `convert` shows all faults of a checkpoint. The other commands point to it.
        most_details = len(error.details) if name == "convert" else MOST_DETAILS
        return _fail(name, message(error, most_details), error.exit_code)
    if isinstance(error, ImportError):
        if (error.name or "").partition(".")[0] == "cvt_keras":
            hint = "In a checkout, run pip install -r requirements.txt or pip install -e ."
            return _fail(name, f"{error}. {hint}", 1)
        return _fail(
            name,
            f"{error}. Install the missing package: pip install -r requirements.txt in a checkout, else the extra train",
            1,
        )
    if isinstance(error, (MemoryError, OSError)):
        return _fail(name, str(error) or type(error).__name__, 1)
    if isinstance(error, KeyboardInterrupt):
        print(file=sys.stderr)  # after the terminal's ^C
        return _fail(name, ". ".join(["stopped", *map(str, error.args)]), signals.exit_code(error))
    raise error


def message(error, most_details=MOST_DETAILS):
    """The text that a command prints for a `UserError`: with its hint, or without one with the flag of its argument."""
    if not error.details:
        if error.hint:
            return f"{error.summary}. {error.hint}"
        is_flag = error.argument is not None and error.argument not in POSITIONAL
        return f"{error.summary} (--{error.argument.replace('_', '-')})" if is_flag else error.summary
    lines = [error.summary, *(f"  {detail}" for detail in error.details[:most_details])]
    if len(error.details) > most_details:
        lines.append(f"  and {len(error.details) - most_details} more")
    return "\n".join([*lines, *([error.hint] if error.hint else [])])


def parse_images(arguments_type, argv, **settings):
    """Parses the flags of a command whose last positional argument, `images`, takes any number of paths.

    Args:
        arguments_type: a dataclass with a field `images`, a tuple of paths.
        argv: the arguments.
        settings: further arguments of `tyro.cli`.

    Raises:
        SystemExit: by tyro, for invalid flags and for `--help`.
    """
    import tyro

    arguments, rest = tyro.cli(arguments_type, args=argv, return_unknown_args=True, **settings)
    if any(word.startswith("-") and word != "-" for word in rest):
        return tyro.cli(arguments_type, args=argv, **settings)  # exits, and names the unknown flag
    # With images on both sides of a flag, tyro takes those before it, and `rest` has those after it.
    return dataclasses.replace(arguments, images=(*arguments.images, *map(Path, rest)))


@contextlib.contextmanager
def resumable(name, argv, again=None):
    """If Ctrl-C, SIGTERM or an error of the operating system ends the block, adds the command that resumes the work.

    Args:
        name: the command.
        argv: its arguments.
        again: the arguments that resume the work; defaults to `argv` with --resume.
    """
    if again is None:
        again = [*argv, *([] if "--resume" in argv else ["--resume"])]
    command = shlex.join([*_program(name, argv), *again])
    if os.environ.get("KERAS_BACKEND") == "jax" and PROGRAM not in os.environ:  # the command may have been given it alone
        command = f"KERAS_BACKEND=jax {command}"
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise RunError(f"{error}; finished epochs are kept", hint=f"Once this is fixed, resume with: {command}") from error
    except KeyboardInterrupt as stop:
        raise type(stop)(f"Finished epochs are kept. To resume: {command}") from stop


def _program(name, argv):
    """The words that the user typed before `argv`, or else `cvt-keras` and the command's name."""
    if program := os.environ.get(PROGRAM):
        return shlex.split(program)
    script = sys.orig_argv[: len(sys.orig_argv) - len(argv)]
    if sys.orig_argv[len(script) :] == argv and Path(sys.argv[0]).name != "cvt-keras":
        return script  # such as python3.11 train.py
    return ["cvt-keras", name]


def _help():
    width = max(map(len, COMMANDS))
    rows = [f"  {name:{width}}  {command.purpose}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: cvt-keras COMMAND ...",
            "",
            "CvT, the convolutional vision transformer, for Keras 3.",
            "",
            *rows,
            "",
            "Run cvt-keras COMMAND --help for its arguments, or cvt-keras --version.",
        ]
    )


def _fail(name, text, code):
    print(f"cvt-keras {name}: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
