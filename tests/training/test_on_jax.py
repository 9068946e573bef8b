"""Trains on JAX, in other processes, and compares with TensorFlow and between numbers of devices and processes."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from eager import eagerly

from cvt_keras import CvT, Stage, Variant, runs
from cvt_keras.export import export
from cvt_keras.training import Recipe, launch, loop, run

ROOT = Path(__file__).parent.parent.parent
SCRIPT = Path(__file__).parent / "on_jax.py"
CLI = [sys.executable, "-m", "cvt_keras.cli"]

STAGES = (Stage(8, 1, 1, kernel_size=7, stride=4, padding=2), Stage(16, 1, 2, cls_token=True))
# Ten steps that are the same on every backend: no stochastic depth, and weights that both start from.
PLAIN = Recipe(
    variant=Variant(STAGES, "gelu"),
    dataset="digits",
    epochs=1,
    batch_size=32,
    train_limit=320,
    validation_limit=64,
    peak_learning_rate=1e-3,
)
# Everything random, an average of the weights, and images that do not fill the batches of validation.
RANDOM = dataclasses.replace(
    PLAIN,
    variant=Variant(tuple(dataclasses.replace(stage, drop_path=0.5) for stage in STAGES), "gelu", whitening=2),
    epochs=2,
    train_limit=70,
    validation_limit=50,
    test_limit=20,
    crop_padding=3,
    mixup=0.4,
    cutmix=0.4,
    ema=0.9,
    label_smoothing=0.1,
    class_weights="auto",
    seed=7,
)


@pytest.fixture(scope="session")
def jax_environment(tmp_path_factory):
    """Environment variables for programs that compile fast, and once."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "SLURM_", "OMPI_"))},
        "KERAS_BACKEND": "jax",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }


@pytest.fixture(scope="session")
def train_on_jax(jax_environment):
    """Runs a list of jobs of on_jax.py in one process, with this number of devices, and returns what it printed."""

    def train(*jobs, devices=1):
        jobs = [{**job, "recipe": job["recipe"].settings(), "run_dir": str(job["run_dir"])} for job in jobs]
        variables = {**jax_environment, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        done = subprocess.run([sys.executable, SCRIPT, json.dumps(jobs)], env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return train


@pytest.fixture(scope="session")
def shared_weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "start.keras"
    preprocessing = {"class_names": list("0123456789"), "image_size": [32, 32]}  # the head is kept for these classes
    CvT(PLAIN.variant, 10, (32, 32, 3), preprocessing=preprocessing).save(path)
    return str(path)


@pytest.fixture(scope="session")
def on_one_device(train_on_jax, shared_weights, tmp_path_factory):
    """The folder of the runs `plain`, `random`, `resumed` and the unfinished `stopped`, and what the process printed."""
    folder = tmp_path_factory.mktemp("jax")
    printed = train_on_jax(
        {"recipe": dataclasses.replace(PLAIN, weights=shared_weights), "run_dir": folder / "plain"},
        {"recipe": RANDOM, "run_dir": folder / "random"},
        {"recipe": RANDOM, "run_dir": folder / "resumed", "stop_after": 1},
        {"recipe": RANDOM, "run_dir": folder / "resumed", "resume": True},
        {"recipe": RANDOM, "run_dir": folder / "stopped", "stop_after": 1},
    )
    return folder, printed


def _history(run_dir):
    """The history without times."""
    return [
        {name: value for name, value in row.items() if name not in ("train_seconds", "seconds")}
        for row in runs.read_history(run_dir)
    ]


def _state(run_dir):
    """The arrays of the newest checkpoint."""
    [folder] = (run_dir / runs.CHECKPOINTS).glob("epoch-*")
    return {f"{file} {name}": value for file in ("state", "best") for name, value in np.load(folder / f"{file}.npz").items()}


def _require_close(first, second, **tolerances):
    assert len(first) == len(second) > 0
    for row, other in zip(first, second):
        assert row == pytest.approx(other, **tolerances)


def test_ten_steps_agree_with_tensorflow(on_one_device, shared_weights, tmp_path):
    folder, _ = on_one_device
    with eagerly(True):
        run(dataclasses.replace(PLAIN, weights=shared_weights), tmp_path / "run", evaluate_test=False)
    _require_close(_history(folder / "plain"), _history(tmp_path / "run"), abs=1e-4)
    on_jax, on_tensorflow = _state(folder / "plain"), _state(tmp_path / "run")
    assert list(on_jax) == list(on_tensorflow)
    compared = 0
    for name, value in on_tensorflow.items():
        if name.endswith(("kernel", "bias", "gamma", "beta", "cls_token", "moving_mean", "moving_variance")):
            np.testing.assert_allclose(on_jax[name], value, atol=1e-4, err_msg=name)
            compared += 1
    assert compared > 50


def test_the_run_folder_of_jax_is_complete_and_says_so(on_one_device):
    folder, printed = on_one_device
    report = runs.read_json(folder / "random" / runs.REPORT)
    assert (report["backend"], report["devices"], report["recipe"]["xla"]) == ("jax", 1, "on")
    assert {path.name for path in (folder / "random").iterdir()} == {
        *("recipe.json", "history.csv", "model.keras", "report.json", "report.html", "plots", "tensorboard", "checkpoints")
    }
    assert "float32, XLA on" in printed


def test_resume_on_jax_is_exact(on_one_device):
    folder, printed = on_one_device
    assert "resuming after epoch 1 of 2" in printed
    assert "not an exact resume" not in printed
    assert _history(folder / "resumed") == _history(folder / "random")
    whole, resumed = _state(folder / "random"), _state(folder / "resumed")
    assert list(whole) == list(resumed)
    for name, value in whole.items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)


def test_a_run_of_jax_is_resumed_on_tensorflow_which_is_not_exact(on_one_device, capsys):
    folder, _ = on_one_device
    with eagerly(True):
        result = run(RANDOM, folder / "stopped", resume=True, evaluate_test=False)
    assert "the run trained on jax with 1 device, and continues on tensorflow with 1 device" in capsys.readouterr().out
    assert result.history[0] == runs.read_history(folder / "stopped")[0]
    assert len(result.history) == 2
    assert (result.report.backend, result.report.recipe["xla"]) == ("tensorflow", "off")


@pytest.mark.slow
def test_a_run_of_tensorflow_is_resumed_on_jax(train_on_jax, tmp_path, monkeypatch):
    def stop(self, epoch, logs=None):
        raise KeyboardInterrupt

    with eagerly(True), pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(loop.EarlyStopping, "on_epoch_end", stop)
        run(RANDOM, tmp_path / "run", evaluate_test=False)
    printed = train_on_jax({"recipe": RANDOM, "run_dir": tmp_path / "run", "resume": True})
    assert "the run trained on tensorflow with 1 device, and continues on jax with 1 device" in printed
    assert len(runs.read_history(tmp_path / "run")) == 2


# === Devices and processes ===


def _launch(processes, run_dir, recipe_file, *flags):
    train = ["--", "train", "--recipe-file", recipe_file, "--run-dir", run_dir]
    return [*CLI, "launch", "--processes", str(processes), *flags, *map(str, train)]


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "random.json"
    path.write_text(json.dumps(RANDOM.settings()))
    return path


def test_two_processes_train_like_one(jax_environment, on_one_device, tmp_path):
    job = {"recipe": RANDOM.settings(), "run_dir": str(tmp_path / "run")}
    group = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{launch._free_port()}", "JAX_NUM_PROCESSES": "2"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [
        subprocess.Popen(
            [sys.executable, SCRIPT, json.dumps([job])], env={**jax_environment, **group, "JAX_PROCESS_ID": str(i)}, **pipes
        )
        for i in range(2)
    ]
    for i, process in enumerate(started):
        shown, printed = process.communicate()
        assert process.returncode == 0, printed
        assert shown.count("Epoch 1/2") == (i == 0)  # only process 0 shows its progress
    folder, _ = on_one_device
    _require_close(_history(tmp_path / "run"), _history(folder / "random"), abs=1e-5)
    report = runs.read_json(tmp_path / "run" / runs.REPORT)
    assert (report["backend"], report["devices"]) == ("jax", 2)


@pytest.mark.slow
def test_launched_processes_show_one_bar_and_write_one_run(recipe_file, jax_environment, tmp_path):
    run_dir = tmp_path / "run"
    done = subprocess.run(_launch(2, run_dir, recipe_file), env=jax_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert runs.read_json(run_dir / runs.REPORT)["test"]["images"] == 20
    assert done.stdout.count("Epoch 1/2") == 1
    assert done.stdout.count("2 processes with 2 devices in all") == 1
    assert done.stdout.count("images; the run is in") == 1
    assert len(list((run_dir / runs.TENSORBOARD / "train").iterdir())) == 1
    assert not [path for path in run_dir.rglob("*") if runs.is_unfinished(path)]


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
def test_devices_train_like_one(train_on_jax, on_one_device, tmp_path, devices):
    printed = train_on_jax({"recipe": RANDOM, "run_dir": tmp_path / "run", "devices": "all"}, devices=devices)
    assert printed.startswith(f"JAX, {devices} devices: ")
    _require_close(_history(tmp_path / "run"), _history(on_one_device[0] / "random"), abs=1e-5)


@pytest.mark.slow
def test_four_processes_train_like_one(recipe_file, jax_environment, on_one_device, tmp_path):
    command = _launch(4, tmp_path / "run", recipe_file)
    subprocess.run(command, env=jax_environment, check=True, capture_output=True)
    _require_close(_history(tmp_path / "run"), _history(on_one_device[0] / "random"), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_trains_on_jax_and_scales_the_loss(train_on_jax, tmp_path, precision):
    recipe = dataclasses.replace(RANDOM, precision=precision, train_limit=320, epochs=3, ema=0.9)
    train_on_jax({"recipe": recipe, "run_dir": tmp_path / "run"})
    assert runs.read_json(tmp_path / "run" / runs.REPORT)["recipe"]["precision"] == precision
    losses = [row["loss"] for row in runs.read_history(tmp_path / "run")]
    assert losses[-1] < losses[0]
    scales = [value for name, value in _state(tmp_path / "run").items() if name.endswith("dynamic_scale")]
    assert [float(scale) for scale in scales] == ([2.0**15] if precision == "mixed_float16" else [])


# === Processes that die ===


def _wait_for_epoch(run_dir, epoch, seconds=180):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if any(int(path.name[-4:]) >= epoch for path in (run_dir / runs.CHECKPOINTS).glob("epoch-????")):
            return
        time.sleep(0.05)
    raise AssertionError(f"no checkpoint of epoch {epoch} in {run_dir} after {seconds} s")


def _children(process):
    """The ids of the processes that a process started, in their order."""
    return sorted(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))


LONG = 15  # so many epochs that a process can be killed in the middle of the training


@pytest.fixture(scope="session")
def long_recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "long.json"
    path.write_text(json.dumps(dataclasses.replace(RANDOM, epochs=LONG).settings()))
    return path


@pytest.fixture(scope="session")
def uninterrupted(long_recipe, jax_environment, tmp_path_factory):
    """The folder of a run by two processes."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    subprocess.run(_launch(2, run_dir, long_recipe), env=jax_environment, check=True, capture_output=True)
    return run_dir


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="lists the processes in /proc")
@pytest.mark.parametrize("dead", [0, 1])
def test_a_killed_process_is_named_and_the_resumed_run_is_that_of_an_uninterrupted_one(
    long_recipe, uninterrupted, jax_environment, tmp_path, dead
):
    killed = tmp_path / "killed"
    command = _launch(2, killed, long_recipe)
    launched = subprocess.Popen(command, env=jax_environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _wait_for_epoch(killed, 3)
    os.kill(_children(launched)[dead], signal.SIGKILL)
    started = time.monotonic()
    _, printed = launched.communicate()
    assert time.monotonic() - started < 30
    assert launched.returncode == 1
    assert f"process {dead} of 2 was killed by SIGKILL" in printed
    assert f"To resume: cvt-keras launch --processes 2 -- train --recipe-file {long_recipe}" in printed
    assert len(runs.read_history(killed)) < LONG
    subprocess.run([*command, "--resume"], env=jax_environment, check=True, capture_output=True)
    _require_close(_history(killed), _history(uninterrupted), abs=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="lists the processes in /proc")
def test_launch_restarts_after_a_kill(long_recipe, jax_environment, tmp_path):
    command = _launch(2, tmp_path / "run", long_recipe, "--restarts", "1")
    launched = subprocess.Popen(command, env=jax_environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _wait_for_epoch(tmp_path / "run", 3)
    os.kill(_children(launched)[1], signal.SIGKILL)
    shown, printed = launched.communicate()
    assert launched.returncode == 0, printed
    assert "restart 1 of 1: resuming after the last finished epoch" in shown
    assert "resuming after epoch" in shown
    assert len(runs.read_history(tmp_path / "run")) == LONG


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="lists the processes in /proc")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGHUP, 143), (signal.SIGKILL, -9)])
def test_no_process_outlives_a_closed_terminal_or_a_killed_launcher(long_recipe, jax_environment, tmp_path, number, code):
    command = _launch(2, tmp_path / "run", long_recipe)
    launched = subprocess.Popen(command, env=jax_environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _wait_for_epoch(tmp_path / "run", 2)
    processes = _children(launched)
    os.kill(launched.pid, number)
    assert launched.wait() == code
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{process}").exists() for process in processes):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_processes_with_other_flags_or_images_are_refused_with_both_values(jax_environment, recipe_file, tmp_path):
    group = ["--processes", "2", "--run-dir", str(tmp_path / "run"), "--recipe-file", str(recipe_file)]
    for flags, difference in (
        (["--seed", "8"], "seed: 8 in process 1, 7 in process 0"),
        (["--test-limit", "21"], "test_limit: 21 in process 1, 20 in process 0"),
    ):
        address = f"127.0.0.1:{launch._free_port()}"
        commands = [
            [*CLI, "train", *group, "--coordinator", address, "--process-id", str(i), *(flags if i else [])] for i in range(2)
        ]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started = [subprocess.Popen(command, env=jax_environment, **pipes) for command in commands]
        for i, process in enumerate(started):
            shown, printed = process.communicate()
            assert process.returncode == 2, printed
            assert ("digits: " in shown) == (i == 0)  # only process 0 prints its progress
            assert "process 1 differs from process 0" in printed and difference in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_coordinator_that_never_comes_is_reported_within_a_minute(jax_environment, tmp_path):
    flags = ["--coordinator", "127.0.0.1:7", "--processes", "2", "--process-id", "1", "--run-dir", str(tmp_path / "run")]
    started = time.monotonic()
    done = subprocess.run([*CLI, "train", "smoke", *flags], env=jax_environment, capture_output=True, text=True)
    assert time.monotonic() - started < 60
    assert done.returncode == 1
    assert "no coordinator answers at 127.0.0.1:7" in done.stderr


# === Other commands ===


@pytest.mark.slow
def test_a_run_of_jax_is_exported_on_tensorflow(on_one_device):
    folder, _ = on_one_device
    [artifact] = export(folder / "random", formats=("dynamic_int8",), verify_images=20)
    assert artifact.passed


@pytest.mark.slow
def test_a_search_runs_on_jax(jax_environment, recipe_file, tmp_path):
    flags = ["--recipe-file", str(recipe_file), "--trials", "2", "--epochs", "1", "--search-dir", str(tmp_path / "search")]
    done = subprocess.run([*CLI, "search", *flags], env=jax_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "best: trial" in done.stdout
    for run_dir in (tmp_path / "search" / "trials").iterdir():
        assert runs.read_json(run_dir / runs.REPORT)["backend"] == "jax"


@pytest.mark.slow
def test_compression_is_refused_in_one_line(jax_environment, on_one_device, tmp_path):
    command = [*CLI, "prune", str(on_one_device[0] / "random"), "--run-dir", str(tmp_path / "pruned")]
    done = subprocess.run(command, env=jax_environment, capture_output=True, text=True)
    [line] = done.stderr.strip().splitlines()
    assert done.returncode == 2
    assert line.endswith("Set KERAS_BACKEND=tensorflow")
