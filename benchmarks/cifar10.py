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
from cvt_keras.data.pipeline import batches_per_epoch, evaluation_batches, training_batches
from cvt_keras.data.split import Split
from cvt_keras.layers import ConvTokenEmbedding, PixelNormalization, Whitening
from cvt_keras.report.metrics import evaluate
from cvt_keras.training import RECIPES, run
from cvt_keras.training.callbacks import BestWeights
from cvt_keras.training.loop import WHITENING_IMAGES
from cvt_keras.training.optimizers import make_optimizer
from cvt_keras.training.plan import resolve
from cvt_keras.variants import get_variant, named
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


CHANGES = {
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


# === Training ===


def fit(network, recipe, source):
    """Trains what `cvt_keras.training.run` does not, in the same way: a CNN, or on images without validation.

    Args:
        network: `"cnn"`, or `"recipe"` for that of the recipe.
        recipe: a `Recipe`.
        source: a `Source`. Without validation images, the weights of the last epoch stay; else those of the best.

    Returns:
        The classifier, its MACs, seconds per epoch (the median), and the training accuracy of the last epoch, in 0..1.
    """
    keras.utils.set_random_seed(recipe.seed)
    names, side = source.class_names, recipe.image_size
    if network == CNN:
        classifier, multiplies = cnn(Preprocessing(source.mean, source.std, names), side)
    else:
        classifier = build_classifier(recipe.variant, mean=source.mean, std=source.std, class_names=names)
        multiplies = macs(recipe.variant, (side, side, 3), len(names))
    train = source.train.limit(recipe.train_limit)
    adapt_whitening(classifier, train, recipe)
    steps = batches_per_epoch(train, recipe)
    classifier.compile(
        make_optimizer(recipe, classifier, steps * recipe.epochs),
        loss=keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=recipe.label_smoothing),
        metrics=["accuracy"],
        jit_compile=recipe.xla == "on",
    )
    best, starts, seconds = BestWeights(), [], []
    clock = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: starts.append(time.perf_counter()),
        on_test_begin=lambda logs: seconds.append(time.perf_counter() - starts[-1]),
        on_epoch_end=lambda epoch, logs: seconds.append(time.perf_counter() - starts[-1]),
    )
    validates = len(source.validation) > 0
    history = classifier.fit(
        training_batches(train, len(names), recipe),
        epochs=recipe.epochs,
        steps_per_epoch=steps,
        shuffle=False,
        validation_data=evaluation_batches(source.validation, len(names), side) if validates else None,
        callbacks=[best, clock] if validates else [clock],
        verbose=2,
    ).history
    if validates:
        classifier.set_weights(best.weights)
        seconds = seconds[::2]  # until the validation begins
    return classifier, multiplies, float(np.median(seconds)), history["accuracy"][-1]


def adapt_whitening(classifier, split, recipe):
    """Sets the kernel of the whitening layer, as a run does."""
    layer = next(layer for layer in classifier._flatten_layers() if isinstance(layer, Whitening))
    batches = evaluation_batches(split.limit(WHITENING_IMAGES), 10, recipe.image_size)
    layer.adapt(classifier.get_layer("normalization")(images) for images, _ in batches)


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
    """What to change in the recipe's network: a key of CHANGES."""
    epochs: int | None = None
    """Instead of the recipe's."""
    peak_learning_rate: float | None = None
    """Instead of the recipe's."""
    weight_decay: float | None = None
    """Instead of the recipe's."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A run for each."""
    all_images: bool = False
    """Train on the 5,000 validation images too, and keep the last epoch."""
    validation_only: bool = False
    """Do not touch the test images."""
    train_limit: int | None = None
    """Train on the first N images only."""
    data_dir: str | None = None
    """TFDS' folder; defaults to TFDS_DATA_DIR, or else ~/tensorflow_datasets."""
    runs: Path = Path("runs")
    """Where the run folders go."""
    csv: Path | None = None
    """Write the results into this CSV file, and skip the runs that it has."""


def main(arguments):
    if arguments.change not in CHANGES:
        raise ValueError(f"`change` must be one of {', '.join(CHANGES)}. Received: change={arguments.change!r}")
    recipe = dataclasses.replace(
        RECIPES[arguments.recipe], dataset="cifar10", data_dir=arguments.data_dir, train_limit=arguments.train_limit
    )
    for name in ("epochs", "peak_learning_rate", "weight_decay"):
        if (value := getattr(arguments, name)) is not None:
            recipe = dataclasses.replace(recipe, **{name: value})
    recipe = resolve(dataclasses.replace(recipe, variant=named(CHANGES[arguments.change](get_variant(recipe.variant)))))
    source = sources.load("cifar10", recipe.data_dir, recipe.image_size)
    if arguments.all_images:
        source = with_all_images(source)
    for seed in arguments.seeds:
        row = {
            "network": CNN if arguments.network == CNN else RECIPES[arguments.recipe].variant_name,
            "change": arguments.change,
            "recipe": arguments.recipe,
            "epochs": recipe.epochs,
            "peak_learning_rate": recipe.peak_learning_rate,
            "weight_decay": recipe.weight_decay,
            "train_images": len(source.train.limit(recipe.train_limit)),
            "seed": seed,
        }
        name = "-".join(str(value) for value in row.values() if value != "").replace(" ", "_")
        if is_stored(arguments.csv, row):
            print(f"{name}: in {arguments.csv} already", flush=True)
            continue
        row |= run_once(arguments, dataclasses.replace(recipe, seed=seed), source, arguments.runs / name)
        print(f"{name}: {row['test_percent'] or row['validation_percent']}%", flush=True)
        if arguments.csv:
            add_rows(arguments.csv, [row], KEY)
    print(f"{environment.device()}, {environment.versions()}, {source.note}")


def run_once(arguments, recipe, source, run_dir):
    """Trains and measures once. Returns the measured columns of the CSV file."""
    if arguments.network == CNN or arguments.all_images:
        classifier, multiplies, seconds, accuracy = fit(arguments.network, recipe, source)
    else:
        result = run(recipe, run_dir, resume=True, evaluate_test=not arguments.validation_only)
        classifier = keras.saving.load_model(run_dir / "model.keras", compile=False)
        multiplies, accuracy = result.report.macs, result.history[-1]["accuracy"]
        seconds = float(np.median([epoch["train_seconds"] for epoch in result.history]))
    row = {"macs_millions": f"{multiplies / 1e6:.1f}", "training_percent": _percent(accuracy)}
    splits = {"validation": source.validation, "test": source.test.limit(0 if arguments.validation_only else None)}
    for name, split in splits.items():
        top1, cross_entropy, mirrored = measure(classifier, split) if len(split) else (None, None, None)
        row |= {f"{name}_percent": _percent(top1), f"{name}_mirrored_percent": _percent(mirrored)}
        row |= {f"{name}_cross_entropy": "" if cross_entropy is None else f"{cross_entropy:.4f}"}
    return {**row, "seconds_per_epoch": f"{seconds:.0f}", "device": environment.device(), "data": source.note}


def with_all_images(source):
    """The source with its validation images among the training images."""
    parts = source.train, source.validation
    joined = Split(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("images", "labels")))
    return dataclasses.replace(source, train=joined, validation=source.validation.limit(0))


def is_stored(path, row):
    if path is None or not path.exists():
        return False
    with path.open(newline="") as file:
        return any(all(stored[name] == str(row[name]) for name in KEY) for stored in csv.DictReader(file))


def _percent(share):
    return "" if share is None else f"{100 * share:.2f}"


if __name__ == "__main__":
    main(tyro.cli(Arguments))
