import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from labelled_images import error_of, resized, rows, sizes, write_image

from cvt_keras.data import sources
from cvt_keras.errors import ArgumentError, DataError


def data_error_of(folder):
    """The error about what lies in a folder."""
    error = error_of("folder", folder)
    assert (type(error), error.argument) == (DataError, "data_dir")
    return error


def test_a_folder_is_held_out_by_class(photos):
    source, again = sources.load("folder", photos), sources.load("folder", str(photos))
    assert (source.name, source.class_names, source.mirror) == ("folder", ("cat", "dog"), True)
    assert [np.bincount(split.labels).tolist() for split in (source.train, source.validation, source.test)] == [
        [16, 24],
        [2, 3],
        [2, 3],
    ]
    for split in ("train", "validation", "test"):
        np.testing.assert_array_equal(getattr(source, split).images, getattr(again, split).images)
    files = sorted(photos.rglob("*.png"))
    expected = {resized(tf.io.decode_png(path.read_bytes()), 32).tobytes(): path.parent.name for path in files}
    found = {
        image.tobytes(): source.class_names[label]
        for split in (source.train, source.validation, source.test)
        for image, label in zip(split.images, split.labels)
    }
    assert found == expected
    assert len(set(source.train.limit(8).labels)) == 2
    assert "held out" in source.note


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("validation", ["validation", "valid", "val", None])
def test_a_folder_may_bring_its_splits(photos, tmp_path, validation, nested):
    root = tmp_path / "split"
    shutil.copytree(photos, root / "train" if nested else root)
    for split, n in {"test": 3, validation: 2}.items():
        for name in ("cat", "dog") if split else ():
            for i in range(n):
                write_image(root / split / name / f"{i}.png")
    (root / ".cache").mkdir()
    source = sources.load("folder", root)
    assert sizes(source) == ([50, 4, 6] if validation else [45, 5, 6])
    assert source.note == ""
    assert len(np.unique(rows(source.train, source.validation, source.test), axis=0)) == sum(sizes(source))


def test_a_class_may_be_called_as_a_split(photos):
    for i in range(10):
        for name in ("train", "test"):
            write_image(photos / name / f"{i}.png")
    assert sources.load("folder", photos).class_names == ("cat", "dog", "test", "train")


@pytest.mark.parametrize("name", ["Test", "extra"])
def test_what_lies_beside_train_and_is_no_split_is_not_passed_over(photos, tmp_path, name):
    shutil.copytree(photos, tmp_path / "split" / "train")
    shutil.copytree(photos, tmp_path / "split" / name)
    error = data_error_of(tmp_path / "split")
    assert error.summary.endswith(f": {name}")
    assert "Move them" in error.hint


def test_a_split_has_one_folder(photos, tmp_path):
    for name in ("train", "validation", "val"):
        shutil.copytree(photos, tmp_path / "split" / name)
    assert "one folder for validation. Found: validation, val" in data_error_of(tmp_path / "split").summary


@pytest.mark.parametrize("suffix", [".bmp", ".WEBP", ".tiff", ".jxl", ".tga"])
def test_an_image_that_would_be_passed_over_is_named(photos, suffix):
    (photos / "cat" / f"1{suffix}").touch()
    error = data_error_of(photos)
    assert error.summary == f"{photos}/cat/1{suffix} is none of .jpg .jpeg .jpe .jfif .png .gif"
    assert "Convert it" in error.hint


def test_a_folder_takes_each_format_and_passes_over_what_is_hidden(photos):
    flat = np.full((32, 32, 3), (200, 100, 50), "uint8")
    for path in (*(photos / "cat").iterdir(), *(photos / "dog").iterdir()):
        path.unlink()
    for folder in ("cat", "dog"):
        for i, suffix in enumerate((".jpg", ".JPEG", ".jpe", ".jfif", ".png", ".PNG")):
            write_image(photos / folder / f"{i}{suffix}", flat)
        tf.keras.utils.save_img(photos / folder / "5.gif", flat, scale=False)
        write_image(photos / folder / "6.png", flat[..., :1])
        write_image(photos / folder / "7.png", np.concatenate([flat, flat[..., :1] // 2], axis=-1))
        (photos / folder / ".hidden.png").write_bytes(b"no image")
        (photos / folder / "notes.txt").write_text("no image")
    (photos / ".cache").mkdir()
    (photos / "README.md").write_text("no class")
    source = sources.load("folder", photos)
    assert sum(sizes(source)) == 18
    images = np.concatenate([source.train.images, source.validation.images, source.test.images])
    grey = images[..., 2] == 200
    assert grey.all(axis=(1, 2)).sum() == 2
    np.testing.assert_allclose(images[~grey.any(axis=(1, 2))], np.broadcast_to(flat, (16, 32, 32, 3)), atol=5)


@pytest.mark.parametrize(
    ("data", "reason"), [(b"", "empty"), (b"no image at all", "Unknown image file format"), (None, "Invalid PNG data")]
)
def test_a_file_that_is_no_image_is_named(photos, data, reason):
    broken = photos / "dog" / "7.png"
    broken.write_bytes(broken.read_bytes()[:200] if data is None else data)
    summary = data_error_of(photos).summary
    assert summary.startswith(f"{broken} can't be decoded: ")
    assert reason in summary


def test_a_folder_is_needed():
    error = error_of("folder")
    assert (type(error), error.argument) == (ArgumentError, "data_dir")
    assert "--data-dir" in error.hint


def test_an_empty_class_folder_is_named(photos):
    (photos / "eel").mkdir()
    (photos / "eel" / "1.txt").write_bytes(b"")
    assert data_error_of(photos).summary == f"{photos / 'eel'} holds no files of .jpg .jpeg .jpe .jfif .png .gif"


def test_a_folder_within_a_class_is_not_passed_over(photos):
    (photos / "dog" / "puppies").mkdir()
    assert data_error_of(photos).summary == f"{photos}/dog/puppies is a folder within a class"


def test_a_class_too_small_to_hold_out_is_named(photos):
    for i in range(2):
        write_image(photos / "eel" / f"{i}.png")
    summary = data_error_of(photos).summary
    assert summary == f"{photos / 'eel'} has too few images to hold out one each for test and validation: 2"
    write_image(photos / "eel" / "2.png")
    source = sources.load("folder", photos)
    assert [np.sum(split.labels == 2) for split in (source.train, source.validation, source.test)] == [1, 1, 1]


@pytest.mark.parametrize("remove", ["cat", "cat dog"])
def test_fewer_than_two_classes_are_an_error(photos, remove):
    for name in remove.split():
        shutil.rmtree(photos / name)
    summary = data_error_of(photos).summary
    assert summary.startswith(f"{photos} needs a folder for each of two classes or more")
    assert ("Found: none" in summary) == (remove == "cat dog")


def test_splits_without_classes_are_no_classes(photos):
    (photos / "cat").rename(photos / "train")
    (photos / "dog").rename(photos / "test")
    assert "Found: test, train" in data_error_of(photos).summary


@pytest.mark.parametrize("split", ["test", "val"])
@pytest.mark.parametrize("names", ["cat", "cat dog eel", ""])
def test_splits_of_other_classes_are_an_error(photos, tmp_path, split, names):
    root = tmp_path / "split"
    shutil.copytree(photos, root / "train")
    (root / split).mkdir()
    for name in names.split():
        write_image(root / split / name / "1.png")
    odd = {"cat": "dog", "cat dog eel": "eel", "": "cat, dog"}[names]
    summary = data_error_of(root).summary
    assert summary == f"{root / split} and {root / 'train'} must hold the same class folders. Only one has: {odd}"


def test_a_folder_that_may_not_be_read_is_named(photos, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert f"Permission denied: '{photos}" in data_error_of(photos).summary


def test_a_file_that_may_not_be_read_is_named(photos, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    error = data_error_of(photos)
    assert f"Permission denied: '{photos}" in error.summary
    assert error.hint is None  # least of all to remove the file
