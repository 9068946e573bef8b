"""Hides the messages that TensorFlow writes to standard error at every start.

TensorFlow's C++ code writes to file descriptor 2, not to `sys.stderr`, so that descriptor is redirected. A separate process
filters it, and shows all messages if TensorFlow aborts. That process can import the standard library only.
"""

import contextlib
import os
import re
import subprocess
import sys

GREETINGS = re.compile(
    r"WARNING: All log messages before absl::InitializeLog\(\) is called are written to STDERR"
    r"|[IWE]\d{4} .*(?:"
    r"port\.cc:\d+\] oneDNN custom operations are on"
    r"|cudart_stub\.cc:\d+\] Could not find cuda drivers on your machine"
    r"|cuda_platform\.cc:\d+\] failed call to cuInit"
    r"|cpu_feature_guard\.cc:\d+\] This TensorFlow binary is optimized"
    r"|Unable to register cu\w+ factory"
    r"|computation placer already registered"
    r"|util\.cc:\d+\] oneDNN supports DT_UINT8 only)"
    r"|INFO: Created TensorFlow Lite XNNPACK delegate"
    r"|To enable the following instructions: .* rebuild TensorFlow"
)
_SUCCESS = b"\0"  # the last line if the block did not raise
_SECONDS = 5  # to wait for the last lines to be shown


@contextlib.contextmanager
def held_back():
    """Hides `GREETINGS` on file descriptor 2 during the block. If the block raises, shows them at its end."""
    try:
        stderr = os.dup(2)
    except OSError:  # there is no standard error
        yield
        return
    # With -I and -S, Python starts in 10 ms.
    command = [sys.executable, "-I", "-S", __file__]
    watcher = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stderr, stderr=stderr, start_new_session=True)
    os.dup2(watcher.stdin.fileno(), 2)
    try:
        yield
        os.write(2, _SUCCESS + b"\n")
    finally:
        if sys.stderr is not None:
            sys.stderr.flush()
        os.dup2(stderr, 2)
        os.close(stderr)
        watcher.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            watcher.wait(_SECONDS)


def _watch(lines, shown):
    """Shows lines at once, except greetings. Shows these at the end unless the last line is `_SUCCESS`."""
    greetings = []
    for line in lines:
        if line.rstrip() == _SUCCESS:
            return
        if GREETINGS.match(line.decode(errors="replace")):
            greetings.append(line)
        else:
            shown.write(line)
            shown.flush()
    shown.writelines(greetings)
    shown.flush()


if __name__ == "__main__":
    _watch(sys.stdin.buffer, sys.stdout.buffer)
