"""Reads the imports in the source: which part may import which, without exceptions and without circles."""

import ast
import functools
import graphlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cvt_keras.cli import COMMANDS

ROOT = Path(__file__).parent.parent

# The parts that each part of the package may import. Only commands import `cli`. It imports them by name, when they are called.
ALLOWED = {
    "errors": set(),
    "greetings": set(),
    "lazy": set(),
    "signals": set(),
    "terminal": set(),
    "variants": set(),
    "preprocessing": set(),
    "registration": set(),
    "environment": {"errors", "greetings"},
    "runs": {"errors"},
    "cli": {"errors", "signals"},
    "layers": {"preprocessing", "variants"},
    "conversion": {"errors", "preprocessing", "variants"},
    "model": {"conversion", "errors", "layers", "preprocessing", "variants"},
    "quantized": {"layers", "model", "preprocessing", "variants"},
    "attention": {"errors", "layers", "model", "variants"},
    "pretrained": {"conversion", "environment", "errors", "model", "runs", "variants"},
    "data": {"errors", "preprocessing", "runs", "terminal"},
    "report": {"errors", "preprocessing", "runs"},
    "predict": {
        "quantized",
        "attention",
        "data",
        "environment",
        "errors",
        "greetings",
        "lazy",
        "model",
        "preprocessing",
        "report",
        "runs",
        "terminal",
    },
    "training": {
        *("attention", "conversion", "data", "environment", "errors", "lazy", "model"),
        *("preprocessing", "quantized", "report", "runs", "signals", "variants"),
    },
    "search": {
        *("data", "environment", "errors", "lazy", "preprocessing", "report", "runs", "signals", "training", "variants"),
    },
    "compression": {
        *("environment", "errors", "layers", "lazy"),
        *("model", "quantized", "runs", "training"),
    },
    "export": {
        *("data", "environment", "errors", "lazy", "model", "preprocessing", "quantized"),
        *("report", "runs", "signals", "terminal", "training"),
    },
}
# Import Keras and NumPy only, to run on every backend.
PORTABLE = ("layers", "model", "conversion", "quantized", "attention", "training.objective", "training.optimizers")
# Keras has no gradients of its own.
OWN_BACKENDS = {"attention": {"jax", "tensorflow"}}
# The modules of training that export may import: what a run is, not how it is trained.
EXPORT_KNOWS = {"cvt_keras.training", "cvt_keras.training.recipes"}


def _modules():
    """A dict from the name of each module of the package to its file."""
    modules = {}
    for folder, package in ((ROOT / "cvt_keras", "cvt_keras"), (ROOT / "export", "cvt_keras.export")):
        for path in sorted(folder.rglob("*.py")):
            if "node_modules" in path.parts:
                continue
            parts = path.relative_to(folder).with_suffix("").parts
            modules[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return modules


MODULES = _modules()


@functools.cache
def _imports(module, own=True):
    """The modules that a module imports anywhere: those of the package, or the top-level names of all others."""
    path = MODULES[module]
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    imported = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(filter(None, [base, node.module]))
            names = [(source, alias.name) for alias in node.names]
        else:
            continue
        for source, name in names:
            full_name = f"{source}.{name}" if name and f"{source}.{name}" in MODULES else source
            top = full_name.partition(".")[0]
            if (top == "cvt_keras") == own:
                imported.append(full_name if own else top)
    return imported


def _part(module):
    return (module.split(".") + [""])[1]


@pytest.mark.parametrize("module", [module for module in MODULES if _part(module)])
def test_dependencies_point_one_way(module):
    part = _part(module)
    used = {_part(name) for name in _imports(module)} - {"", "cli"}
    assert used <= ALLOWED[part] | {part}, module


def test_only_commands_import_cli():
    importing = {module for module in MODULES if "cvt_keras.cli" in _imports(module)}
    assert importing == {command.module for command in COMMANDS.values()} | {"cvt_keras.export.web.samples"}


def test_every_part_has_a_rule():
    assert {_part(module) for module in MODULES} - {""} == set(ALLOWED)


def test_imports_have_no_circle():
    graph = {module: set(_imports(module)) - {module} for module in MODULES}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises for a circle, naming it
    assert set(MODULES) <= set(order)


def test_nothing_imports_export():
    importing = [
        module for module in MODULES if _part(module) != "export" and any(_part(name) == "export" for name in _imports(module))
    ]
    assert not importing
    assert not [module for module in MODULES if "export" in _imports(module, own=False)]


def test_export_does_not_import_how_a_run_is_trained():
    for module in MODULES:
        if _part(module) == "export":
            assert {name for name in _imports(module) if _part(name) == "training"} <= EXPORT_KNOWS, module


@pytest.mark.parametrize("part", PORTABLE)
def test_the_network_imports_keras_and_numpy_only(part):
    for module in MODULES:
        if f"{module}.".startswith(f"cvt_keras.{part}."):
            known = {"keras", "numpy", *sys.stdlib_module_names} | OWN_BACKENDS.get(part, set())
            assert set(_imports(module, own=False)) <= known, module


def test_only_figures_import_matplotlib():
    drawing = {module for module in MODULES if "matplotlib" in _imports(module, own=False)}
    assert drawing == {"cvt_keras.report.figures", "cvt_keras.search.figures"}


def test_tensorflow_model_optimization_is_imported_in_one_place():
    importing = {module for module in MODULES if "tensorflow_model_optimization" in _imports(module, own=False)}
    assert importing == {"cvt_keras.compression.tfmot"}


def _exits(tree):
    """The calls of `sys.exit` and its like in a module, except under `if __name__ == "__main__"`."""
    body = [node for node in tree.body if not (isinstance(node, ast.If) and "__name__" in ast.unparse(node.test))]
    calls = [node for part in body for node in ast.walk(part) if isinstance(node, ast.Call)]
    return [call for call in calls if ast.unparse(call.func) in ("sys.exit", "exit", "quit", "os._exit")]


def test_no_imported_module_exits():
    exiting = {module for module, path in MODULES.items() if _exits(ast.parse(path.read_text(encoding="utf-8")))}
    # JAX offers no other end for a process whose group is broken.
    assert exiting == {"cvt_keras.training.distributed"}
    assert _exits(ast.parse("def main():\n    sys.exit(1)"))


# Two processes: in one, importing a package that `pip install keras jax tyro wrapt` does not install fails.
IMPORTS = """
import os, sys
missing = ("tensorflow", "torch", "sklearn", "matplotlib", "tensorflow_datasets", "jinja2", "requests", "tqdm")
child = os.fork()
if not child:
    for name in missing:
        sys.modules[name] = None
import keras
before = set(sys.modules)
import cvt_keras
for name in cvt_keras.__all__:
    getattr(cvt_keras, name)
new = {name.partition(".")[0] for name in set(sys.modules) - before}
heavy = {"keras_tuner", "tensorflow_model_optimization", "transformers", "tyro", "export", *missing}
assert not {name for name in new & heavy if sys.modules[name]}, new & heavy
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
from cvt_keras import CvT
from cvt_keras.training.optimizers import make_optimizer
assert CvT.from_variant("cvt_tiny", 10, (16, 16, 3)).count_params()
"""


def test_the_package_imports_no_more_than_keras_and_the_network_runs_without_tensorflow():
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], cwd=ROOT, env={**os.environ, "KERAS_BACKEND": "jax"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
