import dataclasses
import functools
import shutil

import numpy as np
import pytest
from eager import eagerly

from cvt_keras import CvT
from cvt_keras.data import tfds
from cvt_keras.training import run
from cvt_keras.training.recipes import SMOKE


@pytest.fixture(scope="session")
def recipe(cifar10_dir):
    return dataclasses.replace(SMOKE, dataset="cifar10", data_dir=str(cifar10_dir), test_limit=100, peak_learning_rate=5e-3)


@pytest.fixture(scope="session")
def short(recipe):
    """A recipe for one epoch of two steps."""
    return dataclasses.replace(recipe, epochs=1, train_limit=64, validation_limit=32)


@pytest.fixture(autouse=True)
def cifar10_read_once(read_cifar10, monkeypatch):
    monkeypatch.setattr(tfds, "cifar10", read_cifar10)


@pytest.fixture(scope="session")
def read_cifar10():
    return functools.lru_cache(tfds.cifar10)


@pytest.fixture(scope="module")
def eager():
    """Runs Keras' steps without tracing them. A run of a few steps then takes a third of the time."""
    with eagerly(True):
        yield


@pytest.fixture(scope="session")
def result(recipe, tmp_path_factory):
    """The `RunResult` of a run of `recipe`, traced as for a user."""
    with eagerly(False):
        return run(recipe, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="session")
def finished(result):
    """The report and the folder of `result`, to be read only."""
    return result.report, result.run_dir


@pytest.fixture(scope="session")
def untested_result(short, tmp_path_factory):
    """The `RunResult` of a run of `short` without test images, to be read only."""
    with eagerly(True):
        return run(short, tmp_path_factory.mktemp("runs") / "untested", evaluate_test=False)


@pytest.fixture
def untested(untested_result, tmp_path):
    """A copy of its folder."""
    return shutil.copytree(untested_result.run_dir, tmp_path / "untested")


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A network of 10 classes with random weights."""
    path = tmp_path_factory.mktemp("weights") / "tiny.keras"
    preprocessing = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "class_names": list("abcdefghij"), "image_size": [64, 64]}
    model = CvT("cvt_tiny", 10, (64, 64, 3), preprocessing=preprocessing)
    random = np.random.default_rng(0)
    model.set_weights([value + random.uniform(0.1, 0.2, value.shape).astype("float32") for value in model.get_weights()])
    model.save(path)
    return str(path)
