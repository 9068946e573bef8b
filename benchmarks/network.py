"""Prints the tables of docs/network.md and docs/results/network.md: python benchmarks/network.py

Parameters and MACs of each variant, and the largest differences from the outputs of the authors' code and of transformers in
tests/golden.
"""

import dataclasses
import json
from pathlib import Path

import keras
import numpy as np
import tyro
from keras import ops

from cvt_keras import VARIANTS, CvT, environment, macs
from cvt_keras.conversion.checkpoint import load_state_dict
from cvt_keras.conversion.configs import variant_from_microsoft, variant_from_transformers
from cvt_keras.conversion.layouts import microsoft_weights, transformers_weights
from result_tables import add_rows

ROOT = Path(__file__).parent.parent
# Image side and classes that each network was published with; the others are for CIFAR-10.
PUBLISHED = {"cvt_13": (224, 1000), "cvt_21": (224, 1000), "cvt_w24": (384, 1000)}
GOLDEN = ROOT / "tests" / "golden"


def sizes():
    """Yields name, image side, classes, trainable parameters and MACs of each variant."""
    for name in VARIANTS:
        side, num_classes = PUBLISHED.get(name, (32, 10))
        model = CvT.from_variant(name, num_classes, (None, None, 3))
        parameters = sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)
        yield name, side, num_classes, parameters, macs(name, (side, side, 3), num_classes)


def golden_model(path):
    """Returns the network of a golden file with its weights loaded, their state dict, and all arrays of the file."""
    with np.load(path) as arrays:
        golden = dict(arrays)
    if "spec_json" in golden:
        variant, layout = variant_from_microsoft(json.loads(bytes(golden["spec_json"]))), microsoft_weights
    else:
        variant, layout = variant_from_transformers(json.loads(bytes(golden["config_json"]))), transformers_weights
    prefix = "weights/"
    state_dict = {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}
    height, width = golden["input_nchw"].shape[2:]
    model = CvT(variant, golden["out/logits"].shape[1], (height, width, 3))
    load_state_dict(model, state_dict, layout(variant, model.num_classes))
    return model, state_dict, golden


def differences(path):
    """Returns the largest absolute differences from a golden file: `logits`, `stage0`, ... -> a number."""
    model, _, golden = golden_model(path)
    images = golden["input_nchw"].transpose(0, 2, 3, 1)
    largest = {"logits": _largest(model(images), golden["out/logits"])}
    for stage, tokens in model.features(images).items():
        tokens, cls_token = tokens if isinstance(tokens, tuple) else (tokens, None)
        largest[stage] = _largest(ops.transpose(tokens, (0, 3, 1, 2)), golden[f"out/{stage}"])
        if f"out/{stage}_cls" in golden:  # transformers does not return it
            largest[f"{stage}_cls"] = _largest(cls_token, golden[f"out/{stage}_cls"])
    return largest


def _largest(ours, reference):
    return float(np.abs(ops.convert_to_numpy(ours) - reference).max())


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Sizes of the variants, and differences from the golden files."""

    csv: Path | None = None
    """Also write the differences into this CSV file."""


def main(arguments):
    print(f"{environment.cpu()}, {keras.config.backend()} backend, {environment.versions()}\n")
    print("| variant | image | classes | trainable parameters | MACs |\n| --- | --- | --- | --- | --- |")
    for name, side, num_classes, parameters, cost in sizes():
        print(f"| `{name}` | {side}x{side} | {num_classes} | {parameters:,} | {cost / 1e6:,.1f} M |")
    print("\n| golden file | largest absolute difference |\n| --- | --- |")
    rows = []
    for path in sorted(GOLDEN.glob("*.npz")):
        largest = {name: f"{value:.1e}" for name, value in differences(path).items()}
        print(f"| `{path.stem}` | {', '.join(f'{name} {value}' for name, value in largest.items())} |")
        columns = {name: largest.pop(name, "") for name in ("logits", "stage0", "stage1", "stage2", "stage2_cls")}
        assert not largest, f"no column for {', '.join(largest)}"
        rows.append({"golden_file": path.stem, "backend": keras.config.backend(), **columns, "device": environment.cpu()})
    if arguments.csv:
        add_rows(arguments.csv, rows, ("golden_file", "backend"))


if __name__ == "__main__":
    main(tyro.cli(Arguments))
