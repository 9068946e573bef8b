"""A `.keras` file opens once `cvt_keras` and `keras` are imported, in either order, and `cvt_keras` alone imports no Keras."""

import os
import subprocess
import sys
from pathlib import Path

import keras

from cvt_keras import build_classifier
from cvt_keras.quantized.model import quantize
from cvt_keras.registration import MODULES
from cvt_keras.training.optimizers import Muon, WarmupThenDecay

ROOT = Path(__file__).parent.parent

# Forks a process per scenario, as each needs a fresh `keras` and `cvt_keras`. On JAX: importing TensorFlow would import Keras.
_FORK_AND_CHECK = """
import importlib, os, sys, wrapt, jax, sklearn.base, matplotlib.pyplot, h5py, optree  # imported once, for all
assert not {"keras", "cvt_keras"} & set(sys.modules)
modules, files = sys.argv[1].split(), sys.argv[2:]

def check(names):
    for name in names:
        importlib.import_module(name)
    assert set(modules) <= set(sys.modules)
    if "keras" in names:
        import keras
        for file in files:
            assert keras.saving.load_model(file).count_params()

for names in (("cvt_keras", "keras"), ("keras", "cvt_keras"), *((module,) for module in modules)):
    if (child := os.fork()) == 0:
        try:
            check(names)
        except BaseException as error:
            print(names, repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, names
"""


def _run(code, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "KERAS_BACKEND": "jax"}
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_files_open_and_all_classes_register_whichever_module_is_imported_first(tmp_path):
    classifier = build_classifier("cvt_tiny", 2, (16, 16, 3))
    quantize(classifier).save(tmp_path / "quantized.keras")
    classifier.compile(Muon(WarmupThenDecay(1e-3, 10)), "mse")
    classifier.save(tmp_path / "compiled.keras")
    _run(_FORK_AND_CHECK, " ".join(MODULES), *sorted(tmp_path.iterdir()))


def test_cvt_keras_alone_imports_no_keras():
    _run(
        "import sys, cvt_keras, cvt_keras.cli, cvt_keras.training.flags, cvt_keras.preprocessing, cvt_keras.errors\n"
        "cvt_keras.VARIANTS, cvt_keras.Preprocessing\n"
        "heavy = {'keras', 'tensorflow', 'jax', 'torch', 'matplotlib', 'sklearn', 'tensorflow_datasets', 'keras_tuner'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )


def test_modules_lists_every_module_that_registers_a_class():
    registered = {
        value.__module__ for name, value in keras.saving.get_custom_objects().items() if name.startswith("cvt_keras>")
    }
    assert registered == set(MODULES)
