"""One training run: recipe and run folder in, report out."""

import dataclasses
import re
import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from cvt_keras import environment, evaluation, page, plots, pretrained, runs
from cvt_keras.data import sources
from cvt_keras.data.pipeline import batches_per_epoch, evaluation_batches, training_batches
from cvt_keras.model import build_classifier
from cvt_keras.training.callbacks import (
    BestWeights,
    Checkpoints,
    Compression,
    HaltOnNaN,
    StopAfterStep,
    Stopwatch,
    TensorBoard,
    stored_data,
)
from cvt_keras.training.optimizers import make_optimizer
from cvt_keras.training.recipes import Recipe, RecipeError
from cvt_keras.variants import Variant, get_variant, macs, named


class DifferentRunError(RecipeError):
    """A run that was to go on began with other settings.

    Attributes:
        differences: what they are, as text.
    """

    def __init__(self, run_dir, differences):
        self.differences = differences
        way_out = "Give it its own settings, or train in another --run-dir"
        super().__init__(f"the run in {run_dir} can't go on with other settings: {differences}. {way_out}")


def run(recipe, run_dir, resume=False, evaluate_test=True, compression=None):
    """Trains by `recipe` and writes a run folder.

    Args:
        recipe: a `Recipe`.
        run_dir: a folder that does not exist yet, or is empty, unless `resume`.
        resume: go on where the run in `run_dir` stopped: after its last finished epoch. What comes out is what an uninterrupted
            run gives, to the bit where TensorFlow is deterministic. A finished run is left as it is.
        evaluate_test: whether to touch the test split, once, at the end.
        compression: a `Compression` of `cvt_keras.compression`, to which the recipe's `weights` are handed; its settings become
            the recipe's `compression`.

    Returns:
        The `Report` that `report.json` holds.

    Raises:
        FileExistsError: if `run_dir` already holds something, without `resume`, or something else than a run.
        DataError: if the images can't be had.
        RecipeError: if the recipe does not fit the images (fewer than a batch, or too small), its weights or, with `resume`,
            the run.
        CheckpointError: if its weights are broken, or a package that reads them is missing.
        RunError: if `run_dir` can't be written to, or another process trains there; with `resume`, if a file of it is broken.
        FloatingPointError: if the loss is no number any more.
        MemoryError: if a batch does not fit into the memory.
        OSError: if a file can't be written.
    """
    if keras.config.backend() != "tensorflow":
        raise RecipeError(
            "training needs Keras' tensorflow backend: set KERAS_BACKEND=tensorflow. "
            f"Received: {keras.config.backend()}, from KERAS_BACKEND or keras.json"
        )
    if recipe.compression is not None and compression is None:
        raise RecipeError("`compression` is no training: a run with it comes from python -m cvt_keras.compression")
    compression = compression or Compression()
    recipe = dataclasses.replace(recipe, compression=compression.settings)
    run_dir = Path(run_dir)
    stored = _stored_recipe(run_dir) if resume else None
    if stored is None:
        runs.require_vacant(run_dir)
        if resume:
            print(f"no run to go on with in {run_dir}: training from the first epoch", flush=True)
    auto = recipe.dataset == "auto"
    recipe = resolve(recipe, stored)
    compression.require(recipe)
    print(f"{device()}, {recipe.precision}, XLA {recipe.xla}", flush=True)
    if stored is not None and (report := _finished_report(run_dir, evaluate_test)) is not None:
        # Its images, which may be gone by now, are not needed; that they can't be mirrored is in its recipe.
        _require_same(dataclasses.replace(recipe, flip=recipe.flip and stored.flip), stored, run_dir)
        print(f"{run_dir} holds a finished run: nothing is left to do", flush=True)
        return report
    runs.require_writable(run_dir)
    if not tf.config.list_physical_devices("GPU") and environment.has_nvidia_device():
        _warn('this machine has an NVIDIA device that TensorFlow does not see: pip install "tensorflow[and-cuda]"')
    begun = stored_data(run_dir) if stored is not None else None
    if begun is not None:
        # An epoch that is stored holds all that the weights gave: their file may be gone.
        _require_same(dataclasses.replace(recipe, flip=recipe.flip and stored.flip), stored, run_dir)
        checkpoint, look = None, begun
    else:
        checkpoint = read_weights(recipe)
        look = checkpoint.preprocessing if checkpoint else {}
    if checkpoint:
        recipe = dataclasses.replace(recipe, variant=named(checkpoint.variant))
        print(f"starting from {recipe.weights}: {recipe.variant_name}, with {checkpoint.variant.activation}", flush=True)
    source = sources.load(recipe.dataset, recipe.data_dir, recipe.image_size)
    if auto and recipe.dataset == "digits":
        because = "scikit-learn's digits stand in for CIFAR-10, as when this run began. For CIFAR-10 train in another --run-dir"
        source = dataclasses.replace(source, fallback=because)
    if source.fallback:
        _warn(source.fallback)
    # The images must look as those that the weights know.
    source = dataclasses.replace(source, **{name: tuple(look[name]) for name in ("mean", "std") if look.get(name)})
    dataset = source.name if recipe.dataset == "auto" else recipe.dataset
    recipe = dataclasses.replace(recipe, dataset=dataset, flip=recipe.flip and source.mirror)
    train, test = source.train.limit(recipe.train_limit), source.test.limit(recipe.test_limit)
    check(recipe, train)
    if stored is not None:
        _require_same(recipe, stored, run_dir)
        recipe = dataclasses.replace(recipe, weights=stored.weights)  # as recipe.json spells them
    tested = f", {len(test)} test" if evaluate_test else ""
    counts = f"{len(train)} training, {len(source.validation)} validation{tested} images"
    print(f"{source.name}: {counts}{f' ({source.note})' if source.note else ''}", flush=True)
    # Not before everything is known to be there: a folder in the way would make the next try harder.
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        with runs.lock(run_dir):
            if stored is None:
                runs.require_vacant(run_dir)  # still: another process may have begun there meanwhile
            runs.sweep(run_dir)
            best, history = _fit(recipe, run_dir, source, train, checkpoint, compression)
            report = _finish(recipe, run_dir, source, train, test if evaluate_test else None, best, history, compression)
    except tf.errors.ResourceExhaustedError as error:  # of the memory or of the disk
        reason = str(error.message).splitlines()[0]
        if not re.search("OOM|memory|allocat", reason, re.IGNORECASE):
            raise OSError(f"{run_dir} can't be written: {reason}") from error
        # A compressed network's image size is that of the run before.
        image = "" if recipe.compression else f" or --image-size than {recipe.image_size}"
        raise MemoryError(
            f"the memory of {device()} is too small: train at a smaller --batch-size than {recipe.batch_size}{image}, "
            "into another --run-dir"
        ) from error
    if source.fallback:
        _warn(source.fallback)
    return report


def _finish(recipe, run_dir, source, train, test, best, history, compression):
    """Writes what the best weights come to -> the `Report`.

    Args:
        test: the test split, or `None` to leave it alone.
    """
    # What leaves the run is float32 whatever trained it, and carries no optimizer.
    final = compression.wrap(_build(recipe, source, "float32"))
    final.set_weights(best.weights)
    found = compression.check(final)
    with runs.whole(run_dir / runs.MODEL) as aside:
        final.save(aside)

    num_classes = len(source.class_names)
    validation_logits = _logits(final, source.validation, recipe, num_classes)
    test_logits = None if test is None else _logits(final, test, recipe, num_classes)
    report = evaluation.Report(
        dataset=source.name,
        data_note=". ".join(filter(None, (source.note, source.fallback))),
        variant=recipe.variant_name,
        recipe=recipe.settings(),
        epochs=recipe.epochs,
        seed=recipe.seed,
        image_size=[recipe.image_size] * 2,
        train_images=len(train),
        class_names=list(source.class_names),
        parameters=sum(int(np.prod(variable.shape)) for variable in final.trainable_variables),
        macs=macs(recipe.variant, _image_shape(recipe), num_classes),
        train_seconds=sum(epoch["seconds"] for epoch in history),
        train_images_per_second=_images_per_epoch(recipe, train) / float(np.median([row["train_seconds"] for row in history])),
        validation=evaluation.metrics(validation_logits, source.validation.labels),
        test=None if test is None else evaluation.metrics(test_logits, test.labels),
        per_class=None if test is None else evaluation.per_class(test_logits, test.labels, source.class_names),
        confusion=None if test is None else evaluation.confusion(test_logits, test.labels, num_classes).tolist(),
        compression=found,
        device=device(),
        versions=environment.versions(),
    )
    shown = {}
    if test is not None:
        shown = {"images": test.images, "logits": test_logits, "labels": test.labels, "class_names": source.class_names}
    plots.draw(run_dir, history, **shown, first_epoch=compression.first_epoch)
    (run_dir / runs.PAGE).unlink(missing_ok=True)  # of a report without the test; with it the run would count as finished
    runs.write_json(run_dir / runs.REPORT, dataclasses.asdict(report))
    page.write(run_dir)
    return report


def _fit(recipe, run_dir, source, train, checkpoint, compression):
    """Trains, from `checkpoint` if there is one, or goes on -> the `BestWeights` and the history, a dict for each epoch."""
    keras.utils.set_random_seed(recipe.seed)
    steps = batches_per_epoch(train, recipe)
    num_classes = len(source.class_names)
    classifier = _build(recipe, source, recipe.precision)
    if checkpoint:
        # A head of other classes, though as many, would have to be unlearned.
        head = checkpoint.preprocessing["class_names"] == list(source.class_names)
        checkpoint.load_into(classifier.get_layer("cvt"), head=head)
        if compression.settings is not None and not head:
            raise RecipeError(
                f"`data_dir` must lead to the images that {recipe.weights} was trained on, of other classes than these. "
                f"Received: data_dir={recipe.data_dir}, of {_enumerated(source.class_names)}"
            )
        print(
            "the head is that of the weights" if head else "the head is new: the weights do not name these classes", flush=True
        )
    classifier = compression.wrap(classifier)
    if compression.settings is not None:
        compression.start(classifier, evaluation_batches(train, num_classes, recipe.image_size), steps, recipe.epochs)
    classifier.compile(
        optimizer=make_optimizer(recipe, classifier, steps * recipe.epochs),
        loss=keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=recipe.label_smoothing),
        # The loss is of smoothed labels; the plain one is what a reader can compare.
        metrics=["accuracy", keras.metrics.CategoricalCrossentropy(from_logits=True, name="cross_entropy")],
        jit_compile=recipe.xla == "on",
    )
    # What `fit` would make in its first step: it would trace the step twice then, which takes as long as many steps.
    classifier.optimizer.build(classifier.trainable_variables)
    blank = np.zeros((1, num_classes), "float32")
    classifier.compute_loss(None, blank, blank)
    classifier.compute_metrics(None, blank, blank)  # of which `fit` forgets the value
    begun = (run_dir / runs.RECIPE).exists()
    if not begun:
        runs.write_json(run_dir / runs.RECIPE, recipe.settings())
    (run_dir / runs.CHECKPOINTS).mkdir(exist_ok=True)

    stopwatch, best = Stopwatch(), BestWeights(compression.first_epoch)
    data = source.fingerprint()
    if recipe.weights:
        data |= {"mean": list(source.mean), "std": list(source.std)}
    checkpoints = Checkpoints(run_dir, data, stopwatch, best, compression.variables)
    checkpoints.restore(classifier)
    first_epoch = len(checkpoints.history)
    if first_epoch:
        print(f"going on after epoch {first_epoch} of {recipe.epochs}", flush=True)
    elif begun:
        print(f"no finished epoch to go on from in {run_dir}: training from the first one", flush=True)
    if first_epoch == recipe.epochs:
        return best, checkpoints.history
    advice = f"train anew, into another --run-dir, at a lower --peak-learning-rate than {recipe.peak_learning_rate}"
    if recipe.precision != "float32":
        advice += ", or with --precision float32"
    with StopAfterStep() as stop:
        classifier.fit(
            training_batches(train, num_classes, recipe, first_epoch),
            initial_epoch=first_epoch,
            epochs=recipe.epochs,
            steps_per_epoch=steps,
            shuffle=False,  # the pipeline does
            validation_data=evaluation_batches(source.validation, num_classes, recipe.image_size),
            callbacks=[
                stop,
                HaltOnNaN(advice),
                compression,
                stopwatch,
                best,
                *([keras.callbacks.SwapEMAWeights()] if recipe.ema else []),
                TensorBoard(run_dir / runs.TENSORBOARD, write_graph=False),
                checkpoints,  # last: an epoch that it holds is not trained again
            ],
        )
    return best, checkpoints.history


def _build(recipe, source, dtype):
    return build_classifier(
        recipe.variant,
        input_shape=_image_shape(recipe),
        mean=source.mean,
        std=source.std,
        class_names=source.class_names,
        dtype=dtype,
    )


def check(recipe, train):
    """Whether the recipe fits the images.

    Args:
        recipe: a `Recipe`, with its variant settled.
        train: the training `Split`, of as many images as are trained on.

    Raises:
        RecipeError: if it does not.
    """
    if not batches_per_epoch(train, recipe):
        raise RecipeError(
            f"`batch_size` must not exceed the {len(train)} training images: give --batch-size {len(train)} or less. "
            f"Received: batch_size={recipe.batch_size}"
        )
    if recipe.crop_padding >= recipe.image_size:
        raise RecipeError(
            f"`crop_padding` must be under the {recipe.image_size} pixels of a side: "
            f"give --crop-padding 0, or a larger --image-size. Received: crop_padding={recipe.crop_padding}"
        )
    try:
        get_variant(recipe.variant).grids(recipe.image_size, recipe.image_size)
    except ValueError as error:
        raise RecipeError(f"`image_size` is too small for {recipe.variant_name}: {error}") from error


def resolve(recipe, stored=None):
    """What is `auto` in a recipe, settled.

    Args:
        recipe: a `Recipe`.
        stored: that of the run it goes on with, or `None`.

    Returns:
        The recipe with `dataset`, `precision` and `xla` as the stored one has them, and the variant that its weights settled;
        without one with `precision` and `xla` as this machine will run them.
    """
    if stored is not None:
        left_open = [name for name in ("dataset", "precision", "xla") if getattr(recipe, name) == "auto"]
        if (
            recipe.weights
            and same_weights(stored.weights, recipe.weights)
            and _leaves_open(recipe.variant, get_variant(stored.variant))
        ):
            left_open.append("variant")
        return dataclasses.replace(recipe, **{name: getattr(stored, name) for name in left_open})
    gpus = tf.config.list_physical_devices("GPU")
    precision, xla = recipe.precision, recipe.xla
    if precision == "auto":
        precision = _gpu_precision(gpus[0]) if gpus else "float32"
    if xla == "auto":
        xla = "on" if gpus else "off"
    return dataclasses.replace(recipe, precision=precision, xla=xla)


def same_weights(was, is_now):
    """Whether these are the weights that a run began with: also where they were moved, or told from another folder."""
    if was == is_now or was is None or is_now is None:
        return was == is_now
    before, after = Path(was).expanduser(), Path(is_now).expanduser()
    return _same_place(was, is_now) or (before.name == after.name and after.exists() and not before.exists())


def read_weights(recipe):
    """The checkpoint that a recipe starts from, or `None`.

    Raises:
        RecipeError: if there is none of that name, or it does not fit the recipe.
        CheckpointError: if it can't be read.
    """
    if recipe.weights is None:
        if recipe.variant is None:
            raise RecipeError("`weights` must say what to start from (--weights SOURCE), or `variant` what to train anew")
        return None
    try:
        checkpoint = pretrained.read(recipe.weights, recipe.variant)
    except pretrained.CheckpointError:
        raise
    except ValueError as error:
        way_out = ". The recipe finetune, without --variant, takes the weights' own" if "`variant`" in str(error) else ""
        raise RecipeError(f"`weights` can't be started from: {error}{way_out}") from error
    except (ImportError, OSError) as error:
        raise pretrained.CheckpointError(f"{recipe.weights} can't be read: {error}") from error
    if checkpoint.channels != 3:
        raise RecipeError(f"`weights` must be of images with 3 channels. Received: {recipe.weights}, {checkpoint.channels}")
    return checkpoint


def _leaves_open(variant, settled):
    """Whether `variant`, as given beside weights, left open what they settled: all of it, or the activation."""
    return variant is None or dataclasses.replace(get_variant(variant), activation=settled.activation) == settled


def _stored_recipe(run_dir):
    """The recipe of the run in `run_dir`, or `None` where no run has begun.

    Raises:
        RunError: if its recipe.json is broken.
    """
    path = run_dir / runs.RECIPE
    if not path.exists():
        return None
    way_out = "put the run's own back, or train in another --run-dir"
    try:
        recipe = Recipe.from_settings(runs.read_json(path))
        get_variant(recipe.variant)
    except (TypeError, RecipeError, runs.RunError) as error:
        raise runs.RunError(f"{path} can't be gone on with ({error}): {way_out}") from error
    if unsettled := [name for name in ("dataset", "precision", "xla") if getattr(recipe, name) == "auto"]:
        raise runs.RunError(f"{path} is of no run, as it leaves {', '.join(unsettled)} open: {way_out}")
    return recipe


def _finished_report(run_dir, evaluate_test):
    """The report of the run in `run_dir`, or `None` if a part of the run is still to be made.

    Raises:
        RunError: if it is broken.
    """
    if not all((run_dir / name).exists() for name in (runs.MODEL, runs.HISTORY, runs.PLOTS, runs.REPORT, runs.PAGE)):
        return None
    path = run_dir / runs.REPORT
    try:
        report = evaluation.Report(**runs.read_json(path))
    except (TypeError, runs.RunError) as error:
        raise runs.RunError(f"{path} is broken ({error}): remove it to have it made again") from error
    return None if evaluate_test and report.test is None else report


def _require_same(recipe, stored, run_dir):
    """A run goes on with the settings it began with.

    Raises:
        DifferentRunError: if `recipe` has others, naming them.
    """
    was, is_now = stored.settings(), recipe.settings()
    for settings in (was, is_now):
        settings["variant"] = settings["variant"] and named(get_variant(settings["variant"]))
    names = [name for name in is_now | was if was.get(name) != is_now.get(name)]
    # Where TFDS keeps a data set may change; another folder of images is another data set. What lies in it is compared with
    # the checkpoint's.
    if recipe.dataset != "folder" or _same_place(was["data_dir"], is_now["data_dir"]):
        names = [name for name in names if name != "data_dir"]
    if same_weights(was["weights"], is_now["weights"]):
        names = [name for name in names if name != "weights"]
    elif "variant" in names:  # which comes from the weights
        names = ["weights", *(name for name in names if name not in ("weights", "variant"))]
    if names:
        differences = ", ".join(f"{name} was {_shown(was.get(name))} and is {_shown(is_now.get(name))}" for name in names)
        raise DifferentRunError(run_dir, differences)


def _enumerated(names, most=5):
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _shown(value):
    return "a Variant of its own" if isinstance(value, Variant) else repr(value)


def _same_place(*paths):
    """Whether paths, of which any may be `None`, lead to the same file or folder, however they are spelled."""
    return len({path and Path(path).expanduser().resolve() for path in paths}) == 1


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


def _logits(model, split, recipe, num_classes):
    return model.predict(evaluation_batches(split, num_classes, recipe.image_size), verbose=0)


def _image_shape(recipe):
    return recipe.image_size, recipe.image_size, 3


def _images_per_epoch(recipe, train):
    return batches_per_epoch(train, recipe) * recipe.batch_size


def _warn(text):
    print(f"WARNING: {text}", file=sys.stderr, flush=True)
