import pytest
import torch
from checkpoint_files import config_of, weights_of
from transformers import CvtConfig, CvtForImageClassification

from cvt_keras import CvT, Stage, Variant
from cvt_keras.conversion import checkpoint, layouts
from cvt_keras.conversion.layouts import LAYOUTS, microsoft_weights, transformers_weights


@pytest.mark.parametrize("name", ["cvt_13", "cvt_21", "cvt_w24"])
def test_the_transformers_map_has_the_keys_and_shapes_of_its_model(name):
    with torch.device("meta"):  # shapes without memory
        reference = CvtForImageClassification(CvtConfig(**config_of(name, 1000))).state_dict()
    weights = transformers_weights(name, 1000)
    ours = {weight.key: weight.shape for weight in weights} | {key: () for key in layouts.counters(weights)}
    assert ours == {key: tuple(value.shape) for key, value in reference.items()}


def _keras_shapes(weights):
    return {weight.path: checkpoint._transposed(weight.shape, weight.axes) for weight in weights}


def _maps(name):
    for layout in LAYOUTS.values():
        weights = layout.weights(name, 7, 4)
        assert len({weight.key for weight in weights}) == len({weight.path for weight in weights}) == len(weights)
        yield _keras_shapes(weights)


@pytest.mark.parametrize("name", ["cvt_tiny", "cvt_13", pytest.param("cvt_21", marks=pytest.mark.slow)])
def test_each_map_covers_the_whole_network(name):
    shapes = {variable.path: tuple(variable.shape) for variable in CvT(name, 7, (None, None, 4)).weights}
    for mapped in _maps(name):
        assert mapped == shapes


@pytest.mark.parametrize("name", ["cvt_21", "cvt_w24"])  # the second would take a gigabyte
def test_the_maps_cover_the_same_network(name):
    microsoft, transformers = _maps(name)
    assert microsoft == transformers


@pytest.mark.parametrize("projection", ["avg", "linear"])
def test_the_map_covers_the_papers_ablations(projection):
    variant = Variant((Stage(8, 1, 1, projection=projection, qkv_bias=False),))
    keys = {weight.key for weight in microsoft_weights(variant, 5)}
    assert not any("conv_proj" in key or key.endswith("proj_q.bias") for key in keys)
    assert {weight.path for weight in microsoft_weights(variant, 5)} == set(weights_of(CvT(variant, 5, (16, 16, 3))))


@pytest.mark.parametrize(
    "layout, variant, part",
    [
        ("microsoft", "cvt_cifar", "stem=(32,"),
        ("transformers", "cvt_cifar", "stem=(32,"),
        ("transformers", Variant((Stage(8, 1, 1, projection="avg", cls_token=True),)), "projection='avg'"),
        ("transformers", Variant((Stage(8, 1, 1, cls_token=True), Stage(16, 1, 1, cls_token=True))), "stage 0"),
        ("transformers", Variant((Stage(8, 1, 1), Stage(16, 1, 1))), "cls_token=False in its last stage"),
    ],
)
def test_a_network_that_a_layout_lacks_is_refused(layout, variant, part):
    with pytest.raises(ValueError) as error:
        LAYOUTS[layout].weights(variant)
    assert part in str(error.value)


@pytest.mark.parametrize("name", ["cvt_13", "cvt_21", "cvt_w24"])
def test_the_papers_networks_are_recognised_by_their_shapes(name):
    shapes = {weight.key: weight.shape for weight in microsoft_weights(name, 5, 4)}
    assert layouts.paper_network(shapes) == name
