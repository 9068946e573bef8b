import json
import subprocess
import sys
from pathlib import Path

import pytest

import train
from cvt_keras.training import RECIPES

ROOT = Path(__file__).parent.parent


def test_a_recipe_comes_first_and_its_values_are_the_defaults():
    recipe, run_dir = train.parse(["smoke", "--seed", "3"])
    assert (recipe.seed, recipe.epochs, recipe.variant) == (3, RECIPES["smoke"].epochs, "cvt_tiny")
    assert run_dir == Path("runs/smoke-cifar10-cvt_tiny")


def test_without_a_name_it_is_the_default_recipe():
    recipe, run_dir = train.parse(["--epochs", "3", "--run-dir", "somewhere"])
    assert (recipe.epochs, recipe.variant, recipe.batch_size) == (3, "cvt_cifar", RECIPES["cifar10"].batch_size)
    assert run_dir == Path("somewhere")


def test_every_field_has_a_flag():
    flags = {
        "--variant": ("variant", "cvt_13"),
        "--data-dir": ("data_dir", "somewhere"),
        "--epochs": ("epochs", 7),
        "--batch-size": ("batch_size", 64),
        "--seed": ("seed", 7),
        "--precision": ("precision", "mixed_float16"),
        "--xla": ("xla", "on"),
        "--train-limit": ("train_limit", 100),
        "--test-limit": ("test_limit", 100),
        "--crop-padding": ("crop_padding", 2),
        "--peak-learning-rate": ("peak_learning_rate", 0.5),
        "--warmup": ("warmup", 0.25),
        "--weight-decay": ("weight_decay", 0.25),
        "--gradient-clip": ("gradient_clip", 0.25),
    }
    for flag, (field, value) in flags.items():
        recipe, _ = train.parse([flag, str(value)])
        assert getattr(recipe, field) == value != getattr(RECIPES["cifar10"], field), flag
    assert not train.parse(["--no-flip"])[0].flip


def test_an_unknown_recipe_ends_with_2_and_one_line(capsys):
    assert train.main(["cifar11"]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    for part in ("cifar11", "cifar10", "smoke"):
        assert part in line


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--variant", "cvt_14"], ["'cvt_14'", "cvt_cifar"]),
        (["cifar10", "--epochs", "0"], ["epochs=0"]),
        (["--precision", "float8"], ["float8", "mixed_bfloat16"]),
        (["--epoch", "3"], ["--epoch"]),
    ],
)
def test_a_wrong_flag_ends_with_2_and_its_name(arguments, parts, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    for part in parts:
        assert part in message


def test_missing_data_ends_with_1_and_one_line(tmp_path, capsys):
    arguments = ["smoke", "--data-dir", str(tmp_path / "nowhere"), "--run-dir", str(tmp_path / "run")]
    assert train.main(arguments) == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "nowhere" in line


@pytest.mark.parametrize("raised, code, part", [(OSError("no space"), 1, "no space"), (KeyboardInterrupt(), 130, "--run-dir")])
def test_what_stops_a_run_is_told_in_one_line(raised, code, part, monkeypatch, capsys):
    def stop(recipe, run_dir):
        raise raised

    monkeypatch.setattr(train, "run", stop)
    assert train.main(["smoke"]) == code
    [line] = capsys.readouterr().err.strip().splitlines()
    assert part in line


def test_the_command_trains_and_says_where(cifar10_dir, tmp_path):
    run_dir = tmp_path / "run"
    command = [sys.executable, ROOT / "train.py", "smoke", "--data-dir", cifar10_dir, "--run-dir", run_dir]
    first = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    report = json.loads((run_dir / "report.json").read_text())
    assert f"{report['test']['top1']:.2%} top-1 on 256 test images" in first.stdout
    assert str(run_dir) in first.stdout
    assert "cores" in first.stdout and "float32" in first.stdout and "256 training" in first.stdout

    second = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert second.returncode == 2
    assert str(run_dir) in second.stderr
