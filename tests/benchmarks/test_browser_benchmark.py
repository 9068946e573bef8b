import importlib.util
import re
from pathlib import Path

import pytest
from tools import require, require_browser

from cvt_keras import build_classifier
from cvt_keras.export import tflite


@pytest.fixture(scope="module")
def benchmark():
    require(importlib.util.find_spec("playwright"), "pip install -r requirements-dev.txt")
    return importlib.import_module("benchmarks.browser")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A folder with the files of an exported run that the benchmark reads."""
    run_dir = tmp_path_factory.mktemp("run")
    folder = run_dir / "export" / "tflite"
    folder.mkdir(parents=True)
    classifier, names = build_classifier("cvt_tiny", 10, (32, 32, 3)), [str(i) for i in range(10)]
    for kind in ("float32", "dynamic_int8"):
        (folder / f"{kind}.tflite").write_bytes(tflite.convert(classifier, names, kind))
    (folder.parent / tflite.LABELS).write_text(tflite.labels_text(names))
    return run_dir


def test_a_row_for_each_file_with_both_times(benchmark, run_dir, capsys):
    require_browser()
    benchmark.main(benchmark.Arguments(run_dir, runs=3, turns=2))
    device, _, head, _, *rows = capsys.readouterr().out.splitlines()
    assert "cores; median of 2 turns of 3 runs" in device
    assert re.search(r"Chromium [\d.]+, @litertjs/core [\d.]+, WASM, one thread .* LiteRT [\d.]+ in Python, one thread", head)
    for kind, row in zip(("float32", "dynamic_int8"), rows, strict=True):
        times = re.fullmatch(rf"\| `{kind}` \| [\d.]+ \| (.*) \| (.*) \|", row).groups()
        for cell in times:
            median, least, most = map(float, re.fullmatch(r"([\d.]+) \(([\d.]+) to ([\d.]+)\)", cell).groups())
            assert 0 < least <= median <= most


@pytest.mark.parametrize(
    "name, value, install",
    [("RUNTIME", ["none.js"], "npm ci --prefix export/web"), ("CHROMIUM", None, "apt-get install chromium")],
)
def test_the_benchmark_says_what_to_install(name, value, install, benchmark, run_dir, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setattr(benchmark, "RUNTIME", ())
    monkeypatch.setattr(benchmark, "CHROMIUM", "chromium")
    monkeypatch.setattr(benchmark, name, value)
    with pytest.raises(SystemExit, match=f"^to run this benchmark: {install}$"):
        benchmark.main(benchmark.Arguments(run_dir))


def test_bad_arguments_are_refused(benchmark, run_dir, tmp_path):
    for change in ({"runs": 0}, {"turns": 0}):
        [(name, value)] = change.items()
        with pytest.raises(ValueError, match=f"{name}={value}"):
            benchmark.Arguments(run_dir, **change)
    with pytest.raises(ValueError, match=r"Received: run=.*\. Export it first: cvt-keras export "):
        benchmark.Arguments(tmp_path)
