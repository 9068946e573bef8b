import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("part", ["serving", "web"])
def test_the_wheel_holds_every_file(part):
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folder = ROOT / "export" / part
    packed = {file for pattern in patterns[f"cvt_keras.export.{part}"] for file in folder.glob(pattern)}
    assert packed == {file for file in folder.iterdir() if file.is_file() and file.suffix != ".py"}
