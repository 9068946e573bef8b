"""Registers every class that a `.keras` file may contain, as soon as `cvt_keras` and `keras` are both imported.

Keras looks up the classes of a file in its registry, and imports no other package to find them. Importing our classes at once
would import Keras. That takes seconds, and `--help` and the client of a server do without it.
"""

import importlib
import sys

import wrapt

# Importing one of them registers its classes. All of them import Keras.
MODULES = tuple(
    f"cvt_keras.{name}" for name in ("layers", "model", "quantized.layers", "quantized.model", "training.optimizers")
)
_loaded: set[str] = set()


def _on_import(module):
    """Imports the rest of `MODULES`, unless one of them is still being imported: the modules that need it would fail.

    For example, `import cvt_keras.layers` in a fresh process imports Keras in its first lines. When it ends, this runs again.
    """
    _loaded.add(module.__name__)
    if all(name in _loaded for name in MODULES if name in sys.modules):
        for name in MODULES:
            importlib.import_module(name)


for _name in ("keras", *MODULES):
    wrapt.register_post_import_hook(_on_import, _name)
