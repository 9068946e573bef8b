import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cvt_keras.compression import tfmot
from cvt_keras.errors import MissingPackageError

ROOT = Path(__file__).parent.parent.parent


def test_tfmot_is_imported_late_and_tf_keras_stays_keras_3():
    code = (
        "import os, sys, cvt_keras.training.loop, cvt_keras.compression.methods, cvt_keras.export.artifacts\n"
        "assert not [name for name in sys.modules if name.startswith('tensorflow_model_optimization')]\n"
        "from cvt_keras.compression import tfmot\n"
        "tfmot.load()\n"
        "import keras, tensorflow as tf\n"
        "assert keras.__version__.startswith('3.')\n"
        "assert tf.keras.__version__.startswith('3.')\n"
        "assert tf.keras.layers.Dense is keras.layers.Dense\n"
        "assert 'TF_USE_LEGACY_KERAS' not in os.environ  # child processes inherit it"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_users_own_setting_stays(monkeypatch):
    monkeypatch.setenv("TF_USE_LEGACY_KERAS", "0")
    tfmot.load()
    assert os.environ["TF_USE_LEGACY_KERAS"] == "0"


def test_tfmot_is_imported_in_one_place():
    sources = [path for folder in ("cvt_keras", "export", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    naming = [path for path in [*sources, ROOT / "train.py"] if "tensorflow_model_optimization" in path.read_text()]
    assert naming == [ROOT / "cvt_keras" / "compression" / "tfmot.py"]


def test_the_error_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("tensorflow_model_optimization")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorflow_model_optimization", None)
    with pytest.raises(MissingPackageError) as failure:
        tfmot.load()
    assert failure.value.hint == "Install it: pip install tensorflow-model-optimization==0.8.1 tf_keras"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    [pin] = [package for package in extras["compress"] if package.startswith("tensorflow-model-optimization")]
    assert pin in (ROOT / "requirements.txt").read_text().splitlines()
