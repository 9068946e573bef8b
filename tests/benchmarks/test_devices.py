import subprocess

import pytest

from benchmarks import devices
from cvt_keras import runs
from cvt_keras.variants import get_variant


def test_each_way_is_trained_and_compared_with_one_device(tmp_path, monkeypatch, capsys):
    commands = []

    def run(command, env, **settings):
        run_dir = devices.Path(command[command.index("--run-dir") + 1])
        recipe = runs.read_json(command[command.index("--recipe-file") + 1])
        assert recipe["variant"]["stages"][0]["drop_path"] == devices.STOCHASTIC_DEPTH
        assert env["KERAS_BACKEND"] == "jax"
        commands.append((command[3 : command.index("--recipe-file")], command[-2:], env["XLA_FLAGS"][-1]))
        run_dir.mkdir()
        times = {"train_seconds": 10.0 * len(commands), "seconds": 99.0 * len(commands)}
        loss = 2.0 + (len(commands) > 1) * 1e-6
        history = [{"epoch": epoch, "loss": loss, "val_loss": 1.0, **times} for epoch in (1, 2)]
        runs.write_csv(run_dir / runs.HISTORY, history)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(devices.subprocess, "run", run)
    table = tmp_path / "devices.csv"
    rows = devices.main(devices.Arguments(processes=(2,), csv=table))
    assert [row["trained by"] for row in rows] == ["one device", "2 devices", "2 processes"]
    assert [row["largest difference of a loss"] for row in rows] == ["0.0e+00", "1.0e-06", "1.0e-06"]
    assert [row["seconds per step"] for row in rows] == ["0.500", "1.000", "1.500"]
    assert [(command, count) for command, _, count in commands] == [
        (["train"], "1"),
        (["train"], "2"),
        (["launch", "--processes", "2", "--", "train"], "1"),
    ]
    assert [flags for _, flags, _ in commands] == [["--devices", count] for count in "121"]
    for processes in (0, 7):
        with pytest.raises(ValueError, match=f"Received: {processes}"):
            devices.Arguments(processes=(processes,))
    assert table.read_text().startswith("trained by,loss,validation loss,largest difference of a loss,")
    assert "2.000001" in capsys.readouterr().out


def test_a_failed_training_is_reported(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, stderr="no images")
    monkeypatch.setattr(devices.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(RuntimeError, match="one device failed: no images"):
        devices.main(devices.Arguments())


def test_all_batches_divide_among_the_devices():
    recipe = devices.recipe_of(devices.Arguments())
    assert all(recipe.batch_size % count == 0 for count in devices.Arguments().processes)
    assert recipe.train_limit % recipe.batch_size == 0
    assert recipe.variant.stages[0].dim == get_variant("cvt_cifar").stages[0].dim
