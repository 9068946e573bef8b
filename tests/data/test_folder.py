import errno
import hashlib
import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from labelled_images import error_of, noise, resized, rows, sizes, write_image

from cvt_keras.cli import message
from cvt_keras.data import folder, images, sources
from cvt_keras.data.cache import Cache
from cvt_keras.data.record import ImageRecord
from cvt_keras.data.split import hold_out
from cvt_keras.errors import ArgumentError, DataError
from cvt_keras.preprocessing import Preprocessing

SPLITS = ("train", "validation", "test")


def data_error_of(folder, **options):
    """The `DataError` of a folder."""
    error = error_of("folder", folder, **options)
    assert (type(error), error.argument) == (DataError, "data_dir")
    return error


def digests(source):
    return {split: getattr(source, split).digests for split in SPLITS}


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def warning(source, part):
    """The only warning that contains `part`."""
    [line] = [text for text in source.warnings if part in text]
    assert "\n" not in line and not line.endswith(".")
    return line


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path_factory, monkeypatch):
    """The system's folder for temporary files."""
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture
def split_photos(photos, tmp_path):
    """A folder of cats and dogs with train/ (50 images) and test/ (6)."""
    shutil.move(photos, tmp_path / "split" / "train")
    for name in ("cat", "dog"):
        for i in range(3):
            write_image(tmp_path / "split" / "test" / name / f"{i}.png")
    return tmp_path / "split"


# === Which images are held out ===


def test_held_out_images_are_chosen_by_their_digests(photos):
    source, again = sources.load("folder", photos), sources.load("folder", str(photos))
    assert (source.name, source.class_names, source.mirror) == ("folder", ("cat", "dog"), True)
    assert "held out" in source.note
    assert (source.warnings, source.left_out) == ((), {})
    assert sum(sizes(source)) == 50
    for name, split in ((name, getattr(source, name)) for name in SPLITS):
        np.testing.assert_array_equal(split.images, getattr(again, name).images)
        assert set(split.labels) == {0, 1}
        assert list(split.digests) == sorted(split.digests)
    shares = [int(digest[:16], 16) / 2**64 for digest in source.test.digests]
    assert sum(share >= 0.1 for share in shares) <= 1  # one class had no image below 0.1, and gave its lowest
    files = sorted(photos.rglob("*.png"))
    expected = {resized(images.decode(path.read_bytes()), 32).tobytes(): path.parent.name for path in files}
    loaded = {
        image.tobytes(): source.class_names[label]
        for split in (source.train, source.validation, source.test)
        for image, label in zip(split.images, split.labels)
    }
    assert loaded == expected
    assert len(set(source.train.limit(8).labels)) == 2


def test_adding_removing_and_renaming_files_moves_no_other_image(photos):
    for i in range(20, 60):
        for name in ("cat", "dog"):
            write_image(photos / name / f"{i}.png")
    before = digests(sources.load("folder", photos, Preprocessing(image_size=(8, 8))))
    write_image(photos / "cat" / "new.png")
    (photos / "dog" / "3.png").unlink()
    (photos / "dog" / "4.png").rename(photos / "dog" / "renamed.png")
    after = digests(sources.load("folder", photos, Preprocessing(image_size=(8, 8))))
    common = set().union(*before.values()) & set().union(*after.values())
    assert len(common) == 119
    for split in SPLITS:
        assert [d for d in before[split] if d in common] == [d for d in after[split] if d in common]


def test_with_a_record_images_keep_their_splits_also_in_another_format(photos):
    before = sources.load("folder", photos)
    path = next(path for path in sorted(photos.rglob("*.png")) if sha256(path) in before.test.digests)
    write_image(path.with_suffix(".bmp"), images.decode(path.read_bytes()))
    path.unlink()
    after = sources.load("folder", photos, record=ImageRecord.of_source(before))
    for split in SPLITS:
        assert set(getattr(after, split).pixels) == set(getattr(before, split).pixels)


def test_with_a_record_a_class_may_lack_images(photos):
    record = ImageRecord.of_source(sources.load("folder", photos))
    for path in (photos / "dog").iterdir():
        path.write_bytes(b"")
    source = sources.load("folder", photos, skip_broken=True, record=record)
    assert (sum(sizes(source)), source.class_names) == (20, ("cat", "dog"))


def digest_at(share):
    return f"{int(share * 2**64):016x}".ljust(64, "0")


def assigned(classes, splits=("test", "validation")):
    """`hold_out` with shares in 0..1 in place of digests."""
    shares_by_digest = {digest_at(share): share for shares in classes.values() for share in shares}
    by_digest = hold_out({name: [digest_at(share) for share in shares] for name, shares in classes.items()}, splits)
    return {shares_by_digest[digest]: split for digest, split in by_digest.items()}


def test_a_tenth_goes_to_test_and_the_next_to_validation():
    splits = assigned({"cat": [0.05, 0.0999, 0.1, 0.1999, 0.2, 0.9]})
    assert splits == {0.05: "test", 0.0999: "test", 0.1: "validation", 0.1999: "validation", 0.2: "train", 0.9: "train"}


@pytest.mark.parametrize(("splits", "expected"), [(["validation"], "train"), (["test"], "test"), ([], "train")])
def test_a_split_with_its_own_folder_holds_out_nothing(splits, expected):
    split_of = assigned({"cat": [0.05, 0.15, 0.5]}, splits)
    assert split_of[0.05] == expected
    assert split_of[0.15] == ("validation" if "validation" in splits else "train")


def test_an_empty_split_gets_the_image_with_the_lowest_digest():
    assert assigned({"cat": [0.5, 0.3, 0.4, 0.6]}) == {0.3: "test", 0.4: "validation", 0.5: "train", 0.6: "train"}
    assert assigned({"cat": [0.15, 0.3, 0.4]}) == {0.15: "validation", 0.3: "test", 0.4: "train"}


@pytest.mark.parametrize("shares", [[0.01, 0.02, 0.03], [0.11, 0.12, 0.13], [0.01, 0.02, 0.15], [0.01, 0.02, 0.9]])
def test_three_images_are_enough_for_a_class(shares):
    assert set(assigned({"cat": shares}).values()) == set(SPLITS)


def test_the_lowest_digests_stay_held_out_where_training_needs_images():
    assert assigned({"cat": [0.11, 0.12, 0.13, 0.14]}) == {0.11: "validation", 0.12: "validation", 0.13: "test", 0.14: "train"}


def test_copies_are_in_the_same_split_also_across_classes():
    assert assigned({"cat": [0.3, 0.3, 0.4, 0.5], "dog": [0.05, 0.15, 0.3, 0.6]})[0.3] == "test"


def test_a_class_too_small_to_hold_out_is_named(photos):
    for i in range(2):
        write_image(photos / "eel" / f"{i}.png")
    shutil.copy(photos / "eel" / "0.png", photos / "eel" / "copy.png")
    assert data_error_of(photos).summary == (
        "the class eel has too few different images for one each in train, test, validation: 2"
    )
    write_image(photos / "eel" / "2.png")
    source = sources.load("folder", photos)
    assert [
        len({d for d, label in zip(split.digests, split.labels) if label == 2}) for split in (source.train, source.test)
    ] == [1, 1]


def test_a_class_of_copies_of_others_is_named():
    with pytest.raises(DataError) as error:
        assigned({"cat": [0.2, 0.3, 0.4], "dog": [0.3, 0.4, 0.5]})
    assert error.value.summary.endswith(": 3, of which 2 are also in other classes")


def test_copies_in_two_classes_are_counted(photos):
    shutil.copy(photos / "cat" / "0.png", photos / "dog" / "copy.png")
    source = sources.load("folder", photos)
    assert warning(source, "another class") == "2 files are copies of a file in another class: cat/0.png, dog/copy.png"
    assert sum(len(set(split)) for split in digests(source).values()) == 50
    assert sum(sizes(source)) == 51


# === Folders for splits ===


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("validation", ["validation", "valid", "val", "Val", "dev", None])
def test_a_folder_may_have_folders_for_splits(photos, tmp_path, validation, nested):
    root = tmp_path / "split"
    shutil.copytree(photos, root / "train" if nested else root)
    for split, n in {"test": 3, validation: 2}.items():
        for name in ("cat", "dog") if split else ():
            for i in range(n):
                write_image(root / split / name / f"{i}.png")
    source = sources.load("folder", root)
    assert source.note == ""
    assert sum(sizes(source)[:2]) == (54 if validation else 50)
    assert sizes(source)[1] == 4 or not validation
    assert sizes(source)[2] == 6
    assert len(np.unique(rows(source.train, source.validation, source.test), axis=0)) == sum(sizes(source))


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Train", "Test"),
        ("training", "testing"),
        ("Training", "TEST"),
        ("training_set", "test_set"),
        ("train-set", "Test Set"),
        ("trainset", "testset"),
        ("train_data", "test_images"),
        ("train_dataset", "testing_split"),
    ],
)
def test_usual_names_of_splits_are_understood(split_photos, train, test):
    before = digests(sources.load("folder", split_photos))
    (split_photos / "train").rename(split_photos / train)
    (split_photos / "test").rename(split_photos / test)
    assert digests(sources.load("folder", split_photos)) == before


def test_only_a_test_split_is_held_out_beside_a_validation_folder(split_photos):
    (split_photos / "test").rename(split_photos / "val")
    source = sources.load("folder", split_photos)
    assert len(source.validation) == 6 and "held out" in source.note


def test_a_class_may_have_the_name_of_a_split(photos):
    for i in range(10):
        for name in ("train", "test"):
            write_image(photos / name / f"{i}.png")
    assert sources.load("folder", photos).class_names == ("cat", "dog", "test", "train")


@pytest.mark.parametrize("name", ["tests", "extra"])
def test_a_folder_beside_train_that_is_not_a_split_is_an_error(split_photos, name):
    (split_photos / "test").rename(split_photos / name)
    error = data_error_of(split_photos)
    assert error.summary == f"{split_photos} has a folder train, and folders that are not splits: {name}"
    assert "rename folders of splits to test or validation" in error.hint


def test_two_folders_for_a_split_are_an_error(photos, tmp_path):
    for name in ("train", "validation", "Val"):
        shutil.copytree(photos, tmp_path / "split" / name)
    assert data_error_of(tmp_path / "split").summary.endswith("more than one folder for the split validation: Val, validation")


@pytest.mark.parametrize("split", ["test", "Val"])
@pytest.mark.parametrize(("names", "odd"), [("cat", "has no folder for dog"), ("cat dog eel", "has a folder for eel")])
def test_a_split_with_other_classes_is_an_error(photos, tmp_path, split, names, odd):
    root = tmp_path / "split"
    shutil.copytree(photos, root / "train")
    for name in names.split():
        write_image(root / split / name / "1.png")
    error = data_error_of(root)
    assert error.summary == f"{root / split} {odd}, unlike {root / 'train'}"
    assert "emove" not in error.hint
    assert "out of" in error.hint


def test_an_empty_split_lacks_all_classes(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "split" / "train")
    (tmp_path / "split" / "test").mkdir()
    assert "has no folder for cat, dog" in data_error_of(tmp_path / "split").summary


# === The same pixels in two splits ===


def test_test_images_with_the_pixels_of_a_training_image_are_left_out(split_photos):
    trained_on = sources.load("folder", split_photos).train.digests
    path = next(path for path in (split_photos / "train" / "cat").iterdir() if sha256(path) in trained_on)
    write_image(split_photos / "test" / "cat" / "seen.bmp", images.decode(path.read_bytes()))  # other bytes
    source = sources.load("folder", split_photos)
    assert source.left_out == {"the same pixels as a training image": 1}
    assert warning(source, "same pixels") == (
        "1 test image has the same pixels as a training image and is left out: test/cat/seen.bmp"
    )
    assert len(source.test) == 6 and sha256(split_photos / "test" / "cat" / "seen.bmp") not in source.test.digests


def test_a_split_of_copies_of_training_images_is_an_error(photos, tmp_path):
    root = tmp_path / "split"
    for split in ("train", "val", "test"):
        shutil.copytree(photos, root / split)
    same = f"image in {root} has the same pixels as a training"
    assert data_error_of(root).summary == f"every validation {same} image. Number of validation images: 50"
    shutil.rmtree(root / "val")
    assert data_error_of(root).summary == f"every test {same} or validation image. Number of test images: 50"
    for path in (root / "test" / "cat").iterdir():
        write_image(path)
    source = sources.load("folder", root)
    assert len(source.test) == 20
    assert warning(source, "are left of") == "no test images are left of dog"


def test_no_pixels_are_in_two_splits(split_photos):
    shutil.copytree(split_photos / "test", split_photos / "valid")
    write_image(split_photos / "valid" / "cat" / "own.png")
    for split in ("valid", "test"):
        write_image(split_photos / split / "dog" / f"own-{split}.png")
        shutil.copy(next((split_photos / "train" / "dog").iterdir()), split_photos / split / "dog" / "copy.png")
    source = sources.load("folder", split_photos)
    assert source.left_out == {"the same pixels as a training image": 2, "the same pixels as a validation image": 6}
    assert len([line for line in source.warnings if "same pixels" in line]) == 3
    assert not set(source.train.pixels) & {*source.validation.pixels, *source.test.pixels}
    assert not set(source.validation.pixels) & set(source.test.pixels)
    assert source.split_folders == ("train", "validation", "test")


# === Files ===


def test_all_kinds_of_files_are_read_by_their_bytes(photos):
    for name in ("x.jpg", "x.jpe", "x.PNG", "x.webp", "x.bmp"):
        write_image(photos / "cat" / name)
    for name in ("x", "x.jpg.1", "x.jpg_large", "x.jpg!d", "x.jpg?w=300", "x.pnga", "x.txt"):
        shutil.copy(photos / "cat" / "x.webp", photos / "cat" / f"copy-{name}")
    source = sources.load("folder", photos)
    assert sum(sizes(source)) == 62
    assert source.left_out == {}


def test_other_files_are_left_out_and_counted(photos):
    for name in ("a.txt", "b.TXT", "notes.json", "x.jpg.json", "Thumbs.db", "desktop.ini", "empty", ".hidden.png", ".DS_Store"):
        (photos / "cat" / name).write_bytes(b"BMW is no image, nor is this" if name != "empty" else b"")
    for name in ("__MACOSX/cat/._1.png", "dog/@eaDir/1.png@SynoEAStream", "dog/.ipynb_checkpoints/1.png", ".git/a"):
        (photos / name).parent.mkdir(parents=True)
        (photos / name).write_bytes(b"x")
    (photos / "README.md").write_text("no class")
    write_image(photos / "stray.jpg")
    source = sources.load("folder", photos)
    assert source.class_names == ("cat", "dog")
    assert sum(sizes(source)) == 50
    assert source.left_out == {
        "hidden": 4,
        "in @eaDir": 1,
        "in __MACOSX": 1,
        "Thumbs.db": 1,
        "desktop.ini": 1,
        "outside the class folders": 2,
        "not an image: .json": 2,
        "not an image: .txt": 2,
        "not an image: other files": 1,
    }
    assert warning(source, "outside") == "1 image outside the class folders is left out: stray.jpg"


def test_images_in_folders_within_a_class_belong_to_it(photos):
    for i in range(5):
        write_image(photos / "dog" / "puppies" / "small" / f"{i}.png")
    source = sources.load("folder", photos)
    assert sum(sizes(source)) == 55
    assert warning(source, "dog") == "images in folders within dog count as dog: puppies"


def test_a_link_to_an_enclosing_folder_is_an_error(photos):
    (photos / "dog" / "again").symlink_to(photos / "dog")
    assert "is a link to a folder that contains it" in data_error_of(photos).summary


def test_a_named_pipe_is_not_opened(photos):
    os.mkfifo(photos / "dog" / "pipe.jpg")
    assert sources.load("folder", photos).left_out == {"not a file": 1}


# === Broken files ===


def write_broken_files(photos):
    """Writes files that can't be read. -> `{path: reason}`"""
    whole = (photos / "dog" / "7.png").read_bytes()
    contents = {
        "0.jpg": (b"", "the file is empty"),
        "1.jpg": (b"no image at all", "not a readable JPEG"),
        "2.png": (whole[:200], "the image is broken"),
        "3.jpg": (b"\n<!DOCTYPE html><p>404", "a web page (HTML)"),
        "4.jpg_large": (b"<html>", "a web page (HTML)"),
        "5.png": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a Git LFS pointer"),
        "6.psd": (b"8BPS", "not a readable JPEG"),
        "7": (whole[:200], "the image is broken"),
    }
    for name, (data, _) in contents.items():
        (photos / "dog" / f"broken {name}").write_bytes(data)
    return {f"{photos}/dog/broken {name}": reason for name, (_, reason) in contents.items()}


def test_all_broken_files_are_listed_at_once(photos):
    expected = write_broken_files(photos)
    error = data_error_of(photos)
    assert error.summary == f"8 of 58 files in {photos} can't be read"
    assert len(error.details) == 8
    for detail, (path, reason) in zip(error.details, expected.items()):
        assert detail.startswith(f"{path}: ") and reason in detail
    assert "--skip-broken" in error.hint and "git lfs pull" in error.hint


def test_many_broken_files_are_listed_in_a_text_file(photos, temporary_folder):
    for i in range(12):
        (photos / "cat" / f"broken {i:02}.jpg").write_bytes(b"")
    os.rename(photos / "cat" / "broken 00.jpg", os.fsencode(photos / "cat") + b"/broken \xe9.jpg")
    error = data_error_of(photos)
    assert len(error.details) == 10
    [listed] = temporary_folder.glob("cvt-keras-broken-files-*.txt")
    assert error.summary == f"12 of 62 files in {photos} can't be read; all are listed in {listed}"
    lines = listed.read_text("utf-8").splitlines()
    assert len(lines) == 12
    assert lines[-1] == rf"{photos}/cat/broken \xe9.jpg: the file is empty"
    assert str(listed) in message(error)


def test_skip_broken_leaves_broken_files_out(photos):
    expected = write_broken_files(photos)
    (photos / "dog" / "nowhere.jpg").symlink_to("/nowhere")
    source = sources.load("folder", photos, skip_broken=True)
    assert sum(sizes(source)) == 50
    assert sum(source.left_out.values()) == len(expected) + 1
    assert source.left_out["broken: a link whose target is missing"] == source.left_out["broken: the file is empty"] == 1
    assert source.left_out["broken: a web page (HTML), not an image"] == 2
    assert warning(source, "can't be read").startswith("9 files that can't be read are left out: dog/broken 0.jpg, ")


def test_a_class_of_broken_files_is_an_error_also_with_skip_broken(photos):
    (photos / "eel").mkdir()
    (photos / "eel" / "1.jpg").write_bytes(b"")
    assert data_error_of(photos, skip_broken=True).summary == f"{photos} has no readable images of eel"


def test_broken_links_are_an_error(photos):
    for path in sorted((photos / "cat").iterdir()):
        path.unlink()
        path.symlink_to(f"../.git/annex/objects/{path.name}")
    error = data_error_of(photos)
    assert error.summary.startswith(f"20 of 50 files in {photos} can't be read")
    assert error.details[0] == f"{photos}/cat/0.png: a broken link: ../.git/annex/objects/0.png does not exist"
    assert "git annex get" in error.hint and "dvc pull" in error.hint
    (photos / "README.md").symlink_to("/nowhere")
    assert "21 of 51 files" in data_error_of(photos).summary


def test_a_broken_link_to_a_folder_is_named(photos):
    (photos / "eel").symlink_to("/nowhere")
    error = data_error_of(photos, skip_broken=True)
    assert error.summary == f"{photos}/eel is a broken link: /nowhere does not exist"
    (photos / "owl").symlink_to("/nowhere")
    error = data_error_of(photos)
    assert error.summary == f"2 links in {photos} are broken" and len(error.details) == 2


def test_files_without_read_permission_are_named(photos, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    for path in sorted(photos.rglob("*.png"))[:15]:
        path.unlink()
    for path in (photos / "dog").iterdir():
        path.unlink()
    write_image(photos / "dog" / "1.png")
    monkeypatch.setattr("cvt_keras.data.folder.open", refuse, raising=False)
    error = data_error_of(photos)
    assert error.details[0] == f"{photos}/cat/5.png: Permission denied"
    assert error.hint.startswith("Ask for read permission")


def test_a_folder_without_read_permission_is_named(photos, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert f"Permission denied: '{photos}" in data_error_of(photos).summary


def test_a_jpeg_without_its_last_bytes_is_read_with_a_warning(photos):
    write_image(photos / "cat" / "x.jpg", noise(1, (100, 120, 3))[0])
    (photos / "cat" / "x.jpg").write_bytes((photos / "cat" / "x.jpg").read_bytes()[:-2])
    source = sources.load("folder", photos)
    assert sum(sizes(source)) == 51
    assert warning(source, "last bytes") == "1 image lacks its last bytes and is used without them: cat/x.jpg"


def test_one_other_pixel_makes_two_colours(photos):
    for i, spot in enumerate([(0, 0), (0, 7), (7, 0), (5, 3)]):
        pixels = np.zeros((8, 8, 3), "uint8")
        pixels[spot] = 1
        write_image(photos / "cat" / f"spot{i}.png", pixels)
    assert sources.load("folder", photos).warnings == ()


def test_pixels_are_compared_at_their_full_size(split_photos):
    """These images differ in one pixel or in size, but are equal once they are stretched."""
    for i, path in enumerate(["train/cat/x.png", "train/cat/y.png", "test/cat/x.png", "test/cat/y.png"]):
        pixels = np.zeros((80, 80, 3), "uint8")
        pixels[40:, 40:] = 255
        pixels[-1, -1, 0] -= i
        write_image(split_photos / path, pixels if i < 3 else pixels.repeat(2, axis=0))
    assert sources.load("folder", split_photos, Preprocessing(image_size=(2, 2))).left_out == {}
    assert folder.pixel_digest(np.zeros((4, 6, 3), "uint8")) != folder.pixel_digest(np.zeros((6, 4, 3), "uint8"))


def test_images_with_only_one_colour_are_counted(photos):
    for i in range(4):
        write_image(photos / "cat" / f"icon{i}.png", np.zeros((8, 8 + i, 4), "uint8"))
    assert warning(sources.load("folder", photos), "one colour") == (
        "4 images have only one colour: cat/icon0.png, cat/icon1.png, cat/icon2.png and 1 more"
    )


# === Folders without images ===


def test_a_folder_without_images_is_left_out_with_a_warning(split_photos):
    for path in ("annotations/1.xml", "train/labels/a/1.txt", "train/labels/2", "test/labels/1.txt"):
        (split_photos / path).parent.mkdir(parents=True, exist_ok=True)
        (split_photos / path).write_bytes(b"x")
    source = sources.load("folder", split_photos)
    assert source.class_names == ("cat", "dog")
    assert source.left_out == {
        "in a folder without images: annotations": 1,
        "in a folder without images: test/labels": 1,
        "in a folder without images: train/labels": 2,
    }
    assert warning(source, "annotations") == "annotations holds no images and is left out: 1 file"
    assert warning(source, "train/labels") == "train/labels holds no images and is left out: 2 files"


def test_a_class_with_images_in_one_split_only_is_an_error(split_photos):
    write_image(split_photos / "train" / "eel" / "1")  # an image without an ending
    (split_photos / "test" / "eel").mkdir()
    (split_photos / "test" / "eel" / "1.txt").write_bytes(b"x")
    assert data_error_of(split_photos).summary == f"{split_photos} has no readable test images of eel"


def test_folders_without_images_are_named_if_there_are_too_few_classes(photos):
    shutil.rmtree(photos / "dog")
    (photos / "dog").mkdir()
    (photos / "dog" / "1.txt").write_bytes(b"x")
    assert data_error_of(photos).summary.startswith(
        "`data_dir` must hold at least two class folders. Found: cat, and folders without images: dog. Received: "
    )


# === Other layouts ===


def test_class_folders_with_the_same_inner_folders_are_an_error(photos, tmp_path):
    for name in ("fold1", "fold2"):
        shutil.copytree(photos, tmp_path / "folds" / name)
    error = data_error_of(tmp_path / "folds")
    assert error.summary.endswith("fold1, fold2 hold no images directly, but all hold the folders cat, dog")
    assert "merge fold1, fold2" in error.hint and "If fold1, fold2 are the classes" in error.hint
    (tmp_path / "folds" / "fold2" / "dog").rename(tmp_path / "folds" / "fold2" / "eel")
    assert sources.load("folder", tmp_path / "folds").class_names == ("fold1", "fold2")


def test_inner_folders_for_images_and_labels_are_not_classes(photos):
    for name in ("cat", "dog"):
        (photos / name).rename(photos / "images")
        (photos / name).mkdir()
        (photos / "images").rename(photos / name / "images")
        (photos / name / "labels").mkdir()
        (photos / name / "labels" / "1.txt").write_bytes(b"x")
    assert sources.load("folder", photos).class_names == ("cat", "dog")


@pytest.mark.parametrize("test", ["Cat", "CAT"])
def test_class_names_that_differ_in_case_are_an_error(split_photos, test):
    (split_photos / "test" / "cat").rename(split_photos / "test" / test)
    error = data_error_of(split_photos)
    folders = f"{split_photos}/test and {split_photos}/train"
    assert error.summary == f"class names in {folders} differ in upper and lower case: {test} and cat"
    assert error.hint == f"In {split_photos}/test, rename {test} to cat"


@pytest.mark.parametrize("beside", [False, True])
def test_splits_one_level_down_are_suggested(split_photos, tmp_path, beside):
    root = tmp_path / "around"
    root.mkdir()
    split_photos.rename(root / "data")
    if beside:
        (root / "labels").mkdir()
        (root / "labels" / "1.txt").write_bytes(b"x")
    assert data_error_of(root).hint == f"The splits train, test are in {root}/data: use --data-dir {root}/data"


def test_data_dir_is_required():
    error = error_of("folder")
    assert (type(error), error.argument) == (ArgumentError, "data_dir")
    assert "--data-dir" in error.hint


def test_an_empty_class_folder_is_named(photos):
    (photos / "eel").mkdir()
    assert data_error_of(photos).summary == f"the class folder {photos / 'eel'} is empty"


@pytest.mark.parametrize("remove", ["cat", "cat dog"])
def test_fewer_than_two_classes_are_an_error(photos, remove):
    for name in remove.split():
        shutil.rmtree(photos / name)
    error = data_error_of(photos)
    assert error.summary.startswith("`data_dir` must hold at least two class folders")
    assert ("Found: none" in error.summary) == (remove == "cat dog")
    assert "DIR/cat/1.jpg" in error.hint


def test_the_error_for_a_flat_folder_shows_the_layout(photos):
    error = data_error_of(photos / "cat")
    assert error.summary.endswith(f"Found: none, and 20 images outside class folders. Received: data_dir={photos / 'cat'}")
    assert "DIR/cat/1.jpg" in error.hint


def test_classes_one_level_down_are_suggested(photos):
    error = data_error_of(photos.parent)
    assert error.summary.endswith(f"Found: photos. Received: data_dir={photos.parent}")
    assert f"--data-dir {photos}" in error.hint


def test_splits_without_class_folders_are_an_error(photos):
    (photos / "cat").rename(photos / "train")
    (photos / "dog").rename(photos / "Test")
    assert "has no class folders within Test, train" in data_error_of(photos).summary


# === Names ===


def test_class_names_are_compared_after_normalisation(split_photos):
    for split, form in (("train", "NFD"), ("test", "NFC")):
        (split_photos / split / "cat").rename(split_photos / split / unicodedata.normalize(form, "café"))
    assert sources.load("folder", split_photos).class_names == ("café", "dog")


def test_two_folders_with_the_same_normalised_name_are_an_error(photos):
    for form in ("NFD", "NFC"):
        write_image(photos / unicodedata.normalize(form, "café") / "1.png")
    assert "two folders named café" in data_error_of(photos).summary


def test_a_class_name_that_is_not_utf_8_is_an_error_before_files_are_read(photos, monkeypatch):
    os.rename(photos / "cat", os.fsencode(photos) + b"/caf\xe9")
    monkeypatch.setattr(images, "read", lambda data, reserve: pytest.fail("read"))
    error = data_error_of(photos)
    assert error.summary == rf"the name of a class folder is not valid UTF-8: {photos}/caf\xe9"
    assert "convmv" in error.hint


@pytest.mark.parametrize("name", ["a\nb", "a\tb", "a\u2028b"])
def test_control_characters_in_a_class_name_are_an_error(photos, name):
    (photos / "cat").rename(photos / name)
    assert "line break" in data_error_of(photos).summary


def test_file_names_may_hold_any_bytes(photos):
    os.rename(photos / "cat" / "1.png", os.fsencode(photos) + b"/cat/\xe9\n.png")
    assert sum(sizes(sources.load("folder", photos))) == 50


# === Progress ===


def test_many_files_show_a_progress_bar(photos, monkeypatch):
    steps = []

    class Bar:
        def __init__(self, total, **options):
            assert total == 50
            self.hidden = options["disable"]

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

        def update(self):
            if self.hidden is None:  # shown on a terminal
                steps.append(1)

    monkeypatch.setattr("tqdm.tqdm", Bar)
    sources.load("folder", photos, cache=Cache("memory"))
    assert not steps
    monkeypatch.setattr("cvt_keras.data.cache._MIN_IMAGES_FOR_PROGRESS", 50)
    sources.load("folder", photos, cache=Cache("memory"))
    assert len(steps) == 50
