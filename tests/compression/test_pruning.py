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
    """Steps that move every weight, as `fit` calls the callback around them -> the sparsity after each."""
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


@pytest.fixture
def classifier():
    return build_classifier("cvt_tiny", 10, (32, 32, 3))


@pytest.mark.parametrize("target", [0.5, 0.9])
def test_the_share_of_zeros_rises_over_the_first_half_and_stays(classifier, target):
    reached = _train(MagnitudePruning(target), classifier, steps=20, epochs=4)
    assert reached[0] == 0
    assert all(after >= before for before, after in itertools.pairwise(reached))
    assert 0.5 * target < reached[15] < target  # a polynomial: most of it comes early
    np.testing.assert_allclose(reached[40:], target, atol=2e-3)


def test_the_zeros_stay_where_they_are_in_the_second_half(classifier):
    pruning = MagnitudePruning(0.7)
    _train(pruning, classifier, steps=40)
    before = {path: np.asarray(kernel) == 0 for path, kernel in kernels(classifier).items()}
    for step in range(5):
        pruning.on_train_batch_begin(step)
        for kernel in kernels(classifier).values():
            kernel.assign_add(np.ones(kernel.shape))
        pruning.on_train_batch_end(step)
    for path, kernel in kernels(classifier).items():
        np.testing.assert_array_equal(np.asarray(kernel) == 0, before[path])


def test_a_constant_share_is_there_from_the_first_step(classifier):
    np.testing.assert_allclose(_train(MagnitudePruning(0.7, schedule="constant"), classifier, steps=5), 0.7, atol=2e-3)


def test_two_of_four_along_the_inputs_are_zero(classifier):
    pruning = MagnitudePruning(0.5, pattern="2:4")
    _train(pruning, classifier, steps=3)
    for kernel in kernels(classifier).values():
        inputs = np.moveaxis(np.asarray(kernel), -2, -1).reshape(-1, 4)
        np.testing.assert_array_equal((inputs == 0).sum(axis=1), 2)
    assert pruning.check(classifier)["sparsity"] == 0.5


def test_blocks_of_four_inputs_are_zero_in_dense_layers_alone(classifier):
    _train(MagnitudePruning(0.5, pattern="4x1", schedule="constant"), classifier, steps=2)
    chosen = kernels(classifier)
    assert np.count_nonzero(np.asarray(chosen["stage1_embed/proj"]) == 0) == 0
    for kernel in (kernel for kernel in chosen.values() if len(kernel.shape) == 2):
        blocks = (np.asarray(kernel).T.reshape(-1, 4) == 0).sum(axis=1)
        assert set(blocks) == {0, 4}
        assert np.mean(blocks == 4) == pytest.approx(0.5, abs=1 / len(blocks))


def test_the_rest_of_the_network_is_not_pruned(classifier):
    _train(MagnitudePruning(0.9, schedule="constant"), classifier, steps=2)
    chosen = {id(kernel) for kernel in kernels(classifier).values()}
    others = [variable for variable in classifier.trainable_variables if id(variable) not in chosen]
    assert others and share_of_zeros(others) == 0


def test_layers_can_be_named(classifier):
    pruning = MagnitudePruning(0.5, schedule="constant", layers=["head", "stage1_block0/mlp"])
    _train(pruning, classifier, steps=2)
    assert list(pruning.check(classifier)["sparsity_by_layer"]) == ["stage1_block0/mlp/fc1", "stage1_block0/mlp/fc2", "head"]
    assert share_of_zeros([classifier.get_layer("cvt").get_layer("head").kernel]) == 0.5
    assert share_of_zeros([kernels(classifier)["stage0_block0/mlp/fc1"]]) == 0


def test_updates_come_with_the_frequency(classifier):
    reached = _train(MagnitudePruning(0.8, frequency=10), classifier, steps=60)
    changes = [step for step in range(1, 60) if reached[step] != reached[step - 1]]
    assert changes == [10, 20, 30]


def test_weights_count_from_the_epoch_in_which_the_last_zeros_come(classifier):
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
    assert len(found := pruning.check(classifier)["sparsity_by_layer"]) > 2 and all(map(is_mlp, found))
    assert pruning.settings["layers"].endswith("is_mlp")


@pytest.mark.parametrize("pattern", ["2:4", "4x1"])
def test_inputs_that_do_not_come_in_fours_are_told_before_the_training(pattern):
    classifier = build_classifier(Variant((Stage(dim=18, depth=1, heads=1),)), 10, (32, 32, 3))
    with pytest.raises(RecipeError) as refusal:
        MagnitudePruning(0.5, pattern).start(classifier, None, 10, 1)
    assert refusal.value.argument == "layers"
    assert pattern in refusal.value.summary and "proj_q, with 18" in refusal.value.summary
    MagnitudePruning(0.5, pattern, layers=["stage0_block0/mlp/fc2"]).start(classifier, None, 10, 1)


def test_a_share_of_which_a_kernel_has_no_zero_is_refused(classifier):
    smallest = min(kernels(classifier).values(), key=lambda kernel: np.prod(kernel.shape))
    least = 0.5 / np.prod(smallest.shape)
    for pattern, smallest_share in (("unstructured", least), ("4x1", 4 * least)):
        with pytest.raises(RecipeError) as refusal:
            MagnitudePruning(smallest_share - 0.1 * least, pattern).start(classifier, None, 10, 1)
        assert refusal.value.argument == "sparsity"
        assert f"{smallest_share:.2g} for stage0_" in refusal.value.summary
    MagnitudePruning(1.1 * least).start(classifier, None, 10, 1)


def test_a_step_has_no_half(classifier):
    with pytest.raises(RecipeError) as refusal:
        MagnitudePruning(0.5).start(classifier, None, 1, 1)
    assert refusal.value.argument == "schedule"
    _train(pruning := MagnitudePruning(0.5, schedule="constant"), classifier, steps=1)
    assert pruning.check(classifier)["sparsity"] == pytest.approx(0.5, abs=2e-3)


@pytest.mark.parametrize("frequency", [6, 1000])
def test_a_schedule_that_would_do_nothing_is_refused(classifier, frequency):
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
def test_an_argument_out_of_its_range_is_refused(arguments, argument, parts):
    with pytest.raises(RecipeError) as refusal:
        MagnitudePruning(**arguments)
    assert refusal.value.argument == argument
    for part in parts:
        assert part in refusal.value.summary


def test_a_convolution_has_no_blocks(classifier):
    with pytest.raises(RecipeError) as refusal:
        MagnitudePruning(0.5, pattern="4x1", layers=["stage1"]).start(classifier, None, 10, 1)
    assert refusal.value.argument == "layers"
    assert "4x1" in refusal.value.summary and "stage1_embed/proj" in refusal.value.summary


@pytest.mark.parametrize("before", ["cluster", "qat"])
def test_what_it_can_not_come_after_is_refused(before):
    with pytest.raises(RecipeError) as refusal:
        MagnitudePruning(after={"method": before}).require(SMOKE)
    assert refusal.value.argument == "run" and before in refusal.value.summary


def test_a_moving_average_is_refused():
    with pytest.raises(RecipeError) as refusal:
        MagnitudePruning().require(dataclasses.replace(SMOKE, ema=0.9))
    assert refusal.value.argument == "ema" and "ema=0.9" in refusal.value.summary
    MagnitudePruning().require(SMOKE)


@pytest.mark.parametrize("pattern, target", [("unstructured", 0.7), ("2:4", 0.5), ("4x1", 0.5)])
def test_a_network_that_is_not_as_it_was_to_be_is_told(classifier, pattern, target):
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
def test_zeros_in_the_wrong_places_are_told(classifier, pattern):
    for kernel in kernels(classifier).values():  # half of them, but not in fours
        values = np.ones(kernel.shape)
        values[..., 1 : values.shape[-2] // 2 + 1, :] = 0
        kernel.assign(values)
    with pytest.raises(RunError) as failure:
        MagnitudePruning(0.5, pattern).check(classifier)
    assert "stage0_block0/attention/proj_q" in failure.value.summary and f"pattern {pattern}" in failure.value.summary


@pytest.mark.parametrize("pattern", ["2:4", "4x1"])
@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_the_pattern_is_in_the_files(classifier, pattern, kind):
    """Along the inputs, the last axis of TFLite's matrices: a phone's sparse kernels look for it there."""
    pruning = MagnitudePruning(0.5, pattern)
    _train(pruning, classifier, steps=4)
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), "uint8")
    file = tflite.convert(classifier, [str(i) for i in range(10)], kind, images)
    interpreter = Interpreter(model_content=file, experimental_op_resolver_type=OpResolverType.BUILTIN_REF)
    interpreter.allocate_tensors()
    matrices = [
        interpreter.get_tensor(operation["inputs"][1])
        for operation in interpreter._get_ops_details()
        if operation["op_name"] == "FULLY_CONNECTED"
    ]
    # Eight bits make a zero of a small weight too, so that a group may have more.
    zeros = {2, 3, 4} if pattern == "2:4" else {4}
    follow = [
        matrix.size
        for matrix in matrices
        if np.isin((matrix.reshape(-1, 4) == 0).sum(axis=1), list(zeros)).mean() >= (1 if pattern == "2:4" else 0.5)
    ]
    pruned = [kernel.shape[0] * kernel.shape[1] for kernel in pruning._kernels(classifier).values() if len(kernel.shape) == 2]
    assert not collections.Counter(pruned) - collections.Counter(follow)


def test_masks_and_step_are_kept_for_a_resume(classifier):
    pruning = MagnitudePruning(0.5)
    _train(pruning, classifier, steps=20)
    step, *masks = pruning.variables
    assert int(step) == 21
    for mask, kernel in zip(masks, kernels(classifier).values(), strict=True):
        np.testing.assert_array_equal(mask.numpy() == 0, np.asarray(kernel) == 0)


def test_it_prunes_in_mixed_precision_too():
    classifier = build_classifier("cvt_tiny", 10, (32, 32, 3), dtype="mixed_bfloat16")
    pruning = MagnitudePruning(0.7, schedule="constant")
    pruning.start(classifier, None, 2, 1)
    classifier.compile("sgd", keras.losses.CategoricalCrossentropy(from_logits=True))
    images, labels = np.zeros((4, 32, 32, 3), "float32"), np.eye(10, dtype="float32")[:4]
    classifier.fit(images, labels, batch_size=2, callbacks=[pruning], verbose=0)
    assert share_of_zeros(kernels(classifier).values()) == pytest.approx(0.7, abs=2e-3)
