import shutil
import subprocess
import sys

import pytest
import tensorflow as tf
from labelled_images import error_of

from cvt_keras.data import folder, sources, tfds
from cvt_keras.errors import ArgumentError, DataError, UnavailableError


def test_the_module_itself_imports_nothing_heavy():
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
def test_a_name_passes(name):
    sources.check_name(name)


@pytest.mark.parametrize("name", ["cifar1O", "tfds:", "mnist", "", None])
def test_an_unknown_name_is_quoted_beside_the_choices(name):
    for call in (sources.check_name, sources.load):
        with pytest.raises(ArgumentError) as error:
            call(name)
        assert error.value.argument == "dataset"
        assert f"dataset={name!r}" in error.value.summary
        assert all(choice in error.value.summary for choice in sources.NAMES)


# === What every kind of source refuses alike ===


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
    monkeypatch.setitem(sys.modules, module, None)  # what Python does with it: every import fails
    error = error_of(dataset)
    assert type(error) is UnavailableError
    assert error.hint.endswith(f"pip install {packages}")


@pytest.mark.parametrize("dataset", ["cifar10", "auto", "tfds:mnist", "folder"])
def test_a_data_dir_that_is_not_a_folder_is_named(tmp_path, dataset):
    error = error_of(dataset, tmp_path / "nowhere")
    assert (type(error), error.argument) == (DataError, "data_dir")
    assert f"data_dir={tmp_path / 'nowhere'}" in error.summary
    assert "--data-dir" in error.hint


def test_images_too_big_for_the_memory_are_an_error(photos):
    for error in (error_of("folder", photos, image_size=10**7), error_of("digits", image_size=10**6)):
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
def test_sound_data_is_not_blamed(photos, cifar100_dir, monkeypatch, dataset, module, step, failure, argument, text):
    def fail(*args):
        raise failure

    monkeypatch.setattr(module, step, fail)
    error = error_of(dataset, {"folder": photos, "cifar100": cifar100_dir}[dataset])
    assert error.argument == argument
    assert text in error.summary
    assert "emove" not in error.summary + error.hint


@pytest.mark.parametrize("dataset", ["digits", "auto", "cifar10"])
def test_skip_broken_is_for_folders_alone(dataset, cifar10_dir):
    assert sources.load(dataset, cifar10_dir, skip_broken=True).left_out == {}


# === auto ===


def test_auto_is_cifar10_where_it_is(cifar10_dir):
    source = sources.load("auto", cifar10_dir)
    assert (source.name, source.fallback) == ("cifar10", "")


@pytest.mark.parametrize("installed", [True, False])
def test_auto_falls_back_to_digits_and_says_why(tmp_path, monkeypatch, installed):
    if not installed:
        monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    source = sources.load("auto", tmp_path)
    assert source.name == "digits"
    assert "CIFAR-10" in source.fallback
    assert "\n" not in source.fallback
    for part in ("no connection to", "--data-dir") if installed else ("pip install tensorflow-datasets",):
        assert part in source.fallback


@pytest.mark.parametrize("pattern", ["*train.tfrecord*", "dataset_info.json"])
def test_auto_does_not_pass_over_a_broken_copy(cifar10_dir, tmp_path, pattern):
    shutil.copytree(cifar10_dir, tmp_path, dirs_exist_ok=True)
    [broken] = tmp_path.rglob(pattern)
    broken.unlink()
    error = error_of("auto", tmp_path)
    assert (type(error), error.argument) == (DataError, "data_dir")
    assert str(tmp_path / "cifar10") in error.hint


def test_auto_with_neither_names_both(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    error = error_of("auto", tmp_path)
    assert type(error) is UnavailableError
    assert "CIFAR-10 is not in" in error.summary and "sklearn.datasets" in error.summary
    assert "--data-dir" in error.hint and "pip install scikit-learn" in error.hint


@pytest.mark.parametrize("split", ["", "Train"])
@pytest.mark.parametrize("dataset", ["auto", "cifar10", "tfds:mnist"])
def test_a_folder_of_classes_is_not_taken_for_tfds(dataset, split, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / split / name).mkdir(parents=True)
        (tmp_path / split / name / "1.jpg").touch()
    with pytest.raises(DataError) as refusal:
        sources.load(dataset, tmp_path)
    assert refusal.value.argument == "data_dir" and "--dataset folder" in refusal.value.hint
