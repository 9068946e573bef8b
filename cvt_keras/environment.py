"""The backend of Keras, its devices and errors, and the installed packages.

What differs between TensorFlow and JAX is here. On JAX, TensorFlow only reads and augments images, on the CPU.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
from pathlib import Path

from cvt_keras import greetings
from cvt_keras.errors import ArgumentError, MissingPackageError

TRAINING_BACKENDS = ("tensorflow", "jax")


def start(*backends):
    """Imports Keras and its backend for a command, and hides TensorFlow's start-up messages.

    Args:
        backends: the Keras backends that the command can use; without any, it can use all.

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
            elif backends:  # a command that needs no backend in particular may not need TensorFlow either
                keep_tensorflow_on_cpu()
    except ImportError as error:
        raise MissingPackageError(
            f"Keras can't be imported: {error}",
            hint=f"Install it with pip install keras {_packages(os.environ.get('KERAS_BACKEND'))}",
        ) from error
    except ValueError as error:  # by Keras, for an unknown backend
        raise ArgumentError(f"Keras can't start: {error}", hint="Unset KERAS_BACKEND") from error
    if backends:
        require_backend(*backends)


def _packages(backend):
    return {"jax": "jax tensorflow"}.get(backend, backend or "tensorflow")  # TensorFlow reads the images for JAX


def backend():
    """The name of the backend of Keras, such as `"tensorflow"`."""
    import keras

    return keras.config.backend()


def require_backend(*backends):
    """Raises unless Keras runs on one of these backends.

    Args:
        backends: names of Keras backends, such as `"tensorflow"`.

    Raises:
        ArgumentError: if Keras runs on another.
    """
    if backend() not in backends:
        raise ArgumentError(
            f"Keras must use the {' or '.join(backends)} backend here. Received: {backend()}, from KERAS_BACKEND or keras.json",
            hint=f"Set KERAS_BACKEND={backends[0]}",
        )


def keep_tensorflow_on_cpu():
    """Hides the GPUs from TensorFlow, which would reserve most of their memory, unless it is the backend."""
    if backend() != "tensorflow":
        _hide_gpus_from_tensorflow()


def _hide_gpus_from_tensorflow():
    with contextlib.suppress(ImportError, RuntimeError):  # not installed, or it has used its devices before
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")


def cpu():
    """The name of the processor, and the number of cores that this process may use."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux
    return f"{name}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"


def hide_gpus():
    """Makes this process use no GPU. Must come before the backend starts its devices."""
    if backend() == "jax":
        import jax

        jax.config.update("jax_platforms", "cpu")
    _hide_gpus_from_tensorflow()


def gpus():
    """The GPUs of this process that the backend can use: TensorFlow's physical devices, or JAX's devices."""
    if backend() == "jax":
        import jax

        return [device for device in jax.local_devices() if device.platform != "cpu"]
    import tensorflow as tf

    return tf.config.list_physical_devices("GPU")


def device():
    """The name of the device that the backend trains on."""
    if not (devices := gpus()):
        return cpu()
    if backend() == "jax":
        return devices[0].device_kind
    import tensorflow as tf

    return tf.config.experimental.get_device_details(devices[0]).get("device_name", "GPU")


def supports_bfloat16(gpu):
    """Whether one of `gpus()` computes in bfloat16: NVIDIA's from compute capability 8 (Ampere) on."""
    if backend() == "jax":
        capability = getattr(gpu, "compute_capability", None)
        # Only NVIDIA's is a number: AMD's is a name such as gfx90a, and a TPU has no such attribute.
        return not re.fullmatch(r"[\d.]+", str(capability)) or float(capability) >= 8
    import tensorflow as tf

    return tf.config.experimental.get_device_details(gpu).get("compute_capability", (0, 0)) >= (8, 0)


def errors():
    """The classes of the errors that the backend and the input pipeline raise, for `except`."""
    import tensorflow as tf

    if backend() != "jax":
        return (tf.errors.OpError,)
    import jax

    return (tf.errors.OpError, jax.errors.JaxRuntimeError)


def lacks_memory(error):
    """Whether one of `errors()` says that the memory of the device does not suffice."""
    # TensorFlow raises the same class for a full disk. Only the text differs.
    return is_exhausted(error) and re.search("OOM|memory|allocat", str(error).partition("\n")[0], re.IGNORECASE) is not None


def is_exhausted(error):
    """Whether one of `errors()` says that the memory or the disk is full."""
    import tensorflow as tf

    return isinstance(error, tf.errors.ResourceExhaustedError) or str(error).startswith("RESOURCE_EXHAUSTED")


def has_nvidia_device(dev=Path("/dev")):
    """Whether this machine has an NVIDIA device, even one that TensorFlow can't use."""
    # WSL has no such file, but has nvidia-smi.
    return any(dev.glob("nvidia[0-9]*")) or "GPU" in _nvidia_smi()


def count_nvidia_devices():
    """The number of NVIDIA devices that JAX would use in a new process, without starting them."""
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    platforms = os.environ.get("JAX_PLATFORMS", "cuda")
    if not any(map(importlib.util.find_spec, plugins)) or not re.search("cuda|gpu", platforms):
        return 0
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    return sum(line.startswith("GPU ") for line in _nvidia_smi().splitlines())


def _nvidia_smi():
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def versions():
    """The versions of Python and of the installed packages that results depend on."""
    installed = {"python": platform.python_version()}
    for package in ("keras", "tensorflow", "jax", "jaxlib", "tensorflow-datasets", "scikit-learn", "numpy"):
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return installed
