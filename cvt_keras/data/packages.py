"""The packages that images come through: imported when a data set needs them, and what their errors say."""

import importlib
import re
import textwrap

from cvt_keras.errors import UnavailableError


def require(module, packages=None):
    """Imports a module.

    Args:
        module: its name.
        packages: what pip installs it by; defaults to `module`.

    Raises:
        UnavailableError: if it can't be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnavailableError(
            f"{module} can't be imported: {error}", hint=f"Install what is missing: pip install {packages or module}"
        ) from error


def is_out_of_memory(error):
    """Whether `error` is Python's MemoryError or TensorFlow's, which is told by its name so as not to import TensorFlow."""
    return isinstance(error, MemoryError) or type(error).__name__ == "ResourceExhaustedError"


def reason(error):
    """The first line of an error of TensorFlow or TFDS that is not about where in their code it was raised.

    They keep what went wrong in the text alone, in the middle of names of nodes, lists of configs and traces.
    """
    around = r"\{\{.*?\}\}|\[Op:.*?\].*|Failed to construct dataset .*?\}\": |Here are \d+ BuilderConfigs.*"
    text = re.sub(around, "", str(error)).strip()
    [first, *rest] = (text or type(error).__name__).splitlines()
    if first.endswith(":"):  # the point comes after it
        first = textwrap.shorten(" ".join([first, *rest]), 300, placeholder=" ...")
    return first.rstrip(".: ")
