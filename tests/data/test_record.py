import dataclasses

import numpy as np
import pytest
from small_sources import small_source, written

from cvt_keras.data.pixels import mean_and_std
from cvt_keras.data.record import EARLIER, Comparison, Image, ImageRecord
from cvt_keras.errors import RunError

SOURCE = small_source("1a 2b 3a", "4b 5a", "6a 7b")


def test_a_record_survives_write_and_read(tmp_path):
    record = ImageRecord.of_source(dataclasses.replace(SOURCE, class_names=("猫, 1", 'a "b"')))
    record.write(tmp_path / "images.csv")
    assert ImageRecord.read(tmp_path / "images.csv") == record
    assert record.images["4"] == Image("validation", 'a "b"', "pixels 4")
    text = (tmp_path / "images.csv").read_text(encoding="utf-8")
    assert text.startswith('digest,split,label,pixels\n1,train,"猫, 1",pixels 1\n')
    assert ImageRecord.read(tmp_path / "none.csv") is None


@pytest.mark.parametrize(
    "content",
    [
        *("", b"\xff\xfe", "digest,split,label\n1,train,a\n", "digest,split,label,pixels,more\n"),
        *("digest,split,label,pixels\n1,trial,a,2\n", "digest,split,label,pixels\n1,train,a\n"),
    ],
)
def test_a_damaged_record_is_named(tmp_path, content):
    path = tmp_path / "images.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RunError) as error:
        ImageRecord.read(path)
    assert str(path) in error.value.summary
    assert "not verified" in error.value.hint


def test_the_same_images_keep_their_splits():
    again, comparison = ImageRecord.of_source(SOURCE).apply(SOURCE)
    assert not comparison
    for name in ("train", "validation", "test"):
        assert getattr(again, name) is getattr(SOURCE, name)


def test_training_images_stay_in_the_train_split():
    # All but 4 are now in another split.
    moved = small_source("6a 7b 5a 8a", "4b", "1a 2b 3b 9b")
    again, comparison = ImageRecord.of_source(SOURCE).apply(moved)
    assert written(again) == ["1a 2b 3b 8a", "4b 5a", "6a 7b 9b"]
    np.testing.assert_array_equal(again.train.images[:, 0, 0, 0], [1, 2, 3, 8])
    assert (again.mean, again.std) == mean_and_std(again.train.images)
    assert comparison == Comparison(missing=0, new=2, relabelled=1)
    assert str(comparison) == "2 new, 1 of another class than before"
    left_out, _ = ImageRecord.of_source(SOURCE).apply(moved, keep_new=False)
    assert written(left_out) == ["1a 2b 3b", "4b 5a", "6a 7b"]


def test_missing_images_are_counted():
    again, comparison = ImageRecord.of_source(SOURCE).apply(small_source("1a 2b", "4b", "6a 7b"))
    assert written(again) == ["1a 2b", "4b", "6a 7b"]
    assert str(comparison) == "2 missing"


def test_a_file_with_the_pixels_of_a_recorded_image_is_that_image():
    # All files are new. 8' and 9 have new pixels, too.
    edited = small_source("6'a 2'b 8'a", "1'a 4b", "3'a 9b")
    again, comparison = ImageRecord.of_source(SOURCE).apply(edited)
    assert written(again) == ["1'a 2'b 3'a 8'a", "4b", "6'a 9b"]
    assert comparison == Comparison(missing=2, new=2, relabelled=0)  # 5 and 7; 8' and 9
    trained_on = set(SOURCE.train.pixels) | set(again.train.pixels)
    assert not trained_on & {*again.validation.pixels, *again.test.pixels}


def test_pixels_that_were_trained_on_count_as_training_also_if_a_copy_was_tested_on():
    for source in (small_source("1a", "2b", "1'a"), small_source("1'a", "1a", "2b")):
        assert ImageRecord.of_source(source).split_of("another file", "pixels 1") == "train"


def test_images_in_the_folder_of_another_split_are_counted():
    moved = small_source("6a 2b 3a", "4b 5a", "1a 7b", ("train", "test"))
    again, comparison = ImageRecord.of_source(SOURCE).apply(moved)
    assert (written(again), str(comparison)) == (written(SOURCE), "2 in another split than their folder says")
    # A held-out image may become a training image without being moved to another folder.
    held_out = small_source("4b 2b 3a", "1a 5a", "6a 7b", ("train", "test"))
    assert not ImageRecord.of_source(SOURCE).apply(held_out)[1]


def test_a_file_in_two_classes_is_not_a_difference():
    twice = small_source("1a 1b 2b", "4b", "6a")
    _, comparison = ImageRecord.of_source(twice).apply(twice)
    assert not comparison


def test_an_earlier_runs_training_images_are_recorded_but_not_missing():
    source = small_source("1'a 8a", "4b", "6a")
    record = ImageRecord.of_source(source).after(ImageRecord.of_source(SOURCE))
    earlier = {digest: image for digest, image in record.images.items() if image.split == EARLIER}
    assert earlier == {
        "2": Image(EARLIER, "b", "pixels 2"),
        "3": Image(EARLIER, "a", "pixels 3"),
    }  # not 1, which has the pixels of 1'
    assert not record.apply(source)[1]
    assert record.after(record) == record
    back = small_source("1'a 8a 2b", "4b", "6a 3'a")
    again, comparison = record.apply(back, keep_new=False)
    assert (written(again), comparison) == (written(source), Comparison(missing=0, new=2, relabelled=0))
    again, _ = record.apply(back)
    assert written(again) == ["1'a 2b 3'a 8a", "4b", "6a"]
    later = ImageRecord.of_source(small_source("1'a 2b", "4b", "6a")).after(record)
    assert {digest: image.split for digest, image in later.images.items() if image.split in ("train", EARLIER)} == {
        "1'": "train", "2": "train", "3": EARLIER, "8": EARLIER,
    }  # fmt: skip
