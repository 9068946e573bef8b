import dataclasses
import shutil

import keras
import numpy as np
import pytest

from cvt_keras import cli


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
    assert cli.main(["export", str(trained)]) == 0
    return trained


@pytest.fixture(scope="session")
def serving(exported, tmp_path_factory):
    """A double of TF Serving that has three versions of the export on disk."""
    from double import Double

    folder = tmp_path_factory.mktemp("models")
    for version in "123":
        shutil.copytree(exported / "export" / "saved_model" / "1", folder / version)
    with Double(folder) as double:
        yield double


@pytest.fixture(scope="session")
def classifier(trained):
    return keras.saving.load_model(trained / "model.keras", compile=False)


@pytest.fixture(scope="session")
def test_images(cifar10_dir):
    """The run's 256 test images and their labels."""
    from cvt_keras.data import sources

    split = sources.load("cifar10", str(cifar10_dir)).test
    return split.images, split.labels


@pytest.fixture(scope="session")
def litert():
    """A function: a .tflite file and uint8 images of its network's size -> LiteRT's probabilities, `(n, classes)`."""
    from ai_edge_litert.interpreter import Interpreter

    def run(file, images):
        interpreter = Interpreter(str(file))
        interpreter.allocate_tensors()
        [taken], [given] = interpreter.get_input_details(), interpreter.get_output_details()
        rows = []
        for image in images:
            interpreter.set_tensor(taken["index"], image[None])
            interpreter.invoke()
            rows.append(interpreter.get_tensor(given["index"])[0])
        scale, zero_point = given["quantization"]
        rows = np.stack(rows).astype("float32")
        return (rows - zero_point) * np.float32(scale) if scale else rows

    return run
