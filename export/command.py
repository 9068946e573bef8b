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
    return fail(name, "stopped", 143 if isinstance(stop, Terminated) else 130)


def fail(name, message, code):
    """Says on a line of its own what is wrong -> `code`."""
    print(f"\n{name}: {message}", file=sys.stderr)
    return code


def _terminate(number, frame):
    raise Terminated
