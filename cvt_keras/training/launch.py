"""The command `cvt-keras launch`: starts a training by several processes on this machine, and ends all if one dies."""

import contextlib
import ctypes
import dataclasses
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro

from cvt_keras import cli, environment
from cvt_keras.errors import ArgumentError, DistributedError
from cvt_keras.training import __main__ as train
from cvt_keras.training.distributed import COORDINATOR, LOST, PROCESS_ID, PROCESSES

POLL_SECONDS = 0.2
OTHERS_SECONDS = 3.0  # after the end of one process, to see which others end by themselves
STOP_SECONDS = 15.0  # after SIGTERM, before a process is killed: it finishes its step
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_LAST_LINES = 15  # of a dead process's output that are shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    processes: int
    """Number of processes. On a machine with NVIDIA GPUs, it must divide their number."""
    restarts: int = 0
    """How often to resume after the last finished epoch if a process dies."""


def parse(argv):
    """Reads the command line.

    Returns:
        `Arguments`, and the arguments of `cvt-keras train`.

    Raises:
        ArgumentError: if a value is wrong, or no command `train` follows.
        What `training.__main__.parse` raises.
    """
    if "--" not in argv and "train" in argv:
        raise ArgumentError("`--` must come before `train`", hint="Use cvt-keras launch --processes N -- train ...")
    if (backend := os.environ.get("KERAS_BACKEND", "jax")) != "jax":
        raise ArgumentError(
            f"Keras must use the jax backend for several processes. Received: KERAS_BACKEND={backend}",
            hint="Unset KERAS_BACKEND: launch sets it",
        )
    at = argv.index("--") if "--" in argv else len(argv)
    own, command = argv[:at], argv[at + 1 :]
    arguments = tyro.cli(
        Arguments,
        prog="cvt-keras launch",
        description="Train by several processes on this machine, on JAX: cvt-keras launch --processes N -- train ...",
        args=own,
    )
    for name, least in (("processes", 1), ("restarts", 0)):
        if getattr(arguments, name) < least:
            raise ArgumentError(
                f"`{name}` must be at least {least}. Received: {name}={getattr(arguments, name)}", argument=name
            )
    if command[:1] != ["train"]:
        received = f"-- {command[0]}" if command else "no command"
        raise ArgumentError(
            f"a command `train` must follow. Received: {received}", hint="Use cvt-keras launch --processes N -- train ..."
        )
    _, settings = train.parse(command[1:])
    for name in ("coordinator", "processes", "process_id"):
        if getattr(settings, name) is not None:
            raise ArgumentError(
                f"`{name}` is set by launch. Received: {name}={getattr(settings, name)}",
                argument=name,
                hint=f"Leave out --{name.replace('_', '-')} after `-- train`",
            )
    return arguments, command[1:]


def main(argv):
    arguments, train_argv = parse(argv)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # ignored under nohup
        signal.signal(signal.SIGHUP, signal.getsignal(signal.SIGTERM))  # a closed terminal ends all processes
    program = ["cvt-keras", "launch", *argv[: argv.index("--")], "--", "train"]
    devices = devices_of_processes(arguments.processes, environment.count_nvidia_devices())
    for restart in range(arguments.restarts + 1):
        failure = run(arguments.processes, devices, train_argv, program)
        if failure is None:
            return 0
        if "--resume" not in train_argv:
            train_argv = [*train_argv, "--resume"]
        if failure.exit_code == 2 or restart == arguments.restarts:
            break
        print(f"cvt-keras launch: {cli.message(failure)}", file=sys.stderr, flush=True)
        print(f"restart {restart + 1} of {arguments.restarts}: resuming after the last finished epoch", flush=True)
    raise failure


def devices_of_processes(processes, gpus):
    """The GPUs of each process: values of `JAX_LOCAL_DEVICE_IDS`, or `None` without GPUs.

    Raises:
        ArgumentError: if they can't be divided evenly.
    """
    if not gpus:
        return None
    if gpus % processes:
        raise ArgumentError(
            f"`processes` must divide {gpus}, the number of GPUs. Received: processes={processes}", argument="processes"
        )
    each = gpus // processes
    return [",".join(str(i * each + j) for j in range(each)) for i in range(processes)]


def run(processes, devices, train_argv, program):
    """Runs a training, and waits for its end. Ends all processes if one dies or a signal arrives.

    Args:
        processes: their number.
        devices: as `devices_of_processes` returns.
        train_argv: arguments of `cvt-keras train`.
        program: the words before them, for the command that resumes.

    Returns:
        `None`, or the `DistributedError` that says which process died and why.
    """
    with tempfile.TemporaryDirectory(prefix="cvt-keras-launch-") as logs, contextlib.ExitStack() as files:
        variables = {
            "KERAS_BACKEND": "jax",
            **os.environ,
            COORDINATOR: f"127.0.0.1:{_free_port()}",
            PROCESSES: str(processes),
            cli.PROGRAM: shlex.join(program),
        }
        started = []
        try:
            for i in range(processes):
                output = None
                if i:  # the first one shows its progress
                    output = files.enter_context(open(Path(logs) / str(i), "wb"))
                own = {**variables, PROCESS_ID: str(i), **({"JAX_LOCAL_DEVICE_IDS": devices[i]} if devices else {})}
                command = [sys.executable, "-m", "cvt_keras.cli", "train", *train_argv]
                # A session of its own: Ctrl-C reaches this process alone, which ends all.
                options = {"start_new_session": True, "preexec_fn": _end_with_parent}
                started.append(subprocess.Popen(command, env=own, stdout=output, stderr=output, **options))
            if not _wait(started):
                return None
            _see_others_end(started)
            again = train_argv if "--resume" in train_argv else [*train_argv, "--resume"]
            outputs = [_read(Path(logs) / str(i)) for i in range(processes)]
            return _failure(started, outputs, shlex.join([*program, *again]))
        finally:
            _end(started)


def _end_with_parent():
    """Asks Linux to end this process if its parent is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait(started):
    """Waits until one process fails, or all end. Returns whether one failed."""
    while True:
        codes = [process.poll() for process in started]
        if any(codes):
            return True
        if None not in codes:
            return False
        time.sleep(POLL_SECONDS)


def _see_others_end(started):
    deadline = time.monotonic() + OTHERS_SECONDS
    while time.monotonic() < deadline and any(process.poll() is None for process in started):
        time.sleep(POLL_SECONDS)


def _failure(started, outputs, resume):
    """The error for a training whose processes ended: that of the process that failed first, as far as one can tell.

    Args:
        started: the processes.
        outputs: what each printed, as text; that of process 0 is empty.
        resume: the command that resumes the training.
    """
    codes = {i: process.returncode for i, process in enumerate(started) if process.returncode}
    killed = [i for i, code in codes.items() if code < 0 and code != -signal.SIGABRT]
    # A process that lost another one aborts, or says so. What process 0 says is on the terminal.
    own_fault = [i for i, code in codes.items() if i and code > 0 and LOST not in outputs[i]]
    agreed = [i for i, code in codes.items() if code == 2]  # all say the same
    dead = [*killed, *agreed, *own_fault, *codes][0]
    code = codes[dead]
    if code == -signal.SIGKILL:
        reason = "was killed by SIGKILL, which the system also sends if the memory does not suffice"
    elif code < 0:
        reason = f"was ended by {signal.Signals(-code).name}"
    else:
        reason = f"ended with exit code {code}"
    lines = [line for line in outputs[dead].splitlines() if line.strip()][-_LAST_LINES:]
    # A process that ended by itself has said what to do.
    hint = f"Finished epochs are kept. To resume: {resume}" if code < 0 else None
    error = DistributedError(f"process {dead} of {len(started)} {reason}", details=lines, hint=hint)
    error.exit_code = code if code > 0 else 1
    return error


def _end(started):
    """Ends the processes that still run: by SIGTERM, later by SIGKILL."""
    try:
        for process in started:
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        while time.monotonic() < deadline and any(process.poll() is None for process in started):
            time.sleep(POLL_SECONDS)
    finally:  # also after a second Ctrl-C
        for process in started:
            if process.poll() is None:
                process.kill()
            process.wait()


def _read(path):
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(cli.run("launch", sys.argv[1:]))
