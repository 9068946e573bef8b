"""Ctrl-C and SIGTERM: exit codes, and signals that wait for the end of a step."""

import contextlib
import os
import signal
import threading


class Terminated(KeyboardInterrupt):
    """Raised by SIGTERM, and handled like Ctrl-C."""


def raise_on_sigterm():
    """Makes SIGTERM raise `Terminated`."""
    signal.signal(signal.SIGTERM, _terminate)


def exit_code(stop):
    """The exit code of a command that ended with a `KeyboardInterrupt`."""
    return 143 if isinstance(stop, Terminated) else 130


def _terminate(number, frame):
    while frame is not None:
        if frame.f_code.co_name == "_xla_gc_callback":  # Python drops what is raised in JAX's callback of the garbage collector
            threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
            return
        frame = frame.f_back
    raise Terminated


class Held:
    """Delays Ctrl-C and SIGTERM during the block, as an exception inside TensorFlow's work can crash the process.

    The previous handlers are called when the block ends or calls `answer`, or at once by a second signal. Outside the main
    thread, which receives no signals, this does nothing.

    Args:
        until: what the signal waits for, for the message: "this step".
    """

    def __init__(self, until):
        self.until = until

    def __enter__(self):
        self._handlers, self._received = {}, None
        if threading.current_thread() is threading.main_thread():
            # A signal without a Python handler, such as SIGTERM by default, keeps its effect.
            handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
            self._handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
        for number in self._handlers:
            signal.signal(number, self._hold)
        return self

    def __exit__(self, kind, error, traceback):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if kind is None:
            self.answer()

    def answer(self):
        """Calls the previous handler, if a signal was received."""
        if self._received is not None:
            self._handlers[self._received](self._received, None)
            # Only after the handler: an exception that it raises inside a garbage collector's callback is lost, and the next
            # call must raise again.
            self._received = None

    def _hold(self, number, frame):
        if self._received is not None:
            self.answer()
        self._received = number
        with contextlib.suppress(OSError):  # Ctrl-C also ends the program at the other end of a pipe
            os.write(2, f"\nstopping after {self.until}; a second signal (Ctrl-C) stops at once\n".encode())
