"""Public names of a package that are imported when they are first used (PEP 562)."""

import importlib
import importlib.util


def attach(package, modules):
    """Returns a package's `__getattr__` and `__dir__`.

    Args:
        package: its `__name__`.
        modules: module of the package -> tuple of the public names that it defines.

    Returns:
        The two functions, which the package's `__init__.py` assigns to `__getattr__` and `__dir__`.
    """
    module_of = {name: f"{package}.{module}" for module, names in modules.items() for name in names}

    def get_attribute(name):
        if name in module_of:
            return getattr(importlib.import_module(module_of[name]), name)
        # Modules of the package are attributes too, imported on first use.
        if not name.startswith("_") and importlib.util.find_spec(f"{package}.{name}"):
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def list_names():
        return sorted({*vars(importlib.import_module(package)), *module_of})

    return get_attribute, list_names
