import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.network import differences, golden_model
from cvt_keras import VARIANTS, CvT
from cvt_keras.pretrained import load_state_dict, microsoft_weights, variant_from_microsoft

GOLDEN = sorted((Path(__file__).parent / "golden").glob("ms_*.npz"))


def _spec(path):
    with np.load(path) as arrays:
        return json.loads(bytes(arrays["spec_json"]))


def test_golden_files_are_there():
    assert len(GOLDEN) == 3


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_logits_and_stages_agree_with_the_authors_code(path):
    found = differences(path)
    cls_token = set() if "nocls" in path.stem else {"stage2_cls"}
    assert set(found) == {"logits", "stage0", "stage1", "stage2"} | cls_token
    assert max(found.values()) < 1e-4, found


@pytest.mark.parametrize("name", ["cvt_13", "cvt_21", "cvt_w24"])
def test_the_map_covers_the_papers_networks(name):
    weights = microsoft_weights(name)
    assert len({weight.key for weight in weights}) == len({weight.path for weight in weights}) == len(weights)
    if name == "cvt_13":
        paths = {variable.path for variable in CvT(VARIANTS[name], 10, (None, None, 3)).weights}
        assert paths == {weight.path for weight in weights}


def test_a_state_dict_is_used_whole_or_refused():
    model, state_dict, _ = golden_model(GOLDEN[-1])
    before = model.get_weights()
    damaged = dict(state_dict)
    damaged["head.extra"] = damaged.pop("head.bias")
    damaged["norm.weight"] = np.ones(3, "float32")
    damaged["head.weight"] = damaged["head.weight"].T
    with pytest.raises(ValueError) as error:
        load_state_dict(model, damaged, microsoft_weights(model.variant))
    for part in ("missing: head.bias", "unused: head.extra", "shape: norm.weight is (3,)", "shape: head.weight is (64, 10)"):
        assert part in str(error.value)
    for ours, old in zip(model.get_weights(), before):
        np.testing.assert_array_equal(ours, old)


def test_a_map_of_another_network_is_refused():
    model, state_dict, _ = golden_model(GOLDEN[-1])
    with pytest.raises(ValueError, match="stage1_block1"):
        load_state_dict(model, state_dict, microsoft_weights("cvt_tiny"))


def test_a_stem_has_no_counterpart():
    with pytest.raises(ValueError, match=r"stem=\(32,"):
        microsoft_weights("cvt_cifar")


@pytest.mark.parametrize(
    "key, value",
    [("KERNEL_QKV", [3, 5, 3]), ("DROP_RATE", [0, 0, 0.1]), ("ATTN_DROP_RATE", [0.1, 0, 0]), ("POS_EMBED", [1, 0, 0])],
)
def test_a_setting_that_the_network_has_not_is_refused(key, value):
    with pytest.raises(ValueError) as error:
        variant_from_microsoft({**_spec(GOLDEN[0]), key: value})
    assert f"`{key}`" in str(error.value)
    assert str(value) in str(error.value)
