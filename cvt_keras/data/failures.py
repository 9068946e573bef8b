"""What the errors of TensorFlow and TFDS say. TensorFlow is not imported for it."""

import re
import textwrap


def is_out_of_memory(error):
    """Whether `error` is Python's MemoryError or TensorFlow's, which is known by its name, without an import."""
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
