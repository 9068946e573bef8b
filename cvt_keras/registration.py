"""Registers with Keras every class that a `.keras` file of ours can hold, once `cvt_keras` and `keras` are both imported.

Keras finds the classes of a file in its registry, and imports no packages but its own to look for them. To import our classes
at once would import Keras, which takes seconds that `--help` and the client of a server should not take.
"""

import importlib
import sys

import wrapt

# They register what they define as they are imported. All of them import Keras.
MODULES = tuple(
    f"cvt_keras.{name}" for name in ("layers", "model", "quantized.layers", "quantized.model", "training.optimizers")
)
_loaded: set[str] = set()


def _on_import(module):
    """Imports the rest of `MODULES`, unless one of them is half imported: what needs that one would fail.

    `import cvt_keras.layers` in a fresh process imports Keras in its first lines, for instance. The call after it ends does it.
    """
    _loaded.add(module.__name__)
    if all(name in _loaded for name in MODULES if name in sys.modules):
        for name in MODULES:
            importlib.import_module(name)


for _name in ("keras", *MODULES):
    wrapt.register_post_import_hook(_on_import, _name)
