"""Fixtures of all tests. The tests of the network run on every backend, the others need TensorFlow."""

import json
import signal
from pathlib import Path

import keras
import numpy as np
import pytest

if keras.config.backend() != "tensorflow":
    collect_ignore = [
        *("benchmarks", "compression", "data", "deploy", "export", "predict", "quantized", "report", "search", "training"),
        *("test_architecture.py", "test_environment.py", "test_old_runs.py", "test_runs.py"),
    ]


@pytest.fixture(autouse=True, scope="session")
def cache_home(tmp_path_factory):
    """Keeps decoded images out of the user's cache folder, also in processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def seeded():
    keras.utils.set_random_seed(0)


def _write_tfds(data_dir, name, splits, class_names=None, shard=10_000):
    """Writes a data set in the format of TFDS.

    Args:
        data_dir: TFDS' folder.
        name: the name of the builder, with its config if it has several.
        splits: `{split: examples}`; an example is a dict of the builder's features.
        class_names: the content of TFDS' file of class names; without it there is no such file.
        shard: the number of examples in a file.

    Returns:
        The folder of the records.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=data_dir)
    folder = Path(builder.data_path)
    folder.mkdir(parents=True)
    if class_names:
        builder.info.features["label"].names = class_names
    writer = tfds.core.SequentialWriter(builder.info, max_examples_per_shard=shard)
    writer.initialize_splits(list(splits))
    writer.add_examples(splits)
    writer.close_all()
    return folder


@pytest.fixture(scope="session")
def cifar10_dir(tmp_path_factory):
    """TFDS' folder with a small CIFAR-10: 5,256 + 256 images of noise on a colour per class. 5,000 of them are held out."""
    data_dir = tmp_path_factory.mktemp("tensorflow_datasets")
    random = np.random.default_rng(0)
    colours = random.integers(64, 192, (10, 3))

    def examples(n):
        for i in range(n):
            noise = random.integers(-64, 64, (32, 32, 3))
            yield {"id": f"{i}", "image": (colours[i % 10] + noise).astype("uint8"), "label": i % 10}

    _write_tfds(data_dir, "cifar10", {"train": examples(5_256), "test": examples(256)})
    return data_dir


@pytest.fixture(scope="session")
def write_tfds():
    """The function `_write_tfds`."""
    return _write_tfds


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A network of 5 classes in a folder of transformers, to be read, or copied by `copy_folder`."""
    import safetensors.numpy
    from checkpoint_files import TINY, config_of, random_arrays

    from cvt_keras.conversion.layouts import transformers_weights

    folder = tmp_path_factory.mktemp("transformers") / "tiny"
    folder.mkdir()
    safetensors.numpy.save_file(random_arrays(transformers_weights(TINY, 5)), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_of(TINY, 5)))
    processor = {"size": {"shortest_edge": 64}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture
def heard():
    """Installs handlers for SIGINT and SIGTERM that raise. The list of the signals that they received."""
    numbers = []

    def handle(number, frame):
        numbers.append(number)
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    yield numbers
    for number, handler in previous.items():
        signal.signal(number, handler)


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    excluded = set() if config.getoption("--run-slow") else {"slow"}
    if keras.config.backend() != "tensorflow":
        excluded.add("files")
    deselected = [item for item in items if any(item.get_closest_marker(name) for name in excluded)]
    config.hook.pytest_deselected(items=deselected)
    items[:] = [item for item in items if item not in deselected]
