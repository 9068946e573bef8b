import dataclasses

import numpy as np
import pytest

from cvt_keras import CvT
from cvt_keras.training import run
from cvt_keras.training.recipes import SMOKE


@pytest.fixture(scope="session")
def recipe(cifar10_dir):
    return dataclasses.replace(SMOKE, dataset="cifar10", data_dir=str(cifar10_dir), test_limit=100, peak_learning_rate=5e-3)


@pytest.fixture
def short(recipe):
    """An epoch of two steps."""
    return dataclasses.replace(recipe, epochs=1, train_limit=64)


@pytest.fixture(scope="session")
def result(recipe, tmp_path_factory):
    """The `RunResult` of a run of `recipe`."""
    return run(recipe, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="session")
def finished(result):
    """Its report and its folder, to be read."""
    return result.report, result.run_dir


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A network of 10 classes, every weight random."""
    path = tmp_path_factory.mktemp("weights") / "tiny.keras"
    preprocessing = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "class_names": list("abcdefghij"), "image_size": [64, 64]}
    model = CvT("cvt_tiny", 10, (64, 64, 3), preprocessing=preprocessing)
    random = np.random.default_rng(0)
    model.set_weights([value + random.uniform(0.1, 0.2, value.shape).astype("float32") for value in model.get_weights()])
    model.save(path)
    return str(path)
