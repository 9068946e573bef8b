import functools
import shlex

import numpy as np
import pytest

from cvt_keras import build_classifier
from cvt_keras.compression.kernels import describe, kernels, share_of_zeros
from cvt_keras.errors import RecipeError


@pytest.fixture(scope="module")
def cvt_cifar():
    return build_classifier("cvt_cifar", 10, (32, 32, 3))


def test_stem_depthwise_convolutions_and_head_are_left_out(cvt_cifar):
    chosen = kernels(cvt_cifar)
    assert len(chosen) == 27
    assert {"stage0_embed/proj", "stage2_block0/mlp/fc2", "stage1_block1/attention/proj_q"} <= set(chosen)
    assert not [path for path in chosen if "stem" in path or "depthwise" in path or "head" in path]
    assert all(kernel.name == "kernel" for kernel in chosen.values())
    assert chosen["stage0_embed/proj"].shape == (3, 3, 32, 64)


def test_without_a_stem_the_first_embedding_is_left_out(classifier):
    assert "stage0_embed/proj" not in kernels(classifier)
    assert "stage1_embed/proj" in kernels(classifier)


def test_a_second_network_in_the_process_has_the_same_paths(classifier):
    assert list(kernels(classifier)) == list(kernels(build_classifier("cvt_tiny", 10, (32, 32, 3))))


@pytest.mark.parametrize(
    "names, number",
    [
        (["stage2_block0/mlp/fc1"], 1),
        (["stem1/conv", "head"], 2),
        (["stage0"], 10),  # with its depthwise convolutions, as they match the name
        (["stage0", "stage0_embed"], 10),
    ],
)
def test_layers_can_be_named(names, number, cvt_cifar):
    assert len(kernels(cvt_cifar, names)) == number


@pytest.mark.parametrize("name", ["stage9", "stage0_block", "norm", "stage0_embed/proj/kernel", ""])
def test_an_unknown_layer_is_refused_with_a_list_of_layers(name, cvt_cifar):
    with pytest.raises(RecipeError) as refusal:
        kernels(cvt_cifar, [name])
    assert refusal.value.argument == "layers"
    assert "stage2_block0/mlp/fc1" in refusal.value.summary and refusal.value.summary.endswith(f": {name}")


def test_a_predicate_chooses(classifier):
    assert list(kernels(classifier, lambda path: path == "head")) == ["head"]
    with pytest.raises(RecipeError) as refusal:
        kernels(classifier, lambda path: False)
    assert refusal.value.argument == "layers"
    assert "head" in refusal.value.summary and "lambda" in refusal.value.summary


@pytest.mark.parametrize("layers", [(), [], "stage1"])
def test_no_names_or_one_string_are_refused(layers, classifier):
    with pytest.raises(RecipeError) as refusal:
        kernels(classifier, layers)
    assert refusal.value.argument == "layers"


def test_recipe_json_holds_names_or_the_predicates_name():
    assert describe(None) == []  # in recipe.json since version 0.1
    assert describe(("stage1",)) == ["stage1"]
    assert describe(shlex.quote) == "shlex.quote"
    assert "partial" in describe(functools.partial(str.startswith, "stage0"))


def test_the_share_of_zeros_is_over_all_kernels_together():
    assert share_of_zeros([np.array([0.0, 1.0, 0.0]), np.array([[2.0]])]) == 0.5
