"""The installed packages, their files, the version, the requirements and the citation."""

import importlib.metadata
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import cvt_keras

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def _folder(package):
    """The folder of a package, relative to the repository."""
    for name, folder in SETUPTOOLS["package-dir"].items():
        if package == name or package.startswith(f"{name}."):
            return Path(folder, *package.removeprefix(name).lstrip(".").split("."))
    return Path(*package.split("."))


def _names(requirements):
    """The packages in lines such as `keras>=3.15`, without `cvt-keras[...]`."""
    names = (re.match(r"[\w.-]+", line) for line in requirements if not line.startswith(("#", "-")))
    return {re.sub(r"[-_.]+", "-", name.group()).lower() for name in names if name} - {"cvt-keras"}


def _lines(file):
    return (ROOT / file).read_text().splitlines()


def test_every_folder_with_an_init_is_a_package():
    sources = [path for top in ("cvt_keras", "export") for path in (ROOT / top).rglob("__init__.py")]
    folders = {path.parent.relative_to(ROOT) for path in sources if "node_modules" not in path.parts}
    assert folders == set(map(_folder, SETUPTOOLS["packages"]))


def test_every_python_file_is_in_a_package():
    files = [path for top in ("cvt_keras", "export") for path in (ROOT / top).rglob("*.py")]
    assert {path.parent for path in files if "node_modules" not in path.parts} == {
        path.parent for path in files if path.name == "__init__.py"
    }


def test_every_other_file_is_package_data():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "cvt_keras", "export"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    files = [Path(line) for line in listed.stdout.splitlines() if not line.endswith(".py")]
    patterns = [str(_folder(package) / pattern) for package, names in SETUPTOOLS["package-data"].items() for pattern in names]
    missing = [str(file) for file in files if (ROOT / file).exists() and not _matches(file, patterns)]
    assert files and not missing


def _matches(file, patterns):
    # As in setuptools, `*` does not match a slash.
    return any(file.match(pattern) and len(file.parts) == len(Path(pattern).parts) for pattern in patterns)


def test_the_package_is_marked_as_typed():
    assert (ROOT / "cvt_keras" / "py.typed").exists()


def test_the_version_is_written_once():
    assert importlib.metadata.version("cvt-keras") == cvt_keras.__version__
    assert "version" in PROJECT["project"]["dynamic"]
    tracked = [
        ROOT / "pyproject.toml",
        ROOT / "CITATION.cff",
        *(ROOT / "cvt_keras").rglob("*.py"),
        *(ROOT / "export").glob("*.py"),
    ]
    assert [path.name for path in tracked if f'"{cvt_keras.__version__}"' in path.read_text()] == ["__init__.py"]


def test_every_requirement_has_a_pin():
    extras = PROJECT["project"]["optional-dependencies"]
    needed = {name: _names(extras[name]) for name in extras}
    pins = _names(_lines("requirements.txt"))
    commands = (
        _names(PROJECT["project"]["dependencies"]) | needed["train"] | needed["compress"] | needed["search"] | needed["onnx"]
    )
    assert commands - {"numpy"} <= pins  # TensorFlow pins NumPy
    assert pins <= commands | needed["pretrained"]
    assert needed["dev"] | needed["jax"] == _names(_lines("requirements-dev.txt"))
    exact = [line for file in ("requirements.txt", "requirements-dev.txt") for line in _lines(file) if _names([line])]
    assert not [line for line in exact if "==" not in line]


def test_the_citation_is_complete():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "license"} <= set(citation)
    assert "version" not in citation
    assert all(author.get("name") or (author["family-names"] and author["given-names"]) for author in citation["authors"])
    [paper] = citation["references"]
    assert paper["title"].startswith("CvT: Introducing Convolutions") and len(paper["authors"]) == 7 and paper["year"] == 2021
    assert paper["identifiers"][0]["value"] == "arXiv:2103.15808"
