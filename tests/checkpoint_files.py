"""Checkpoints for the tests: the golden files, and small random ones in the formats of others."""

import dataclasses

import keras
import numpy as np
import torch

from benchmarks.network import GOLDEN
from cvt_keras import VARIANTS, Stage, Variant
from cvt_keras.conversion import layouts
from cvt_keras.pretrained import transformers_config

MICROSOFT = sorted(GOLDEN.glob("ms_*.npz"))
TRANSFORMERS = sorted(GOLDEN.glob("hf_*.npz"))


def narrow(name, **change):
    """A network of the paper at an eighth of its widths: CvT-13 fits into 1 MB instead of 80."""
    stages = (dataclasses.replace(stage, dim=stage.dim // 8, **change) for stage in VARIANTS[name].stages)
    return dataclasses.replace(VARIANTS[name], stages=tuple(stages))


# The tests of checkpoints take these for networks of the paper, which are recognised by widths, kernels and depths.
SHALLOW = narrow("cvt_13", depth=1)
PAPER = {"shallow": SHALLOW, "narrow_13": narrow("cvt_13"), "narrow_21": narrow("cvt_21")}
# As small as `cvt_tiny`, and a network that transformers can build.
TINY = Variant(
    (
        Stage(8, 1, 1, 7, 4, 2, mlp_ratio=2.0),
        Stage(16, 2, 2, mlp_ratio=2.0, drop_path=0.1, cls_token=True),
    ),
    activation="gelu",
)


def random_arrays(weights, counters=True):
    """A random state dict for a weight map, with BatchNorm's counters: key -> array."""
    random = np.random.default_rng(0)
    arrays = {weight.key: random.normal(size=weight.shape).astype("float32") for weight in weights}
    arrays |= {key: np.abs(array) for key, array in arrays.items() if key.endswith("running_var")}
    return {**arrays, **({key: np.zeros((), "int64") for key in layouts.counters(weights)} if counters else {})}


def save_torch(path, arrays, wrap=lambda arrays: arrays, **options):
    """Saves a state dict with PyTorch and returns the path."""
    torch.save(wrap({key: torch.from_numpy(array) for key, array in arrays.items()}), path, **options)
    return path


def config_of(variant, num_classes, **change):
    """A config.json as transformers writes it, with class names."""
    names = {str(i): f"class {i}" for i in range(num_classes)}
    return {**transformers_config(variant), "id2label": names, **change}


def copy_folder(folder, to):
    """Copies a transformers folder, which the test may then damage, and returns the copy."""
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def weights_of(model):
    """The weights of a network: variable path -> array."""
    return {variable.path: keras.ops.convert_to_numpy(variable) for variable in model.weights}
