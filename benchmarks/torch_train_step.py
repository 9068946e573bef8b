"""Measures the training speed of transformers' CvT on PyTorch, to compare: python benchmarks/torch_train_step.py --help.

Trains on one batch of synthetic pixels, which stays on the device, as `train_step.py` does with this project's network.
Needs PyTorch, transformers and this project's requirements except TensorFlow.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Literal

import torch
import transformers
import tyro
from transformers import CvtConfig, CvtForImageClassification

sys.path[:0] = map(str, Path(__file__).parents[:2])  # to run without installing the package

from cvt_keras import environment
from cvt_keras.pretrained import transformers_config
from measuring import image_rates, matrix_product_rate, matrix_size, require_at_least_one, training_flops


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measures images per second, peak memory, and FLOP/s as a share of the FLOP/s of a large matrix product."""

    variant: str = "cvt_13"
    """The name of a network of the paper."""
    image_size: int = 224
    """Height and width of the images, in pixels."""
    num_classes: int = 1000
    """Number of classes."""
    batch_size: int = 64
    """Images per training step."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """bfloat16: with torch.autocast."""
    compile: bool = False
    """Compile the network with torch.compile."""
    steps: int = 20
    """Steps per repetition."""
    repetitions: int = 5
    """Repetitions; the result is their median. One more before them compiles, and is not counted."""

    def __post_init__(self):
        require_at_least_one(self, "image_size", "num_classes", "batch_size", "steps", "repetitions")


def training_seconds(arguments):
    """Returns the seconds of each repetition, without the first."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = transformers_config(arguments.variant) | {"num_labels": arguments.num_classes}
    model = CvtForImageClassification(CvtConfig(**config)).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    network = torch.compile(model) if arguments.compile else model
    images = torch.randn(arguments.batch_size, 3, arguments.image_size, arguments.image_size, device=device)
    labels = torch.randint(arguments.num_classes, (arguments.batch_size,), device=device)
    seconds = []
    for _ in range(arguments.repetitions + 1):
        started = time.perf_counter()
        for _ in range(arguments.steps):
            with torch.autocast(device, torch.bfloat16, enabled=arguments.precision == "bfloat16"):
                logits = network(images).logits
            loss = torch.nn.functional.cross_entropy(logits.float(), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def product_rate(precision):
    """FLOP/s of the product of two large square matrices on this device."""
    on_gpu = torch.cuda.is_available()
    side, products = matrix_size(on_gpu)
    matrix = torch.randn(side, side, device="cuda" if on_gpu else "cpu") / side**0.5
    return matrix_product_rate(matrix.to(getattr(torch, precision)), lambda product: product[0, 0].item(), products)


def measure(arguments):
    """Returns the result: a dict of JSON values."""
    seconds = training_seconds(arguments)
    rates = image_rates(arguments.steps * arguments.batch_size, seconds)
    flops = training_flops(arguments.variant, arguments.image_size, arguments.num_classes) * rates["images_per_second"]
    on_gpu = torch.cuda.is_available()
    memory = torch.cuda.max_memory_allocated() if on_gpu else None  # read before the large matrices are allocated
    product = product_rate(arguments.precision)
    return {
        **dataclasses.asdict(arguments),
        "device": torch.cuda.get_device_name() if on_gpu else environment.cpu(),
        **rates,
        "peak_memory_bytes": memory,
        "training_flops": flops,
        "matrix_product_flops": product,
        "share_of_matrix_product": flops / product,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def main(arguments):
    result = measure(arguments)
    print(json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    main(tyro.cli(Arguments))
