"""What a figure was measured on: device and versions."""

import importlib.metadata
import os
import platform
import subprocess
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


def has_nvidia_device(dev=Path("/dev")):
    """Whether this machine has an NVIDIA device, seen by a framework or not."""
    if any(dev.glob("nvidia[0-9]*")):
        return True
    try:  # Windows' Linux has no such file, but the driver's tool
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return "GPU" in listed.stdout


def versions():
    """The versions of Python and of what computes, where it is installed."""
    found = {"python": platform.python_version()}
    for package in ("keras", "tensorflow", "jax", "jaxlib", "tensorflow-datasets", "scikit-learn", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found
