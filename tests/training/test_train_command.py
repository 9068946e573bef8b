import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cvt_keras import cli, runs
from cvt_keras.conversion.layouts import microsoft_weights
from cvt_keras.errors import DivergedError, OccupiedError, OutOfMemoryError, RunError
from cvt_keras.signals import Terminated
from cvt_keras.training import distributed, loop, plan
from cvt_keras.training.__main__ import parse

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    "flags, code, part",
    [
        (["finetune"], 2, "--weights SOURCE"),
        (["finetune", "--weights", "nowhere.pth"], 2, "nowhere.pth"),
        (["finetune", "--weights", "{damaged}"], 1, "damaged.pth is damaged"),
        (["cifar10", "--weights", "{damaged}"], 1, "damaged.pth is damaged"),
        (["finetune", "--weights", "{misfit}"], 1, "missing: stage0.blocks.0.attn.proj_k.bias"),
        (["finetune", "--weights", "{misfit}"], 1, "misfit.pth all.keras"),
    ],
)
def test_weights_that_can_not_be_loaded_end_in_a_short_error(flags, code, part, tmp_path, capsys):
    (tmp_path / "damaged.pth").write_text("hello")
    weights = [weight for weight in microsoft_weights("cvt_13") if "proj_k.bias" not in weight.key]
    torch.save({weight.key: torch.zeros(weight.shape) for weight in weights}, tmp_path / "misfit.pth")
    flags = [flag.format(damaged=tmp_path / "damaged.pth", misfit=tmp_path / "misfit.pth") for flag in flags]
    assert cli.main(["train", *flags, "--run-dir", str(tmp_path / "run")]) == code
    error = capsys.readouterr().err
    assert part in error
    assert len(error.splitlines()) <= cli.MOST_DETAILS + 3
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--variant", "cvt_14"], ["'cvt_14'", "cvt_cifar", "(--variant)"]),
        (["cifar10", "--epochs", "0"], ["epochs=0", "(--epochs)"]),
        (["--dataset", "mnist"], ["'mnist'", "tfds:NAME"]),
        (["--label-smoothing", "1"], ["label_smoothing=1.0", "(--label-smoothing)"]),
    ],
)
def test_an_invalid_value_ends_with_2_and_one_line(arguments, parts, capsys):
    assert cli.main(["train", *arguments]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    for part in ("cvt-keras train: ", *parts):
        assert part in line


@pytest.mark.parametrize(
    "arguments, parts",
    [(["--precision", "float8"], ["float8", "mixed_bfloat16"]), (["--epoch", "3"], ["--epoch"])],
)
def test_a_wrong_flag_ends_with_2_and_its_name(arguments, parts, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *arguments])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    for part in parts:
        assert part in message


def test_missing_data_ends_with_1_and_one_line(tmp_path, capsys):
    arguments = ["smoke", "--dataset", "cifar10", "--data-dir", str(tmp_path / "nowhere"), "--run-dir", str(tmp_path / "run")]
    assert cli.main(["train", *arguments]) == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "nowhere" in line


RESUME = "To resume: cvt-keras train smoke --run-dir 'my runs/one' --resume"


@pytest.mark.parametrize(
    "raised, code, part",
    [
        (OSError("no space"), 1, "no space; finished epochs are kept. Once this is fixed, resume with: cvt-keras train smoke"),
        (DivergedError("the loss is NaN", hint="Lower it"), 1, "the loss is NaN. Lower it"),
        (OutOfMemoryError("too small"), 1, "too small"),
        (RunError("damaged"), 1, "damaged"),
        (OccupiedError("a run"), 2, "a run"),
        (KeyboardInterrupt(), 130, RESUME),
        (Terminated(), 143, RESUME),
    ],
)
def test_an_error_or_signal_ends_a_run_with_one_line(raised, code, part, monkeypatch, capsys):
    def stop(recipe, run_dir, resume, name, devices):
        raise raised

    monkeypatch.setattr(loop, "run", stop)
    assert cli.main(["train", "smoke", "--run-dir", "my runs/one"]) == code
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("cvt-keras train: ")
    assert part in line


@pytest.mark.parametrize("process_id", [0, 1])
def test_the_processes_of_a_finished_training_join_no_group(process_id, tmp_path, monkeypatch, capsys):
    (tmp_path / "checkpoints" / "epoch-0002").mkdir(parents=True)
    state = {"history": [{"epoch": epoch, "val_accuracy": 0.5, "val_loss": 1.0} for epoch in (1, 2)]}
    runs.write_json(tmp_path / "checkpoints" / "epoch-0002" / "state.json", state)
    monkeypatch.setattr(distributed, "join", lambda group: pytest.fail("joined"))
    report = SimpleNamespace(test=None, validation={"top1": 0.125, "images": 5_000})
    monkeypatch.setattr(loop, "run", lambda *args, **kwargs: SimpleNamespace(report=report, run_dir="runs/x"))
    group = ["--coordinator", "127.0.0.1:9", "--processes", "2", "--process-id", str(process_id)]
    assert cli.main(["train", "smoke", "--run-dir", str(tmp_path), "--resume", *group]) == 0
    printed = capsys.readouterr().out
    assert ("all epochs are finished" in printed, "validation images" in printed) == (process_id == 1, process_id == 0)


def test_without_test_images_the_validation_accuracy_is_printed(monkeypatch, capsys):
    report = SimpleNamespace(test=None, validation={"top1": 0.125, "images": 5_000})
    result = SimpleNamespace(report=report, run_dir="runs/x")
    monkeypatch.setattr(loop, "run", lambda recipe, run_dir, resume, name, devices: result)
    assert cli.main(["train", "smoke"]) == 0
    assert (
        "12.50% top-1 (95% interval: 11.61% to 13.45%) on 5,000 validation images; the run is in runs/x"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "missing, environment, code, part",
    [("matplotlib", {}, 1, "pip install matplotlib"), ("", {"KERAS_BACKEND": "foo"}, 2, "foo")],
)
def test_a_failed_import_ends_with_one_line(missing, environment, code, part):
    code_of_process = "import sys\nsys.modules[sys.argv.pop(1)] = None\nfrom cvt_keras import cli\nsys.exit(cli.main())"
    ended = subprocess.run(
        [sys.executable, "-c", code_of_process, missing, "train", "smoke", "--dataset", "digits"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    assert ended.returncode == code
    line = ended.stderr.strip().splitlines()[-1]
    assert line.startswith("cvt-keras train: ") and part in line
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)])
def test_a_stopped_run_keeps_its_epochs_and_prints_the_command_that_resumes_it(cifar10_dir, tmp_path, number, code):
    run_dir = tmp_path / "run"
    flags = ["smoke", "--dataset", "cifar10", "--data-dir", str(cifar10_dir), "--run-dir", str(run_dir)]
    flags += ["--epochs", "3", "--batch-size", "2"]  # an epoch of 128 steps
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *flags],
        stderr=subprocess.PIPE,
        text=True,
        # A shell makes the processes in its background ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not (run_dir / "history.csv").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    _, _, command = error.strip().splitlines()[-1].partition("To resume: ")
    assert command == shlex.join([*process.args, "--resume"])
    # It stopped within the second epoch.
    assert [path.name for path in (run_dir / "checkpoints").glob("epoch-*")] == ["epoch-0001"]
    assert (run_dir / "history.csv").exists() and not (run_dir / "report.json").exists()

    _, arguments = parse(shlex.split(command)[2:])
    assert plan.settle(arguments.recipe, arguments.run_dir, arguments.resume).resumed


def test_the_command_trains_and_prints_accuracy_and_folder(cifar10_dir, tmp_path, eager, capsys):
    run_dir = tmp_path / "run"
    argv = ["train", "smoke", "--dataset", "cifar10", "--data-dir", str(cifar10_dir), "--run-dir", str(run_dir)]
    argv += ["--train-limit", "64", "--epochs", "1"]
    assert cli.main(argv) == 0
    report = json.loads((run_dir / "report.json").read_text())
    printed = capsys.readouterr().out
    low, high = report["test"]["top1_interval"]
    interval = f"95% interval: {low:.2%} to {high:.2%}"
    assert f"{report['test']['top1']:.2%} top-1 ({interval}) on 256 test images; the run is in {run_dir}" in printed
    assert str(run_dir) in printed
    assert "cores" in printed and "float32" in printed and "64 training" in printed
    assert cli.main(argv) == 2
    assert str(run_dir) in capsys.readouterr().err
