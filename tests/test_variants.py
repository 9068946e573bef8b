import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from cvt_keras.variants import VARIANTS, Stage, Variant, different_fields, get_variant, macs, pooled, to_dict

CVT_13 = VARIANTS["cvt_13"]


@pytest.mark.parametrize("name, side, published", [("cvt_13", 224, 4.5e9), ("cvt_21", 224, 7.1e9), ("cvt_w24", 384, 193.2e9)])
def test_macs_are_the_published_ones(name, side, published):
    assert macs(name, (side, side, 3), 1000) == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize("kernel_size, stride, padding, expected", [(7, 4, 2, 100e6), (3, 2, 1, 349e6), (3, 1, 1, 1380e6)])
def test_macs_of_13_layers_at_32x32(kernel_size, stride, padding, expected):
    stem = dataclasses.replace(CVT_13.stages[0], kernel_size=kernel_size, stride=stride, padding=padding)
    variant = Variant((stem, *CVT_13.stages[1:]))
    assert macs(variant, (32, 32, 3), 10) == pytest.approx(expected, rel=0.02)


def test_macs_by_hand():
    variant = Variant((Stage(dim=8, depth=2, heads=2, mlp_ratio=2.0, cls_token=True),), stem=(4,))
    stem = 8 * 12 * 9 * 3 * 4
    embedding = 4 * 6 * 9 * 4 * 8
    queries, keys = 4 * 6, 2 * 3
    convolutions = 9 * 8 * (queries + 2 * keys)
    linear = 8 * 8 * 2 * (queries + 1 + keys + 1)
    attention = 2 * (queries + 1) * (keys + 1) * 8
    mlp = 2 * (queries + 1) * 8 * 16
    assert macs(variant, (8, 12, 3), 5) == stem + embedding + 2 * (convolutions + linear + attention + mlp) + 8 * 5


def test_macs_by_hand_of_parts_that_the_paper_lacks():
    stage = Stage(dim=8, depth=1, heads=2, mlp_ratio=2.0, pool=True, residual_convs=2, mlp_conv=True)
    whitening = 8 * 12 * (4 * 3) * (2 * 4 * 3)
    embedding = 8 * 12 * 9 * 24 * 8  # before pooling
    residual_convs = 2 * (4 * 6 * 9 * 8 * 8)
    mlp_conv = 4 * 6 * 9 * 16
    plain = macs(Variant((dataclasses.replace(stage, pool=False, residual_convs=0, mlp_conv=False),)), (8, 12, 24), 5)
    plain -= 4 * 6 * 9 * 24 * 8
    expected = whitening + embedding + residual_convs + mlp_conv + plain
    assert macs(Variant((stage,), whitening=2), (9, 13, 3), 5) == expected


def test_macs_of_the_ablations():
    def cost(projection):
        return macs(Variant((Stage(dim=8, depth=1, heads=1, projection=projection),)), (16, 16, 3), 5)

    convolutions = 9 * 8 * (64 + 2 * 16)
    more_keys = 25 - 16  # ceil mode on an even grid
    assert cost("avg") == cost("dw_bn") - convolutions + more_keys * (2 * 8 * 8 + 2 * 64 * 8)
    assert cost("linear") == cost("dw_bn") - convolutions + 48 * (2 * 8 * 8 + 2 * 64 * 8)


def test_macs_need_a_known_size():
    with pytest.raises(ValueError, match=r"`input_shape`.*all known.*None"):
        macs("cvt_tiny", (None, None, 3), 10)
    with pytest.raises(ValueError, match=r"`input_shape`.*\(32, 32\)"):
        macs("cvt_tiny", (32, 32), 10)


@pytest.mark.parametrize("side, expected", [(7, 4), (8, 5), (9, 5)])
def test_pooled_rounds_up(side, expected):
    assert pooled(side, 3, 2) == expected


def test_grids_follow_the_paper():
    assert CVT_13.grids(224, 224) == [(56, 56), (28, 28), (14, 14)]
    assert CVT_13.grids(384, 224) == [(96, 56), (48, 28), (24, 14)]
    assert CVT_13.stride == 16


def test_grids_after_whitening_and_pooling():
    # 33x40 pixels, 32x39 after whitening; pooling drops an odd last row or column, a strided convolution does not.
    stages = (Stage(8, 1, 1, pool=True), Stage(8, 1, 1), Stage(8, 1, 1, pool=True))
    assert Variant(stages, whitening=2).grids(33, 40) == [(16, 19), (8, 10), (4, 5)]


@pytest.mark.parametrize(
    "variant, side",
    [
        ("cvt_13", 16),
        ("cvt_tiny", 4),
        ("cvt_cifar", 9),
        (Variant((Stage(8, 1, 1, kernel_size=7, stride=1, padding=0),)), 7),
        (Variant((Stage(8, 1, 1, kernel_size=3, stride=2, padding=0, pool=True), Stage(8, 1, 1)), whitening=3), 6),
        (Variant((Stage(8, 1, 1, kernel_size=2, stride=1, padding=1),)), 1),
    ],
)
def test_the_smallest_side_leaves_tokens_in_every_stage(variant, side):
    variant = get_variant(variant)
    assert variant.min_side == side
    assert min(map(min, variant.grids(side, side + 1))) >= 1
    with pytest.raises(ValueError, match=f"`input_shape` must be at least {side}x{side} .*Received: {side}x{side - 1}"):
        variant.grids(side, side - 1)


def test_drop_path_rises_linearly_within_a_stage():
    rates = VARIANTS["cvt_13"].stages[2].drop_path_rates
    assert rates == pytest.approx([0.1 * i / 9 for i in range(10)])
    assert CVT_13.stages[1].drop_path_rates == (0.0, 0.0)
    assert Stage(8, 1, 1, drop_path=0.1).drop_path_rates == (0.0,)


def test_different_fields_are_those_of_the_network_and_of_each_stage():
    first, second = Stage(8, 1, 1), Stage(8, 2, 1, pool=True)
    variant = Variant((first, second), whitening=2)
    assert different_fields(variant, variant) == {}
    assert different_fields(variant, Variant((first, first))) == {
        "whitening": (2, 0),
        "depth of stage 1": (2, 1),
        "pool of stage 1": (True, False),
    }
    assert different_fields(variant, Variant((second,), whitening=2)) == {
        "number of stages": (2, 1),
        "depth of stage 0": (1, 2),
        "pool of stage 0": (False, True),
    }


def test_a_variant_survives_json():
    for variant in VARIANTS.values():
        assert get_variant(json.loads(json.dumps(to_dict(variant)))) == variant


@pytest.mark.parametrize(
    "make, parts",
    [
        (lambda: Stage(64, 1, heads=5), ["heads=5", "dim=64"]),
        (lambda: Stage(64, 0, 1), ["`depth`", "depth=0"]),
        (lambda: Stage(64.0, 1, 1), ["`dim`", "64.0"]),
        (lambda: Stage(64, 1, 1, stride=0), ["stride=0"]),
        (lambda: Stage(64, 1, 1, padding=-1), ["padding=-1"]),
        (lambda: Stage(64, 1, 1, mlp_ratio=0), ["mlp_ratio=0"]),
        (lambda: Stage(64, 1, 1, mlp_ratio=float("nan")), ["mlp_ratio=nan"]),
        (lambda: Stage(8, 1, 1, mlp_ratio=0.01), ["mlp_ratio=0.01", "dim=8"]),
        (lambda: Stage(64, 1, 1, drop_path=1.0), ["drop_path=1.0"]),
        (lambda: Stage(64, 1, 1, projection="conv"), ["`projection`", "dw_bn", "avg", "linear", "'conv'"]),
        (lambda: Stage(64, 1, 1, stride_q=2), ["stride_q=2"]),
        (lambda: Stage(64, 1, 1, pool=1), ["`pool`", "True or False", "pool=1"]),
        (lambda: Stage(64, 1, 1, stride=1, pool=True), ["`pool`", "stride=1"]),
        (lambda: Stage(64, 1, 1, residual_convs=-1), ["residual_convs=-1"]),
        (lambda: Stage(64, 1, 1, residual_convs=True), ["residual_convs=True"]),
        (lambda: Stage(64, 1, 1, mlp_conv="dw"), ["`mlp_conv`", "'dw'"]),
        (lambda: Variant(()), ["`stages`"]),
        (lambda: Variant((Stage(8, 1, 1),), activation="relu"), ["quick_gelu", "'relu'"]),
        (lambda: Variant((Stage(8, 1, 1),), stem=(0,)), ["stem=(0,)"]),
        (lambda: Variant((Stage(8, 1, 1),), whitening=-1), ["whitening=-1"]),
        (lambda: Variant((Stage(8, 1, 1),), whitening=True), ["whitening=True"]),
        (lambda: Variant((Stage(8, 1, 1),), norm="group"), ["`norm`", "layer", "batch", "'group'"]),
        (lambda: Variant((Stage(8, 1, 1),), attention_scale="width"), ["`attention_scale`", "dim", "head", "'width'"]),
        (lambda: Variant((Stage(8, 1, 1),), identity_init=None), ["`identity_init`", "identity_init=None"]),
        (lambda: Variant(({"dim": 8, "depth": 1, "head": 1},)), ["head", "heads", "stage 0"]),
        (lambda: get_variant("cvt_14"), ["'cvt_14'", *VARIANTS]),
        (lambda: get_variant({"stages": [], "width": 1}), ["width", "activation"]),
        (lambda: get_variant({}), ["missing", "stages"]),
        (lambda: CVT_13.grids(15, 224), ["16x16", "15x224"]),
        (lambda: Variant((Stage(8, 1, 1, kernel_size=7, stride=1, padding=0),)).grids(6, 9), ["7x7", "6x9"]),
        (lambda: macs("cvt_13", (8, 8, 3), 10), ["16x16", "8x8"]),
    ],
)
def test_errors_name_argument_and_value(make, parts):
    with pytest.raises(ValueError) as error:
        make()
    for part in parts:
        assert part in str(error.value)


def test_other_types_are_refused():
    with pytest.raises(TypeError, match="Received: variant=13"):
        get_variant(13)
    with pytest.raises(TypeError, match=r"stage 0.*Received: 3"):
        Variant((3,))
    with pytest.raises(TypeError, match=r"`stages`.*depth=1"):
        Variant(Stage(8, 1, 1))
    with pytest.raises(TypeError, match="stem=32"):
        Variant((Stage(8, 1, 1),), stem=32)


def test_variants_import_no_keras():
    code = "import runpy, sys; runpy.run_path('cvt_keras/variants.py'); assert 'keras' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
