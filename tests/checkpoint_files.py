"""Checkpoints for the tests that read and write them: the golden ones, and as others write them, small and random."""

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
# The paper's widths, which a checkpoint without a config is known by, at the least depth: `shallow` to the tests.
SHALLOW = dataclasses.replace(
    VARIANTS["cvt_13"], stages=tuple(dataclasses.replace(stage, depth=1) for stage in VARIANTS["cvt_13"].stages)
)
# What transformers can build of `cvt_tiny`'s size.
TINY = Variant(
    (
        Stage(8, 1, 1, 7, 4, 2, mlp_ratio=2.0),
        Stage(16, 2, 2, mlp_ratio=2.0, drop_path=0.1, cls_token=True),
    ),
    activation="gelu",
)


def random_arrays(weights, counters=True):
    """A state dict of the `weights` of a map, and of BatchNorm's counters: key -> array."""
    random = np.random.default_rng(0)
    arrays = {weight.key: random.normal(size=weight.shape).astype("float32") for weight in weights}
    arrays |= {key: np.abs(array) for key, array in arrays.items() if key.endswith("running_var")}
    return {**arrays, **({key: np.zeros((), "int64") for key in layouts.counters(weights)} if counters else {})}


def save_torch(path, arrays, wrap=lambda arrays: arrays, **options):
    """Writes a state dict by PyTorch -> its path."""
    torch.save(wrap({key: torch.from_numpy(array) for key, array in arrays.items()}), path, **options)
    return path


def config_of(variant, num_classes, **change):
    """A config.json as transformers writes it, with the classes' names."""
    names = {str(i): f"class {i}" for i in range(num_classes)}
    return {**transformers_config(variant), "id2label": names, **change}


def copy_folder(folder, to):
    """A copy of a transformers folder, to be damaged."""
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def weights_of(model):
    """The weights of a network: path -> array."""
    return {variable.path: keras.ops.convert_to_numpy(variable) for variable in model.weights}
