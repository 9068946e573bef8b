import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from cvt_keras.data import sources

TFDS_DATA_DIR = Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()


def test_splits_are_disjoint_and_fixed(cifar10_dir):
    source = sources.cifar10(cifar10_dir)
    again = sources.cifar10(str(cifar10_dir))
    assert [len(split) for split in (source.train, source.validation, source.test)] == [256, 5_000, 256]
    assert source.train.images.dtype == np.uint8
    assert source.train.images.shape == (256, 32, 32, 3)
    for ours, theirs in zip((source.train, source.validation), (again.train, again.validation)):
        np.testing.assert_array_equal(ours.images, theirs.images)
        np.testing.assert_array_equal(ours.labels, theirs.labels)
    images = np.concatenate([source.train.images, source.validation.images]).reshape(5_256, -1)
    assert len(np.unique(images, axis=0)) == 5_256
    assert (source.name, source.note) == ("cifar10", "")
    assert source.class_names[:3] == ("airplane", "automobile", "bird")


def test_limit_takes_the_first(cifar10_dir):
    split = sources.cifar10(cifar10_dir).test
    np.testing.assert_array_equal(split.limit(7).images, split.images[:7])
    assert len(split.limit(7)) == 7
    assert len(split.limit(None)) == 256


def test_a_folder_that_is_none_is_named(tmp_path):
    with pytest.raises(sources.DataError, match=r"`data_dir`.*nowhere"):
        sources.cifar10(tmp_path / "nowhere")


def test_without_data_or_network_it_says_so_within_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CIFAR10_HOST", "host.invalid")
    started = time.monotonic()
    with pytest.raises(sources.DataError) as error:
        sources.cifar10(tmp_path)
    assert time.monotonic() - started < 20
    for part in (f"not in {tmp_path}", "host.invalid", "--data-dir"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_a_half_written_folder_is_named(cifar10_dir, tmp_path):
    shutil.copytree(cifar10_dir, tmp_path, dirs_exist_ok=True)
    [records] = tmp_path.rglob("cifar10-train.tfrecord*")
    records.write_bytes(records.read_bytes()[:100_000])
    with pytest.raises(sources.DataError) as error:
        sources.cifar10(tmp_path)
    assert f"in {tmp_path} can't be read: truncated record" in str(error.value)
    assert "{{" not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(
    not (TFDS_DATA_DIR / "cifar10").is_dir(), reason="set TFDS_DATA_DIR to a folder in which TFDS prepared CIFAR-10"
)
def test_real_cifar10():
    source = sources.cifar10()
    assert [len(split) for split in (source.train, source.validation, source.test)] == [45_000, 5_000, 10_000]
    assert np.bincount(source.test.labels).tolist() == [1_000] * 10
    assert np.bincount(source.validation.labels).min() > 400
    pixels = source.train.images.reshape(-1, 3) / np.float32(255)
    # A JPEG copy's are a little off.
    np.testing.assert_allclose(pixels.mean(axis=0, dtype="float64"), source.mean, atol=0.01)
    np.testing.assert_allclose(pixels.std(axis=0, dtype="float64"), source.std, atol=0.01)
