import dataclasses
import errno
import os
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from labelled_images import labelled, noise, write_image

from cvt_keras import runs
from cvt_keras.data import cache, images, sources, tfds
from cvt_keras.data.cache import Cache
from cvt_keras.data.pipeline import evaluation_batches, training_batches
from cvt_keras.data.pixels import INDEX_TYPE
from cvt_keras.errors import ArgumentError, DataError
from cvt_keras.preprocessing import Preprocessing
from cvt_keras.training.recipes import SMOKE

SPLITS = ("train", "validation", "test")


@pytest.fixture
def cache_dir(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def decoded(monkeypatch):
    """The sizes in bytes of the files that were decoded."""
    sizes, read = [], images.read

    def counted(data, reserve=None):
        sizes.append(len(data))
        return read(data, reserve)

    monkeypatch.setattr(images, "read", counted)
    return sizes


@pytest.fixture
def load(photos, cache_dir, monkeypatch):
    """Loads `photos`: 50 files."""
    monkeypatch.setattr(cache, "_SETTLED_NS", 0)  # the files are new
    return lambda kind="disk", **options: sources.load("folder", photos, cache=Cache(kind, str(cache_dir)), **options)


def assert_same(source, other):
    assert source.fingerprint() == other.fingerprint()
    assert (source.mean, source.std, source.class_names) == (other.mean, other.std, other.class_names)
    for name in SPLITS:
        ours, theirs = getattr(source, name), getattr(other, name)
        for i in range(len(ours)):
            np.testing.assert_array_equal(ours.images[i], theirs.images[i])
        assert (ours.digests, ours.pixels) == (theirs.digests, theirs.pixels)


def rows(cache_dir):
    """The number of images in a cache."""
    return sum(path.stat().st_size for path in cache_dir.glob("*/index")) // INDEX_TYPE.itemsize


def test_a_second_command_decodes_nothing(load, decoded, capsys):
    first = load()
    assert len(decoded) == 50
    assert_same(load(), first)
    assert len(decoded) == 50
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("resize", ["stretch", "crop"])
@pytest.mark.parametrize("kind", ["memory", "off"])
def test_every_kind_of_cache_gives_the_same_batches(load, photos, kind, resize):
    recipe = dataclasses.replace(SMOKE, image_size=9, resize=resize)  # resizing makes some of the images smaller
    for i in range(10):
        write_image(photos / "cat" / f"long{i}.png", shape=(8 + i, 40, 3))
    disk, other = (load(kind, preprocessing=recipe.preprocessing) for kind in ("disk", kind))
    assert (None in disk.train.images.shape) == (resize == "crop")
    assert_same(disk, other)
    for source in (disk, other):
        assert not isinstance(source.train.images, np.ndarray)
    for ours, theirs in zip(training_batches(disk.train, 2, recipe), training_batches(other.train, 2, recipe), strict=True):
        np.testing.assert_array_equal(ours[0], theirs[0])
        np.testing.assert_array_equal(ours[1], theirs[1])
    batches = (evaluation_batches(source.test, 2, recipe.preprocessing) for source in (disk, other))
    for ours, theirs in zip(*batches, strict=True):
        np.testing.assert_array_equal(ours[0], theirs[0])


def test_memory_writes_nothing(load, cache_dir):
    load("memory")
    assert not cache_dir.exists()


def test_off_keeps_no_pixels_but_checks_files_once(load, cache_dir, decoded):
    source = load("off")
    assert sorted(path.name.partition("-")[0] for path in cache_dir.glob("*/*")) == ["files", "index"]
    load("off")
    assert len(decoded) == 50
    assert source.test.images[0].shape == (32, 32, 3)
    assert len(decoded) == 51


def test_off_names_a_file_that_changes_later(load, photos):
    source = load("off")
    for path in photos.rglob("*.*"):
        write_image(path, noise(1)[0])
    with pytest.raises(DataError, match="has changed since this command began"):
        source.train.images[0]
    shutil.rmtree(photos)
    with pytest.raises(DataError, match="can't be read any more: No such file or directory"):
        source.train.images[0]


def test_only_new_and_changed_files_are_decoded(load, photos, decoded, cache_dir, capsys):
    load()
    first, second = sorted((photos / "cat").iterdir())[:2]
    write_image(first, noise(1)[0])
    second.unlink()
    write_image(photos / "dog" / "new.png")
    decoded.clear()
    source = load()
    assert len(decoded) == 2
    [place] = cache_dir.iterdir()
    assert capsys.readouterr().out == f"decoded 2 new images; the others are in {place}\n"
    assert_same(source, load("memory"))


def test_a_copied_file_is_read_but_not_decoded(load, photos, decoded):
    load()
    decoded.clear()
    path = next((photos / "cat").iterdir())
    path.rename(path.with_name("renamed.png"))
    os.utime(next((photos / "dog").iterdir()))
    source = load()
    assert decoded == []
    assert_same(source, load("memory"))


def test_a_file_of_the_same_size_and_time_is_noticed(load, photos):
    load()
    path = photos / "cat" / "same.bmp"
    write_image(path, noise(2)[0])
    state = path.stat()
    load()
    write_image(path, noise(2)[1])
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert path.stat().st_size == state.st_size
    assert_same(load(), load("memory"))


def test_each_way_of_resizing_has_its_own_pixels(load, decoded):
    load()
    other = load(preprocessing=Preprocessing(image_size=(8, 12)))
    assert other.train.images.shape[1:] == (8, 12, 3)
    assert len(decoded) == 100
    assert load().train.images.shape[1:] == (32, 32, 3)


@pytest.mark.parametrize("name", ["pixels", "index", "files-*"])
@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "noise"])
def test_damaged_files_are_decoded_again(load, cache_dir, name, damage):
    first = load("memory")
    load()
    [path] = cache_dir.glob(f"*/{name}")
    data = path.read_bytes()
    path.unlink()  # before writing, as it may be mapped
    if damage == "noise" and name == "pixels":
        data = data[::-1]  # not noticed, as reading all pixels would take long: so the length must count
    if damage != "gone":
        path.write_bytes({"cut": data[:-5], "empty": b"", "noise": data[::-1]}[damage])
    assert_same(load(), first)
    assert_same(load(), first)


@pytest.mark.parametrize(("name", "extra"), [("pixels", 1_000), ("index", 100)])
def test_what_a_killed_command_wrote_last_is_dropped(load, photos, cache_dir, name, extra):
    first = load()
    [path] = cache_dir.glob(f"*/{name}")
    with path.open("ab") as file:
        file.write(bytes(extra))
    assert_same(load(), first)
    write_image(photos / "cat" / "new.png")
    assert_same(load(), load("memory"))
    assert_same(load(), load("memory"))


def test_an_interrupt_keeps_what_was_decoded(load, cache_dir, decoded, monkeypatch):
    shrink = images.shrink

    def interrupted(*arguments):
        if len(decoded) > 30:
            raise KeyboardInterrupt
        return shrink(*arguments)

    monkeypatch.setattr(images, "shrink", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load()
    monkeypatch.setattr(images, "shrink", shrink)
    kept = rows(cache_dir)
    assert kept > 0
    decoded.clear()
    load()
    assert len(decoded) == 50 - kept


def test_images_are_written_in_batches(load, monkeypatch):
    sizes, append = [], cache.Store._append
    monkeypatch.setattr(cache, "_BATCH_BYTES", 10 * 32 * 32 * 3)
    monkeypatch.setattr(
        cache.Store, "_append", lambda self, index, pixels: sizes.append(len(index)) or append(self, index, pixels)
    )
    first = load()
    assert sizes == [11, 11, 11, 11, 6]
    assert_same(load(), first)
    assert_same(load("memory"), first)


def test_a_full_disk_is_named(load, cache_dir, monkeypatch, decoded):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cache.os, "fsync", full)
        with pytest.raises(DataError) as raised:
            load()
    error = raised.value
    assert error.summary == f"`cache_dir` can't be used: No space left on device. Received: cache_dir={cache_dir}"
    assert error.argument == "cache_dir"
    assert error.hint == "Free some space, choose another folder with --cache-dir, or add --cache memory"
    assert [path.stat().st_size for path in cache_dir.glob("*/*")] == [0, 0]
    assert_same(load(), load("memory"))


def test_a_list_of_files_that_is_not_written_is_no_error(load, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(runs, "whole", full)
    load()


def test_folders_of_one_name_share_their_images(load, photos, tmp_path, cache_dir, decoded):
    first = load()
    shutil.copytree(photos, tmp_path / "copy" / photos.name)
    decoded.clear()
    assert_same(sources.load("folder", tmp_path / "copy" / photos.name, cache=Cache("disk", str(cache_dir))), first)
    assert decoded == []


def test_the_way_of_cropping_does_not_matter_if_images_are_stretched(load, decoded):
    load()
    load(preprocessing=Preprocessing(image_size=(32, 32), crop_pct=0.5))
    assert len(decoded) == 50


def test_the_folder_of_a_data_set_has_its_name(photos, cache_dir):
    named = photos.rename(photos.with_name("фото 1/2".replace("/", ":")))
    sources.load("folder", named, cache=Cache("disk", str(cache_dir)))
    [place] = cache_dir.iterdir()
    assert place.name.startswith("фото-1-2-stretch-32-32-bilinear-")


def test_a_cache_dir_that_is_a_file_is_named(load, cache_dir):
    cache_dir.write_text("")
    with pytest.raises(DataError, match="can't be used") as raised:
        load()
    assert raised.value.argument == "cache_dir"
    assert raised.value.hint == "Choose another folder with --cache-dir, or add --cache memory"
    assert_same(load("off"), load("memory"))


def test_off_without_a_folder_keeps_no_pixels(cache_dir):
    cache_dir.write_text("")
    with Cache("off", str(cache_dir)).open("photos", None) as store:
        with store.adding() as add:
            add("1", noise(1)[0])
        assert len(store.index) == 1
        assert store._in_memory == []


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_copies_of_a_photo_are_stored_once_and_without_a_word(load, photos, kind, capsys):
    path = next((photos / "cat").iterdir())
    shutil.copy(path, path.with_name("copy.png"))
    source = load(kind)
    assert sum(len(getattr(source, name)) for name in SPLITS) == 51
    assert capsys.readouterr().out == ""


def test_a_repair_leaves_what_another_command_has_mapped(load, photos, cache_dir):
    source, expected = load(), load("memory")
    [path] = cache_dir.glob("*/index")
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:200] + bytes(len(data) - 200))
    write_image(photos / "cat" / "new.png")
    assert_same(load(), load("memory"))
    assert_same(source, expected)


@pytest.mark.parametrize("place", [".", "cat", "new/folder"])
def test_a_cache_among_the_photos_is_refused(photos, place):
    with pytest.raises(DataError, match="`cache_dir` must not be in the folder of images") as raised:
        sources.load("folder", photos, cache=Cache("disk", str(photos / place)))
    assert raised.value.argument == "cache_dir"


def test_a_second_command_waits_for_the_first(load, cache_dir, decoded, capsys):
    load()
    [place] = cache_dir.iterdir()
    released = []

    def hold():
        with runs.lock(place):
            held.set()
            time.sleep(0.5)
            released.append(time.monotonic())

    held = threading.Event()
    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    load()
    assert released
    thread.join()
    assert capsys.readouterr().out == f"another command is reading the same images into {place}: waiting for it\n"


def test_the_default_folder_is_in_the_users_cache(photos, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    sources.load("folder", photos)
    [place] = (tmp_path / "home" / "cvt-keras").iterdir()
    assert place.name.startswith(f"{photos.name}-")


# === TFDS ===


@pytest.fixture
def load_tfds(write_tfds, tmp_path, cache_dir):
    pixels = noise(300, (28, 28, 1))
    write_tfds(tmp_path, "mnist", {"train": labelled(pixels[:200]), "test": labelled(pixels[200:])}, shard=40)
    return lambda kind="disk": sources.load("tfds:mnist", str(tmp_path), cache=Cache(kind, str(cache_dir)))


def fail(*args, **keywords):
    raise AssertionError("read again")


def test_tfds_is_read_once(load_tfds, monkeypatch):
    first = load_tfds()
    assert_same(load_tfds("memory"), first)
    monkeypatch.setattr(images, "read", fail)
    assert_same(load_tfds(), first)
    assert first.test.images.shape == (100, 28, 28, 3)


def test_tfds_resumes_where_a_command_was_interrupted(load_tfds, cache_dir, monkeypatch, decoded):
    read = images.read

    def interrupted(data, reserve=None):
        if len(decoded) == 150:
            raise KeyboardInterrupt
        return read(data, reserve)

    monkeypatch.setattr(tfds, "_READ_BATCH", 32)
    monkeypatch.setattr(images, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_tfds()
    monkeypatch.setattr(images, "read", read)
    kept = rows(cache_dir)
    assert 100 < kept < 200
    decoded.clear()
    source = load_tfds()
    assert len(decoded) == 300 - kept
    assert_same(source, load_tfds("memory"))
    pixels = [source.train.images[i].tobytes() for i in range(len(source.train))]
    assert len(set(pixels)) == len(pixels)


def test_tfds_refuses_to_read_without_a_cache(load_tfds):
    with pytest.raises(ArgumentError) as raised:
        load_tfds("off")
    assert raised.value.argument == "cache"
    assert "--cache memory" in raised.value.hint


def test_a_data_set_that_was_prepared_again_is_read_again(load_tfds, tmp_path, write_tfds):
    first = load_tfds()
    shutil.rmtree(tmp_path / "mnist")
    pixels = noise(301, (28, 28, 1))[1:]
    write_tfds(tmp_path, "mnist", {"train": labelled(pixels[:200]), "test": labelled(pixels[200:])})
    assert load_tfds().fingerprint() != first.fingerprint()


# === Processes ===

BUILDER = """
import sys
from cvt_keras.data import cache, sources
import tensorflow
cache._BATCH_BYTES = 10_000
print("ready", flush=True)
source = sources.load("folder", sys.argv[1], cache=cache.Cache("disk", sys.argv[2]))
print(source.fingerprint(), flush=True)
"""


@pytest.mark.slow
def test_killed_builders_and_two_at_once_leave_the_cache_whole(photos, cache_dir, load):
    for i in range(150):
        write_image(photos / "cat" / f"large{i}.png", noise(1, (600 + i, 800, 3))[0])
    expected = load("memory")

    def start():
        command = [sys.executable, "-c", BUILDER, str(photos), str(cache_dir)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        return process

    stored = []
    for i in range(10):
        process = start()
        time.sleep(0.1 + 0.2 * i)
        process.kill()
        process.communicate()
        stored += [path.stat().st_size for path in cache_dir.glob("*/index")]
    assert len(set(stored)) > 2  # the kills came in the middle
    assert_same(load(), expected)
    shutil.rmtree(cache_dir)
    builders = [start() for _ in range(2)]
    outputs = [builder.communicate()[0] for builder in builders]
    assert outputs[0].splitlines()[-1] == outputs[1].splitlines()[-1] == str(expected.fingerprint())
    assert_same(load(), expected)
