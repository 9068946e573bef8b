"""Reads the errors of TensorFlow and TFDS, without importing TensorFlow."""

import re
import textwrap


def is_out_of_memory(error):
    """Whether `error` is Python's MemoryError or TensorFlow's ResourceExhaustedError."""
    return isinstance(error, MemoryError) or type(error).__name__ == "ResourceExhaustedError"


def reason(error):
    """The line of an error of TensorFlow or TFDS that says what went wrong.

    Their messages surround it by names of graph nodes, lists of configs and traces.
    """
    noise = r"\{\{.*?\}\}|\[Op:.*?\].*|Failed to construct dataset .*?\}\": |Here are \d+ BuilderConfigs.*"
    text = re.sub(noise, "", str(error)).strip()
    [first, *rest] = (text or type(error).__name__).splitlines()
    if first.endswith(":"):  # the reason is in the next line
        first = textwrap.shorten(" ".join([first, *rest]), 300, placeholder=" ...")
    return first.rstrip(".: ")
