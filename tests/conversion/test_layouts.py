import pytest
import torch
from checkpoint_files import config_of, weights_of
from transformers import CvtConfig, CvtForImageClassification

from cvt_keras import VARIANTS, CvT, Stage, Variant
from cvt_keras.conversion import checkpoint, layouts
from cvt_keras.conversion.layouts import LAYOUTS, microsoft_weights, transformers_weights


@pytest.mark.parametrize("name", ["cvt_13", "cvt_21", "cvt_w24"])
def test_transformers_has_the_keys_and_shapes_of_the_papers_networks(name):
    with torch.device("meta"):  # shapes without memory
        reference = CvtForImageClassification(CvtConfig(**config_of(name, 1000))).state_dict()
    weights = transformers_weights(name, 1000)
    ours = {weight.key: weight.shape for weight in weights} | {key: () for key in layouts.counters(weights)}
    assert ours == {key: tuple(value.shape) for key, value in reference.items()}


def _keras_shapes(weights):
    return {weight.path: checkpoint._transposed(weight.shape, weight.axes) for weight in weights}


@pytest.mark.parametrize("name", ["cvt_13", "cvt_21", "cvt_w24", "cvt_tiny"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_map_covers_the_network_whole(layout, name):
    weights = LAYOUTS[layout].weights(name, 7, 4)
    assert len({weight.key for weight in weights}) == len({weight.path for weight in weights}) == len(weights)
    if name == "cvt_w24":  # a gigabyte
        shapes = {
            path: shape for layout in LAYOUTS for path, shape in _keras_shapes(LAYOUTS[layout].weights(name, 7, 4)).items()
        }
    else:
        shapes = {variable.path: tuple(variable.shape) for variable in CvT(VARIANTS[name], 7, (None, None, 4)).weights}
    assert shapes == _keras_shapes(weights)


@pytest.mark.parametrize("projection", ["avg", "linear"])
def test_the_authors_ablations_have_a_map(projection):
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
def test_what_a_layout_has_not_is_refused(layout, variant, part):
    with pytest.raises(ValueError) as error:
        LAYOUTS[layout].weights(variant)
    assert part in str(error.value)


@pytest.mark.parametrize("name", ["cvt_13", "cvt_21", "cvt_w24"])
def test_the_papers_networks_are_known_by_their_shapes(name):
    shapes = {weight.key: weight.shape for weight in microsoft_weights(name, 5, 4)}
    assert layouts.paper_network(shapes) == name
