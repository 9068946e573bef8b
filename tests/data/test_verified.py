import dataclasses
import hashlib

import numpy as np
import pytest
from labelled_images import write_image
from small_sources import small_source, written

from cvt_keras.data import sources, verified
from cvt_keras.data.cache import Cache
from cvt_keras.data.record import ImageRecord
from cvt_keras.errors import RunError
from cvt_keras.preprocessing import Preprocessing

SOURCE = small_source("1a 2b 3a", "4b 5a", "6a 7b")


def test_the_test_split_holds_only_test_images_of_the_run():
    source = small_source("6a 2b 8a", "4b 5a", "1'a 7b 9a")
    images = verified.settle(source, ImageRecord.of_source(SOURCE), "images.csv")
    assert written(images.source) == ["1'a 2b", "4b 5a", "6a 7b"]
    note = "Images differ from those of the run: 1 missing, 2 new. New ones are left out."
    assert (images.held_out, images.notes, images.warnings) == ("verified", (note,), [note])


def test_only_a_folder_needs_a_record_to_be_verified():
    images = verified.settle(SOURCE, None, "images.csv")
    assert (images.source, images.held_out) == (SOURCE, "held-out images not verified")
    assert images.warnings == [f"held-out images not verified. {images.unverified}"]
    split = dataclasses.replace(SOURCE.train, digests=None)
    fixed = dataclasses.replace(SOURCE, train=split, validation=split, test=split)
    assert verified.settle(fixed, None, "images.csv") == verified.RunImages(fixed)


def test_a_damaged_record_is_an_error(tmp_path):
    (tmp_path / "images.csv").write_text("hello\n")
    with pytest.raises(RunError):
        verified.load(tmp_path / "images.csv", "folder", tmp_path, Preprocessing(image_size=(8, 8)), Cache())


def test_test_images_are_enough(tmp_path):
    photos = tmp_path / "photos"
    for name in ("cat", "dog"):
        for i in range(10):
            write_image(photos / name / f"{i}.png", np.full((8, 8, 3), 10 * i + len(name) + ord(name[0]) % 5, "uint8"))
    source = sources.load("folder", photos, Preprocessing(image_size=(8, 8)), Cache())
    ImageRecord.of_source(source).write(tmp_path / "images.csv")
    for path in photos.rglob("*.png"):
        if ImageRecord.of_source(source).images[_digest(path)].split != "test":
            path.unlink()
    (photos / "cat" / "new.png").write_bytes(b"")
    images = verified.load(tmp_path / "images.csv", "folder", photos, Preprocessing(image_size=(8, 8)), Cache())
    assert images.source.test.digests == source.test.digests
    assert (len(images.source.train), images.held_out) == (0, "verified")
    assert images.notes[-1] == "Files that can't be read are left out: 1."


def _digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_cache_that_can_not_be_written_is_no_error(photos, tmp_path):
    (tmp_path / "file").write_text("")
    images = verified.load(
        tmp_path / "images.csv", "folder", photos, Preprocessing(image_size=(8, 8)), Cache("disk", str(tmp_path / "file"))
    )
    assert len(images.source.test)
    [note] = images.notes
    assert note.startswith("`cache_dir` can't be used: ") and note.endswith("decoded for this command only.")
