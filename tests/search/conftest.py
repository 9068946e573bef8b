import csv
import json

import pytest
from small_search import SMOKE, SPACE

from cvt_keras.search.space import space_of


@pytest.fixture
def make_oracle(tmp_path):
    """Opens an oracle of 6 trials in `tmp_path / "oracle"`, as a search does. A second call resumes it."""
    from cvt_keras.search import folder, oracles
    from cvt_keras.search.candidates import Candidates

    def make(algorithm="random", trials=6, max_macs=None, space=SPACE, recipe=SMOKE):
        candidates = Candidates(recipe, space or space_of(recipe), 10, max_macs)
        settings = {"recipe": recipe.settings(), "space": {}, "algorithm": algorithm, "max_macs": max_macs, "data": {}}
        oracle = oracles.make(algorithm, candidates, trials, settings)
        oracle.open(tmp_path / folder.ORACLE)
        return oracle

    return make


@pytest.fixture
def no_pictures(monkeypatch):
    """Replaces figures by blanks: drawing them after each trial would take most of the time."""
    from matplotlib.figure import Figure

    from cvt_keras.search import figures

    for name in ("parallel_coordinates", "best_curves", "importance"):
        monkeypatch.setattr(figures, name, lambda *_: Figure(figsize=(1, 1)))


@pytest.fixture
def quick_run(monkeypatch):
    """Replaces training by a quick result, which is best at a learning rate of 4e-3. Returns the list of recipes."""
    from cvt_keras import runs
    from cvt_keras.search import tuner
    from cvt_keras.training import RunResult

    trained = []

    def run(recipe, run_dir, resume, evaluate_test):
        assert not evaluate_test
        assert resume == (run_dir / runs.RECIPE).exists()
        trained.append(recipe)
        run_dir.mkdir(parents=True, exist_ok=True)
        runs.write_json(run_dir / runs.RECIPE, recipe.settings())
        best = 0.9 - 50 * abs(recipe.peak_learning_rate - 4e-3)
        history = [
            {"epoch": epoch, "val_accuracy": best * epoch / recipe.epochs, "seconds": 1.5}
            for epoch in range(1, recipe.epochs + 1)
        ]
        return RunResult(run_dir, None, history)

    monkeypatch.setattr(tuner, "run", run)
    return trained


@pytest.fixture
def space_file(tmp_path):
    file = tmp_path / "space.json"
    space = {
        "peak_learning_rate": {"low": 1e-3, "high": 8e-3, "log": True},
        "stage0_depth": [1, 2, 3],
        "mixup": {"low": 0.0, "high": 0.4},
    }
    file.write_text(json.dumps(space))
    return file


@pytest.fixture
def table():
    """Reads a search's trials.csv."""

    def read(search_dir):
        with open(search_dir / "trials.csv", newline="") as file:
            return list(csv.DictReader(file))

    return read
