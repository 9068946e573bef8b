import dataclasses

import numpy as np
import pytest
from small_sources import small_source, written

from cvt_keras.data.images import mean_and_std
from cvt_keras.data.record import Comparison, ImageRecord, without_copies
from cvt_keras.errors import RunError

SOURCE = small_source("1a 2b 3a", "4b 5a", "6a 7b")


def test_a_record_comes_back_from_its_file(tmp_path):
    record = ImageRecord.of_source(dataclasses.replace(SOURCE, class_names=("猫, 1", 'a "b"')))
    record.write(tmp_path / "images.csv")
    assert ImageRecord.read(tmp_path / "images.csv") == record
    assert record.images["4"] == ("validation", 'a "b"')
    assert (tmp_path / "images.csv").read_text(encoding="utf-8").startswith('digest,split,label\n1,train,"猫, 1"\n')
    assert ImageRecord.read(tmp_path / "none.csv") is None


@pytest.mark.parametrize(
    "content", ["", "digest,split\n", "digest,split,label\n1,trial,a\n", "digest,split,label\n1,train\n", b"\xff\xfe"]
)
def test_a_damaged_record_is_named(tmp_path, content):
    path = tmp_path / "images.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RunError) as error:
        ImageRecord.read(path)
    assert str(path) in error.value.summary
    assert "not verified" in error.value.hint


def test_the_same_images_stay_as_they_are():
    again, comparison = ImageRecord.of_source(SOURCE).apply(SOURCE)
    assert not comparison
    for name in ("train", "validation", "test"):
        assert getattr(again, name) is getattr(SOURCE, name)


def test_what_was_trained_on_stays_in_training():
    # Nothing but 4 lies where it was.
    moved = small_source("6a 7b 5a 8a", "4b", "1a 2b 3b 9b")
    again, comparison = ImageRecord.of_source(SOURCE).apply(moved)
    assert written(again) == ["1a 2b 3b 8a", "4b 5a", "6a 7b 9b"]
    np.testing.assert_array_equal(again.train.images[:, 0, 0, 0], [1, 2, 3, 8])
    assert (again.mean, again.std) == mean_and_std(again.train.images)
    assert comparison == Comparison(missing=0, new=2, relabelled=1)
    assert str(comparison) == "2 new, 1 of another class than before"
    left_out, _ = ImageRecord.of_source(SOURCE).apply(moved, keep_new=False)
    assert written(left_out) == ["1a 2b 3b", "4b 5a", "6a 7b"]


def test_what_is_gone_is_counted():
    again, comparison = ImageRecord.of_source(SOURCE).apply(small_source("1a 2b", "4b", "6a 7b"))
    assert written(again) == ["1a 2b", "4b", "6a 7b"]
    assert str(comparison) == "2 missing"


def test_a_copy_in_a_later_split_is_left_out():
    copied = small_source("1a 2b 1a", "1a 4b", "4b 6a 2b")
    source, left_out = without_copies(copied)
    assert (written(source), left_out) == (["1a 2b 1a", "4b", "6a"], 3)
    assert without_copies(source) == (source, 0)
    record = ImageRecord.of_source(source)
    assert {digest: split for digest, (split, _) in record.images.items()} == {
        "1": "train", "2": "train", "4": "validation", "6": "test",
    }  # fmt: skip
    again, comparison = record.apply(copied)
    assert (written(again), bool(comparison)) == (written(source), False)
    # A test image that was copied into the training images later stays a test image.
    again, comparison = record.apply(small_source("1a 2b 1a 6a", "4b", "6a"))
    assert (written(again)[2], bool(comparison)) == ("6a", False)


def test_a_file_in_two_classes_is_no_difference():
    twice = small_source("1a 1b 2b", "4b", "6a")
    _, comparison = ImageRecord.of_source(twice).apply(twice)
    assert not comparison


def test_training_images_that_are_gone_are_remembered():
    record = ImageRecord.of_source(small_source("1a 8a", "4b", "6a")).after(ImageRecord.of_source(SOURCE))
    assert record == ImageRecord.of_source(small_source("1a 8a 2b 3a", "4b", "6a"))
