"""The device, the installed packages, and the start of Keras and TensorFlow."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

from cvt_keras import greetings
from cvt_keras.errors import ArgumentError, MissingPackageError


def start(backend="tensorflow"):
    """Imports Keras and its backend for a command, and hides TensorFlow's start-up messages.

    Args:
        backend: the Keras backend that the command needs; `None` means any.

    Raises:
        MissingPackageError: if Keras or its backend is not installed.
        ArgumentError: if `KERAS_BACKEND` names another backend, or one that does not exist.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # INFO messages would break the progress bar
    try:
        with greetings.held_back():
            import keras

            if keras.config.backend() == "tensorflow":
                import tensorflow as tf

                tf.config.list_physical_devices()
    except ImportError as error:
        raise MissingPackageError(
            f"Keras can't be imported: {error}", hint="Install it with pip install keras tensorflow"
        ) from error
    except ValueError as error:  # by Keras, for an unknown backend
        raise ArgumentError(f"Keras can't start: {error}", hint="Unset KERAS_BACKEND") from error
    if backend is not None:
        require_backend(backend)


def require_backend(backend):
    """Raises unless Keras runs on this backend.

    Args:
        backend: the name of a Keras backend, such as `"tensorflow"`.

    Raises:
        ArgumentError: if Keras runs on another.
    """
    import keras

    if keras.config.backend() != backend:
        raise ArgumentError(
            f"Keras must use the {backend} backend. Received: {keras.config.backend()}, from KERAS_BACKEND or keras.json",
            hint=f"Set KERAS_BACKEND={backend}",
        )


def cpu():
    """The name of the processor, and the number of cores that this process may use."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux
    return f"{name}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"


def device():
    """The name of the device that TensorFlow trains on."""
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        return cpu()
    return tf.config.experimental.get_device_details(gpus[0]).get("device_name", "GPU")


def has_nvidia_device(dev=Path("/dev")):
    """Whether this machine has an NVIDIA device, even one that TensorFlow can't use."""
    if any(dev.glob("nvidia[0-9]*")):
        return True
    try:  # WSL has no such file, but has nvidia-smi
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return "GPU" in listed.stdout


def versions():
    """The versions of Python and of the installed packages that results depend on."""
    installed = {"python": platform.python_version()}
    for package in ("keras", "tensorflow", "jax", "jaxlib", "tensorflow-datasets", "scikit-learn", "numpy"):
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return installed
