import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

from benchmarks.train_step import Arguments, main

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "benchmarks" / "train_step.py"
TINY = ["--variant", "cvt_tiny", "--batch-size", "4", "--steps", "2", "--repetitions", "2", "--image-size", "16"]


def _check(result):
    assert result["images_per_second_min"] <= result["images_per_second"] <= result["images_per_second_max"]
    assert result["images_per_second_min"] > 0
    assert result["peak_memory_bytes"] > 2**20
    assert 0 < result["share_of_matrix_product"] < 1
    assert result["device"] and result["versions"]["keras"] == keras.__version__


def test_it_measures_this_backend(capsys):
    arguments = Arguments(
        variant="cvt_tiny", image_size=24, batch_size=4, precision="mixed_bfloat16", xla="off", steps=2, repetitions=2
    )
    result = main(arguments)
    _check(result)
    assert result["backend"] == keras.config.backend()
    assert {name: result[name] for name in dataclasses.asdict(arguments)} == dataclasses.asdict(arguments)
    assert json.loads(capsys.readouterr().out) == result


@pytest.mark.slow
def test_the_script_runs_on_jax_without_tensorflow():
    block = "import runpy, sys; sys.modules['tensorflow'] = None; runpy.run_path(sys.argv[0], run_name='__main__')"
    code = f"import sys; sys.argv = {[str(SCRIPT), *TINY]!r}; sys.argv[0] = {str(SCRIPT)!r}; {block}"
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert finished.returncode == 0, finished.stderr
    result = json.loads(finished.stdout)
    _check(result)
    assert (result["backend"], result["xla"]) == ("jax", "on")


@pytest.mark.parametrize("field", ["steps", "batch_size", "image_size", "num_classes", "repetitions"])
def test_a_size_below_one_is_refused(field):
    with pytest.raises(ValueError, match=f"{field}=0"):
        Arguments(**{field: 0})


def test_an_unknown_variant_and_too_small_images_are_refused():
    with pytest.raises(ValueError, match="'cvt_14'"):
        Arguments(variant="cvt_14")
    with pytest.raises(ValueError, match="16x16"):
        Arguments(variant="cvt_13", image_size=8)
