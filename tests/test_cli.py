"""The table of commands, their exit codes, and their imports before the flags are parsed."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import cvt_keras
from cvt_keras import cli
from cvt_keras.errors import ArgumentError, CheckpointError, UserError
from cvt_keras.signals import Terminated

ROOT = Path(__file__).parent.parent
HEAVY = ("keras", "tensorflow", "jax", "torch", "matplotlib", "sklearn", "tensorflow_datasets", "keras_tuner")


@pytest.fixture
def command(monkeypatch):
    """A function that replaces the `main` of the commands."""

    def replace(main):
        monkeypatch.setattr(cli.importlib, "import_module", lambda name: SimpleNamespace(main=main))

    return replace


def _raise(error):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    "error, code, printed",
    [
        (UserError("it failed"), 1, "it failed"),
        (UserError("it failed", hint="Give --x"), 1, "it failed. Give --x"),
        (ArgumentError("`x_y` must be 1", argument="x_y"), 2, "`x_y` must be 1 (--x-y)"),
        (ArgumentError("`x` must be 1", argument="x", hint="Give --x 1"), 2, "`x` must be 1. Give --x 1"),
        (ArgumentError("`run` must be a run", argument="run"), 2, "`run` must be a run"),  # `run` has no flag
        (
            ImportError("No foo"),
            1,
            "No foo. Install the missing package: pip install -r requirements.txt in a checkout, else the extra train",
        ),
        (OSError(28, "No space left"), 1, "[Errno 28] No space left"),
        (MemoryError(), 1, "MemoryError"),
        (KeyboardInterrupt(), 130, "stopped"),
        (KeyboardInterrupt("To resume: x"), 130, "stopped. To resume: x"),
        (Terminated(), 143, "stopped"),
    ],
)
def test_an_error_is_one_line_and_its_exit_code(error, code, printed, command, capsys):
    command(_raise(error))
    assert cli.main(["train"]) == code
    assert capsys.readouterr().err.strip() == f"cvt-keras train: {printed}"


def test_an_unexpected_error_is_not_hidden(command):
    command(_raise(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["train"])


def test_the_return_value_of_a_command_is_the_exit_code(command):
    for returned, code in ((None, 0), (0, 0), (1, 1)):
        command(lambda argv, returned=returned: returned)
        assert cli.main(["train"]) == code


def test_a_command_receives_its_arguments(command):
    received = []
    command(lambda argv: received.append(argv))
    cli.main(["train", "smoke", "--seed", "1"])
    cli.main(["qat", "runs/x"])
    assert received == [["smoke", "--seed", "1"], ["qat", "runs/x"]]


def test_the_first_faults_are_printed_and_by_convert_all(command, capsys):
    command(_raise(CheckpointError("it does not fit", details=[f"missing: {i}" for i in range(30)], hint="See more")))
    assert cli.main(["train"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "cvt-keras train: it does not fit"
    assert lines[1] == "  missing: 0"
    assert lines[10:] == ["  missing: 9", "  and 20 more", "See more"]
    assert cli.main(["convert"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 32


def test_help_lists_the_commands(capsys):
    for argv in ([], ["--help"]):
        assert cli.main(argv) == 0
        printed = capsys.readouterr().out
        assert all(f"  {name} " in printed for name in cli.COMMANDS)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == cvt_keras.__version__


def test_an_unknown_command_is_refused_with_a_list_of_commands(capsys):
    assert cli.main(["predikt"]) == 2
    message = capsys.readouterr().err
    assert "predikt" in message and "export" in message


@pytest.mark.parametrize("typed", ["cvt-keras train smoke --epochs 3", "cvt-keras train smoke --epochs 3 --resume"])
def test_resumable_names_the_command_that_resumes(typed):
    argv = typed.split()[2:]
    with pytest.raises(KeyboardInterrupt) as stop, cli.resumable("train", argv):
        raise Terminated
    assert isinstance(stop.value, Terminated)
    assert stop.value.args[0].endswith(f"cvt-keras train smoke --epochs 3{' --resume'}")
    with pytest.raises(UserError) as error, cli.resumable("train", argv):
        raise OSError("disk full")
    assert "finished epochs are kept" in error.value.summary
    assert error.value.hint.count("--resume") == 1
    with pytest.raises(ArgumentError, match="wrong"), cli.resumable("train", argv):
        raise ArgumentError("wrong")


# In one process all commands show their help and reject a flag. After that nothing heavy may be imported.
LIGHT = """
import contextlib, io, sys
from cvt_keras import cli
for name in cli.COMMANDS:
    for argv in ([name, "--help"], [name, "--no-such-flag"]):
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
            try:
                code = cli.main(argv)
            except SystemExit as stop:
                code = stop.code
        assert code == (0 if argv[1] == "--help" else 2), (argv, code)
        assert argv[1] != "--help" or "usage: cvt-keras " + name in out.getvalue(), out.getvalue()
assert cli.main(["train", "no-such-recipe"]) == 2
imported = set(sys.argv[1:]) & set(sys.modules)
assert not imported, imported
"""


def test_help_and_wrong_flags_import_neither_keras_nor_tensorflow(tmp_path):
    done = subprocess.run([sys.executable, "-c", LIGHT, *HEAVY], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# In one process, as `python train.py --help` and `python -m MODULE --help` run them.
CHECKOUT = """
import contextlib, io, runpy, sys
for command in ("train.py", "cvt_keras.training", "cvt_keras.pretrained", "cvt_keras.search", "cvt_keras.compression prune",
                "cvt_keras.predict", "export", "export.web", "export.serving.client"):
    name, *arguments = command.split()
    sys.argv = [name, *arguments, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            run = runpy.run_path if name.endswith(".py") else runpy.run_module
            run(name, run_name="__main__", **({} if name.endswith(".py") else {"alter_sys": True}))
            code = None
        except SystemExit as stop:
            code = stop.code
    assert code == 0 and out.getvalue().startswith("usage: cvt-keras "), (command, code, out.getvalue())
"""


def test_the_commands_of_a_checkout_work():
    done = subprocess.run([sys.executable, "-c", CHECKOUT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
