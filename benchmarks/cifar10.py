"""Trains networks on CIFAR-10 for docs/results/cifar10.csv: python benchmarks/cifar10.py --help

Trains the network of a recipe, the same with one change, or a plain CNN of as many MACs, with several seeds. All take the same
images, augmentation and optimizer. Each run adds a row to the CSV file as soon as it ends, and runs that are already in it are
skipped. So the same command continues after an interruption.
"""

import csv
import dataclasses
from pathlib import Path
from typing import Literal

import keras
import numpy as np
import tyro
from keras import layers

from cvt_keras import Preprocessing, build_classifier, environment, macs
from cvt_keras.data import sources
from cvt_keras.data.pipeline import batches_per_epoch, evaluation_batches, training_batches
from cvt_keras.layers import ConvTokenEmbedding, CvTBlock, PixelNormalization, Whitening, linear_initializer
from cvt_keras.report.metrics import evaluate
from cvt_keras.training import RECIPES, Recipe, run
from cvt_keras.training.callbacks import BestWeights, Stopwatch
from cvt_keras.training.objective import WHITENING_IMAGES, adapt_whitening, compile_classifier
from cvt_keras.training.plan import resolve
from cvt_keras.variants import get_variant, named
from result_tables import add_rows

CNN = "cnn"
CNN_WIDTHS = (64, 128, 128)
NO_BLOCKS = "no blocks"
SETTINGS = ("epochs", "peak_learning_rate", "weight_decay", "crop_padding", "label_smoothing")  # fields of a recipe with a flag
KEY = ("network", "change", "recipe", *SETTINGS, "train_images", "seed")  # the columns that tell runs apart


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
    NO_BLOCKS: lambda variant: variant,  # a stage must have a block: `build` removes them
    "layer norm": lambda variant: dataclasses.replace(variant, norm="layer"),
    "strided embeddings": lambda variant: _stages(variant, pool=False),  # they have no activation either
    "no whitening": lambda variant: dataclasses.replace(variant, whitening=0),
    "no residual convolution": lambda variant: _stages(variant, residual_convs=0),
    "no convolution in the MLP": lambda variant: _stages(variant, mlp_conv=False),
    "attention scaled by the whole width": lambda variant: dataclasses.replace(variant, attention_scale="dim"),
    "random start": lambda variant: dataclasses.replace(variant, identity_init=False),
}


def build(network, change, recipe, source, dtype="float32"):
    """Builds a classifier of raw pixels.

    Args:
        network: `"cnn"`, or `"recipe"` for that of the recipe.
        change: a key of `CHANGES`; the recipe's variant has it already, except for `"no blocks"`.
        recipe: a `Recipe`.
        source: a `Source`.
        dtype: a dtype policy.

    Returns:
        A `keras.Model`, and its MACs.
    """
    names, side = source.class_names, recipe.image_size
    shape = (side, side, 3)
    if network == CNN:
        return cnn(Preprocessing(source.mean, source.std, names), side, dtype)
    classifier = build_classifier(
        recipe.variant, input_shape=shape, mean=source.mean, std=source.std, class_names=names, dtype=dtype
    )
    if change != NO_BLOCKS:
        return classifier, macs(recipe.variant, shape, len(names))
    without = keras.models.clone_model(
        classifier,
        clone_function=lambda layer: (
            layers.Identity(dtype=layer.dtype_policy.name, name=layer.name) if isinstance(layer, CvTBlock) else layer
        ),
        recursive=True,
    )
    without.dtype_policy = classifier.dtype_policy
    # Each block of a stage has the same MACs: those without blocks follow from one and two blocks per stage.
    one, two = (macs(_stages(get_variant(recipe.variant), depth=depth), shape, len(names)) for depth in (1, 2))
    return without, 2 * one - two


def cnn(preprocessing, side, dtype="float32"):
    """A CNN like airbench's (Keller Jordan, arXiv 2404.00498), narrower, with the parts of `cvt_cifar`: 54.2 M MACs at 32x32.

    Whitening, then three groups of two 3x3 convolutions with BatchNorm and GELU. The first convolution of each group is
    max-pooled before its norm. The head takes the largest value of each channel. All convolutions start near the identity, as
    the embeddings of `cvt_cifar` do; in docs/results/recipe.md the CNN starts at random.

    Args:
        preprocessing: a `Preprocessing` with mean, std and class names.
        side: height and width of the images in pixels.
        dtype: a dtype policy.

    Returns:
        A `keras.Model` from raw pixels to logits, and its MACs.
    """
    pixels = keras.Input((side, side, 3), name="images")
    x = Whitening(dtype=dtype, name="whitening")(PixelNormalization(preprocessing, name="normalization")(pixels))
    cost = (side - 1) ** 2 * 12 * 24
    settings = {"norm_type": "batch", "identity_init": True, "dtype": dtype}
    for i, dim in enumerate(CNN_WIDTHS):
        cost += x.shape[1] ** 2 * 9 * x.shape[-1] * dim
        x = ConvTokenEmbedding(dim, pool=True, **settings, name=f"stage{i}_embed")(x)
        cost += x.shape[1] ** 2 * 9 * dim * dim
        x = ConvTokenEmbedding(dim, stride=1, **settings, name=f"stage{i}_conv0")(x)
        x = layers.Activation("gelu", dtype=dtype)(x)
    x = layers.GlobalMaxPooling2D(dtype=dtype, name="pool")(x)
    classes = len(preprocessing.class_names)
    logits = layers.Dense(classes, kernel_initializer=linear_initializer(), dtype="float32", name="head")(x)
    classifier = keras.Model(pixels, logits, name="classifier")
    classifier.dtype_policy = keras.dtype_policies.get(dtype)  # `compile` reads it to scale the loss in float16
    return classifier, cost + x.shape[-1] * classes


# === Training ===


def fit(network, change, recipe, source):
    """Trains what `cvt_keras.training.run` can't, in the same way: a network that is no variant, or without validation images.

    Args:
        network, change, recipe, source: as in `build`. Without validation images, the weights are those of the last epoch,
            otherwise those of the best.

    Returns:
        The classifier in float32, its MACs, images per second in training (in the median epoch), and the training accuracy of
        the last epoch, in 0..1.

    Raises:
        ValueError: if the recipe has a setting that only `run` implements.
    """
    default = Recipe()
    for name in ("weights", "freeze", "class_weights", "early_stopping", "ema"):
        if getattr(recipe, name) != getattr(default, name):
            raise ValueError(f"`{name}` must be {getattr(default, name)} here. Received: {name}={getattr(recipe, name)}")
    keras.utils.set_random_seed(recipe.seed)
    classifier, cost = build(network, change, recipe, source, recipe.precision)
    first = evaluation_batches(source.train.limit(WHITENING_IMAGES), len(source.class_names), recipe.preprocessing)
    adapt_whitening(classifier, first)
    classes, steps = len(source.class_names), batches_per_epoch(source.train, recipe)
    compile_classifier(classifier, recipe, steps * recipe.epochs)
    best, stopwatch, seconds = BestWeights(), Stopwatch(), []
    record = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seconds.append(stopwatch.train_seconds))
    validation = evaluation_batches(source.validation, classes, recipe.preprocessing) if len(source.validation) else None
    history = classifier.fit(
        training_batches(source.train, classes, recipe),
        epochs=recipe.epochs,
        steps_per_epoch=steps,
        shuffle=False,
        validation_data=validation,
        callbacks=[best, stopwatch, record],
        verbose=2,
    ).history
    trained, _ = build(network, change, recipe, source)
    trained.set_weights(best.weights or classifier.get_weights())
    return trained, cost, steps * recipe.batch_size / np.median(seconds), history["accuracy"][-1]


def measure(classifier, split):
    """Returns top-1 and cross-entropy, and top-1 by the mean probabilities of an image and its mirror image."""
    views = split, dataclasses.replace(split, images=np.asarray(split.images)[:, :, ::-1])
    preprocessing = Preprocessing(image_size=classifier.input_shape[1:3])
    logits = [classifier.predict(evaluation_batches(view, 10, preprocessing), verbose=0) for view in views]
    metrics = evaluate(logits[0], split.labels)
    probabilities = sum(keras.ops.convert_to_numpy(keras.ops.softmax(part)) for part in logits)
    return metrics["top1"], metrics["loss"], float(np.mean(probabilities.argmax(axis=-1) == split.labels))


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
    crop_padding: int | None = None
    """Instead of the recipe's."""
    label_smoothing: float | None = None
    """Instead of the recipe's."""
    train_limit: int | None = None
    """Train on the first N images only."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A run for each."""
    all_images: bool = False
    """Train on the 5,000 validation images too, and keep the last epoch."""
    validation_only: bool = False
    """Do not touch the test images."""
    data_dir: str | None = None
    """TFDS' folder; defaults to TFDS_DATA_DIR, or else ~/tensorflow_datasets."""
    runs: Path = Path("runs")
    """Where the run folders go."""
    csv: Path | None = None
    """Write the results into this CSV file, and skip the runs that are already in it."""


def main(arguments):
    if arguments.change not in CHANGES:
        raise ValueError(f"`change` must be one of {', '.join(filter(None, CHANGES))}. Received: change={arguments.change!r}")
    if arguments.change and arguments.network == CNN:
        raise ValueError(f"`change` needs the recipe's network. Received: change={arguments.change!r}, network='{CNN}'")
    recipe = dataclasses.replace(RECIPES[arguments.recipe], dataset="cifar10", data_dir=arguments.data_dir)
    changes = {name: value for name in (*SETTINGS, "train_limit") if (value := getattr(arguments, name)) is not None}
    variant = named(CHANGES[arguments.change](get_variant(recipe.variant)))
    recipe = resolve(dataclasses.replace(recipe, variant=variant, **changes))
    for name, value in {"train_limit": recipe.train_limit, "validation_only": arguments.validation_only}.items():
        if arguments.all_images and value:
            raise ValueError(f"`{name}` can't be combined with `all_images`. Received: {name}={value}, all_images=True")
    source = images(arguments, recipe)
    for seed in arguments.seeds:
        row = {
            "network": CNN if arguments.network == CNN else RECIPES[arguments.recipe].variant_name,
            "change": arguments.change,
            "recipe": arguments.recipe,
            **{name: getattr(recipe, name) for name in SETTINGS},
            "train_images": len(source.train),
            "seed": seed,
        }
        name = "-".join(str(value) for value in row.values() if value != "").replace(" ", "_")
        if is_stored(arguments.csv, row, arguments.validation_only):
            print(f"{name}: already in {arguments.csv}", flush=True)
            continue
        row |= run_once(arguments, dataclasses.replace(recipe, seed=seed), source, arguments.runs / name)
        print(f"{name}: {row['test_percent'] or row['validation_percent']}%", flush=True)
        if arguments.csv:
            add_rows(arguments.csv, [row], KEY)
    print(f"{environment.device()}, {environment.versions()}, {source.note}")


def images(arguments, recipe):
    """Loads CIFAR-10, with only the images that the runs use. Returns a `Source`."""
    source = sources.load("cifar10", recipe.data_dir, recipe.preprocessing, recipe.pixel_cache)
    train, validation = source.train, source.validation
    if arguments.all_images:
        train = train.followed_by(validation)
        validation = validation.limit(0)
    return dataclasses.replace(
        source,
        train=train.limit(recipe.train_limit),
        validation=validation.limit(recipe.validation_limit),
        test=source.test.limit(0 if arguments.validation_only else recipe.test_limit),
    )


def run_once(arguments, recipe, source, run_dir):
    """Trains and measures once. Returns the measured columns of the CSV file."""
    if arguments.network == CNN or arguments.all_images or arguments.change == NO_BLOCKS:
        classifier, cost, speed, accuracy = fit(arguments.network, arguments.change, recipe, source)
    else:
        result = run(recipe, run_dir, resume=True, evaluate_test=not arguments.validation_only)
        classifier = keras.saving.load_model(run_dir / "model.keras", compile=False)
        cost, speed = result.report.macs, result.report.train_images_per_second
        accuracy = result.history[-1]["accuracy"]
    row = {"macs_millions": f"{cost / 1e6:.1f}", "training_percent": _percent(accuracy)}
    for name in ("validation", "test"):
        split = getattr(source, name)
        top1, cross_entropy, mirrored = measure(classifier, split) if len(split) else (None, None, None)
        row |= {f"{name}_percent": _percent(top1), f"{name}_mirrored_percent": _percent(mirrored)}
        row |= {f"{name}_cross_entropy": "" if cross_entropy is None else f"{cross_entropy:.4f}"}
    return {**row, "images_per_second": f"{speed:.0f}", "device": environment.device(), "data": source.note}


def is_stored(path, row, validation_only=False):
    """Whether the CSV file has the run of `row`, with test results unless `validation_only`."""
    if path is None or not path.exists():
        return False
    with path.open(newline="") as file:
        same = [stored for stored in csv.DictReader(file) if all(stored[name] == str(row[name]) for name in KEY)]
    return any(stored["test_percent"] or validation_only for stored in same)


def _percent(share):
    return "" if share is None else f"{100 * share:.2f}"


if __name__ == "__main__":
    main(tyro.cli(Arguments))
