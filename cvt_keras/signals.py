"""Ctrl-C and SIGTERM: what they end a command with, and when."""

import contextlib
import os
import signal
import threading


class Terminated(KeyboardInterrupt):
    """SIGTERM, ended like Ctrl-C."""


def raise_on_sigterm():
    """SIGTERM raises `Terminated` from here on."""
    signal.signal(signal.SIGTERM, _terminate)


def exit_code(stop):
    """The exit code of a command that a `KeyboardInterrupt` ended."""
    return 143 if isinstance(stop, Terminated) else 130


def _terminate(number, frame):
    raise Terminated


class Held:
    """Holds Ctrl-C and SIGTERM back during the block: raised in the midst of TensorFlow's work they can crash it.

    What answered the signals before does so when the block ends or calls `answer`, or at once if a second one comes. Without
    effect outside the main thread, which alone hears signals.

    Args:
        until: what is waited for, for the line that tells it: "this step".
    """

    def __init__(self, until):
        self.until = until

    def __enter__(self):
        self._answers, self._received = {}, None
        if threading.current_thread() is threading.main_thread():
            # What Python does not answer, as SIGTERM by default, ends the process without a word to anyone.
            heard = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
            self._answers = {number: answer for number, answer in heard.items() if callable(answer)}
        for number in self._answers:
            signal.signal(number, self._hold)
        return self

    def __exit__(self, kind, error, traceback):
        for number, answer in self._answers.items():
            signal.signal(number, answer)
        if kind is None:
            self.answer()

    def answer(self):
        """Lets what was held back strike."""
        if self._received is not None:
            self._answers[self._received](self._received, None)
            self._received = None  # not before: where it strikes in a garbage collector's callback, what it raises is lost

    def _hold(self, number, frame):
        if self._received is not None:
            self.answer()
        self._received = number
        with contextlib.suppress(OSError):  # Ctrl-C ends the reader of a pipe too
            os.write(2, f"\nstopping after {self.until}; once more stops at once\n".encode())
