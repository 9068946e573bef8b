"""The packages that images come through, imported when a data set needs them."""

import importlib

from cvt_keras.errors import UnavailableError


def require(module, packages=None):
    """Imports a module.

    Args:
        module: its name.
        packages: what pip installs it by; defaults to `module`.

    Raises:
        UnavailableError: if it can't be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnavailableError(
            f"{module} can't be imported: {error}", hint=f"Install what is missing: pip install {packages or module}"
        ) from error
