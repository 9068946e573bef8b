"""Searches for a good recipe with keras-tuner, within a budget of MACs, on one machine or several.

The names are imported when they are first used: `search` needs TensorFlow and keras-tuner, the space does not.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cvt_keras.search.space import Choice, Range
    from cvt_keras.search.study import SearchResult, search

__all__ = ["Choice", "Range", "SearchResult", "search"]

_MODULES = {
    "Choice": "cvt_keras.search.space",
    "Range": "cvt_keras.search.space",
    "SearchResult": "cvt_keras.search.study",
    "search": "cvt_keras.search.study",
}


def __getattr__(name):
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
