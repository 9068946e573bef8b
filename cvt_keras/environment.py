"""What a figure was measured on: device and versions."""

import importlib.metadata
import os
import platform
from pathlib import Path


def cpu():
    """The processor's name and the number of cores this process may use."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux
    return f"{name}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"


def versions():
    """The versions of Python and of what computes, where it is installed."""
    found = {"python": platform.python_version()}
    for package in ("keras", "tensorflow", "jax", "jaxlib", "tensorflow-datasets", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found
