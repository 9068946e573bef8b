import dataclasses
import json

import numpy as np
import pytest

from cvt_keras import Preprocessing


def test_it_is_frozen_and_compares_by_value():
    preprocessing = Preprocessing([0.1, 0.2], np.array([0.3, 0.4]), ["a", "b"], [4, 6])
    assert preprocessing == Preprocessing((0.1, 0.2), (0.3, 0.4), ("a", "b"), (4, 6), "stretch")
    assert hash(preprocessing) == hash(Preprocessing((0.1, 0.2), (0.3, 0.4), ("a", "b"), (4, 6)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        preprocessing.mean = (0.0, 0.0)


@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing(),
        Preprocessing((0.1,), (0.2,), ("a", "b"), (4, 6)),
        Preprocessing(image_size=(4, 6), resize="crop", crop_pct=0.9, interpolation="bicubic"),
    ],
)
def test_config_round_trip(preprocessing):
    config = preprocessing.get_config()
    assert json.loads(json.dumps(config)) == config
    assert Preprocessing.from_config(config) == preprocessing
    assert Preprocessing.from_config(preprocessing) is preprocessing


def test_missing_keys_of_a_config_are_unknown():
    assert Preprocessing.from_config(None) == Preprocessing.from_config({}) == Preprocessing()
    assert Preprocessing.from_config({"mean": [0.5]}) == Preprocessing(mean=(0.5,))  # as version 0.1 wrote it


def test_a_config_of_an_older_version_stretches():
    config = {"mean": None, "std": None, "class_names": None, "image_size": [4, 6], "resize": "stretch"}  # of version 0.4
    assert Preprocessing.from_config(config) == Preprocessing(image_size=(4, 6), crop_pct=0.875, interpolation="bilinear")


def test_crop_from_is_rounded_down_as_the_field_does():
    crop = Preprocessing(image_size=(224, 224), resize="crop")
    assert crop.crop_from == (256, 256)
    assert crop.replace(crop_pct=0.9).crop_from == (248, 248)
    assert crop.replace(image_size=(184, 750), crop_pct=1).crop_from == (184, 750)
    with pytest.raises(ValueError, match="`image_size`"):
        _ = Preprocessing(resize="crop").crop_from


def test_replace_changes_only_the_named_fields():
    preprocessing = Preprocessing((0.1,), (0.2,), ("a",), (4, 6))
    assert preprocessing.replace(mean=(0.3,), class_names=None) == Preprocessing((0.3,), (0.2,), None, (4, 6))


def test_numpy_values_become_python_values():
    preprocessing = Preprocessing(mean=(np.float32(0.5),), image_size=(np.int64(4), np.int64(6)))
    assert preprocessing == Preprocessing(mean=(0.5,), image_size=(4, 6))
    assert [type(side) for side in preprocessing.image_size] == [int, int]


@pytest.mark.parametrize(
    "fields, name",
    [
        ({"mean": 0.5}, "mean"),
        ({"mean": ["a"]}, "mean"),
        ({"mean": []}, "mean"),
        ({"mean": [125.0, 123.0, 114.0]}, "mean"),
        ({"std": [float("nan")]}, "std"),
        ({"std": [0.5, 0.0]}, "std"),
        ({"class_names": "cat"}, "class_names"),
        ({"class_names": ["cat", 1]}, "class_names"),
        ({"image_size": [224]}, "image_size"),
        ({"image_size": [224, 0]}, "image_size"),
        ({"image_size": [224.0, 224.0]}, "image_size"),
        ({"resize": "pad"}, "resize"),
        ({"interpolation": "lanczos"}, "interpolation"),
        ({"crop_pct": 0}, "crop_pct"),
        ({"crop_pct": 1.1}, "crop_pct"),
        ({"crop_pct": True}, "crop_pct"),
        ({"crop_pct": "0.9"}, "crop_pct"),
    ],
)
def test_an_invalid_value_is_named(fields, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        Preprocessing(**fields)


def test_an_unknown_key_is_named_beside_the_known_ones():
    with pytest.raises(ValueError, match=r"mean, std, class_names, image_size, resize.*means"):
        Preprocessing.from_config({"means": [0.5]})


@pytest.mark.parametrize("preprocessing", [Preprocessing(), Preprocessing((0.5,), (0.5,)), Preprocessing((0.5,) * 3)])
def test_statistics_of_missing_channels_are_refused(preprocessing):
    with pytest.raises(ValueError, match="3 channels"):
        preprocessing.require_channels(3)
