import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from labelled_images import error_of, labelled, noise, resized, rows, same_rows, sizes

from cvt_keras.data import images, sources, tfds
from cvt_keras.data.cache import Cache
from cvt_keras.errors import DataError, UnavailableError
from cvt_keras.preprocessing import Preprocessing

TFDS_DATA_DIR = Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()


def test_5000_images_are_held_out():
    assert tfds.VALIDATION_IMAGES == 5_000


def test_cifar10_holds_out_the_last_training_images(small_cifar10_dir):
    source = sources.load("cifar10", str(small_cifar10_dir))
    assert sizes(source) == [100, 20, 40]
    assert source.train.images.dtype == np.uint8
    splits = (source.train, source.validation, source.test)
    np.testing.assert_array_equal(np.concatenate([split.images for split in splits]), noise(160))
    assert [split.labels[0] for split in splits] == [0, 0, 0] and source.validation.labels[13] == 3
    assert (source.name, source.note, source.fallback, source.mirror) == ("cifar10", "", "", True)
    assert source.class_names[:3] == ("airplane", "automobile", "bird")
    assert (source.mean, source.std) == (tfds.CIFAR10_MEAN, tfds.CIFAR10_STD)


def test_cifar100_has_fine_labels(cifar100_dir):
    source = sources.load("cifar100", cifar100_dir)
    assert source.name == "cifar100"
    np.testing.assert_array_equal(
        np.concatenate([source.train.images, source.validation.images, source.test.images]), noise(160)
    )
    np.testing.assert_array_equal(source.validation.labels, np.arange(100, 120) % 100)
    assert source.class_names == tuple(f"class {i}" for i in range(100))
    pixels = np.asarray(source.train.images) / 255
    np.testing.assert_allclose(source.mean, pixels.mean(axis=(0, 1, 2)), atol=6e-5)
    np.testing.assert_allclose(source.std, pixels.std(axis=(0, 1, 2)), atol=6e-5)
    assert source.mean == tuple(round(number, 4) for number in source.mean)


def test_without_the_file_of_class_names_they_are_numbers(cifar100_dir):
    [names] = cifar100_dir.rglob("label.labels.txt")
    names.unlink()
    assert sources.load("cifar100", cifar100_dir).class_names == tuple(map(str, range(100)))


def test_larger_images_are_stretched(cifar100_dir):
    source = sources.load("cifar100", cifar100_dir, Preprocessing(image_size=(20, 20)))
    assert source.test.images.shape == (40, 20, 20, 3)
    np.testing.assert_array_equal(source.test.images[0], resized(noise(160)[120], 20))


def test_smaller_images_are_not_stretched(cifar100_dir):
    """At 224 pixels CIFAR would take 7.5 GB. The pipeline stretches batches."""
    source = sources.load("cifar100", cifar100_dir, Preprocessing(image_size=(224, 224)))
    np.testing.assert_array_equal(source.test.images, noise(160)[120:])


def test_the_note_names_a_jpeg_copy(cifar100_dir, write_tfds, monkeypatch):
    assert sources.load("cifar100", cifar100_dir).note == ""
    shutil.rmtree(cifar100_dir / "cifar100")
    monkeypatch.setattr(
        "tensorflow_datasets.features.Image.encode_example", lambda self, image: tf.io.encode_jpeg(image).numpy()
    )
    examples = labelled(noise(30), 100, id="", coarse_label=0)
    write_tfds(cifar100_dir, "cifar100", {"train": examples, "test": examples})
    for name in ("cifar100", "tfds:cifar100"):
        assert "JPEG" in sources.load(name, cifar100_dir).note


def test_without_data_or_network_the_error_names_both(tmp_path, reached):
    for dataset in ("cifar10", "cifar100"):
        error = error_of(dataset, tmp_path)
        assert (type(error), error.argument) == (UnavailableError, "data_dir")
        for part in (f"not in {tmp_path}", "no connection to www.cs.toronto.edu (no network)"):
            assert part in error.summary
        assert "--data-dir" in error.hint
    assert reached == [("www.cs.toronto.edu", 443)] * 2


def test_too_few_images_to_hold_out_are_an_error(cifar100_dir, monkeypatch):
    monkeypatch.setattr(tfds, "VALIDATION_IMAGES", 120)
    error = error_of("cifar100", cifar100_dir)
    assert (type(error), error.argument) == (DataError, "dataset")
    assert error.summary == "CIFAR-100 has too few training images to hold out 120. Found: 120"


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


def test_a_broken_image_is_an_error(write_tfds, tmp_path, monkeypatch):
    monkeypatch.setattr("tensorflow_datasets.features.Image.encode_example", lambda self, image: b"no image")
    folder = write_tfds(tmp_path, "mnist", {"train": labelled(noise(20, (28, 28, 1)))})
    error = error_of("tfds:mnist", tmp_path)
    assert "not a readable JPEG" in error.summary
    assert str(folder) in error.hint


def test_tfds_holds_out_a_fixed_fair_sample(write_tfds, tmp_path):
    # Sorted by class, as some data sets are: the last images are of one class.
    images = noise(200, (28, 28, 1))
    train = [{"image": image, "label": i // 20} for i, image in enumerate(images)]
    write_tfds(tmp_path, "mnist", {"train": train, "test": labelled(noise(30, (28, 28, 1)))})
    source, again = (sources.load("tfds:mnist", tmp_path, Preprocessing(image_size=(28, 28))) for _ in range(2))
    assert sizes(source) == [180, 20, 30]
    np.testing.assert_array_equal(source.validation.images, again.validation.images)
    assert len(set(source.validation.labels)) > 5
    assert len(set(source.train.limit(20).labels)) > 5
    # Grey images get three channels, and each image keeps its label.
    colour = np.repeat(images, 3, axis=-1)
    assert same_rows(rows(source.train, source.validation), colour.reshape(200, -1))
    for image, label in zip(source.validation.images, source.validation.labels):
        [place] = np.flatnonzero((colour == image).all(axis=(1, 2, 3)))
        assert place // 20 == label
    assert (source.name, source.note) == ("tfds:mnist", "")
    assert source.class_names == tuple("0123456789")


def test_tfds_holds_out_at_most_as_many_as_cifar(write_tfds, tmp_path, monkeypatch):
    monkeypatch.setattr(tfds, "VALIDATION_IMAGES", 3)
    write_tfds(tmp_path, "mnist", {"train": labelled(noise(100, (28, 28, 1))), "test": labelled(noise(5, (28, 28, 1)))})
    assert sizes(sources.load("tfds:mnist", tmp_path)) == [97, 3, 5]


def test_tfds_loads_a_config_with_images_of_any_size(write_tfds, tmp_path):
    # Of one colour each, as this data set stores JPEGs.
    photos = [np.full((20 + i, 40, 3), (8 * i, 100, 200), "uint8") for i in range(30)]
    name = "imagenette/160px-v2"
    write_tfds(tmp_path, name, {"train": labelled(photos), "validation": labelled(photos[:8])})
    source = sources.load(f"tfds:{name}", tmp_path, Preprocessing(image_size=(24, 24)))
    assert (source.name, sizes(source), source.mirror) == (f"tfds:{name}", [27, 3, 8], True)
    assert source.train.images.shape == (27, 24, 24, 3)
    colours = source.test.images[np.argsort(source.test.labels)]
    np.testing.assert_allclose(colours, [resized(photo, 24) for photo in photos[:8]], atol=3)
    assert "validation split" in source.note
    assert sources.load(f"tfds:{name}:1.0.0", tmp_path).test.images.shape == (8, 32, 32, 3)


def test_tfds_holds_out_a_test_split_if_there_is_none(write_tfds, tmp_path):
    write_tfds(tmp_path, "tf_flowers", {"train": labelled(noise(50), 5)})
    source = sources.load("tfds:tf_flowers", tmp_path)
    assert sizes(source) == [40, 5, 5]
    assert same_rows(rows(source.train, source.validation, source.test), noise(50).reshape(50, -1))
    assert "held out" in source.note


@pytest.mark.parametrize("name", ["mnist", "kmnist", "fashion_mnist"])
def test_characters_are_not_mirrored(write_tfds, tmp_path, name):
    write_tfds(tmp_path, name, {"train": labelled(noise(20, (28, 28, 1)))})
    assert sources.load(f"tfds:{name}", tmp_path).mirror == (name == "fashion_mnist")


def test_tfds_has_all_data_sets_of_characters():
    import tensorflow_datasets

    assert set(tensorflow_datasets.list_builders(with_community_datasets=False)) >= tfds.CHARACTERS


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("nosuch", "unknown data set: nosuch is neither in tensorflow-datasets nor in "),
        (
            "imdb_reviews",
            "imdb_reviews is not for image classification, which needs an image and one label. Its features: text, label",
        ),
        ("coco", "coco is not for image classification"),
        ("imagenette/nosuch", "BuilderConfig nosuch not found with version 1.0.0"),
        ("mnist:9.9.9", "mnist cannot be loaded at version 9.9.9"),
        ("no name", "Parsing builder name string no name failed"),
    ],
)
def test_other_data_sets_are_errors(tmp_path, name, part, reached):
    error = error_of(f"tfds:{name}", tmp_path)
    assert (type(error), error.argument) == (DataError, "dataset")
    assert part in error.summary
    assert not reached


def test_a_data_set_without_a_train_split_is_an_error(write_tfds, tmp_path):
    write_tfds(tmp_path, "mnist", {"test": labelled(noise(5, (28, 28, 1)))})
    assert "mnist has no split named train. Its splits: test" in error_of("tfds:mnist", tmp_path).summary


def test_labels_that_are_not_public_are_an_error(write_tfds, tmp_path):
    unlabelled = [{"image": image, "label": -1} for image in noise(5, (28, 28, 1))]
    write_tfds(tmp_path, "mnist", {"train": labelled(noise(20, (28, 28, 1))), "test": unlabelled})
    assert "mnist has no labels for its split test" in error_of("tfds:mnist", tmp_path).summary


def test_hosts_are_tried_before_tfds_downloads(tmp_path, reached):
    error = error_of("tfds:svhn_cropped", tmp_path)
    assert type(error) is UnavailableError
    assert reached == [("ufldl.stanford.edu", 80)]
    for part in (f"not in {tmp_path}", "no connection to ufldl.stanford.edu"):
        assert part in error.summary
    assert "folder that holds svhn_cropped/" in error.hint


@pytest.mark.parametrize("name", ["mnist", "imagenet2012"])
def test_a_failed_download_is_an_error(tmp_path, monkeypatch, name):
    """The hosts of ImageNet, which the user downloads by hand, are not tried first."""
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
    source = tfds.cifar10(None, Preprocessing(image_size=(32, 32)), Cache())
    assert sizes(source) == [45_000, 5_000, 10_000]
    assert np.bincount(source.test.labels).tolist() == [1_000] * 10
    assert np.bincount(source.validation.labels).min() > 400
    pixels = np.asarray(source.train.images).reshape(-1, 3) / np.float32(255)
    # Those of a JPEG copy differ a little.
    np.testing.assert_allclose(pixels.mean(axis=0, dtype="float64"), source.mean, atol=0.01)
    np.testing.assert_allclose(pixels.std(axis=0, dtype="float64"), source.std, atol=0.01)


@pytest.mark.skipif(
    not (TFDS_DATA_DIR / "cifar10").is_dir(), reason="set TFDS_DATA_DIR to a folder in which TFDS prepared CIFAR-10"
)
def test_cifar10_decodes_as_with_tensorflows_accurate_dct():
    builder, keys = tfds._builder("cifar10", "CIFAR-10", None)
    files = [data.numpy() for data, _ in tfds._encoded(builder, "test[:400]", keys)]
    for data in files:
        is_jpeg = data.startswith(b"\xff\xd8")
        expected = tf.io.decode_jpeg(data, dct_method="INTEGER_ACCURATE") if is_jpeg else tf.io.decode_png(data)
        np.testing.assert_array_equal(images.decode(data), expected)
