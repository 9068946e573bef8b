import dataclasses

import pytest

from benchmarks import step_times
from benchmarks.step_times import Arguments, main
from cvt_keras import Stage, Variant
from cvt_keras.training import RECIPES


@pytest.fixture
def tiny_recipe(monkeypatch):
    variant = Variant((Stage(dim=8, depth=1, heads=2),), whitening=2)
    recipe = dataclasses.replace(RECIPES["cifar10"], variant=variant, batch_size=4)
    monkeypatch.setitem(step_times.RECIPES, "tiny", recipe)


def test_networks_take_turns(tiny_recipe, capsys):
    times = main(Arguments("tiny", ("no blocks", "cnn"), turns=2, steps=1))
    assert [len(seconds) for seconds in times.values()] == [2, 2, 2]
    assert all(second > 0 for seconds in times.values() for second in seconds)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == ["| custom", "| no blocks", "| cnn"]
    assert rows[0][-1].startswith("1.00 (1.00 to 1.00)")
    assert float(rows[1][1].split()[0]) < float(rows[0][1].split()[0])


def test_each_turn_has_its_steps():
    calls = []

    class Network:
        def __init__(self, name):
            self.name = name

        def train_on_batch(self, *batch):
            calls.append(self.name)

    seconds = step_times.step_seconds({name: Network(name) for name in "ab"}, (), turns=2, steps=2)
    assert "".join(calls) == "bbaa" + "aabb" + "bbaa"
    assert list(map(len, seconds.values())) == [2, 2]


def test_unknown_changes_and_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="no heads"):
        Arguments(changes=("no heads",))
    for name in ("turns", "steps"):
        with pytest.raises(ValueError, match=f"{name}=0"):
            Arguments(**{name: 0})
