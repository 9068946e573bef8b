import dataclasses

import pytest
import torch
from checkpoint_files import config_of, weights_of
from transformers import CvtConfig, CvtForImageClassification

from cvt_keras import VARIANTS, CvT, Stage, Variant
from cvt_keras.conversion import checkpoint, layouts
from cvt_keras.conversion.layouts import LAYOUTS, microsoft_weights, transformers_weights
from cvt_keras.errors import ArgumentError


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
        ("transformers", Variant((Stage(8, 1, 1, projection="avg", cls_token=True),)), "projection='avg'"),
        ("transformers", Variant((Stage(8, 1, 1, cls_token=True), Stage(16, 1, 1, cls_token=True))), "stage 0"),
        ("transformers", Variant((Stage(8, 1, 1), Stage(16, 1, 1))), "cls_token=False in its last stage"),
    ],
)
def test_a_network_that_a_layout_lacks_is_refused(layout, variant, part):
    with pytest.raises(ValueError) as error:
        LAYOUTS[layout].weights(variant)
    assert part in str(error.value)


# Each field that only this project has, with a value that the others lack.
EXTENSIONS = {"stem": (32, 32), "whitening": 2, "norm": "batch", "attention_scale": "head"}
STAGE_EXTENSIONS = {"pool": True, "residual_convs": 1, "mlp_conv": True}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name, value", [*EXTENSIONS.items(), *STAGE_EXTENSIONS.items()])
def test_a_field_that_both_layouts_lack_is_refused(layout, name, value):
    in_stage = name in STAGE_EXTENSIONS
    stages = (Stage(8, 1, 2), Stage(8, 2, 2, cls_token=True, **({name: value} if in_stage else {})))
    variant = Variant(stages, **({} if in_stage else {name: value}))
    expected = f"Received: {name}={value!r}" + (" in stage 1" if in_stage else "")
    with pytest.raises(ValueError) as error:
        LAYOUTS[layout].weights(variant)
    assert str(error.value).endswith(expected)
    require = {"microsoft": layouts.require_microsoft, "transformers": layouts.require_transformers}[layout]
    with pytest.raises(ArgumentError) as error:
        require(variant, "model")
    assert error.value.argument == "model"
    [detail] = error.value.details
    assert detail.endswith(expected)


def test_every_field_has_its_place_in_the_layouts_or_is_refused():
    """The others leave the shapes and the meaning of the weights alone, or both layouts know them."""
    training = {"activation", "identity_init", "drop_path"}
    sizes = {"stages", "dim", "depth", "heads", "kernel_size", "stride", "padding", "mlp_ratio"}
    known = sizes | {"projection", "qkv_bias", "stride_q", "stride_kv", "cls_token"}
    fields = {field.name for record in (Variant, Stage) for field in dataclasses.fields(record)}
    assert fields == training | known | EXTENSIONS.keys() | STAGE_EXTENSIONS.keys()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_ignore_identity_init(layout):
    variant = dataclasses.replace(VARIANTS["cvt_tiny"], identity_init=True)
    assert LAYOUTS[layout].weights(variant) == LAYOUTS[layout].weights("cvt_tiny")


@pytest.mark.parametrize("name", ["cvt_13", "cvt_21", "cvt_w24"])
def test_the_papers_networks_are_recognised_by_their_shapes(name):
    shapes = {weight.key: weight.shape for weight in microsoft_weights(name, 5, 4)}
    assert layouts.paper_network(shapes) == name
