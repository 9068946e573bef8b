import os
import platform
import signal
import subprocess
import sys
import types
from pathlib import Path

import keras
import pytest
import tensorflow as tf

from cvt_keras import environment
from cvt_keras.errors import ArgumentError

ROOT = Path(__file__).parent.parent


def test_versions_are_those_in_use():
    versions = environment.versions()
    assert versions["python"] == platform.python_version()
    assert versions["keras"] == keras.__version__


def test_cpu_counts_the_cores_of_this_process():
    name, _, cores = environment.cpu().rpartition(", ")
    assert name
    assert int(cores.split()[0]) <= os.cpu_count()


def test_an_nvidia_device_is_detected_by_its_file_or_by_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setattr(environment.subprocess, "run", _not_installed)
    assert not environment.has_nvidia_device(tmp_path)
    (tmp_path / "nvidiactl").touch()  # exists without a device too
    assert not environment.has_nvidia_device(tmp_path)
    (tmp_path / "nvidia0").touch()
    assert environment.has_nvidia_device(tmp_path)

    listed = subprocess.CompletedProcess([], 0, stdout="GPU 0: NVIDIA H100 (UUID: GPU-1)\n")
    monkeypatch.setattr(environment.subprocess, "run", lambda *args, **kwargs: listed)
    assert environment.has_nvidia_device(tmp_path / "nowhere")


def _not_installed(*args, **kwargs):
    raise FileNotFoundError


GREETINGS = """\
WARNING: All log messages before absl::InitializeLog() is called are written to STDERR
I0000 00:00:1795749504.486676    2780 port.cc:153] oneDNN custom operations are on. You may see slightly different results.
I0000 00:00:1795749504.487003    2780 cudart_stub.cc:31] Could not find cuda drivers on your machine, GPU will not be used.
E0000 00:00:1795749507.129324    2780 cuda_platform.cc:52] failed call to cuInit: INTERNAL: CUDA error: UNKNOWN ERROR (303)
E0000 00:00:1795749507.129324    2780 util.cc:131] oneDNN supports DT_UINT8 only on platforms with AVX-512. Falling back.
INFO: Created TensorFlow Lite XNNPACK delegate for CPU.
"""
LINE = "W0000 00:00:1795749507.129324    2780 gpu_device.cc:2342] Cannot dlopen some GPU libraries.\n"


HELD = """
import os, sys
from cvt_keras import greetings
with greetings.held_back():
    os.write(2, sys.argv[1].encode())
    if sys.argv[2] == "raises":
        raise SystemExit(3)
    if sys.argv[2] == "aborts":
        os.abort()
os.write(2, b"after\\n")
"""


@pytest.mark.parametrize(
    "fate, code, shown",
    [
        ("ends", 0, LINE + "after\n"),
        ("raises", 3, LINE + GREETINGS),
        ("aborts", -signal.SIGABRT, LINE + GREETINGS),
    ],
)
def test_greetings_are_hidden_unless_tensorflow_fails(fate, code, shown):
    done = subprocess.run([sys.executable, "-c", HELD, GREETINGS + LINE, fate], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, shown)


def test_tensorflow_starts_without_messages():
    code = "from cvt_keras import environment; environment.start(); print('started')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "started\n", "")


@pytest.mark.parametrize("backends", [("jax",), ("tensorflow", "jax"), ()])
def test_another_backend_than_the_required_ones_is_refused(backends, monkeypatch):
    monkeypatch.setattr(keras.config, "backend", lambda: "torch")
    if not backends:
        environment.start()
        return
    with pytest.raises(ArgumentError) as error:
        environment.start(*backends)
    assert f"the {' or '.join(backends)} backend here. Received: torch" in error.value.summary
    assert error.value.hint == f"Set KERAS_BACKEND={backends[0]}"


def test_the_nvidia_devices_of_a_new_process_are_counted(monkeypatch):
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: name == "jax_cuda13_plugin")
    for visible, count in (("0,2", 2), ("", 0), ("-1", 0)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert environment.count_nvidia_devices() == count
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    listed = subprocess.CompletedProcess(
        [], 0, stdout="GPU 0: NVIDIA H100 (UUID: GPU-1)\nGPU 1: RTX 3060 Laptop GPU (UUID: GPU-2)\n"
    )
    monkeypatch.setattr(environment.subprocess, "run", lambda *args, **kwargs: listed)
    assert environment.count_nvidia_devices() == 2
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert environment.count_nvidia_devices() == 0
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None)  # JAX without CUDA
    assert environment.count_nvidia_devices() == 0


class JaxRuntimeError(RuntimeError):
    pass


@pytest.mark.parametrize(
    ("error", "exhausted", "memory"),
    [
        (tf.errors.ResourceExhaustedError(None, None, "OOM when allocating a tensor"), True, True),
        (tf.errors.ResourceExhaustedError(None, None, "events.v2; No space left on device"), True, False),
        (tf.errors.InvalidArgumentError(None, None, "out of memory"), False, False),
        (JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."), True, True),
        (JaxRuntimeError("INTERNAL: memory"), False, False),
    ],
)
def test_errors_of_memory_and_disk_are_told_apart_on_both_backends(error, exhausted, memory):
    assert (environment.is_exhausted(error), environment.lacks_memory(error)) == (exhausted, memory)


def test_jax_has_its_own_devices_and_errors(monkeypatch):
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    jax = pytest.importorskip("jax")
    assert environment.gpus() == []
    assert environment.errors() == (tf.errors.OpError, jax.errors.JaxRuntimeError)
    gpu = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100", compute_capability="9.0")
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu])
    assert environment.gpus() == [gpu]
    assert environment.device() == "NVIDIA H100"
    assert environment.supports_bfloat16(gpu)
    for capability, supported in (("7.5", False), ("gfx90a", True), (None, True)):
        assert environment.supports_bfloat16(types.SimpleNamespace(compute_capability=capability)) == supported


def test_tensorflow_leaves_the_gpus_to_jax(monkeypatch):
    hidden = []
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda *arguments: hidden.append(arguments))
    environment.keep_tensorflow_on_cpu()
    assert not hidden
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    environment.keep_tensorflow_on_cpu()
    assert hidden == [([], "GPU")]
