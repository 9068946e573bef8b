"""What commands share that write to a terminal."""

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


def progress(n, description=None, stream=None, shown=True):
    """A bar that counts images, on a terminal only, and disappears when it is full.

    Args:
        n: the number of images.
        description: what is done to them; optional.
        stream: defaults to standard output.
        shown: `False` hides the bar on a terminal too, for instance if there are few images.

    Returns:
        A `tqdm` bar, which is a context manager.
    """
    from tqdm import tqdm  # imported here to keep --help fast

    disable = None if shown else True  # None: except on a terminal
    return tqdm(total=n, desc=description, unit=" images", leave=False, disable=disable, file=stream or sys.stdout)


def discard_output():
    """Discards the rest of standard output, whose reader has closed it, as `head` does. Else Python fails at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
