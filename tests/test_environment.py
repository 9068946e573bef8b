import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import keras
import pytest

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


@pytest.mark.parametrize("backend", ["jax", None])
def test_another_backend_than_the_required_one_is_refused(backend, monkeypatch):
    monkeypatch.setattr(keras.config, "backend", lambda: "torch")
    if backend is None:
        environment.start(backend=None)
        return
    with pytest.raises(ArgumentError) as error:
        environment.start(backend=backend)
    assert "torch" in error.value.summary
    assert error.value.hint == f"Set KERAS_BACKEND={backend}"
