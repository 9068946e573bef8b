"""How a command ends that does without Keras: by signals as in cvt_keras.signals, which comes with Keras and its seconds."""

import signal
import sys


class Terminated(KeyboardInterrupt):
    """SIGTERM, ended like Ctrl-C."""


def raise_on_sigterm():
    """SIGTERM raises `Terminated` from here on."""
    signal.signal(signal.SIGTERM, _terminate)


def stopped(name, stop):
    """Says that a `KeyboardInterrupt` ended the command -> its exit code."""
    print(file=sys.stderr)  # a terminal has written ^C
    return fail(name, "stopped", 143 if isinstance(stop, Terminated) else 130)


def fail(name, message, code):
    """Says in a line what is wrong -> `code`."""
    print(f"{name}: {message}", file=sys.stderr)
    return code


def _terminate(number, frame):
    raise Terminated
