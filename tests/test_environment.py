import os
import platform
import subprocess

import keras

from cvt_keras import environment


def test_versions_are_those_that_run():
    versions = environment.versions()
    assert versions["python"] == platform.python_version()
    assert versions["keras"] == keras.__version__


def test_cpu_counts_the_cores_of_this_process():
    name, _, cores = environment.cpu().rpartition(", ")
    assert name
    assert int(cores.split()[0]) <= os.cpu_count()


def test_an_nvidia_device_is_seen_by_its_file_or_by_the_drivers_tool(tmp_path, monkeypatch):
    monkeypatch.setattr(environment.subprocess, "run", _no_tool)
    assert not environment.has_nvidia_device(tmp_path)
    (tmp_path / "nvidiactl").touch()  # which lies there without a device too
    assert not environment.has_nvidia_device(tmp_path)
    (tmp_path / "nvidia0").touch()
    assert environment.has_nvidia_device(tmp_path)

    listed = subprocess.CompletedProcess([], 0, stdout="GPU 0: NVIDIA H100 (UUID: GPU-1)\n")
    monkeypatch.setattr(environment.subprocess, "run", lambda *args, **kwargs: listed)
    assert environment.has_nvidia_device(tmp_path / "nowhere")


def _no_tool(*args, **kwargs):
    raise FileNotFoundError
