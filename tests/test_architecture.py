"""Who may import whom, read off the source."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cvt_keras"

# What each module may import of the project, beside the modules under it.
ALLOWED = {
    "variants": set(),
    "environment": set(),
    "runs": set(),
    "signals": set(),
    "evaluation": set(),
    "plots": {"evaluation", "runs"},
    "page": {"plots", "runs"},
    "layers": {"variants"},
    "model": {"layers", "variants", "pretrained"},  # the last when `from_pretrained` is called
    "state_dicts": set(),
    "configs": {"model", "runs", "state_dicts", "variants"},
    "pretrained": {"configs", "model", "runs", "state_dicts", "variants"},
    "data": set(),
    # Its layers, which `cvt_keras` itself registers, know the network alone.
    "compression": {"data", "layers", "model", "pretrained", "runs", "signals", "training", "variants"},
    "search": {"data", "page", "plots", "pretrained", "runs", "signals", "training", "variants"},
    "training": {"data", "environment", "evaluation", "model", "page", "plots", "pretrained", "runs", "signals", "variants"},
}
# Keras and NumPy alone, so that they run on every backend.
PORTABLE = ["layers", "model", "configs", "pretrained", "training/optimizers", "compression/layers"]


def _imports(path):
    """The modules that a file imports anywhere in it, by full name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


MODULES = [path.relative_to(PACKAGE).with_suffix("") for path in sorted(PACKAGE.rglob("*.py")) if path.stem != "__init__"]


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_dependencies_point_one_way(module):
    part = module.parts[0]
    known = {path.stem for path in PACKAGE.iterdir()}
    used = {name.split(".")[1] for name in _imports(PACKAGE / f"{module}.py") if name.startswith("cvt_keras.")}
    assert used & known <= ALLOWED[part] | {part}
    assert "export" not in {name.split(".")[0] for name in _imports(PACKAGE / f"{module}.py")}


@pytest.mark.parametrize("module", PORTABLE)
def test_the_network_needs_keras_and_numpy_alone(module):
    used = {name.split(".")[0] for name in _imports(PACKAGE / f"{module}.py")}
    assert used <= {"cvt_keras", "keras", "numpy", *sys.stdlib_module_names}


def test_one_module_alone_draws():
    drawing = {str(module) for module in MODULES if any("matplotlib" in name for name in _imports(PACKAGE / f"{module}.py"))}
    assert drawing == {"plots"}


def _run(code, **environment):
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={**os.environ, **environment})


def test_importing_the_package_loads_no_more_than_keras():
    _run(
        "import keras, sys\n"
        "before = set(sys.modules)\n"
        "import cvt_keras\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "heavy = {'tensorflow_datasets', 'keras_tuner', 'tensorflow_model_optimization', 'torch', 'matplotlib', 'sklearn',"
        " 'transformers', 'tyro', 'export'}\n"
        "assert not new & heavy, new & heavy"
    )


def test_network_and_optimizer_work_where_tensorflow_is_not_installed():
    _run(
        "import sys\n"
        "sys.modules['tensorflow'] = None  # what Python does with it: every import fails\n"
        "from cvt_keras import CvT\n"
        "from cvt_keras.training.optimizers import make_optimizer\n"
        "assert CvT.from_variant('cvt_tiny', 10, (16, 16, 3)).count_params()",
        KERAS_BACKEND="jax",
    )
