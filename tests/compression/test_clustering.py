import dataclasses

import numpy as np
import pytest

from cvt_keras.compression.clustering import WeightClustering
from cvt_keras.compression.kernels import kernels
from cvt_keras.errors import RecipeError, RunError
from cvt_keras.training.recipes import SMOKE


def _step(clustering, classifier, change):
    """Makes a training step that adds `change(kernel)` to each kernel."""
    clustering.on_train_batch_begin(0)
    for kernel in kernels(classifier).values():
        kernel.assign_add(change(np.asarray(kernel)))
    clustering.on_train_batch_end(0)


def _values(classifier):
    return {path: np.unique(np.asarray(kernel)) for path, kernel in kernels(classifier).items()}


@pytest.mark.parametrize("clusters", [2, 16])
def test_each_kernel_keeps_its_number_of_values(classifier, clusters):
    before = {path: np.asarray(kernel).copy() for path, kernel in kernels(classifier).items()}
    chosen = {id(kernel) for kernel in kernels(classifier).values()}
    others = [variable for variable in classifier.trainable_variables if id(variable) not in chosen]
    others_before = [np.asarray(variable).copy() for variable in others]
    clustering = WeightClustering(clusters)
    clustering.start(classifier, None, 10, 1)
    for path, kernel in kernels(classifier).items():
        error = np.mean((np.asarray(kernel) - before[path]) ** 2) / np.var(before[path])
        assert error < (0.03 if clusters == 16 else 0.5)  # a uniform distribution would leave 1 / clusters ** 2
    for variable, value in zip(others, others_before):
        np.testing.assert_array_equal(np.asarray(variable), value)
    random = np.random.default_rng(0)
    for _ in range(3):
        _step(clustering, classifier, lambda kernel: random.normal(size=kernel.shape, scale=0.02).astype("float32"))
        assert {len(values) for values in _values(classifier).values()} == {clusters}
    assert set(clustering.check(classifier)["values_by_layer"].values()) == {clusters}


def test_training_moves_centroids_and_moves_weights_between_them(classifier):
    clustering = WeightClustering(4, layers=["stage0_block0/mlp"])
    clustering.start(classifier, None, 10, 1)
    clustered = kernels(classifier, ["stage0_block0/mlp"])
    before = {path: np.unique(np.asarray(kernel)) for path, kernel in clustered.items()}
    _step(clustering, classifier, lambda kernel: np.full_like(kernel, 0.25))
    for path, kernel in clustered.items():
        np.testing.assert_allclose(np.unique(np.asarray(kernel)), before[path] + 0.25, atol=1e-6)
    # Changes that are too small to reach the next centroid add up.
    path, kernel = next(iter(clustered.items()))
    low, high = np.unique(np.asarray(kernel))[[0, -1]]
    index = tuple(np.argwhere(np.asarray(kernel) == low)[0])
    change = np.zeros(kernel.shape, "float32")
    change[index] = (high - low) / 8
    for _ in range(16):
        _step(clustering, classifier, lambda k: change if k.shape == change.shape else np.zeros_like(k))
    assert np.asarray(kernel)[index] == np.unique(np.asarray(kernel))[-1]


def test_zeros_of_a_pruned_network_stay(classifier):
    random = np.random.default_rng(0)
    for kernel in kernels(classifier).values():
        kernel.assign(np.asarray(kernel) * (random.random(kernel.shape) < 0.5))
    clustered = kernels(classifier, ["stage0_block0/mlp", "stage1_embed"])
    zeros = {path: np.asarray(kernel) == 0 for path, kernel in clustered.items()}
    clustering = WeightClustering(8, keep_zeros=True, layers=["stage0_block0/mlp", "stage1_embed"])
    clustering.start(classifier, None, 10, 1)
    for _ in range(3):
        _step(clustering, classifier, lambda kernel: random.normal(size=kernel.shape, scale=0.01).astype("float32"))
        for path, kernel in clustered.items():
            assert (np.asarray(kernel)[zeros[path]] == 0).all()
            assert len(np.unique(np.asarray(kernel))) == 8
    assert clustering.check(classifier)["sparsity"] >= 0.45
    # The float weights behind the zeros do not drift to another centroid either.
    float_weights = [variable.numpy() for variable in clustering.variables if variable.name.startswith("weights")]
    for weights, zero in zip(float_weights, zeros.values(), strict=True):
        assert (weights[zero] == 0).all()


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


def test_nan_weights_do_not_hang_clustering(classifier):
    clustering = WeightClustering(4, layers=["stage0_block0/mlp/fc1"])
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


def test_more_clusters_than_values_are_refused(classifier):
    with pytest.raises(RecipeError) as refusal:
        WeightClustering(65).start(classifier, None, 10, 1)
    assert refusal.value.argument == "clusters"
    assert " 64" in refusal.value.summary and "stage0_block0/attention/proj_q" in refusal.value.summary


def test_earlier_methods_and_settings_that_are_refused():
    with pytest.raises(RecipeError) as refusal:
        WeightClustering(after={"method": "qat"}).require(SMOKE)
    assert refusal.value.argument == "run" and "qat" in refusal.value.summary
    with pytest.raises(RecipeError) as refusal:
        WeightClustering().require(dataclasses.replace(SMOKE, ema=0.5))
    assert refusal.value.argument == "ema" and "ema=0.5" in refusal.value.summary
    WeightClustering(after={"method": "prune"}).require(SMOKE)


def test_a_network_with_too_many_values_is_an_error(classifier):
    with pytest.raises(RunError) as failure:
        WeightClustering(16).check(classifier)
    assert failure.value.argument == "clusters"
    for part in ("stage0_block0/attention/proj_q", "64", "16"):
        assert part in failure.value.summary
