"""Prints the tables of docs/results/pretrained.md: python benchmarks/pretrained.py [--memory]

Largest differences between this network and that of transformers with the same random weights; with --memory, the peak memory
of a conversion. Needs PyTorch and transformers, which requirements-dev.txt installs.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import keras
import numpy as np
import safetensors.torch
import torch
import transformers
from transformers import CvtConfig, CvtForImageClassification

from cvt_keras import CvT, environment
from cvt_keras.conversion.layouts import microsoft_weights
from cvt_keras.pretrained import to_torch_state_dict, transformers_config

ROOT = Path(__file__).parent.parent

CASES = [("cvt_13", (224, 224)), ("cvt_13", (192, 256)), ("cvt_13", (384, 384)), ("cvt_21", (224, 224)), ("cvt_21", (384, 384))]


def reference_model(variant, num_classes=1000, seed=0):
    """Returns transformers' model of a variant in eval mode, with random weights and BatchNorm statistics."""
    config = transformers_config(variant)
    config["id2label"] = {i: f"class {i}" for i in range(num_classes)}
    torch.manual_seed(seed)
    model = CvtForImageClassification(CvtConfig(**config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key.endswith("running_var"):
                value.uniform_(0.5, 2, generator=generator)
            elif value.is_floating_point():
                value.add_(torch.randn(value.shape, generator=generator), alpha=0.1 if value.ndim < 2 else 0.02)
    return model


def logits(model, images):
    """Logits of a transformers model for images `(batch, height, width, channels)`."""
    with torch.no_grad():
        return model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).logits.numpy()


def differences(variant, size, folder):
    """Compares logits after loading transformers' weights into Keras, and after loading them back.

    Args:
        variant: a name.
        size: `(height, width)` of the images.
        folder: where the weights are saved.

    Returns:
        The largest absolute differences of both directions, and the largest absolute logit.
    """
    theirs = reference_model(variant)
    theirs.save_pretrained(folder)
    ours = CvT.from_pretrained(folder, input_shape=(*size, 3))
    images = np.random.default_rng(0).normal(size=(2, *size, 3)).astype("float32")
    expected, loaded = logits(theirs, images), keras.ops.convert_to_numpy(ours(images))
    back = CvtForImageClassification(theirs.config).eval()
    state_dict = to_torch_state_dict(ours, layout="transformers")
    back.load_state_dict({key: torch.from_numpy(array) for key, array in state_dict.items()})
    pairs = ((loaded, expected), (logits(back, images), loaded))
    return *(float(np.abs(a - b).max()) for a, b in pairs), float(np.abs(expected).max())


def peak_memory(variant, suffix, folder):
    """Converts a file of the authors' layout in a new process. Returns its size and the peak memory in bytes, and seconds."""
    random = np.random.default_rng(0)
    arrays = {weight.key: torch.from_numpy(random.random(weight.shape, "float32")) for weight in microsoft_weights(variant)}
    source = Path(folder) / f"weights{suffix}"
    (torch.save if suffix == ".pth" else safetensors.torch.save_file)(arrays, source)
    del arrays
    started = time.perf_counter()
    command = [sys.executable, "-m", "cvt_keras.pretrained", str(source), str(Path(folder) / "model.keras")]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    # In KiB on Linux.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return source.stat().st_size, peak, time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", action="store_true", help="measure the memory of a conversion instead")
    memory = parser.parse_args().memory
    versions = {**environment.versions(), "torch": torch.__version__, "transformers": transformers.__version__}
    print(f"{environment.cpu()}, {keras.config.backend()} backend, {versions}\n")
    if memory:
        print("| variant | file | size | peak memory | seconds |\n| --- | --- | --- | --- | --- |")
        largest = 0
        for variant, suffix in (("cvt_13", ".pth"), ("cvt_w24", ".pth"), ("cvt_w24", ".safetensors")):
            with tempfile.TemporaryDirectory() as folder:
                size, peak, seconds = peak_memory(variant, suffix, folder)
            # The system reports only the largest peak of all children so far.
            shown = f"{peak / 2**30:.2f} GiB" if peak > largest else f"at most {peak / 2**30:.2f} GiB"
            largest = max(peak, largest)
            print(f"| `{variant}` | {suffix} | {size / 2**30:.2f} GiB | {shown} | {seconds:.0f} |", flush=True)
        return
    print("| variant | image | backend | from transformers | and back | largest logit |\n| --- | --- | --- | --- | --- | --- |")
    for variant, size in CASES:
        with tempfile.TemporaryDirectory() as folder:
            loaded, written, largest = differences(variant, size, folder)
        image, backend = "x".join(map(str, size)), keras.config.backend()
        print(f"| `{variant}` | {image} | {backend} | {loaded:.1e} | {written:.1e} | {largest:.1f} |", flush=True)


if __name__ == "__main__":
    main()
