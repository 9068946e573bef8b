import contextlib
import dataclasses
import fcntl
import shutil

import keras
import numpy as np
import pytest

from cvt_keras import cli


@contextlib.contextmanager
def _made_once(request, tmp_path_factory, name):
    """Yields a folder that all workers of pytest-xdist share, and whether this one has to fill it; the others wait."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if hasattr(request.config, "workerinput") else base
    done = shared / f"{name}.done"
    with open(shared / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield shared / name, not done.exists()
        except BaseException:
            shutil.rmtree(shared / name, ignore_errors=True)  # so that the next worker meets the same error
            raise
        done.touch()


@pytest.fixture(scope="session")
def trained(request, cifar10_dir, tmp_path_factory):
    """The folder of a short run on the synthetic images, stretched to 24x40, in mixed precision. Not to be written to."""
    from cvt_keras.training import RECIPES, run

    recipe = dataclasses.replace(
        RECIPES["smoke"], dataset="cifar10", data_dir=str(cifar10_dir), precision="mixed_bfloat16", epochs=12, flip=False,
        image_size=(24, 40), train_limit=256, peak_learning_rate=1e-2,
    )  # fmt: skip
    with _made_once(request, tmp_path_factory, "trained") as (run_dir, missing):
        if missing:
            run(recipe, run_dir)
    return run_dir


@pytest.fixture(scope="session")
def exported(request, trained, tmp_path_factory):
    """A copy of the run, exported in every default format. Not to be written to."""
    with _made_once(request, tmp_path_factory, "exported") as (run_dir, missing):
        if missing:
            shutil.copytree(trained, run_dir)
            assert cli.main(["export", str(run_dir)]) == 0
    return run_dir


@pytest.fixture(scope="session")
def serving(exported, tmp_path_factory):
    """A test double of TF Serving, with three versions of the export on disk."""
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
    """The 256 test images of the run, uint8, at the size of its network, and their labels."""
    from cvt_keras.data import images, sources

    split = sources.load("cifar10", str(cifar10_dir)).test
    return images.stretch(split.images, (24, 40)).numpy(), split.labels


@pytest.fixture(scope="session")
def litert():
    """A function that runs a .tflite file on uint8 images of its size, and returns probabilities `(n, classes)`."""
    from ai_edge_litert.interpreter import Interpreter

    def run(file, images):
        interpreter = Interpreter(str(file))
        interpreter.allocate_tensors()
        [input_], [output] = interpreter.get_input_details(), interpreter.get_output_details()
        rows = []
        for image in images:
            interpreter.set_tensor(input_["index"], image[None])
            interpreter.invoke()
            rows.append(interpreter.get_tensor(output["index"])[0])
        scale, zero_point = output["quantization"]
        rows = np.stack(rows).astype("float32")
        return (rows - zero_point) * np.float32(scale) if scale else rows

    return run
