"""Searches for a good recipe with keras-tuner, within a budget of MACs, on one machine or several.

The names are imported when they are first used: `search` needs TensorFlow and keras-tuner, the space does not.
"""

from typing import TYPE_CHECKING

from cvt_keras import lazy

if TYPE_CHECKING:
    from cvt_keras.search.space import Choice, Range
    from cvt_keras.search.study import SearchResult, search

__all__ = ["Choice", "Range", "SearchResult", "search"]

if not TYPE_CHECKING:  # a type checker would take any name for one of ours
    __getattr__, __dir__ = lazy.attach(__name__, {"space": ("Choice", "Range"), "study": ("SearchResult", "search")})
