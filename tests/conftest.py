"""The network's tests run on every backend; the rest needs TensorFlow's."""

import keras
import numpy as np
import pytest

if keras.config.backend() != "tensorflow":
    collect_ignore = [
        *("benchmarks", "data", "training", "test_architecture.py"),
        *("test_environment.py", "test_evaluation.py", "test_runs.py", "test_train.py"),
    ]


@pytest.fixture(autouse=True)
def seeded():
    keras.utils.set_random_seed(0)


@pytest.fixture(scope="session")
def cifar10_dir(tmp_path_factory):
    """A folder as TFDS writes it, with CIFAR-10's features and 5,256 + 256 made images: a colour for each class, and noise."""
    import tensorflow_datasets as tfds

    data_dir = tmp_path_factory.mktemp("tensorflow_datasets")
    builder = tfds.builder("cifar10", data_dir=data_dir)
    folder = data_dir / "cifar10" / str(builder.version)
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    colours = random.integers(64, 192, (10, 3))

    def examples(n):
        for i in range(n):
            noise = random.integers(-64, 64, (32, 32, 3))
            yield {"id": f"{i}", "image": (colours[i % 10] + noise).astype("uint8"), "label": i % 10}

    writer = tfds.core.SequentialWriter(builder.info, max_examples_per_shard=10_000)
    writer.initialize_splits(["train", "test"])
    writer.add_examples({"train": examples(5_256), "test": examples(256)})
    writer.close_all()
    return data_dir
