"""What commands that print a line per file share."""

import os
import stat
import sys


def one_line(name):
    """Escapes tabs and line breaks in a file's or a class's name, so that it stays in its column and line."""
    return str(name).translate({ord(character): repr(character)[1:-1] for character in "\t\n\r"})


def is_file(stream):
    """Whether a stream writes to a file, not to a terminal or through a pipe."""
    try:
        return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except OSError:  # the stream has no file
        return False


def discard_output():
    """Discards the rest of standard output, whose reader has closed it, as `head` does. Else Python fails at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
