"""One training run: recipe and run folder in, report out."""

import dataclasses
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from cvt_keras import environment, evaluation, runs
from cvt_keras.data import sources
from cvt_keras.data.pipeline import batches_per_epoch, evaluation_batches, training_batches
from cvt_keras.model import build_classifier
from cvt_keras.training.callbacks import Stopwatch
from cvt_keras.training.optimizers import make_optimizer
from cvt_keras.training.recipes import RecipeError
from cvt_keras.variants import get_variant, macs, to_dict


def run(recipe, run_dir, *, evaluate_test=True):
    """Trains by `recipe` and writes a run folder.

    Args:
        recipe: a `Recipe`.
        run_dir: a folder that does not exist yet, or is empty.
        evaluate_test: whether to touch the test split, once, at the end.

    Returns:
        The `Report` that `report.json` holds.

    Raises:
        FileExistsError: if `run_dir` already holds something.
        DataError: if the images can't be had.
        RecipeError: if the recipe does not fit the images: fewer than a batch, or too small.
        FloatingPointError: if the loss is no number any more.
    """
    if keras.config.backend() != "tensorflow":
        raise RecipeError(
            f"Training needs Keras' tensorflow backend: unset KERAS_BACKEND. Received: KERAS_BACKEND={keras.config.backend()}"
        )
    run_dir = Path(run_dir)
    runs.require_vacant(run_dir)
    recipe = resolve(recipe)
    print(f"{device()}, {recipe.precision}, XLA {recipe.xla}", flush=True)
    source = sources.cifar10(recipe.data_dir)
    train, test = source.train.limit(recipe.train_limit), source.test.limit(recipe.test_limit)
    steps = batches_per_epoch(train, recipe)
    if not steps:
        raise RecipeError(
            f"`batch_size` must not exceed the {len(train)} training images. Received: batch_size={recipe.batch_size}"
        )
    image_shape = train.images.shape[1:]
    if recipe.crop_padding >= min(image_shape[:2]):
        raise RecipeError(
            f"`crop_padding` must be under the {min(image_shape[:2])} pixels of a side. "
            f"Received: crop_padding={recipe.crop_padding}"
        )
    variant = get_variant(recipe.variant)
    try:
        variant.grids(*image_shape[:2])
    except ValueError as error:
        raise RecipeError(f"`variant` {recipe.variant} does not fit the images: {error}") from error
    counts = f"{len(train)} training, {len(source.validation)} validation, {len(test)} test images"
    print(f"{source.name}: {counts}{f' ({source.note})' if source.note else ''}", flush=True)

    keras.utils.set_random_seed(recipe.seed)
    num_classes = len(source.class_names)
    about = {
        "input_shape": image_shape,
        "mean": source.mean,
        "std": source.std,
        "class_names": source.class_names,
    }
    classifier = build_classifier(variant, num_classes, **about, dtype=recipe.precision)
    classifier.compile(
        optimizer=make_optimizer(recipe, classifier, steps * recipe.epochs),
        loss=keras.losses.CategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=recipe.xla == "on",
    )

    # Not before everything is known to be there: a folder in the way would make the next try harder.
    (run_dir / runs.CHECKPOINTS).mkdir(parents=True)
    runs.write_json(run_dir / runs.RECIPE, {**recipe.settings(), "variant": to_dict(variant)})

    stopwatch = Stopwatch()
    best = run_dir / runs.CHECKPOINTS / "best.weights.h5"
    started = time.perf_counter()
    history = classifier.fit(
        training_batches(train, num_classes, recipe),
        epochs=recipe.epochs,
        steps_per_epoch=steps,
        shuffle=False,  # the pipeline does
        validation_data=evaluation_batches(source.validation, num_classes),
        callbacks=[
            stopwatch,
            keras.callbacks.CSVLogger(run_dir / runs.HISTORY),
            keras.callbacks.ModelCheckpoint(best, monitor="val_accuracy", save_best_only=True, save_weights_only=True),
            keras.callbacks.TerminateOnNaN(),
        ],
    )
    seconds = time.perf_counter() - started
    if not np.isfinite(history.history["loss"][-1]):
        raise FloatingPointError(
            f"the loss is no number any more in epoch {len(history.epoch)}: train at a lower --peak-learning-rate "
            f"than {recipe.peak_learning_rate}, or with --precision float32; {run_dir} holds what is left of this run"
        )

    # What leaves the run is float32 whatever trained it, and carries no optimizer.
    classifier.load_weights(best)
    final = build_classifier(variant, num_classes, **about, dtype="float32")
    final.set_weights(classifier.get_weights())
    with runs.whole(run_dir / runs.MODEL) as aside:
        final.save(aside)

    validation_logits = _logits(final, source.validation, num_classes)
    test_logits = _logits(final, test, num_classes) if evaluate_test else None
    report = evaluation.Report(
        dataset=source.name,
        data_note=source.note,
        variant=recipe.variant,
        recipe=recipe.settings(),
        epochs=recipe.epochs,
        seed=recipe.seed,
        image_size=list(image_shape[:2]),
        class_names=list(source.class_names),
        parameters=sum(int(np.prod(variable.shape)) for variable in final.trainable_variables),
        macs=macs(variant, image_shape, num_classes),
        train_seconds=seconds,
        train_images_per_second=steps * recipe.batch_size / float(np.median(stopwatch.epoch_seconds)),
        validation=evaluation.metrics(validation_logits, source.validation.labels),
        test=evaluation.metrics(test_logits, test.labels) if evaluate_test else None,
        per_class=evaluation.per_class(test_logits, test.labels, source.class_names) if evaluate_test else None,
        device=device(),
        versions=environment.versions(),
    )
    runs.write_json(run_dir / runs.REPORT, dataclasses.asdict(report))
    return report


def resolve(recipe):
    """The recipe with `precision` and `xla` as this machine will run them."""
    gpus = tf.config.list_physical_devices("GPU")
    precision, xla = recipe.precision, recipe.xla
    if precision == "auto":
        precision = _gpu_precision(gpus[0]) if gpus else "float32"
    if xla == "auto":
        xla = "on" if gpus else "off"
    return dataclasses.replace(recipe, precision=precision, xla=xla)


def device():
    """The name of the device that TensorFlow trains on."""
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        return environment.cpu()
    return tf.config.experimental.get_device_details(gpus[0]).get("device_name", "GPU")


def _gpu_precision(gpu):
    # bfloat16 came with compute capability 8, Ampere.
    capability = tf.config.experimental.get_device_details(gpu).get("compute_capability", (0, 0))
    return "mixed_bfloat16" if capability >= (8, 0) else "mixed_float16"


def _logits(model, split, num_classes):
    return model.predict(evaluation_batches(split, num_classes), verbose=0)
