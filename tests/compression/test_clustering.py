import dataclasses

import numpy as np
import pytest

from cvt_keras import build_classifier
from cvt_keras.compression.clustering import WeightClustering
from cvt_keras.compression.kernels import kernels
from cvt_keras.errors import RecipeError, RunError
from cvt_keras.training.recipes import SMOKE


@pytest.fixture
def classifier():
    return build_classifier("cvt_tiny", 10, (32, 32, 3))


def _step(clustering, classifier, change):
    """A training step that adds `change(kernel)` to each kernel."""
    clustering.on_train_batch_begin(0)
    for kernel in kernels(classifier).values():
        kernel.assign_add(change(np.asarray(kernel)))
    clustering.on_train_batch_end(0)


def _values(classifier):
    return {path: np.unique(np.asarray(kernel)) for path, kernel in kernels(classifier).items()}


@pytest.mark.parametrize("clusters", [2, 16])
def test_each_kernel_has_so_many_values_and_no_more(classifier, clusters):
    clustering = WeightClustering(clusters)
    clustering.start(classifier, None, 10, 1)
    random = np.random.default_rng(0)
    for _ in range(10):
        _step(clustering, classifier, lambda kernel: random.normal(size=kernel.shape, scale=0.02).astype("float32"))
        assert {len(values) for values in _values(classifier).values()} == {clusters}
    assert set(clustering.check(classifier)["values_by_layer"].values()) == {clusters}


def test_the_values_are_near_the_weights_from_the_first_step(classifier):
    before = {path: np.asarray(kernel).copy() for path, kernel in kernels(classifier).items()}
    WeightClustering(16).start(classifier, None, 10, 1)
    for path, kernel in kernels(classifier).items():
        error = np.mean((np.asarray(kernel) - before[path]) ** 2) / np.var(before[path])
        assert error < 0.03  # 16 even steps over two deviations of a normal cut there would leave 0.01


def test_training_moves_the_values_and_weights_between_them(classifier):
    clustering = WeightClustering(4)
    clustering.start(classifier, None, 10, 1)
    before = _values(classifier)
    _step(clustering, classifier, lambda kernel: np.full_like(kernel, 0.25))
    for path, values in _values(classifier).items():
        np.testing.assert_allclose(values, before[path] + 0.25, atol=1e-6)
    # Steps too small to leave a value add up to one.
    path, kernel = next(iter(kernels(classifier).items()))
    low, high = np.unique(np.asarray(kernel))[[0, -1]]
    place = tuple(np.argwhere(np.asarray(kernel) == low)[0])
    change = np.zeros(kernel.shape, "float32")
    change[place] = (high - low) / 8
    for _ in range(16):
        _step(clustering, classifier, lambda k: change if k.shape == change.shape and k is not None else np.zeros_like(k))
    assert np.asarray(kernel)[place] == np.unique(np.asarray(kernel))[-1]


def test_the_rest_of_the_network_is_left_alone(classifier):
    chosen = {id(kernel) for kernel in kernels(classifier).values()}
    others = [variable for variable in classifier.trainable_variables if id(variable) not in chosen]
    before = [np.asarray(variable).copy() for variable in others]
    WeightClustering(4).start(classifier, None, 10, 1)
    for variable, value in zip(others, before):
        np.testing.assert_array_equal(np.asarray(variable), value)


def test_zeros_of_a_pruned_network_stay(classifier):
    random = np.random.default_rng(0)
    for kernel in kernels(classifier).values():
        kernel.assign(np.asarray(kernel) * (random.random(kernel.shape) < 0.5))
    zeros = {path: np.asarray(kernel) == 0 for path, kernel in kernels(classifier).items()}
    clustering = WeightClustering(8, keep_zeros=True)
    clustering.start(classifier, None, 10, 1)
    for _ in range(5):
        _step(clustering, classifier, lambda kernel: random.normal(size=kernel.shape, scale=0.01).astype("float32"))
        for path, kernel in kernels(classifier).items():
            assert (np.asarray(kernel)[zeros[path]] == 0).all()
            assert len(np.unique(np.asarray(kernel))) == 8
    assert clustering.check(classifier)["sparsity"] >= 0.45


def test_zeros_of_layers_that_are_not_clustered_stay(classifier):
    kernel = kernels(classifier)["stage0_block0/mlp/fc1"]
    kernel.assign(np.asarray(kernel) * (np.arange(kernel.shape[1]) % 2))
    clustering = WeightClustering(4, keep_zeros=True, layers=["head"])
    clustering.start(classifier, None, 10, 1)
    _step(clustering, classifier, np.ones_like)
    assert (np.asarray(kernel)[:, ::2] == 0).all()
    clustering.check(classifier)
    kernel.assign(np.ones(kernel.shape))
    with pytest.raises(RunError) as failure:
        clustering.check(classifier)
    assert "stage0_block0/mlp/fc1" in failure.value.summary


def test_weights_that_are_no_numbers_do_not_hang_it(classifier):
    clustering = WeightClustering(4)
    clustering.start(classifier, None, 10, 1)
    _step(clustering, classifier, lambda kernel: np.full_like(kernel, np.nan))
    assert np.isnan(np.asarray(kernels(classifier)["stage0_block0/mlp/fc1"])).all()


def test_layers_can_be_named(classifier):
    clustering = WeightClustering(4, layers=["head"])
    clustering.start(classifier, None, 10, 1)
    assert clustering.check(classifier)["values_by_layer"] == {"head": 4}
    assert len(_values(classifier)["stage0_block0/mlp/fc1"]) > 4


@pytest.mark.parametrize("clusters", [1, 0, -3])
def test_fewer_than_two_values_are_refused(clusters):
    with pytest.raises(RecipeError) as refusal:
        WeightClustering(clusters)
    assert refusal.value.argument == "clusters"
    assert f"clusters={clusters}" in refusal.value.summary
    with pytest.raises(RecipeError) as refusal:
        WeightClustering(layers=())
    assert refusal.value.argument == "layers"


def test_more_values_than_there_are_are_refused(classifier):
    with pytest.raises(RecipeError) as refusal:
        WeightClustering(65).start(classifier, None, 10, 1)
    assert refusal.value.argument == "clusters"
    assert " 64" in refusal.value.summary and "stage0_block0/attention/proj_q" in refusal.value.summary


def test_what_it_can_not_come_after_is_refused():
    with pytest.raises(RecipeError) as refusal:
        WeightClustering(after={"method": "qat"}).require(SMOKE)
    assert refusal.value.argument == "run" and "qat" in refusal.value.summary
    with pytest.raises(RecipeError) as refusal:
        WeightClustering().require(dataclasses.replace(SMOKE, ema=0.5))
    assert refusal.value.argument == "ema" and "ema=0.5" in refusal.value.summary
    WeightClustering(after={"method": "prune"}).require(SMOKE)


def test_a_network_that_is_not_as_it_was_to_be_is_told(classifier):
    with pytest.raises(RunError) as failure:
        WeightClustering(16).check(classifier)
    assert failure.value.argument == "clusters"
    for part in ("stage0_block0/attention/proj_q", "64", "16"):
        assert part in failure.value.summary
