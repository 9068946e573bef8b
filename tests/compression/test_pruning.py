import collections
import dataclasses
import itertools

import keras
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from cvt_keras import Stage, Variant, build_classifier
from cvt_keras.compression.kernels import kernels, share_of_zeros
from cvt_keras.compression.pruning import MagnitudePruning
from cvt_keras.errors import RecipeError, RunError
from cvt_keras.export import tflite
from cvt_keras.training.recipes import SMOKE


def _train(pruning, classifier, steps, epochs=1):
    """Makes steps that move every weight, with the callback's calls around them. Returns the sparsity after each step."""
    pruning.start(classifier, None, steps, epochs)
    random = np.random.default_rng(0)
    reached = []
    for step in range(steps * epochs):
        pruning.on_train_batch_begin(step)
        for variable in classifier.trainable_variables:
            variable.assign_add(random.normal(size=variable.shape, scale=1e-3))
        pruning.on_train_batch_end(step)
        reached.append(share_of_zeros(kernels(classifier).values()))
    return reached


def test_the_zeros_are_added_in_the_first_half_and_stay(classifier):
    pruning = MagnitudePruning(0.9)
    reached = _train(pruning, classifier, steps=10, epochs=4)
    assert reached[0] == 0
    assert all(after >= before for before, after in itertools.pairwise(reached))
    assert 0.5 * 0.9 < reached[7] < 0.9  # the polynomial adds most of them early
    np.testing.assert_allclose(reached[20:], 0.9, atol=2e-3)
    step, *masks = pruning.variables  # what a checkpoint holds
    assert int(step) == 41
    for mask, kernel in zip(masks, kernels(classifier).values(), strict=True):
        np.testing.assert_array_equal(mask.numpy() == 0, np.asarray(kernel) == 0)
    before = {path: np.asarray(kernel) == 0 for path, kernel in kernels(classifier).items()}
    for step in range(3):
        pruning.on_train_batch_begin(step)
        for kernel in kernels(classifier).values():
            kernel.assign_add(np.ones(kernel.shape))
        pruning.on_train_batch_end(step)
    for path, kernel in kernels(classifier).items():
        np.testing.assert_array_equal(np.asarray(kernel) == 0, before[path])


def test_constant_sets_all_zeros_at_the_first_step_in_the_chosen_kernels_only(classifier):
    np.testing.assert_allclose(_train(MagnitudePruning(0.7, schedule="constant"), classifier, steps=3), 0.7, atol=2e-3)
    chosen = {id(kernel) for kernel in kernels(classifier).values()}
    others = [variable for variable in classifier.trainable_variables if id(variable) not in chosen]
    assert others and share_of_zeros(others) == 0


def test_2_4_sets_two_zeros_in_every_four_inputs(classifier):
    pruning = MagnitudePruning(0.5, pattern="2:4")
    _train(pruning, classifier, steps=3)
    for kernel in kernels(classifier).values():
        inputs = np.moveaxis(np.asarray(kernel), -2, -1).reshape(-1, 4)
        np.testing.assert_array_equal((inputs == 0).sum(axis=1), 2)
    assert pruning.check(classifier)["sparsity"] == 0.5


def test_4x1_sets_blocks_of_four_inputs_in_dense_layers_only(classifier):
    _train(MagnitudePruning(0.5, pattern="4x1", schedule="constant"), classifier, steps=2)
    chosen = kernels(classifier)
    assert np.count_nonzero(np.asarray(chosen["stage1_embed/proj"]) == 0) == 0
    for kernel in (kernel for kernel in chosen.values() if len(kernel.shape) == 2):
        blocks = (np.asarray(kernel).T.reshape(-1, 4) == 0).sum(axis=1)
        assert set(blocks) == {0, 4}
        assert np.mean(blocks == 4) == pytest.approx(0.5, abs=1 / len(blocks))


def test_layers_can_be_named(classifier):
    pruning = MagnitudePruning(0.5, schedule="constant", layers=["head", "stage1_block0/mlp"])
    _train(pruning, classifier, steps=2)
    assert list(pruning.check(classifier)["sparsity_by_layer"]) == ["stage1_block0/mlp/fc1", "stage1_block0/mlp/fc2", "head"]
    assert share_of_zeros([classifier.get_layer("cvt").get_layer("head").kernel]) == 0.5
    assert share_of_zeros([kernels(classifier)["stage0_block0/mlp/fc1"]]) == 0


def test_updates_come_with_the_frequency(classifier):
    reached = _train(MagnitudePruning(0.8, frequency=4, layers=["stage0"]), classifier, steps=24)
    changes = [step for step in range(1, 24) if reached[step] != reached[step - 1]]
    assert changes == [4, 8, 12]


def test_the_first_epoch_to_keep_is_the_one_with_the_last_zeros(classifier):
    pruning = MagnitudePruning(0.7)
    pruning.start(classifier, None, steps=10, epochs=4)
    assert pruning.first_epoch == 2
    pruning.start(classifier, None, steps=10, epochs=1)
    assert pruning.first_epoch == 0
    pruning = MagnitudePruning(0.7, schedule="constant")
    pruning.start(classifier, None, steps=10, epochs=4)
    assert pruning.first_epoch == 0


def test_layers_can_be_chosen_by_a_predicate(classifier):
    def is_mlp(path):
        return "/mlp/" in path

    pruning = MagnitudePruning(0.5, schedule="constant", layers=is_mlp)
    _train(pruning, classifier, steps=2)
    assert len(paths := pruning.check(classifier)["sparsity_by_layer"]) > 2 and all(map(is_mlp, paths))
    assert pruning.settings["layers"].endswith("is_mlp")


@pytest.mark.parametrize("pattern", ["2:4", "4x1"])
def test_inputs_that_are_no_multiple_of_four_are_refused_before_the_training(pattern):
    classifier = build_classifier(Variant((Stage(dim=18, depth=1, heads=1),)), 10, (32, 32, 3))
    with pytest.raises(RecipeError) as refusal:
        MagnitudePruning(0.5, pattern).start(classifier, None, 10, 1)
    assert refusal.value.argument == "layers"
    assert pattern in refusal.value.summary and "proj_q, with 18" in refusal.value.summary
    MagnitudePruning(0.5, pattern, layers=["stage0_block0/mlp/fc2"]).start(classifier, None, 10, 1)


def test_a_sparsity_without_a_zero_in_a_kernel_is_refused(classifier):
    smallest = min(kernels(classifier).values(), key=lambda kernel: np.prod(kernel.shape))
    least = 0.5 / np.prod(smallest.shape)
    for pattern, smallest_share in (("unstructured", least), ("4x1", 4 * least)):
        with pytest.raises(RecipeError) as refusal:
            MagnitudePruning(smallest_share - 0.1 * least, pattern).start(classifier, None, 10, 1)
        assert refusal.value.argument == "sparsity"
        assert f"{smallest_share:.2g} for stage0_" in refusal.value.summary
    MagnitudePruning(1.1 * least).start(classifier, None, 10, 1)


def test_a_training_of_one_step_needs_a_constant_schedule(classifier):
    with pytest.raises(RecipeError) as refusal:
        MagnitudePruning(0.5).start(classifier, None, 1, 1)
    assert refusal.value.argument == "schedule"
    _train(pruning := MagnitudePruning(0.5, schedule="constant"), classifier, steps=1)
    assert pruning.check(classifier)["sparsity"] == pytest.approx(0.5, abs=2e-3)


@pytest.mark.parametrize("frequency", [6, 1000])
def test_a_frequency_that_prunes_nothing_is_refused(classifier, frequency):
    with pytest.raises(RecipeError) as refusal:
        MagnitudePruning(0.7, frequency=frequency).start(classifier, None, steps=10, epochs=1)
    assert refusal.value.argument == "frequency"
    for part in ("at most 5 ", "10 steps", f"frequency={frequency}"):
        assert part in refusal.value.summary


@pytest.mark.parametrize(
    "arguments, argument, parts",
    [
        ({"sparsity": 0}, "sparsity", ["sparsity=0"]),
        ({"sparsity": 1.0}, "sparsity", ["sparsity=1.0"]),
        ({"sparsity": -0.1}, "sparsity", ["sparsity=-0.1"]),
        ({"sparsity": float("nan")}, "sparsity", ["sparsity=nan"]),
        ({"sparsity": 0.7, "pattern": "2:4"}, "sparsity", ["0.5", "2:4", "sparsity=0.7"]),
        ({"sparsity": 0.5, "pattern": "2:4", "schedule": "constant"}, "schedule", ["2:4", "schedule=constant"]),
        ({"sparsity": 0.5, "pattern": "2:4", "frequency": 3}, "frequency", ["2:4", "frequency=3"]),
        ({"schedule": "constant", "frequency": 3}, "frequency", ["constant", "frequency=3"]),
        ({"pattern": "3:4"}, "pattern", ["unstructured, 2:4, 4x1", "3:4"]),
        ({"schedule": "cubic"}, "schedule", ["polynomial, constant", "cubic"]),
        ({"frequency": 0}, "frequency", ["at least 1", "frequency=0"]),
        ({"layers": ()}, "layers", []),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, argument, parts):
    with pytest.raises(RecipeError) as refusal:
        MagnitudePruning(**arguments)
    assert refusal.value.argument == argument
    for part in parts:
        assert part in refusal.value.summary


def test_4x1_refuses_convolutions(classifier):
    with pytest.raises(RecipeError) as refusal:
        MagnitudePruning(0.5, pattern="4x1", layers=["stage1"]).start(classifier, None, 10, 1)
    assert refusal.value.argument == "layers"
    assert "4x1" in refusal.value.summary and "stage1_embed/proj" in refusal.value.summary


@pytest.mark.parametrize("before", ["cluster", "qat"])
def test_earlier_methods_that_are_refused(before):
    with pytest.raises(RecipeError) as refusal:
        MagnitudePruning(after={"method": before}).require(SMOKE)
    assert refusal.value.argument == "run" and before in refusal.value.summary


def test_a_moving_average_is_refused():
    with pytest.raises(RecipeError) as refusal:
        MagnitudePruning().require(dataclasses.replace(SMOKE, ema=0.9))
    assert refusal.value.argument == "ema" and "ema=0.9" in refusal.value.summary
    MagnitudePruning().require(SMOKE)


@pytest.mark.parametrize("pattern, target", [("unstructured", 0.7), ("2:4", 0.5), ("4x1", 0.5)])
def test_a_network_with_the_wrong_sparsity_is_an_error(classifier, pattern, target):
    pruning = MagnitudePruning(target, pattern)
    with pytest.raises(RunError) as failure:
        pruning.check(classifier)
    assert failure.value.argument == "layers"
    for part in ("stage0_block0/attention/proj_q", " 0.00%", f" {target:.0%}"):
        assert part in failure.value.summary
    for kernel in kernels(classifier).values():
        kernel.assign(np.zeros(kernel.shape))
    with pytest.raises(RunError) as failure:
        pruning.check(classifier)
    assert failure.value.argument == "layers"
    for part in ("stage0_block0/attention/proj_q", " 100.00%", f" {target:.0%}"):
        assert part in failure.value.summary


@pytest.mark.parametrize("pattern", ["2:4", "4x1"])
def test_zeros_off_the_pattern_are_an_error(classifier, pattern):
    for kernel in kernels(classifier).values():  # half of them, but not in fours
        values = np.ones(kernel.shape)
        values[..., 1 : values.shape[-2] // 2 + 1, :] = 0
        kernel.assign(values)
    with pytest.raises(RunError) as failure:
        MagnitudePruning(0.5, pattern).check(classifier)
    assert "stage0_block0/attention/proj_q" in failure.value.summary and f"pattern {pattern}" in failure.value.summary


@pytest.mark.parametrize("pattern, kind", [("2:4", "int8"), ("4x1", "float32")])
def test_the_pattern_is_in_the_files(classifier, pattern, kind):
    """It is along the inputs, the last axis of TFLite's matrices, where a phone's sparse kernels expect it."""
    pruning = MagnitudePruning(0.5, pattern)
    _train(pruning, classifier, steps=2)
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), "uint8")
    file = tflite.convert(classifier, [str(i) for i in range(10)], kind, images)
    interpreter = Interpreter(model_content=file, experimental_op_resolver_type=OpResolverType.BUILTIN_REF)
    interpreter.allocate_tensors()
    matrices = [
        interpreter.get_tensor(operation["inputs"][1])
        for operation in interpreter._get_ops_details()
        if operation["op_name"] == "FULLY_CONNECTED"
    ]
    # int8 rounds small weights to zero as well, so a group may have more.
    zeros = {2, 3, 4} if pattern == "2:4" else {4}
    follow = [
        matrix.size
        for matrix in matrices
        if np.isin((matrix.reshape(-1, 4) == 0).sum(axis=1), list(zeros)).mean() >= (1 if pattern == "2:4" else 0.5)
    ]
    pruned = [kernel.shape[0] * kernel.shape[1] for kernel in pruning._kernels(classifier).values() if len(kernel.shape) == 2]
    assert not collections.Counter(pruned) - collections.Counter(follow)


def test_pruning_in_mixed_precision():
    classifier = build_classifier("cvt_tiny", 10, (32, 32, 3), dtype="mixed_bfloat16")
    pruning = MagnitudePruning(0.7, schedule="constant")
    pruning.start(classifier, None, 2, 1)
    classifier.compile("sgd", keras.losses.CategoricalCrossentropy(from_logits=True), jit_compile=False)
    images, labels = np.zeros((4, 32, 32, 3), "float32"), np.eye(10, dtype="float32")[:4]
    classifier.fit(images, labels, batch_size=2, callbacks=[pruning], verbose=0)
    assert share_of_zeros(kernels(classifier).values()) == pytest.approx(0.7, abs=2e-3)
