import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

from benchmarks.train_step import Arguments

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "benchmarks" / "train_step.py"
TINY = ["--variant", "cvt_tiny", "--batch-size", "4", "--steps", "2", "--repetitions", "2"]


def _measure(command, **environment):
    finished = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def _check(result):
    assert result["images_per_second_min"] <= result["images_per_second"] <= result["images_per_second_max"]
    assert result["images_per_second_min"] > 0
    assert result["peak_memory_bytes"] > 2**20
    assert 0 < result["share_of_matrix_product"] < 1
    assert result["device"] and result["versions"]["keras"] == keras.__version__


def test_it_measures_this_backend():
    result = _measure([SCRIPT, *TINY, "--image-size", "48", "--precision", "mixed_bfloat16", "--xla", "on"])
    _check(result)
    assert (result["backend"], result["precision"], result["xla"]) == (keras.config.backend(), "mixed_bfloat16", "on")
    assert (result["variant"], result["image_size"], result["batch_size"]) == ("cvt_tiny", 48, 4)


def test_it_runs_on_jax_where_tensorflow_is_not_installed():
    block = "import runpy, sys; sys.modules['tensorflow'] = None; runpy.run_path(sys.argv[0], run_name='__main__')"
    code = f"import sys; sys.argv = {[str(SCRIPT), *TINY]!r}; sys.argv[0] = {str(SCRIPT)!r}; {block}"
    result = _measure(["-c", code], KERAS_BACKEND="jax")
    _check(result)
    assert (result["backend"], result["xla"]) == ("jax", "on")


@pytest.mark.parametrize("field", ["steps", "batch_size", "image_size", "num_classes", "repetitions"])
def test_a_size_below_one_is_refused(field):
    with pytest.raises(ValueError, match=f"{field}=0"):
        Arguments(**{field: 0})


def test_what_has_no_shape_is_refused():
    with pytest.raises(ValueError, match="'cvt_14'"):
        Arguments(variant="cvt_14")
    with pytest.raises(ValueError, match="16x16"):
        Arguments(variant="cvt_13", image_size=8)
