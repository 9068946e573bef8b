import subprocess
import sys

import pytest
import tensorflow as tf
from labelled_images import error_of

from cvt_keras.data import folder, sources, tfds
from cvt_keras.data.cache import Cache
from cvt_keras.errors import ArgumentError, DataError, UnavailableError
from cvt_keras.preprocessing import Preprocessing


def test_the_module_imports_nothing_heavy():
    subprocess.run(
        [
            sys.executable,
            "-c",
            "import cvt_keras.data.sources, sys\n"
            "heavy = {'keras', 'tensorflow', 'tensorflow_datasets', 'sklearn', 'requests'} & set(sys.modules)\n"
            "assert not heavy, heavy",
        ],
        check=True,
    )


# === Names ===


@pytest.mark.parametrize(
    "name", ["auto", "cifar10", "cifar100", "folder", "digits", "tfds:imagenette/160px-v2", "tfds:mnist:3.0.1"]
)
def test_valid_names_pass(name):
    sources.check_name(name)


@pytest.mark.parametrize("name", ["cifar1O", "tfds:", "mnist", "", None])
def test_the_error_for_an_unknown_name_lists_the_choices(name):
    for call in (sources.check_name, sources.load):
        with pytest.raises(ArgumentError) as error:
            call(name)
        assert error.value.argument == "dataset"
        assert f"dataset={name!r}" in error.value.summary
        assert all(choice in error.value.summary for choice in sources.NAMES)
        assert "--dataset folder" in error.value.hint


# === Errors ===


@pytest.mark.parametrize(
    ("dataset", "module", "packages"),
    [
        ("cifar10", "tensorflow_datasets", "tensorflow-datasets importlib_resources"),
        ("tfds:mnist", "tensorflow_datasets", "tensorflow-datasets importlib_resources"),
        ("digits", "sklearn.datasets", "scikit-learn"),
        ("digits", "tensorflow", "tensorflow"),
    ],
)
def test_a_missing_package_is_named(dataset, module, packages, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # makes the import fail
    error = error_of(dataset)
    assert type(error) is UnavailableError
    assert error.hint.endswith(f"pip install {packages}")


@pytest.mark.parametrize("dataset", ["cifar10", "auto", "tfds:mnist", "folder"])
def test_a_data_dir_that_is_not_a_folder_is_named(tmp_path, dataset):
    (tmp_path / "photos.zip").write_bytes(b"PK")
    for name, reason in {"nowhere": "does not exist", "photos.zip": "is not a folder"}.items():
        error = error_of(dataset, tmp_path / name)
        assert (type(error), error.argument) == (DataError, "data_dir")
        assert error.summary == f"`data_dir` {reason}. Received: data_dir={tmp_path / name}"
        assert "--data-dir" in error.hint


def test_images_that_do_not_fit_into_memory_are_an_error(photos):
    error = error_of("folder", photos, preprocessing=Preprocessing(image_size=(10**7, 10**7)))
    assert (type(error), error.argument) == (DataError, "image_size")
    assert "does not fit into memory: " in error.summary
    assert "--image-size" in error.hint


OUT_OF_MEMORY = tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")
DENIED = tf.errors.PermissionDeniedError(None, None, "/records; Permission denied")


@pytest.mark.parametrize(
    ("dataset", "module", "step", "failure", "argument", "text"),
    [
        ("folder", folder.images, "stretch", OUT_OF_MEMORY, "image_size", "folder does not fit into memory: OOM"),
        ("cifar100", tfds, "_encoded", OUT_OF_MEMORY, "image_size", "cifar100 does not fit into memory: OOM"),
        ("cifar100", tfds, "_encoded", DENIED, "data_dir", "/records; Permission denied"),
    ],
)
def test_errors_about_memory_and_permissions_do_not_advise_to_remove_data(
    photos, cifar100_dir, monkeypatch, dataset, module, step, failure, argument, text
):
    def fail(*args):
        raise failure

    monkeypatch.setattr(module, step, fail)
    error = error_of(dataset, {"folder": photos, "cifar100": cifar100_dir}[dataset], cache=Cache("memory"))
    assert error.argument == argument
    assert text in error.summary
    assert "emove" not in error.summary + error.hint


# === auto ===


def test_auto_is_cifar10_if_it_is_on_disk(small_cifar10_dir):
    source = sources.load("auto", small_cifar10_dir, skip_broken=True)  # which is for folders only
    assert (source.name, source.fallback, source.left_out) == ("cifar10", "", {})


@pytest.mark.parametrize("installed", [True, False])
def test_auto_falls_back_to_digits_and_gives_the_reason(tmp_path, monkeypatch, installed):
    if not installed:
        monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    source = sources.load("auto", tmp_path)
    assert source.name == "digits"
    assert "CIFAR-10" in source.fallback
    assert "\n" not in source.fallback
    for part in ("no connection to", "--data-dir") if installed else ("pip install tensorflow-datasets",):
        assert part in source.fallback


@pytest.mark.parametrize("pattern", ["*train.tfrecord*", "dataset_info.json"])
def test_auto_raises_for_a_broken_copy(small_cifar10_dir, pattern):
    [broken] = small_cifar10_dir.rglob(pattern)
    broken.unlink()
    error = error_of("auto", small_cifar10_dir)
    assert (type(error), error.argument) == (DataError, "data_dir")
    assert str(small_cifar10_dir / "cifar10") in error.hint


def test_auto_without_either_names_both(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    error = error_of("auto", tmp_path)
    assert type(error) is UnavailableError
    assert "CIFAR-10 is not in" in error.summary and "sklearn.datasets" in error.summary
    assert "--data-dir" in error.hint and "pip install scikit-learn" in error.hint


@pytest.mark.parametrize("split", ["", "Train"])
@pytest.mark.parametrize("dataset", ["auto", "cifar10", "tfds:mnist"])
def test_a_folder_of_classes_is_not_used_as_tfds_folder(dataset, split, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / split / name).mkdir(parents=True)
        (tmp_path / split / name / "1.jpg").touch()
    error = error_of(dataset, tmp_path)
    assert (type(error), error.argument) == (DataError, "data_dir")
    assert "--dataset folder" in error.hint
