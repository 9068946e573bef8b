"""Exports: SavedModel, TFLite and ONNX files, each verified in the runtime that its users run.

Names are imported on first use: `export` needs TensorFlow, the serving client and the web page do not.
"""

from typing import TYPE_CHECKING

from cvt_keras import lazy

if TYPE_CHECKING:
    from .artifacts import export
    from .verify import FORMATS, Artifact

__all__ = ["FORMATS", "Artifact", "export"]

if not TYPE_CHECKING:  # a type checker would take any name for one of ours
    __getattr__, __dir__ = lazy.attach(__name__, {"artifacts": ("export",), "verify": ("FORMATS", "Artifact")})
