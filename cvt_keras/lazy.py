"""Public names of a package that are imported when they are first used (PEP 562)."""

import importlib
import importlib.util


def attach(package, modules):
    """Makes a package's `__getattr__` and `__dir__`.

    Args:
        package: its `__name__`.
        modules: the module in it that defines a public name -> a tuple of these names.

    Returns:
        The two functions, to be assigned to `__getattr__` and `__dir__` in its `__init__.py`.
    """
    homes = {name: f"{package}.{module}" for module, names in modules.items() for name in names}

    def get_attribute(name):
        if name in homes:
            return getattr(importlib.import_module(homes[name]), name)
        # A module of the package can be used without an import of its own.
        if not name.startswith("_") and importlib.util.find_spec(f"{package}.{name}"):
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def list_names():
        return sorted({*vars(importlib.import_module(package)), *homes})

    return get_attribute, list_names
