"""Trains networks on CIFAR-10 for docs/results/cifar10.csv: python benchmarks/cifar10.py --help

Trains with several seeds the network of a recipe, one of the paper's ablations on it, or a plain CNN of as many multiplies. All
take the same images, augmentation and optimizer. Each run adds a row to the CSV file as soon as it ends, and runs that the file
has are skipped. So the same command continues after an interruption.
"""

import csv
import dataclasses
import time
from pathlib import Path
from typing import Literal

import keras
import numpy as np
import tyro
from keras import layers

from cvt_keras import Preprocessing, build_classifier, environment, macs
from cvt_keras.data import sources
from cvt_keras.data.pipeline import evaluation_batches, training_batches
from cvt_keras.data.split import Split
from cvt_keras.layers import ConvTokenEmbedding, PixelNormalization, Whitening
from cvt_keras.report.metrics import evaluate
from cvt_keras.training import RECIPES
from cvt_keras.training.callbacks import BestWeights
from cvt_keras.training.loop import WHITENING_IMAGES
from cvt_keras.training.optimizers import make_optimizer
from cvt_keras.training.plan import resolve
from cvt_keras.variants import get_variant
from result_tables import add_rows

CNN = "cnn"
CNN_WIDTHS = (64, 128, 128)
KEY = ("network", "change", "recipe", "epochs", "peak_learning_rate", "weight_decay", "train_images", "seed")


# === Networks ===


def _stages(variant, **changes):
    return dataclasses.replace(variant, stages=tuple(dataclasses.replace(stage, **changes) for stage in variant.stages))


def _with_cls_token(variant):
    *first, last = variant.stages
    return dataclasses.replace(variant, stages=(*first, dataclasses.replace(last, cls_token=True)))


ABLATIONS = {
    "": lambda variant: variant,
    "linear projection": lambda variant: _stages(variant, projection="linear"),
    "full keys and values": lambda variant: _stages(variant, stride_kv=1),
    "cls token": _with_cls_token,
    "layer norm": lambda variant: dataclasses.replace(variant, norm="layer"),
    "strided embeddings": lambda variant: _stages(variant, pool=False),
    "no whitening": lambda variant: dataclasses.replace(variant, whitening=0),
    "no residual convolution": lambda variant: _stages(variant, residual_convs=0),
    "no convolution in the MLP": lambda variant: _stages(variant, mlp_conv=False),
    "attention scaled by the whole width": lambda variant: dataclasses.replace(variant, attention_scale="dim"),
    "random start": lambda variant: dataclasses.replace(variant, identity_init=False),
}


def cnn(preprocessing, side):
    """The network of airbench (Keller Jordan, arXiv 2404.00498), with GELU: 54.2 M MACs at 32x32.

    Whitening, then three groups of two 3x3 convolutions with BatchNorm and GELU; the first of each group is max-pooled before
    its norm. The head takes the largest value of each channel.

    Returns:
        A `keras.Model` from raw pixels to logits, and its MACs.
    """
    pixels = keras.Input((side, side, 3), name="images")
    x = Whitening(name="whitening")(PixelNormalization(preprocessing, name="normalization")(pixels))
    cost = (side - 1) ** 2 * 12 * 24
    for i, dim in enumerate(CNN_WIDTHS):
        cost += x.shape[1] ** 2 * 9 * x.shape[-1] * dim
        settings = {"norm_type": "batch", "identity_init": True}
        x = ConvTokenEmbedding(dim, pool=True, **settings, name=f"stage{i}_embed")(x)
        cost += x.shape[1] ** 2 * 9 * dim * dim
        x = layers.Activation("gelu")(ConvTokenEmbedding(dim, stride=1, **settings, name=f"stage{i}_conv0")(x))
    x = layers.GlobalMaxPooling2D(name="pool")(x)
    classes = len(preprocessing.class_names)
    logits = layers.Dense(classes, kernel_initializer=keras.initializers.TruncatedNormal(stddev=0.02), name="head")(x)
    return keras.Model(pixels, logits, name="classifier"), cost + x.shape[-1] * classes


def build(arguments, recipe, source):
    """Returns a classifier of raw pixels, and its MACs."""
    side = recipe.image_size
    if arguments.network == CNN:
        return cnn(Preprocessing(source.mean, source.std, source.class_names), side)
    variant = ABLATIONS[arguments.change](get_variant(recipe.variant))
    classifier = build_classifier(variant, mean=source.mean, std=source.std, class_names=source.class_names)
    return classifier, macs(variant, (side, side, 3), len(source.class_names))


# === Training ===


def train(classifier, recipe, train_split, validation):
    """Trains as `cvt_keras.training.run` does. Returns seconds per epoch, and the training accuracy of each epoch.

    Args:
        validation: a `Split`; the classifier then has the weights of its best epoch. `None` keeps those of the last.
    """
    classes = classifier.output_shape[-1]
    steps = len(train_split) // recipe.batch_size
    classifier.compile(
        make_optimizer(recipe, classifier, steps * recipe.epochs),
        loss=keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=recipe.label_smoothing),
        metrics=["accuracy"],
        jit_compile=recipe.xla == "on",
    )
    best, seconds = BestWeights(), []
    clock = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: seconds.append(time.perf_counter()),
        on_epoch_end=lambda epoch, logs: seconds.append(time.perf_counter() - seconds.pop()),
    )
    history = classifier.fit(
        training_batches(train_split, classes, recipe),
        epochs=recipe.epochs,
        steps_per_epoch=steps,
        shuffle=False,
        validation_data=evaluation_batches(validation, classes, recipe.image_size) if validation else None,
        callbacks=[best, clock] if validation else [clock],
        verbose=2,
    ).history
    if validation:
        classifier.set_weights(best.weights)
    return float(np.median(seconds)), history["accuracy"]


def adapt_whitening(classifier, split, recipe):
    """Sets the kernel of the whitening layer, if there is one, as a run does."""
    found = [layer for layer in classifier._flatten_layers() if isinstance(layer, Whitening)]
    normalize = classifier.get_layer("normalization")
    for layer in found:
        layer.adapt(normalize(images) for images, _ in evaluation_batches(split.limit(WHITENING_IMAGES), 10, recipe.image_size))


def logits_of(classifier, split, mirrored=False):
    images = split.images[:, :, ::-1] if mirrored else split.images
    return classifier.predict(images.astype("float32"), batch_size=500, verbose=0)


def measure(classifier, split):
    """Returns top-1 and cross-entropy, and top-1 by the mean probabilities of an image and its mirror image."""
    logits = logits_of(classifier, split)
    both = [keras.ops.convert_to_numpy(keras.ops.softmax(part)) for part in (logits, logits_of(classifier, split, True))]
    metrics = evaluate(logits, split.labels)
    mirrored = float(np.mean((both[0] + both[1]).argmax(axis=-1) == split.labels))
    return metrics["top1"], metrics["loss"], mirrored


# === Runs ===


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Trains a network on CIFAR-10 with several seeds."""

    recipe: str = "cifar10"
    """The recipe: its network, and how to train."""
    network: Literal["recipe", "cnn"] = "recipe"
    """The recipe's network, or a plain CNN."""
    change: str = ""
    """What to change in the recipe's network: one of the ablations in this file."""
    epochs: int | None = None
    """Instead of the recipe's."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A run for each."""
    peak_learning_rate: float | None = None
    """Instead of the recipe's."""
    weight_decay: float | None = None
    """Instead of the recipe's."""
    all_images: bool = False
    """Train on the 5,000 validation images too, and keep the last epoch."""
    validation_only: bool = False
    """Do not touch the test images."""
    train_limit: int | None = None
    """Train on the first N images only."""
    data_dir: str | None = None
    """TFDS' folder; defaults to TFDS_DATA_DIR, or else ~/tensorflow_datasets."""
    csv: Path | None = None
    """Write the results into this CSV file, and skip the runs that it has."""
    models: Path | None = None
    """Save each trained classifier in this folder."""


def main(arguments):
    if arguments.change not in ABLATIONS:
        raise ValueError(f"`change` must be one of {', '.join(ABLATIONS)}. Received: change={arguments.change!r}")
    recipe = dataclasses.replace(RECIPES[arguments.recipe], dataset="cifar10", data_dir=arguments.data_dir)
    for name in ("epochs", "peak_learning_rate", "weight_decay"):
        if (value := getattr(arguments, name)) is not None:
            recipe = dataclasses.replace(recipe, **{name: value})
    recipe = resolve(recipe)
    source = sources.load("cifar10", recipe.data_dir, recipe.image_size)
    train_split, validation = source.train.limit(arguments.train_limit), source.validation
    if arguments.all_images:
        parts = train_split, validation
        train_split = Split(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("images", "labels")))
        validation = None
    for seed in arguments.seeds:
        row = {
            "network": CNN if arguments.network == CNN else recipe.variant_name,
            "change": arguments.change,
            "recipe": arguments.recipe,
            "epochs": recipe.epochs,
            "peak_learning_rate": recipe.peak_learning_rate,
            "weight_decay": recipe.weight_decay,
            "train_images": len(train_split),
            "seed": seed,
        }
        if is_stored(arguments.csv, row):
            print(f"{describe(row)}: in {arguments.csv} already", flush=True)
            continue
        row |= run_once(arguments, dataclasses.replace(recipe, seed=seed), source, train_split, validation)
        row |= {"device": environment.device(), "data": source.note}
        print(f"{describe(row)}: {row['test_percent'] or row['validation_percent']}%", flush=True)
        if arguments.csv:
            add_rows(arguments.csv, [row], KEY)
    print(f"{environment.device()}, {environment.versions()}, {source.note}")


def run_once(arguments, recipe, source, train_split, validation):
    """Trains and measures once. Returns the measured columns of the CSV file."""
    keras.utils.set_random_seed(recipe.seed)
    classifier, multiplies = build(arguments, recipe, source)
    adapt_whitening(classifier, train_split, recipe)
    seconds, accuracies = train(classifier, recipe, train_split, validation)
    if arguments.models:
        arguments.models.mkdir(parents=True, exist_ok=True)
        network = arguments.network if arguments.network == CNN else recipe.variant_name
        classifier.save(arguments.models / f"{network}-{arguments.recipe}-{recipe.epochs}-seed{recipe.seed}.keras")
    row = {"macs_millions": f"{multiplies / 1e6:.1f}", "training_percent": _percent(accuracies[-1])}
    splits = {"validation": validation, "test": None if arguments.validation_only else source.test}
    for name, split in splits.items():
        top1, cross_entropy, mirrored = measure(classifier, split) if split else (None, None, None)
        row |= {f"{name}_percent": _percent(top1), f"{name}_mirrored_percent": _percent(mirrored)}
        row |= {f"{name}_cross_entropy": "" if cross_entropy is None else f"{cross_entropy:.4f}"}
    return {**row, "seconds_per_epoch": f"{seconds:.0f}"}


def is_stored(path, row):
    if path is None or not path.exists():
        return False
    with path.open(newline="") as file:
        return any(all(stored[name] == str(row[name]) for name in KEY) for stored in csv.DictReader(file))


def describe(row):
    change = f", {row['change']}" if row["change"] else ""
    return f"{row['network']}{change}, {row['epochs']} epochs of {row['recipe']}, seed {row['seed']}"


def _percent(share):
    return "" if share is None else f"{100 * share:.2f}"


if __name__ == "__main__":
    main(tyro.cli(Arguments))
