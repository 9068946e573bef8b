import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from labelled_images import error_of, labelled, noise, resized, rows, same_rows, sizes

from cvt_keras.data import images, sources, tfds
from cvt_keras.errors import DataError, UnavailableError

TFDS_DATA_DIR = Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()


def test_splits_are_disjoint_and_fixed(cifar10_dir):
    source = tfds.cifar10(cifar10_dir)
    again = sources.load("cifar10", str(cifar10_dir))
    assert sizes(source) == [256, 5_000, 256]
    assert source.train.images.dtype == np.uint8
    assert source.train.images.shape == (256, 32, 32, 3)
    for ours, theirs in zip((source.train, source.validation), (again.train, again.validation)):
        np.testing.assert_array_equal(ours.images, theirs.images)
        np.testing.assert_array_equal(ours.labels, theirs.labels)
    assert len(np.unique(rows(source.train, source.validation), axis=0)) == 5_256
    assert (source.name, source.note, source.fallback, source.mirror) == ("cifar10", "", "", True)
    assert source.class_names[:3] == ("airplane", "automobile", "bird")
    assert (source.mean, source.std) == (tfds.CIFAR10_MEAN, tfds.CIFAR10_STD)


def test_cifar100_is_its_pixels_and_fine_labels_in_their_order(cifar100_dir):
    source = sources.load("cifar100", cifar100_dir)
    assert source.name == "cifar100"
    np.testing.assert_array_equal(
        np.concatenate([source.train.images, source.validation.images, source.test.images]), noise(160)
    )
    np.testing.assert_array_equal(source.validation.labels, np.arange(100, 120) % 100)
    assert source.class_names == tuple(f"class {i}" for i in range(100))
    pixels = source.train.images / 255
    np.testing.assert_allclose(source.mean, pixels.mean(axis=(0, 1, 2)), atol=6e-5)
    np.testing.assert_allclose(source.std, pixels.std(axis=(0, 1, 2)), atol=6e-5)
    assert source.mean == tuple(round(number, 4) for number in source.mean)


def test_without_the_file_of_names_classes_are_numbers(cifar100_dir):
    [names] = cifar100_dir.rglob("label.labels.txt")
    names.unlink()
    assert sources.load("cifar100", cifar100_dir).class_names == tuple(map(str, range(100)))


def test_another_size_is_stretched_to(cifar100_dir):
    source = sources.load("cifar100", cifar100_dir, image_size=20)
    assert source.test.images.shape == (40, 20, 20, 3)
    np.testing.assert_array_equal(source.test.images[0], resized(noise(160)[120], 20))


def test_small_images_stay_small(cifar100_dir):
    """At 224 pixels CIFAR would take 7.5 GB; the pipeline stretches batches."""
    source = sources.load("cifar100", cifar100_dir, image_size=224)
    np.testing.assert_array_equal(source.test.images, noise(160)[120:])


def test_a_jpeg_copy_is_noted(cifar100_dir, write_tfds, monkeypatch):
    assert sources.load("cifar100", cifar100_dir).note == ""
    shutil.rmtree(cifar100_dir / "cifar100")
    monkeypatch.setattr(
        "tensorflow_datasets.features.Image.encode_example", lambda self, image: tf.io.encode_jpeg(image).numpy()
    )
    examples = labelled(noise(30), 100, id="", coarse_label=0)
    write_tfds(cifar100_dir, "cifar100", {"train": examples, "test": examples})
    for name in ("cifar100", "tfds:cifar100"):
        assert "JPEG" in sources.load(name, cifar100_dir).note


def test_without_data_or_network_it_says_so_within_seconds(tmp_path, reached):
    for dataset in ("cifar10", "cifar100"):
        error = error_of(dataset, tmp_path)
        assert (type(error), error.argument) == (UnavailableError, "data_dir")
        for part in (f"not in {tmp_path}", "no connection to www.cs.toronto.edu (no network)"):
            assert part in error.summary
        assert "--data-dir" in error.hint
    assert reached == [("www.cs.toronto.edu", 443)] * 2


def test_too_few_images_to_hold_out(cifar100_dir, monkeypatch):
    monkeypatch.setattr(tfds, "VALIDATION_IMAGES", 120)
    error = error_of("cifar100", cifar100_dir)
    assert (type(error), error.argument) == (DataError, "dataset")
    assert error.summary == "CIFAR-100 has too few training images to hold out 120: 120"


def cut(records):
    records.write_bytes(records.read_bytes()[:10_000])


def flip(records):
    data = bytearray(records.read_bytes())
    data[5_000] ^= 1
    records.write_bytes(data)


@pytest.mark.parametrize(
    ("sabotage", "reason"),
    [
        (cut, "truncated record"),
        (flip, "corrupted record"),
        (Path.unlink, "No such file"),
        (lambda records: records.write_bytes(b""), "contained only 0 elements"),
    ],
    ids=["cut", "flip", "unlink", "empty"],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_broken_records_are_named(cifar100_dir, sabotage, reason, split):
    [records] = cifar100_dir.rglob(f"cifar100-{split}.tfrecord*")
    sabotage(records)
    error = error_of("cifar100", cifar100_dir)
    assert (type(error), error.argument) == (DataError, "data_dir")
    assert error.summary.startswith(f"CIFAR-100 in {cifar100_dir} can't be read: ")
    assert reason in error.summary
    assert f"Remove {records.parent}" in error.hint


@pytest.mark.parametrize("text", ["", '{"name": "cifar', "{}", "[]"])
def test_a_broken_description_is_named(cifar100_dir, text, reached):
    [info] = cifar100_dir.rglob("dataset_info.json")
    info.write_text(text)
    error = error_of("cifar100", cifar100_dir)
    assert (type(error), error.argument) == (DataError, "data_dir")
    assert f"{info} is broken (" in error.summary
    assert f"Remove {info.parent}" in error.hint
    assert not reached


def test_a_missing_description_is_named(cifar100_dir, reached):
    [info] = cifar100_dir.rglob("dataset_info.json")
    info.unlink()
    error = error_of("cifar100", cifar100_dir)
    assert (type(error), error.argument) == (DataError, "data_dir")
    assert f"{info.parent} has no dataset_info.json" in error.summary
    assert f"Remove {info.parent}" in error.hint
    assert not reached


def test_an_image_that_is_none_is_an_error(write_tfds, tmp_path, monkeypatch):
    monkeypatch.setattr("tensorflow_datasets.features.Image.encode_example", lambda self, image: b"no image")
    folder = write_tfds(tmp_path, "mnist", {"train": labelled(noise(20, (28, 28, 1)))})
    error = error_of("tfds:mnist", tmp_path)
    assert "not a readable JPEG" in error.summary
    assert str(folder) in error.hint


def test_tfds_holds_a_fixed_fair_sample_out(write_tfds, tmp_path):
    # Sorted by class, as some sets are: the end of it would be one class.
    images = noise(200, (28, 28, 1))
    train = [{"image": image, "label": i // 20} for i, image in enumerate(images)]
    write_tfds(tmp_path, "mnist", {"train": train, "test": labelled(noise(30, (28, 28, 1)))})
    source, again = (sources.load("tfds:mnist", tmp_path, image_size=28) for _ in range(2))
    assert sizes(source) == [180, 20, 30]
    np.testing.assert_array_equal(source.validation.images, again.validation.images)
    assert len(set(source.validation.labels)) > 5
    assert len(set(source.train.limit(20).labels)) > 5
    # Grey becomes three channels, and each image keeps its label.
    colour = np.repeat(images, 3, axis=-1)
    assert same_rows(rows(source.train, source.validation), colour.reshape(200, -1))
    for image, label in zip(source.validation.images, source.validation.labels):
        [place] = np.flatnonzero((colour == image).all(axis=(1, 2, 3)))
        assert place // 20 == label
    assert (source.name, source.note) == ("tfds:mnist", "")
    assert source.class_names == tuple("0123456789")


def test_tfds_holds_out_no_more_than_cifar_does(write_tfds, tmp_path, monkeypatch):
    monkeypatch.setattr(tfds, "VALIDATION_IMAGES", 3)
    write_tfds(tmp_path, "mnist", {"train": labelled(noise(100, (28, 28, 1))), "test": labelled(noise(5, (28, 28, 1)))})
    assert sizes(sources.load("tfds:mnist", tmp_path)) == [97, 3, 5]


def test_tfds_takes_a_config_and_images_of_any_size(write_tfds, tmp_path):
    # Of one colour each: the set keeps JPEGs.
    photos = [np.full((20 + i, 40, 3), (8 * i, 100, 200), "uint8") for i in range(30)]
    name = "imagenette/160px-v2"
    write_tfds(tmp_path, name, {"train": labelled(photos), "validation": labelled(photos[:8])})
    source = sources.load(f"tfds:{name}", tmp_path, image_size=24)
    assert (source.name, sizes(source), source.mirror) == (f"tfds:{name}", [27, 3, 8], True)
    assert source.train.images.shape == (27, 24, 24, 3)
    colours = source.test.images[np.argsort(source.test.labels)]
    np.testing.assert_allclose(colours, [resized(photo, 24) for photo in photos[:8]], atol=3)
    assert "validation split" in source.note
    assert sources.load(f"tfds:{name}:1.0.0", tmp_path).test.images.shape == (8, 32, 32, 3)


def test_tfds_without_a_test_split_holds_it_out(write_tfds, tmp_path):
    write_tfds(tmp_path, "tf_flowers", {"train": labelled(noise(50), 5)})
    source = sources.load("tfds:tf_flowers", tmp_path)
    assert sizes(source) == [40, 5, 5]
    assert same_rows(rows(source.train, source.validation, source.test), noise(50).reshape(50, -1))
    assert "held out" in source.note


@pytest.mark.parametrize("name", ["mnist", "kmnist", "fashion_mnist"])
def test_a_mirrored_character_is_another_one(write_tfds, tmp_path, name):
    write_tfds(tmp_path, name, {"train": labelled(noise(20, (28, 28, 1)))})
    assert sources.load(f"tfds:{name}", tmp_path).mirror == (name == "fashion_mnist")


def test_the_names_of_characters_are_tfds_own():
    import tensorflow_datasets

    assert set(tensorflow_datasets.list_builders(with_community_datasets=False)) >= tfds.CHARACTERS


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("nosuch", "tensorflow-datasets knows no nosuch"),
        ("imdb_reviews", "imdb_reviews has no images with a class each, but text, label"),
        ("coco", "coco has no images with a class each"),
        ("imagenette/nosuch", "BuilderConfig nosuch not found with version 1.0.0"),
        ("mnist:9.9.9", "mnist cannot be loaded at version 9.9.9"),
        ("no name", "Parsing builder name string no name failed"),
    ],
)
def test_what_is_no_image_classification_is_named(tmp_path, name, part, reached):
    error = error_of(f"tfds:{name}", tmp_path)
    assert (type(error), error.argument) == (DataError, "dataset")
    assert part in error.summary
    assert not reached


def test_a_set_without_a_training_split_is_named(write_tfds, tmp_path):
    write_tfds(tmp_path, "mnist", {"test": labelled(noise(5, (28, 28, 1)))})
    assert "mnist has no split to train on: it has test" in error_of("tfds:mnist", tmp_path).summary


def test_labels_that_are_kept_back_are_an_error(write_tfds, tmp_path):
    kept_back = [{"image": image, "label": -1} for image in noise(5, (28, 28, 1))]
    write_tfds(tmp_path, "mnist", {"train": labelled(noise(20, (28, 28, 1))), "test": kept_back})
    assert "labels of its split test" in error_of("tfds:mnist", tmp_path).summary


def test_hosts_are_tried_before_tfds_does(tmp_path, reached):
    error = error_of("tfds:svhn_cropped", tmp_path)
    assert type(error) is UnavailableError
    assert reached == [("ufldl.stanford.edu", 80)]
    for part in (f"not in {tmp_path}", "no connection to ufldl.stanford.edu"):
        assert part in error.summary
    assert "folder that holds svhn_cropped/" in error.hint


@pytest.mark.parametrize("name", ["mnist", "imagenet2012"])
def test_tfds_downloads_where_the_way_is_open(tmp_path, monkeypatch, name):
    """Or where it is the user who downloads: ImageNet's files are asked for by nobody."""
    import tensorflow_datasets

    def download(self):
        raise RuntimeError("the disk is full\nand more")

    monkeypatch.setattr(tensorflow_datasets.core.DatasetBuilder, "download_and_prepare", download)
    if name == "mnist":
        monkeypatch.setattr(tfds.probe, "require_reachable", lambda urls: None)
    error = error_of(f"tfds:{name}", tmp_path)
    assert type(error) is UnavailableError
    assert error.summary.endswith("the download failed: the disk is full")


@pytest.mark.skipif(
    not (TFDS_DATA_DIR / "cifar10").is_dir(), reason="set TFDS_DATA_DIR to a folder in which TFDS prepared CIFAR-10"
)
def test_real_cifar10():
    source = tfds.cifar10()
    assert sizes(source) == [45_000, 5_000, 10_000]
    assert np.bincount(source.test.labels).tolist() == [1_000] * 10
    assert np.bincount(source.validation.labels).min() > 400
    pixels = source.train.images.reshape(-1, 3) / np.float32(255)
    # A JPEG copy's are a little off.
    np.testing.assert_allclose(pixels.mean(axis=0, dtype="float64"), source.mean, atol=0.01)
    np.testing.assert_allclose(pixels.std(axis=0, dtype="float64"), source.std, atol=0.01)


@pytest.mark.skipif(
    not (TFDS_DATA_DIR / "cifar10").is_dir(), reason="set TFDS_DATA_DIR to a folder in which TFDS prepared CIFAR-10"
)
def test_the_accurate_decoder_of_tensorflow_gives_the_pixels_that_are_trained_on():
    builder, keys = tfds._builder("cifar10", "CIFAR-10", None)
    files = [data.numpy() for data, _ in tfds._encoded(builder, "test[:400]", keys)]
    for data in files:
        is_jpeg = data.startswith(b"\xff\xd8")
        expected = tf.io.decode_jpeg(data, dct_method="INTEGER_ACCURATE") if is_jpeg else tf.io.decode_png(data)
        np.testing.assert_array_equal(images.decode(data), expected)
