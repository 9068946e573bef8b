import dataclasses
import json

import numpy as np
import pytest
from labelled_images import noise

from cvt_keras.data.split import Source, Split, fixed_order


@pytest.fixture
def source():
    splits = [Split(images, np.arange(len(images)) % 2) for images in np.split(noise(12, (4, 4, 3)), [6, 9])]
    return Source("mine", *splits, class_names=("cat", "dog"), mean=(0.5,) * 3, std=(0.5,) * 3)


def test_limit_takes_the_first_images(source):
    split = source.train
    np.testing.assert_array_equal(split.limit(4).images, split.images[:4])
    np.testing.assert_array_equal(split.limit(4).labels, split.labels[:4])
    assert len(split.limit(4)) == 4
    assert len(split.limit(None)) == 6


def test_a_fingerprint_survives_json(source):
    fingerprint = source.fingerprint()
    assert json.loads(json.dumps(fingerprint)) == fingerprint == source.fingerprint()
    assert [fingerprint[f"number of {name} images"] for name in ("train", "validation", "test")] == [6, 3, 3]


@pytest.mark.parametrize("name", ["train", "validation", "test"])
@pytest.mark.parametrize("field", ["images", "labels"])
def test_a_fingerprint_depends_on_pixels_and_labels(source, name, field):
    split = getattr(source, name)
    values = getattr(split, field).copy()
    values.flat[-1] ^= 1
    changed = dataclasses.replace(source, **{name: dataclasses.replace(split, **{field: values})}).fingerprint()
    fingerprint = source.fingerprint()
    assert {key for key in fingerprint if changed[key] != fingerprint[key]} == {f"checksum of {name} images"}


@pytest.mark.parametrize("change", [{"class_names": ("dog", "cat")}, {"note": "JPEG copy"}], ids=["class order", "note"])
def test_a_fingerprint_depends_on_the_order_of_classes_and_the_note(source, change):
    assert dataclasses.replace(source, **change).fingerprint() != source.fingerprint()


def test_fixed_order_never_changes():
    assert fixed_order(8).tolist() == [6, 2, 1, 7, 3, 0, 5, 4]
