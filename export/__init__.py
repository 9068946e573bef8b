"""What leaves the project: SavedModel and TFLite files, each checked in the runtime that its users run.

The names are imported when they are first used: `export` needs TensorFlow, the client of a server and the page do not.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .artifacts import export
    from .verify import FORMATS, Artifact

__all__ = ["FORMATS", "Artifact", "export"]

_MODULES = {"FORMATS": "verify", "Artifact": "verify", "export": "artifacts"}


def __getattr__(name):
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
