import dataclasses
import json

import keras
import numpy as np
import pytest
from PIL import Image

from cvt_keras import build_classifier, runs
from cvt_keras.model import set_calibration
from cvt_keras.predict import networks
from cvt_keras.preprocessing import Calibration, Preprocessing

NAMES = ("apples", "pears", "plums")


@pytest.fixture(scope="session")
def keras_file(tmp_path_factory):
    """A classifier of three classes with random weights, which cuts 16x24 pixels out of the middle of larger images."""
    keras.utils.set_random_seed(0)
    preprocessing = Preprocessing(resize="crop", crop_pct=0.8)
    classifier = build_classifier("cvt_tiny", class_names=NAMES, input_shape=(16, 24, 3), preprocessing=preprocessing)
    # The head starts with zeros; with larger weights, the probabilities differ between images.
    random = np.random.default_rng(0)
    classifier.set_weights([value + random.normal(0, 0.3, value.shape) for value in classifier.get_weights()])
    set_calibration(classifier, Calibration(2.0, 0.742))
    file = tmp_path_factory.mktemp("model") / "fruit.keras"
    classifier.save(file)
    return file


@pytest.fixture(scope="session")
def classifier(keras_file):
    from cvt_keras import load_run

    return load_run(keras_file)


@pytest.fixture
def read_once(classifier, monkeypatch):
    """Lets `load_run` use the network of `classifier` instead of reading a file, which takes seconds. The files asked for."""
    files = []
    monkeypatch.setattr(networks, "KerasNetwork", lambda file: files.append(file) or classifier._network)
    return files


@pytest.fixture
def run_dir(keras_file, tmp_path):
    """A finished run of this classifier, as far as `predict` reads it."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / runs.MODEL).write_bytes(keras_file.read_bytes())
    (folder / runs.RECIPE).write_text("{}")
    (folder / runs.HISTORY).write_text("epoch\n1\n")
    (folder / runs.REPORT).write_text(json.dumps({"variant": "cvt_tiny", "class_names": NAMES}))
    return folder


@dataclasses.dataclass(frozen=True)
class Photos:
    """A folder of images, and the pixels of each by its path."""

    folder: object
    pixels: dict


@pytest.fixture
def photos(tmp_path):
    """Six images of different shapes in folders for two classes."""
    random = np.random.default_rng(1)
    pixels = {}
    names = ("apples/0.png", "apples/1.png", "apples/deeper/2.png", "pears/3.png", "pears/4.png", "pears/5.png")
    for i, name in enumerate(names):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels[path] = random.integers(0, 256, (20 + 3 * i, 40 - 2 * i, 3), "uint8")
        Image.fromarray(pixels[path]).save(path)
    return Photos(tmp_path / "photos", pixels)
