import dataclasses
import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from keras_tuner.engine.trial import TrialStatus
from small_search import SPACE

from cvt_keras import Stage, Variant
from cvt_keras.errors import RecipeError, RunError
from cvt_keras.search import oracles, results
from cvt_keras.search.space import Choice, Range
from cvt_keras.training import RECIPES
from cvt_keras.variants import get_variant, to_dict


def _finish(oracle, trial, score=0.5, status=TrialStatus.COMPLETED):
    if status == TrialStatus.COMPLETED:
        oracle.update_trial(trial.trial_id, {oracles.OBJECTIVE: score, "seconds": 2.0}, step=0)
    trial.status = status
    oracle.end_trial(trial)


def _all(oracle):
    """Runs all trials, and returns their values."""
    values = []
    while (trial := oracle.create_trial("tuner")).status == TrialStatus.RUNNING:
        values.append(trial.hyperparameters.values)
        _finish(oracle, trial, 1 - abs(trial.hyperparameters.values.get("peak_learning_rate", 0) - 4e-3))
    assert trial.status == TrialStatus.STOPPED
    return values


@pytest.mark.parametrize("algorithm", ["random", "bayesian", "hyperband"])
def test_the_recipe_comes_first_and_no_candidate_is_over_the_budget(algorithm, make_oracle):
    oracle = make_oracle(algorithm, trials=8, max_macs=1_400_000)
    values = _all(oracle)
    assert len(values) == 8
    own = oracle.candidates.own
    assert {name: values[0][name] for name in own} == own
    costs = [oracle.candidates.macs(value) for value in values]
    assert max(costs) <= 1_400_000 and len(set(costs)) > 1
    if algorithm != "hyperband":  # which trains the best of a round again
        assert len({json.dumps(value) for value in values}) == 8


def test_without_a_budget_larger_ones_are_tried(make_oracle):
    oracle = make_oracle(trials=14)
    assert max(oracle.candidates.macs(values) for values in _all(oracle)) > 1_400_000


def test_hyperband_trains_the_best_again_for_more_epochs(make_oracle):
    recipe = dataclasses.replace(RECIPES["smoke"], epochs=9)
    oracle = make_oracle("hyperband", trials=13, recipe=recipe)
    values = _all(oracle)
    epochs = [oracle.candidates.of(value).epochs for value in values]
    assert epochs == [1] * 9 + [3] * 3 + [9]
    rate = [value["peak_learning_rate"] for value in values]
    ranked = sorted(rate[:9], key=lambda rate: abs(rate - 4e-3))
    assert sorted(rate[9:12]) == sorted(ranked[:3]) and rate[12] == ranked[0]
    trials = list(oracle.trials.values())
    repeats = [row["repeats"] for row in results.rows(oracle)]
    assert repeats[:9] == [None] * 9 and repeats[9] in [trial.trial_id for trial in trials[:9]]
    assert rate[12] == oracle.trials[repeats[12]].hyperparameters.values["peak_learning_rate"]
    assert oracles.tried(oracle.candidates, trials[9]).endswith(f"3 epochs, trial {repeats[9]} again from scratch)")


def test_the_bayesian_search_approaches_the_optimum(make_oracle):
    oracle = make_oracle("bayesian", trials=8, space={"peak_learning_rate": SPACE["peak_learning_rate"]})
    distance = [abs(values["peak_learning_rate"] - 4e-3) for values in _all(oracle)]
    assert min(distance[3:]) < 3e-4 < min(distance[:3])  # the first three are random


def test_the_bayesian_search_chooses_within_the_budget_by_the_same_criterion(make_oracle):
    oracle = make_oracle("bayesian", max_macs=840_928)  # leaves a depth of 1
    oracle.create_trial("a")
    # The mean is equal everywhere, and the learning rate is the deviation.
    oracle.gpr = SimpleNamespace(predict=lambda points, return_std: (np.zeros(len(points)), points[:, 0]))
    values = oracle._vector_to_values([0.5, 0.99, 0.5])  # a depth of 3
    assert values["stage0_depth"] == 1 and values["peak_learning_rate"] > 6e-3


def test_the_search_uses_the_seed_of_the_recipe(make_oracle, tmp_path):
    first = _all(make_oracle())
    shutil.rmtree(tmp_path / "oracle")
    assert _all(make_oracle()) == first
    shutil.rmtree(tmp_path / "oracle")
    assert _all(make_oracle(recipe=dataclasses.replace(RECIPES["smoke"], seed=1)))[1:] != first[1:]


def test_a_killed_search_resumes_the_unfinished_trial(make_oracle):
    oracle = make_oracle()
    _finish(oracle, oracle.create_trial("a"), 0.4)
    unfinished = oracle.create_trial("a")
    again = make_oracle()  # as after a kill
    assert [trial.score for trial in again.trials.values()] == [0.4, None]
    trial = again.create_trial("b")
    assert trial.trial_id == unfinished.trial_id
    assert trial.hyperparameters.values == unfinished.hyperparameters.values
    _finish(again, trial, 0.6)
    assert len(_all(again)) == 4
    assert make_oracle().create_trial("c").status == TrialStatus.STOPPED
    assert len(make_oracle(trials=8).trials) == 6 and len(_all(make_oracle(trials=8))) == 2


def test_a_kill_at_the_end_of_a_trial_does_not_repeat_it(make_oracle, monkeypatch):
    oracle = make_oracle()
    trial = oracle.create_trial("a")
    writes, save = [], type(oracle).save

    def killed(self):
        writes.append(1)
        if len(writes) == 2:  # the last write of a trial's end
            raise KeyboardInterrupt
        save(self)

    monkeypatch.setattr(type(oracle), "save", killed)
    with pytest.raises(KeyboardInterrupt):
        _finish(oracle, trial)
    monkeypatch.setattr(type(oracle), "save", save)
    again = make_oracle()
    assert json.loads(Path(again._get_oracle_fname()).read_text())["ongoing_trials"]  # keras-tuner would run it again
    assert again.create_trial("a").trial_id != trial.trial_id


def test_a_trial_that_a_kill_kept_from_being_handed_out_is_created_again(make_oracle, monkeypatch):
    oracle = make_oracle()
    monkeypatch.setattr(type(oracle), "save", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        oracle.create_trial("a")
    monkeypatch.undo()
    again = make_oracle()
    assert not again.trials
    assert len(_all(again)) == 6


@pytest.mark.parametrize("name, text", [("oracle.json", "{"), ("trial_3/trial.json", None)])
def test_a_damaged_or_missing_file_is_named(name, text, make_oracle, tmp_path):
    _all(make_oracle())
    path = tmp_path / "oracle" / name
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(RunError) as error:
        make_oracle()
    assert str(tmp_path / "oracle") in error.value.summary
    assert "--fresh" in error.value.hint


def test_three_failures_in_a_row_end_the_search(make_oracle):
    oracle = make_oracle(trials=9)
    _finish(oracle, oracle.create_trial("a"))
    for _ in range(3):
        trial = oracle.create_trial("a")
        trial.message = "the loss is NaN"
        _finish(oracle, trial, status=TrialStatus.FAILED)
    assert oracle.create_trial("a").status == TrialStatus.STOPPED
    assert "last 3 trials failed" in oracle.exhausted and oracle.failing
    assert oracles.line(oracle, trial) == "trial 3 (4 of 9): failed (the loss is NaN); best so far: trial 0, 50.00%"


def test_failures_of_the_last_trials_do_not_stop_the_search_early(make_oracle):
    oracle = make_oracle(trials=3)
    for _ in range(3):
        _finish(oracle, oracle.create_trial("a"), status=TrialStatus.FAILED)
    assert not oracle.failing and oracle.exhausted is None


def test_a_small_space_runs_out(make_oracle):
    oracle = make_oracle(trials=6, space={"stage0_depth": Choice((1, 2)), "peak_learning_rate": Choice((1e-3, 2e-3))})
    assert len(_all(oracle)) == 4
    assert oracle.exhausted == "almost every candidate of the space was tried" and not oracle.failing


@pytest.mark.parametrize("algorithm", ["random", "bayesian"])
def test_a_budget_that_few_candidates_meet_is_met(algorithm, make_oracle):
    """By chance one in many thousands of the space is within the budget."""
    recipe = dataclasses.replace(RECIPES["smoke"], variant="cvt_cifar")
    oracle = make_oracle(algorithm, trials=5, max_macs=22_000_000, recipe=recipe, space=None)
    oracle.require_one()
    costs = [oracle.candidates.macs(values) for values in _all(oracle)]
    assert len(costs) == 5 and max(costs) <= 22_000_000 and len(set(costs)) > 1


def test_a_candidate_shrinks_until_it_is_within_the_budget(make_oracle):
    space = {"mlp_ratio": Range(1.0, 4.0), "stage1_depth": Choice((1, 2, 9)), "stage0_stride": Choice((1, 2)), **SPACE}
    stages = tuple(Stage(dim, 1, dim // 64, mlp_ratio=2.0) for dim in (64, 128, 256))
    recipe = dataclasses.replace(RECIPES["smoke"], variant=Variant(stages, stem=(32, 32)))
    candidates = make_oracle(max_macs=50_000_000, recipe=recipe, space=space).candidates
    large = {
        "mlp_ratio": 4.0,
        "stage1_depth": 9,
        "stage0_stride": 1,
        "stage0_depth": 3,
        "peak_learning_rate": 2e-3,
        "mixup": 0.2,
    }
    assert candidates.smallest == {"mlp_ratio": 1.0, "stage1_depth": 1, "stage0_stride": 2, "stage0_depth": 1}
    shrunk = [candidates.shrunk(large, seed) for seed in range(20)]
    assert all(candidates.fits(values) for values in shrunk) and len({json.dumps(values) for values in shrunk}) > 5
    assert all(values["peak_learning_rate"] == 2e-3 and values["mixup"] == 0.2 for values in shrunk)
    assert candidates.shrunk(large, 3) == shrunk[3] and large["stage1_depth"] == 9
    within = {**large, **candidates.smallest}
    assert candidates.shrunk(within, 0) == within
    candidates.max_macs = 1
    assert candidates.shrunk(large, 0) == within  # as small as can be


def test_a_space_without_valid_networks_is_refused(make_oracle, monkeypatch):
    monkeypatch.setattr(oracles, "MAX_REFUSED", 30)
    oracle = make_oracle(space={"stage0_depth": Choice((1, 2))})
    oracle.candidates.own = None
    oracle.candidates.fits = lambda values: False
    with pytest.raises(RecipeError) as error:
        oracle.require_one()
    assert error.value.argument == "space"
    assert "30 candidates" in error.value.summary and error.value.summary.endswith("invalid for images of 32 pixels")
    oracle.candidates.max_macs = 10**9
    with pytest.raises(RecipeError) as error:
        oracle.require_one()
    assert error.value.argument == "space"
    assert "budget" in error.value.summary


def test_the_magnitude_of_no_augmentation_makes_no_candidate(make_oracle):
    space = {"rand_augment": Choice((0, 1)), "rand_augment_magnitude": Range(2.0, 9.0)}
    for algorithm, trials in (("random", 12), ("bayesian", 6)):
        oracle = make_oracle(algorithm, trials=trials, space=space)
        values = _all(oracle)
        assert [value["rand_augment_magnitude"] for value in values if value["rand_augment"] == 0] == [5.0]
        assert len({value["rand_augment_magnitude"] for value in values}) == trials
        shutil.rmtree(Path(oracle._get_oracle_fname()).parent)
    oracle = make_oracle(space={"rand_augment": Choice((0, 1)), "rand_augment_magnitude": Range(6.0, 9.0)})
    assert oracle.candidates.canonical({"rand_augment": 0, "rand_augment_magnitude": 7.0})["rand_augment_magnitude"] == 6.0
    shutil.rmtree(Path(oracle._get_oracle_fname()).parent, ignore_errors=True)
    assert len(_all(make_oracle(space={"rand_augment": Choice((0, 1)), "rand_augment_magnitude": Choice((5, 9))}))) == 3


@pytest.mark.parametrize("algorithm", ["random", "bayesian", "hyperband"])
def test_words_are_tried(algorithm, make_oracle):
    oracle = make_oracle(algorithm, trials=9, space={"decay": Choice(("linear", "cosine")), **SPACE})
    assert {oracle.candidates.of(values).decay for values in _all(oracle)} == {"linear", "cosine"}
    assert "decay linear, " in oracles.tried(oracle.candidates, oracle.trials["0"])
    assert {row["decay"] for row in results.rows(oracle)} == {"linear", "cosine"}


def test_the_recipe_itself_is_not_tried_twice(make_oracle):
    """Also if the space has integers where the recipe has floats."""
    values = _all(make_oracle(space={"gradient_clip": Choice((0, 1))}))
    assert [value["gradient_clip"] for value in values] == [1, 0]


def test_a_budget_that_nothing_meets_is_refused(make_oracle):
    with pytest.raises(RecipeError) as error:
        make_oracle(max_macs=840_927).require_one()
    assert error.value.argument == "max_macs"
    assert "840,928" in error.value.summary and "max_macs=840,927" in error.value.summary
    make_oracle(max_macs=840_928).require_one()


def test_idle_workers_wait_while_others_may_be_lost(make_oracle):
    oracle = make_oracle(trials=1)
    trial = oracle.create_trial("a")
    assert oracle.create_trial("b").status == TrialStatus.IDLE
    _finish(oracle, trial)
    assert oracle.create_trial("b").status == TrialStatus.STOPPED


def test_idle_workers_wait_too_if_the_space_is_used_up(make_oracle):
    oracle = make_oracle(trials=9, space={"stage0_depth": Choice((1, 2))})
    trials = [oracle.create_trial(name) for name in ("a", "b")]
    assert [oracle.create_trial("c").status for _ in range(2)] == [TrialStatus.IDLE] * 2
    assert "c" in oracle.tuner_ids and oracle.exhausted
    for trial in trials:
        _finish(oracle, trial)
    assert oracle.create_trial("c").status == TrialStatus.STOPPED and "c" not in oracle.tuner_ids


def test_the_longest_trained_of_equals_is_the_best(make_oracle):
    oracle = make_oracle("hyperband", trials=13, recipe=dataclasses.replace(RECIPES["smoke"], epochs=9))
    while (trial := oracle.create_trial("tuner")).status == TrialStatus.RUNNING:
        _finish(oracle, trial, 0.5)
    assert oracles.best(oracle).trial_id == results.best(results.rows(oracle))["trial"] == "12"
    assert oracles.line(oracle, oracle.trials["12"]).endswith("best so far: trial 12, 50.00%")


def test_a_trial_ended_twice_counts_once(make_oracle):
    oracle = make_oracle()
    trial = oracle.create_trial("a")
    _finish(oracle, trial, 0.5)
    trial.status = TrialStatus.FAILED
    oracle.end_trial(trial)
    assert oracle.end_order == [trial.trial_id]


def test_differences_are_named():
    recipe = {"dataset": "cifar10", "data_dir": "a", "seed": 0, "weights": "a/model.keras", "variant": {"stem": []}}
    data = {"class names": "a, b", "number of train images": 45_000}
    settings = {"recipe": recipe, "space": {"mixup": [0, 1]}, "algorithm": "random", "max_macs": 1, "data": data}
    moved = {**settings, "recipe": {**recipe, "data_dir": "b", "skip_broken": True}}
    assert oracles.differences(settings, moved) == ""
    newer = {**settings, "recipe": {**recipe, "early_stopping": 0}}
    assert oracles.differences(settings, newer) == ""  # the default of a field that the stored search lacks
    assert "early_stopping: 0 in the search, now 3" in oracles.differences(
        settings, {**newer, "recipe": {**recipe, "early_stopping": 3}}
    )
    older = to_dict(Variant((Stage(8, 1, 1),)))
    del older["whitening"], older["stages"][0]["pool"]
    older, newer = ({**settings, "recipe": {**recipe, "variant": variant}} for variant in (older, to_dict(get_variant(older))))
    assert oracles.differences(older, newer) == ""
    changed = {
        **settings,
        "recipe": {**recipe, "dataset": "folder", "seed": 1, "weights": None, "variant": {"stem": [8]}},
        "max_macs": None,
        "space": {},
        "data": {"class names": "a, c", "number of train images": 100},
    }
    assert oracles.differences(settings, changed) == (
        "max_macs: 1 in the search, now None; class names differ; number of train images: 45000 in the search, now 100; "
        "dataset: 'cifar10' in the search, now 'folder'; seed: 0 in the search, now 1; "
        "weights: 'a/model.keras' in the search, now None; "
        "variant differs; space: mixup: [0, 1] in the search, now None"
    )


def test_weights_may_be_moved_but_not_be_others(tmp_path):
    here, there = tmp_path / "a" / "model.keras", tmp_path / "b" / "model.keras"
    settings, other = [
        {"recipe": {"weights": str(path)}, "space": {}, "data": {}, "algorithm": "random", "max_macs": None}
        for path in (here, there)
    ]
    for path in (here, there):
        path.parent.mkdir()
        path.write_text("")
    assert "weights: " in oracles.differences(settings, other)
    here.unlink()
    assert oracles.differences(settings, other) == ""


def test_values_of_a_range_have_four_digits_and_values_of_a_choice_are_unchanged(make_oracle):
    space = {"warmup": Range(0.12345, 0.29999), "mixup": Choice((0.12345, 0.2)), "peak_learning_rate": Range(1e-3, 8e-3)}
    for algorithm in ("random", "bayesian"):
        oracle = make_oracle(algorithm, trials=5, space=space)
        for values in _all(oracle):
            assert values["mixup"] in (0.12345, 0.2) and values["warmup"] in space["warmup"]
            assert len(f"{values['peak_learning_rate']:.10g}") <= len("0.001234")
        shutil.rmtree(Path(oracle._get_oracle_fname()).parent)


def test_a_folder_may_be_called_anything(make_oracle, tmp_path):
    """keras-tuner would take the brackets for a pattern."""
    oracle = make_oracle()
    folder = tmp_path / "w[1]" / "oracle"
    folder.parent.mkdir()
    oracle.open(folder)
    _finish(oracle, oracle.create_trial("a"))
    again = make_oracle()
    again.open(folder)
    assert list(again.trials) == ["0"]


def test_partial_files_are_removed(make_oracle, tmp_path):
    _all(make_oracle())
    partial_files = [tmp_path / "oracle" / ".7-oracle.json", tmp_path / "oracle" / "trial_3" / ".7-trial.json"]
    for path in partial_files:
        path.write_text("{")
    make_oracle()
    assert not any(path.exists() for path in partial_files)


def test_a_trial_that_is_handed_out_again_discards_its_epochs(make_oracle):
    oracle = make_oracle()
    trial = oracle.create_trial("a")
    oracle.update_trial(trial.trial_id, {oracles.OBJECTIVE: 0.9}, step=0)
    again = make_oracle()
    trial = again.create_trial("b")
    _finish(again, trial, 0.1)
    assert trial.score == 0.1


def test_an_unfinished_trial_is_held_for_the_worker_that_trains_it(make_oracle):
    oracle = make_oracle()
    unfinished = oracle.create_trial("a").trial_id
    again = make_oracle()
    again.hold = time.monotonic() + 60
    assert again.create_trial("b").status == TrialStatus.IDLE
    again.hold = 0.0
    assert again.create_trial("b").trial_id == unfinished


def test_a_trial_is_printed_in_a_line(make_oracle):
    oracle = make_oracle()
    trial = oracle.create_trial("a")
    assert oracles.line(oracle, trial) == (
        "\ntrial 0 (1 of 6): the recipe itself: peak_learning_rate 0.002, stage0_depth 1, mixup 0 (0.8 M MACs, 2 epochs)"
    )
    _finish(oracle, trial, 0.25)
    assert oracles.line(oracle, trial) == (
        "trial 0 (1 of 6): 25.00% top-1 on the validation images in 2 s; best so far: trial 0, 25.00%"
    )
