import functools
import shlex

import numpy as np
import pytest

from cvt_keras import Stage, Variant, build_classifier
from cvt_keras.compression.kernels import describe, kernels, share_of_zeros
from cvt_keras.errors import RecipeError


@pytest.fixture(scope="module")
def cvt_cifar():
    return build_classifier("cvt_cifar", 10, (32, 32, 3))


def test_the_first_convolution_depthwise_convolutions_and_head_are_left_out(cvt_cifar):
    chosen = kernels(cvt_cifar)
    assert len(chosen) == 27
    assert {"stage1_embed/proj", "stage1_conv0/conv", "stage2_block1/mlp/fc2", "stage1_block0/attention/proj_q"} <= set(chosen)
    assert not [path for path in chosen if path == "stage0_embed/proj" or "depthwise" in path or "head" in path]
    assert all(kernel.name == "kernel" for kernel in chosen.values())
    assert chosen["stage1_embed/proj"].shape == (3, 3, 48, 128)


def test_with_a_stem_the_first_embedding_is_chosen():
    variant = Variant((Stage(dim=8, depth=1, heads=1),), stem=(4, 4))
    classifier = build_classifier(variant, 10, (32, 32, 3))
    chosen = kernels(classifier)
    assert "stage0_embed/proj" in chosen and not [path for path in chosen if "stem" in path]
    assert list(kernels(classifier, ["stem1/conv", "head"])) == ["stem1/conv", "head"]


def test_the_fixed_kernel_of_whitening_is_never_chosen(cvt_cifar):
    network = cvt_cifar.get_layer("cvt")
    assert network.get_layer("whitening").kernel.name == "kernel"
    network.trainable = False
    network.trainable = True
    assert not [path for path in kernels(cvt_cifar, lambda path: True) if "whitening" in path]
    with pytest.raises(RecipeError):
        kernels(cvt_cifar, ["whitening"])


def test_a_second_network_in_the_process_has_the_same_paths(classifier):
    assert list(kernels(classifier)) == list(kernels(build_classifier("cvt_tiny", 10, (32, 32, 3))))


@pytest.mark.parametrize(
    "names, number",
    [
        (["stage2_block0/mlp/fc1"], 1),
        (["stage1_conv0", "head"], 2),
        (["stage0"], 11),  # with its depthwise convolutions, as they match the name
        (["stage0", "stage0_embed"], 11),
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
