"""Measures training on one GPU with JAX, and trains the CIFAR-10 recipes there: python benchmarks/gpu.py --help

Needs JAX and this project's requirements except TensorFlow; for the comparison, also PyTorch and transformers. Prints one line
of JSON per result as soon as it is known. Every part runs in a process of its own, so that each has the whole GPU, and a part
that fails does not stop the others. Exits with 1 if a part failed, and with 2 if there is no GPU.

Validation images only: this script never reads the test split.
"""

import concurrent.futures
import dataclasses
import functools
import importlib.util
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = map(str, Path(__file__).parents[:2])  # to run without installing the package
if __name__ == "__main__":  # before Keras is imported, here and in the processes of the parts
    os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import keras
import numpy as np
import tyro

import train_step
from cvt_keras import build_classifier, environment
from cvt_keras.data.images import decode, in_threads
from cvt_keras.data.tfds import CIFAR10_CLASSES, CIFAR10_MEAN, CIFAR10_STD, VALIDATION_IMAGES
from cvt_keras.training import RECIPES
from cvt_keras.training.objective import WHITENING_IMAGES, adapt_whitening, compile_classifier
from measuring import image_rates, training_flops

CLASSES = len(CIFAR10_CLASSES)
EVALUATION_BATCH = 500
PERCENTS = (80, 85, 88, 89, 90, 91, 92, 93)  # validation accuracies to reach
PACKED = "cifar10.npz"
PRECISION = "mixed_bfloat16"
# Dense products in bfloat16, by the device's name. NVIDIA's data sheets "H100 Tensor Core GPU" and "H200 Tensor Core GPU" give
# twice as much for their SXM modules, for sparse matrices.
PEAK_FLOPS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}

NETWORKS = {
    "cvt_cifar": {"variant": "cvt_cifar", "image_size": 32, "num_classes": 10, "batch_size": 128},
    "cvt_cifar_large": {"variant": "cvt_cifar_large", "image_size": 32, "num_classes": 10, "batch_size": 256},
    "cvt_13": {"variant": "cvt_13", "image_size": 224, "num_classes": 1000, "batch_size": 64},
}
SMOKE_NETWORK = {"variant": "cvt_tiny", "image_size": 16, "num_classes": 10, "batch_size": 4, "steps": 1, "repetitions": 2}
SMOKE_RECIPE = {"variant": "cvt_tiny", "epochs": 2, "batch_size": 8}
TRANSFORMERS = "transformers_cvt_13"
GROUPS = {"speed": (*NETWORKS, TRANSFORMERS), "train": ("cifar10", "cifar10_long")}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measures training on one GPU with JAX: speed, beside transformers on PyTorch, and time to accuracy on CIFAR-10."""

    parts: tuple[str, ...] = tuple(GROUPS)
    """What to run, in the order given: speed, train, or single parts of them.
    speed: cvt_cifar, cvt_cifar_large, cvt_13, transformers_cvt_13. train: cifar10, cifar10_long."""
    data: Path | None = None
    """The file that --pack writes. Without it, synthetic images are trained on, and accuracies mean nothing."""
    pack: Path | None = None
    """Only write the training images of CIFAR-10 to cifar10.npz in this folder. Needs tensorflow-datasets."""
    minutes: float = math.inf
    """Start no part after this time, and end trainings by then."""
    train_minutes: float = 10
    """End a training after the last epoch that fits into this time, compilation included.
    The learning-rate schedule still spans all epochs of the recipe."""
    seed: int = 0
    """Seed of the trainings."""
    cache_dir: Path = Path(tempfile.gettempdir()) / "cvt-keras-jax"
    """Where JAX keeps compiled programs for the next call."""
    smoke: bool = False
    """Run every part at the smallest size on the CPU, to check the script. Its numbers mean nothing."""

    def __post_init__(self):
        known = (*GROUPS, *(name for group in GROUPS.values() for name in group))
        if unknown := set(self.parts) - set(known):
            raise ValueError(f"`parts` must be of {', '.join(known)}. Received: {', '.join(sorted(unknown))}")
        for name in ("minutes", "train_minutes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be greater than 0. Received: {name}={getattr(self, name)}")
        if self.data is not None and not self.data.is_file():
            raise ValueError(f"`data` must be a file that --pack wrote. Received: data={self.data}")

    @property
    def part_names(self):
        """The single parts, each once."""
        return tuple(dict.fromkeys(name for part in self.parts for name in GROUPS.get(part, (part,))))


def say(result):
    print(json.dumps(result), flush=True)


# === Speed ===


def device_peak(device):
    """FLOP/s of dense products in bfloat16 of a device by its name, or `None` if it is not known."""
    return PEAK_FLOPS.get(device)


def with_share_of_peak(result):
    """Adds the share of the device's peak to a result that has `device` and `training_flops`, if the peak is known."""
    peak = device_peak(result["device"])
    return result if peak is None else {**result, "peak_flops": peak, "share_of_peak": result["training_flops"] / peak}


def keras_speed(name, arguments):
    """Yields the speed of training steps of one of `NETWORKS`."""
    network = SMOKE_NETWORK if arguments.smoke else NETWORKS[name]
    yield with_share_of_peak(train_step.measure(train_step.Arguments(precision=PRECISION, **network)))


def transformers_speed(arguments):
    """Yields the speed of training steps of transformers' CvT-13."""
    if arguments.smoke and not all(map(importlib.util.find_spec, ("torch", "transformers"))):
        yield {"skipped": "torch or transformers is not installed"}
        return
    import torch_train_step

    network = SMOKE_NETWORK if arguments.smoke else NETWORKS["cvt_13"]
    settings = torch_train_step.Arguments(precision="bfloat16", compile=not arguments.smoke, **network)
    yield with_share_of_peak(torch_train_step.measure(settings))


# === Data ===


class Data(NamedTuple):
    """uint8 images `(n, 32, 32, 3)` and int32 labels `(n,)`, and what a reader of the accuracies must know."""

    images: np.ndarray
    labels: np.ndarray
    validation_images: np.ndarray
    validation_labels: np.ndarray
    note: str

    def limit(self, count, validation_count):
        """The first images of each split."""
        parts = zip(self[:-1], (count, count, validation_count, validation_count))
        return Data(*(part[:n] for part, n in parts), self.note)


def pack(folder, data_dir=None):
    """Writes the image files of CIFAR-10's training split, as TFDS stores them and in its order.

    Args:
        folder: where `PACKED` goes.
        data_dir: TFDS' folder, where the data set must be; defaults to `TFDS_DATA_DIR`, or `~/tensorflow_datasets`.

    Returns:
        The path of the file.
    """
    import tensorflow_datasets as tfds

    examples = tfds.builder("cifar10", data_dir=data_dir).as_dataset(
        split="train",
        decoders={"image": tfds.decode.SkipDecoding()},
        read_config=tfds.ReadConfig(try_autocache=False),
    )
    files, labels = zip(*((example["image"], example["label"]) for example in examples.as_numpy_iterator()))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PACKED
    # Compressed: JPEG files of this size are mostly header, and all headers are alike.
    np.savez_compressed(
        path,
        files=np.frombuffer(b"".join(files), "uint8"),
        lengths=np.array(list(map(len, files)), "int32"),
        labels=np.array(labels, "uint8"),
    )
    return path


def load(path):
    """Reads a file of `pack`. The last 5,000 images are for validation, as in `cvt_keras.data.tfds`."""
    with np.load(path) as packed:
        content, lengths, labels = (packed[name] for name in ("files", "lengths", "labels"))
    ends = np.cumsum(lengths)
    files = [content[end - length : end].tobytes() for end, length in zip(ends, lengths)]
    images, labels = np.stack(list(in_threads(decode, files))), labels.astype("int32")
    copy = ", JPEG copy of the data" if files[0].startswith(b"\xff\xd8") else ""
    kept = len(images) - VALIDATION_IMAGES
    return Data(images[:kept], labels[:kept], images[kept:], labels[kept:], f"validation images, one seed{copy}")


def synthetic(count, validation_count):
    """Noise, in place of CIFAR-10."""
    random = np.random.default_rng(0)
    parts = []
    for n in (count, validation_count):
        parts += random.integers(0, 256, (n, 32, 32, 3), "uint8"), random.integers(0, CLASSES, n, "int32")
    return Data(*parts, "synthetic images: the accuracies mean nothing")


# === Augmentation, by the rules of cvt_keras/data/augment.py ===


def flip(images, mirrored):
    """Mirrors the chosen images left to right.

    Args:
        mirrored: bool `(batch,)`, whether to mirror each.
    """
    return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def crop(images, offsets, padding):
    """Pads each image by reflection, then crops it to the original size.

    Args:
        offsets: int `(2, batch)`, the top and left edge of each crop, 0 to `2 * padding`.
        padding: pixels on each of the four sides.
    """
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)), "reflect")

    def cut(image, top, left):
        return jax.lax.dynamic_slice(image, (top, left, 0), images.shape[1:])

    return jax.vmap(cut)(padded, *offsets)


def cutmix(images, labels, shares, places):
    """Replaces a box in each image, and the same share of its label, by its neighbour's in the batch.

    Args:
        shares: `(batch,)`, the share of each image outside its box, before rounding to pixels.
        places: `(2, batch)` in 0..1, the position of each box from top to bottom and from left to right.
    """
    side = jnp.sqrt(1 - shares)

    def inside(pixels, place):
        length = jnp.round(side * pixels)
        first = jnp.floor(place * (pixels - length + 1))
        position = jnp.arange(float(pixels))
        return (position >= first[:, None]) & (position < (first + length)[:, None])  # (B, pixels)

    height, width = images.shape[1:3]
    boxes = inside(height, places[0])[:, :, None, None] & inside(width, places[1])[:, None, :, None]
    kept = 1 - jnp.mean(boxes.astype("float32"), axis=(1, 2))  # (B, 1)
    images = jnp.where(boxes, jnp.roll(images, 1, axis=0), images)
    return images, kept * labels + (1 - kept) * jnp.roll(labels, 1, axis=0)


def epoch_draws(recipe, count, epoch):
    """Draws the order and the augmentation of an epoch. The draws differ from those of `cvt_keras.data.pipeline`.

    Args:
        recipe: a `Recipe`.
        count: number of training images.
        epoch: from 0.

    Returns:
        A dict of arrays, each with one row per step.
    """
    steps, batch = count // recipe.batch_size, recipe.batch_size
    flip_key, *keys = jax.random.split(jax.random.key(recipe.seed), 5)
    order_key, offset_key, share_key, place_key = (jax.random.fold_in(key, epoch) for key in keys)
    chosen = jax.random.permutation(order_key, count)[: steps * batch].reshape(steps, batch)
    mirrored = jax.random.bernoulli(flip_key, shape=(count,)) ^ (epoch % 2 == 1)  # alternates from epoch to epoch
    draws = {
        "chosen": chosen,
        "mirrored": mirrored[chosen],
        "offsets": jax.random.randint(offset_key, (steps, 2, batch), 0, 2 * recipe.crop_padding + 1),
    }
    if recipe.cutmix:
        draws["shares"] = jax.random.beta(share_key, recipe.cutmix, recipe.cutmix, (steps, batch))
        draws["places"] = jax.random.uniform(place_key, (steps, 2, batch))
    return draws


def augmented_batch(recipe, images, labels, draws):
    """Returns a training batch: float32 pixels in 0..255, and soft labels.

    Args:
        recipe: a `Recipe`.
        images, labels: all training images and their labels.
        draws: one row of `epoch_draws`.
    """
    pixels, targets = images[draws["chosen"]], jax.nn.one_hot(labels[draws["chosen"]], CLASSES)
    if recipe.flip:
        pixels = flip(pixels, draws["mirrored"])
    if recipe.crop_padding:
        pixels = crop(pixels, draws["offsets"], recipe.crop_padding)
    pixels = pixels.astype("float32")
    return cutmix(pixels, targets, draws["shares"], draws["places"]) if recipe.cutmix else (pixels, targets)


# === Training ===


def compiled_classifier(recipe, images):
    """Returns a classifier that is ready to train, with its whitening adapted.

    Args:
        recipe: a `Recipe`; its precision and `xla` are not `"auto"`.
        images: uint8 `(n, 32, 32, 3)`, all training images.
    """
    for name in ("rand_augment", "erase", "mixup", "weights"):
        if getattr(recipe, name):
            raise ValueError(f"this script does not support `{name}`. Received: {name}={getattr(recipe, name)}")
    keras.utils.set_random_seed(recipe.seed)
    classifier = build_classifier(
        recipe.variant, CLASSES, images.shape[1:], mean=CIFAR10_MEAN, std=CIFAR10_STD, dtype=recipe.precision
    )
    compile_classifier(classifier, recipe, len(images) // recipe.batch_size * recipe.epochs)
    first = images[:WHITENING_IMAGES]
    adapt_whitening(
        classifier, ((first[i : i + EVALUATION_BATCH].astype("float32"),) for i in range(0, len(first), EVALUATION_BATCH))
    )
    return classifier


def initial_state(classifier):
    """The values that `train_step` of Keras changes: trainable, non-trainable, the optimizer's and the metrics'."""
    variables = (classifier.trainable_variables, classifier.non_trainable_variables)
    variables += classifier.optimizer.variables, classifier.metrics_variables
    # Copied: the program of an epoch may overwrite its inputs.
    return tuple([jnp.array(variable.value) for variable in group] for group in variables)


def train_epoch(classifier, recipe, state, images, labels, epoch):
    """Trains for an epoch, all steps in one program.

    Args:
        classifier: from `compiled_classifier`.
        recipe: a `Recipe`.
        state: from `initial_state`, or from the epoch before.
        images, labels: all training images and their labels.
        epoch: from 0.

    Returns:
        The new state, and a dict: the epoch's mean loss and accuracy.
    """

    def step(state, draws):
        logs, state = classifier.train_step(state, augmented_batch(recipe, images, labels, draws))
        return state, logs

    state = (*state[:3], jax.tree.map(jnp.zeros_like, state[3]))  # the metrics start anew
    state, logs = jax.lax.scan(step, state, epoch_draws(recipe, len(images), epoch))
    return state, {name: values[-1] for name, values in logs.items()}  # Keras' metrics are means since the epoch began


def weights(classifier, state):
    """The weights in a state to validate: their moving averages if the optimizer keeps them."""
    optimizer = classifier.optimizer
    if not optimizer.use_ema:
        return state[0]
    values = {id(variable): value for variable, value in zip(optimizer.variables, state[2])}
    # Keras has no public name for them.
    return [values[id(average)] for average in optimizer._model_variables_moving_average]


def validation_hits(classifier, state, images, labels):
    """The number of images that are classified right."""
    trained = weights(classifier, state)

    def hits(batch):
        pixels, labels = batch
        logits, _ = classifier.stateless_call(trained, state[1], pixels.astype("float32"), training=False)
        return jnp.sum(jnp.argmax(logits, axis=-1) == labels)

    size = math.gcd(len(images), EVALUATION_BATCH)
    batches = images.reshape(-1, size, *images.shape[1:]), labels.reshape(-1, size)
    return jnp.sum(jax.lax.map(hits, batches))


def time_to_accuracy(history, percents=PERCENTS):
    """Finds the first epoch that reaches each accuracy.

    Args:
        history: the results of the epochs, in order.
        percents: validation accuracies.

    Returns:
        A dict: percent, as text -> that epoch and its two times, or `None` if no epoch reached it.
    """
    table = {}
    for percent in percents:
        row = next((row for row in history if row["validation_accuracy"] >= percent / 100), None)
        table[str(percent)] = row and {name: row[name] for name in ("epoch", "seconds", "seconds_with_compilation")}
    return table


def training(name, arguments):
    """Trains by a recipe. Yields its settings, a result per epoch, and the summary."""
    started = time.perf_counter()
    recipe = dataclasses.replace(
        RECIPES[name], precision=PRECISION, xla="on", seed=arguments.seed, **(SMOKE_RECIPE if arguments.smoke else {})
    )
    data = load(arguments.data) if arguments.data else synthetic(45_000, 5_000)
    if arguments.smoke:
        data = data.limit(32, 16)
    settings = {name: getattr(recipe, name) for name in ("variant", "epochs", "batch_size", "precision", "seed")}
    yield {"recipe": settings, "note": data.note, "load_seconds": time.perf_counter() - started}

    classifier = compiled_classifier(recipe, data.images)
    images, labels, *validation = map(jax.device_put, data[:-1])
    state = initial_state(classifier)
    compiling = time.perf_counter()
    train = jax.jit(functools.partial(train_epoch, classifier, recipe), donate_argnums=0)
    train = train.lower(state, images, labels, np.int32(0)).compile()
    validate = jax.jit(functools.partial(validation_hits, classifier)).lower(state, *validation).compile()
    compile_seconds = time.perf_counter() - compiling

    history, train_seconds, training_started = [], [], time.perf_counter()
    for epoch in range(recipe.epochs):
        epoch_started = time.perf_counter()
        state, logs = jax.block_until_ready(train(state, images, labels, np.int32(epoch)))
        train_seconds.append(time.perf_counter() - epoch_started)
        accuracy = int(validate(state, *validation)) / len(data.validation_labels)
        now = time.perf_counter()
        if not math.isfinite(logs["loss"]):
            raise FloatingPointError(f"the loss is NaN or infinite in epoch {epoch + 1}")
        history.append(
            {
                "epoch": epoch + 1,
                "seconds": now - training_started,
                "seconds_with_compilation": now - training_started + compile_seconds,
                "validation_accuracy": accuracy,
                "training_accuracy": float(logs["accuracy"]),
                "training_loss": float(logs["loss"]),
            }
        )
        yield history[-1]
        if now - started + now - epoch_started > 60 * arguments.train_minutes:
            break

    device, peak_bytes = train_step.device()
    rates = image_rates(len(images) // recipe.batch_size * recipe.batch_size, train_seconds)
    yield with_share_of_peak(
        {
            "epochs_trained": len(history),
            "validation_accuracy": history[-1]["validation_accuracy"],
            "time_to_accuracy": time_to_accuracy(history),
            "note": data.note,
            "compile_seconds": compile_seconds,
            **rates,
            "training_flops": training_flops(recipe.variant, recipe.image_size, CLASSES) * rates["images_per_second"],
            "peak_memory_bytes": peak_bytes and peak_bytes(),
            "device": device,
            "versions": environment.versions(),
        }
    )


# === Parts ===

PARTS = {
    **{name: functools.partial(keras_speed, name) for name in NETWORKS},
    TRANSFORMERS: transformers_speed,
    **{name: functools.partial(training, name) for name in GROUPS["train"]},
}


def describe_device(arguments):
    """Yields the name of the device. Exits with 2 if it must be a GPU and is not."""
    if jax.default_backend() != "gpu" and not arguments.smoke:
        print("JAX finds no GPU. To check the script on a CPU, add --smoke", file=sys.stderr)
        sys.exit(2)
    yield {"device": train_step.device()[0], "versions": environment.versions()}


def run_part(name, arguments):
    """Runs a part in this process, and prints its results or its error. Exits with 1 after an error."""
    part = describe_device if name == "device" else PARTS[name]
    try:
        for result in part(arguments):
            say({"part": name, **result})
    except Exception as error:
        traceback.print_exc()
        say({"part": name, "error": f"{type(error).__name__}: {error}"})
        sys.exit(1)


def run_in_process(name, arguments):
    """Runs a part in a process of its own. Returns the exit code of that process."""
    process = multiprocessing.get_context("spawn").Process(target=run_part, args=(name, arguments))
    process.start()
    process.join()
    if process.exitcode not in (0, 1, 2):  # it could not say so itself
        say({"part": name, "error": f"the process ended with exit code {process.exitcode}"})
    return process.exitcode


def main(arguments):
    """Returns the exit code."""
    started = time.perf_counter()
    if arguments.pack:
        path = pack(arguments.pack)
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")
        return 0
    environment.require_backend("jax")
    # For the processes of the parts. This process uses no device.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(arguments.cache_dir.resolve())
    if arguments.smoke:
        os.environ |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    else:
        os.environ.setdefault("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=false")  # it failed for CvT on an H100
    if code := run_in_process("device", arguments):
        return code

    def run(name):
        left = arguments.minutes - (time.perf_counter() - started) / 60
        if left <= 0:
            say({"part": name, "skipped": f"not started within {arguments.minutes:g} minutes"})
            return 0
        limit = min(arguments.train_minutes, left)
        return run_in_process(name, dataclasses.replace(arguments, train_minutes=limit))

    # One at a time, so that none slows another down. A smoke run measures nothing.
    with concurrent.futures.ThreadPoolExecutor(2 if arguments.smoke else 1) as pool:
        return int(any(list(pool.map(run, arguments.part_names))))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
