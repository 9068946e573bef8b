"""A file of ours opens once `cvt_keras` and `keras` are imported, in either order, and `cvt_keras` alone imports no Keras."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

from cvt_keras import CvT, build_classifier
from cvt_keras.quantized.model import quantize
from cvt_keras.registration import MODULES

ROOT = Path(__file__).parent.parent


def _run(code, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "2"}
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    classifier = build_classifier("cvt_tiny", 2, (16, 16, 3))
    classifier.save(folder / "classifier.keras")
    quantize(classifier).save(folder / "quantized.keras")
    network = CvT.from_variant("cvt_tiny", 2, (16, 16, 3))
    from cvt_keras.training.optimizers import Muon, WarmupThenDecay

    network.compile(Muon(WarmupThenDecay(1e-3, 10)), "mse")
    network.save(folder / "compiled.keras")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("imports", [("cvt_keras", "keras"), ("keras", "cvt_keras")], ids=" ".join)
def test_files_open_whichever_is_imported_first(imports, files):
    first, second = imports
    _run(
        f"import sys, {first}, {second}\nfor file in sys.argv[1:]:\n    assert keras.saving.load_model(file).count_params()",
        *files,
    )


def test_every_module_can_be_the_first_to_be_imported():
    """One process per module would take a minute: forks of one that has imported what they have in common."""
    _run(
        "import importlib, os, sys, wrapt, numpy\n"
        "for name in sys.argv[1:]:\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        importlib.import_module(name)\n"
        "        missing = [other for other in sys.argv[1:] if other not in sys.modules]\n"
        "        os._exit(1 if missing else 0)\n"
        "    assert os.waitpid(child, 0)[1] == 0, name\n",
        *MODULES,
    )


def test_the_package_alone_imports_no_keras():
    _run(
        "import sys, cvt_keras, cvt_keras.cli, cvt_keras.training.flags, cvt_keras.preprocessing, cvt_keras.errors\n"
        "cvt_keras.VARIANTS, cvt_keras.Preprocessing\n"
        "heavy = {'keras', 'tensorflow', 'jax', 'torch', 'matplotlib', 'sklearn', 'tensorflow_datasets', 'keras_tuner'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )


def test_all_that_is_registered_is_in_the_list():
    registered = {
        value.__module__ for name, value in keras.saving.get_custom_objects().items() if name.startswith("cvt_keras>")
    }
    assert registered == set(MODULES)
