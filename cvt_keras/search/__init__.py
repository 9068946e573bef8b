"""Recipe search with keras-tuner, within a budget of MACs, on one machine or several.

Names are imported on first use: `search` needs TensorFlow and keras-tuner, the space does not.
"""

from typing import TYPE_CHECKING

from cvt_keras import lazy

if TYPE_CHECKING:
    from cvt_keras.search.space import Choice, Range
    from cvt_keras.search.study import SearchResult, search

__all__ = ["Choice", "Range", "SearchResult", "search"]

if not TYPE_CHECKING:  # with `__getattr__`, a type checker would accept any name
    __getattr__, __dir__ = lazy.attach(__name__, {"space": ("Choice", "Range"), "study": ("SearchResult", "search")})
