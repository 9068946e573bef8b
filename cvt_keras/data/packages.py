"""Imports the optional packages of a data set when they are needed."""

import importlib

from cvt_keras.errors import UnavailableError


def require(module, packages=None):
    """Imports a module.

    Args:
        module: its name.
        packages: arguments of `pip install`; defaults to `module`.

    Raises:
        UnavailableError: if it can't be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnavailableError(
            f"{module} can't be imported: {error}", hint=f"Install what is missing: pip install {packages or module}"
        ) from error
