import dataclasses
import json
import math
import re

import numpy as np
import pytest

from cvt_keras import Calibration, Preprocessing


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
    with pytest.raises(ValueError, match=r"`calibration` has the keys temperature, threshold\. Received: temp"):
        Calibration.from_config({"temp": 1.0})


@pytest.mark.parametrize("preprocessing", [Preprocessing(), Preprocessing((0.5,), (0.5,)), Preprocessing((0.5,) * 3)])
def test_statistics_of_missing_channels_are_refused(preprocessing):
    with pytest.raises(ValueError, match="3 channels"):
        preprocessing.require_channels(3)


def test_a_calibration_divides_logits_and_marks_unsure_answers():
    calibration = Calibration(2, np.float32(0.75))
    assert calibration == Calibration.from_config(calibration.get_config()) == Calibration.from_config(calibration)
    assert calibration.get_config() == {"temperature": 2.0, "threshold": 0.75}
    assert Calibration.from_config(None) == Calibration(1.0, 0.0)
    probabilities = calibration.probabilities(np.array([[2 * math.log(3), 0.0], [2000.0, 0.0], [0.0, 2.0]]))
    np.testing.assert_allclose(probabilities[:, 0], [0.75, 1, 1 / (1 + math.e)], atol=1e-6)
    assert probabilities.dtype == np.float32
    assert list(calibration.unsure(np.array([[0.75, 0.25], [0.3, 0.7]]))) == [False, True]


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"temperature": 0}, "temperature=0.0"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": "1"}, "temperature='1'"),
        ({"temperature": True}, "temperature=True"),
        ({"threshold": -0.1}, "threshold=-0.1"),
        ({"threshold": 1.1}, "threshold=1.1"),
        ({"threshold": None}, "threshold=None"),
    ],
)
def test_an_invalid_calibration_is_refused(fields, expected):
    with pytest.raises(ValueError, match=re.escape(expected)):
        Calibration(**fields)
