import dataclasses

import keras
import pytest


@pytest.fixture(scope="session")
def trained(cifar10_dir, tmp_path_factory):
    """The folder of a short run on the made images, in mixed precision."""
    from cvt_keras.training import RECIPES, run

    run_dir = tmp_path_factory.mktemp("runs") / "trained"
    recipe = dataclasses.replace(
        RECIPES["smoke"], dataset="cifar10", data_dir=str(cifar10_dir), precision="mixed_bfloat16", epochs=12, flip=False,
        train_limit=2048, peak_learning_rate=1e-2,
    )  # fmt: skip
    run(recipe, run_dir)
    return run_dir


@pytest.fixture(scope="session")
def exported(trained):
    """The same, exported."""
    from export.__main__ import main

    assert main([str(trained)]) == 0
    return trained


@pytest.fixture(scope="session")
def classifier(trained):
    return keras.saving.load_model(trained / "model.keras", compile=False)


@pytest.fixture(scope="session")
def test_images(cifar10_dir):
    """The run's 256 test images and their labels."""
    from cvt_keras.data import sources

    split = sources.cifar10(str(cifar10_dir)).test
    return split.images, split.labels
