"""The command `cvt-keras`: a table from a name to a module, and how every command ends.

A command's module has `parse(argv)`, which returns the checked arguments, and `main(argv)`, which does the work or raises.
It is imported when its command is called, and imports Keras and TensorFlow after reading the flags, so that `--help` is fast.

Exit codes:
    0: done.
    1: it failed; one line says why, and what to do.
    2: a wrong argument.
    130, 143: stopped by Ctrl-C, by SIGTERM.
"""

import contextlib
import importlib
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

from cvt_keras import signals
from cvt_keras.errors import RunError, UserError

MOST_DETAILS = 10  # shown of the many faults that an error may have
# Arguments that a command takes without a flag. Each other argument is a flag of its name.
POSITIONAL = {"RECIPE", "run", "source", "out", "images"}


class Command(NamedTuple):
    module: str
    purpose: str
    before: tuple[str, ...] = ()  # words that the module's `main` is given before the user's


COMMANDS = {
    "train": Command("cvt_keras.training.__main__", "Train a network by a recipe, and write a run folder"),
    "search": Command("cvt_keras.search.__main__", "Search for a good recipe with keras-tuner"),
    "prune": Command("cvt_keras.compression.__main__", "Set a run's smallest weights to zero", ("prune",)),
    "cluster": Command("cvt_keras.compression.__main__", "Give each kernel of a run a few values", ("cluster",)),
    "qat": Command("cvt_keras.compression.__main__", "Train a run further with the rounding of int8", ("qat",)),
    "export": Command("cvt_keras.export.__main__", "Write a run as SavedModel and TFLite, and verify each file"),
    "convert": Command("cvt_keras.pretrained", "Convert published PyTorch weights to a .keras file"),
    "classify": Command("cvt_keras.export.serving.client", "Ask TF Serving what images show"),
    "web": Command("cvt_keras.export.web.__main__", "Classify images in the browser with an exported run"),
}


def main(argv=None):
    """Runs a command line.

    Args:
        argv: the words after `cvt-keras`; `None` means those of this process.

    Returns:
        The exit code.

    Raises:
        SystemExit: by tyro, for flags that it refuses and for `--help`.
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
        print(f"cvt-keras: there is no command {argv[0]}. Choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return run(argv[0], argv[1:])


def run(name, argv):
    """Runs the command `name` with the words after it, and turns what it raises into an exit code."""
    command = COMMANDS[name]
    try:
        signals.raise_on_sigterm()
        module = importlib.import_module(command.module)
        return module.main([*command.before, *argv]) or 0
    except UserError as error:
        # To convert a checkpoint is also how to see all that is wrong with it.
        most_details = len(error.details) if name == "convert" else MOST_DETAILS
        return _fail(name, message(error, most_details), error.exit_code)
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "cvt_keras":
            hint = "Install the package with pip install -r requirements.txt, or pip install -e . in a checkout"
            return _fail(name, f"{error}. {hint}", 1)
        return _fail(name, f"{error}. Install what is missing: the extra `train` of cvt-keras, or requirements.txt", 1)
    except (MemoryError, OSError) as error:
        return _fail(name, str(error) or type(error).__name__, 1)
    except KeyboardInterrupt as stop:
        print(file=sys.stderr)  # the terminal has written ^C
        return _fail(name, ". ".join(["stopped", *map(str, stop.args)]), signals.exit_code(stop))


def message(error, most_details=MOST_DETAILS):
    """What a command prints of a `UserError`: with its hint, or else with the flag of the argument at fault."""
    if not error.details:
        if error.hint:
            return f"{error.summary}. {error.hint}"
        is_flag = error.argument is not None and error.argument not in POSITIONAL
        return f"{error.summary} (--{error.argument.replace('_', '-')})" if is_flag else error.summary
    lines = [error.summary, *(f"  {detail}" for detail in error.details[:most_details])]
    if len(error.details) > most_details:
        lines.append(f"  and {len(error.details) - most_details} more")
    return "\n".join([*lines, *([error.hint] if error.hint else [])])


@contextlib.contextmanager
def resumable(name, argv, again=None):
    """Adds to what ends the block how to resume the work: to Ctrl-C and SIGTERM, and to a full disk and its like.

    Args:
        name: the command's.
        argv: the words after it.
        again: the words after it that resume the work; by default `argv` with --resume.
    """
    if again is None:
        again = [*argv, *([] if "--resume" in argv else ["--resume"])]
    again = shlex.join([*_program(name, argv), *again])
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise RunError(f"{error}; finished epochs are kept", hint=f"To resume once that is mended: {again}") from error
    except KeyboardInterrupt as stop:
        raise type(stop)(f"Finished epochs are kept. To resume: {again}") from stop


def _program(name, argv):
    """The words that were typed before `argv`, or words that start the same command."""
    script = sys.orig_argv[: len(sys.orig_argv) - len(argv)]
    if sys.orig_argv[len(script) :] == argv and Path(sys.argv[0]).name != "cvt-keras":
        return script  # python train.py, by whichever Python
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
            "cvt-keras COMMAND --help shows its arguments, cvt-keras --version the version.",
        ]
    )


def _fail(name, text, code):
    print(f"cvt-keras {name}: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
