"""One training run: recipe and run folder in, report out."""

import contextlib
import dataclasses
import os
import re

import keras
import numpy as np
import tensorflow as tf

from cvt_keras import environment, runs
from cvt_keras.data.pipeline import evaluation_batches, training_batches
from cvt_keras.errors import OutOfMemoryError, RecipeError
from cvt_keras.model import build_classifier
from cvt_keras.report import figures, metrics, page
from cvt_keras.training.callbacks import (
    CLASS_WEIGHTS,
    BestWeights,
    Checkpoints,
    EarlyStopping,
    HaltOnNaN,
    StopAfterStep,
    Stopwatch,
    TensorBoard,
)
from cvt_keras.training.compressor import Compressor
from cvt_keras.training.freeze import freeze
from cvt_keras.training.optimizers import make_optimizer
from cvt_keras.training.plan import RunResult, settle, warn
from cvt_keras.training.recipes import Recipe
from cvt_keras.variants import macs


def run(
    recipe: Recipe,
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    evaluate_test: bool = True,
    compressor: Compressor | None = None,
    name: str = "run",
) -> RunResult:
    """Trains by `recipe` and writes a run folder.

    Args:
        recipe: a `Recipe`.
        run_dir: a folder that does not exist yet, or is empty, unless `resume`. `None` means
            `runs/<name>-<dataset>-<variant>`, with the data set that is really trained on.
        resume: continue the run in `run_dir` after its last finished epoch. The result is that of an uninterrupted run, to the
            bit where TensorFlow is deterministic. A finished run is left as it is.
        evaluate_test: whether to touch the test split, once, at the end.
        compressor: a `Compressor` of `cvt_keras.compression`, which is given the recipe's `weights`.
        name: the recipe's, for the default run folder.

    Returns:
        A `RunResult`.

    Raises:
        OccupiedError: if `run_dir` already holds something, without `resume`, or something else than a run.
        DataError: if the images can't be had.
        RecipeError: if the recipe does not fit the images (fewer than a batch, or too small), its weights or, with `resume`,
            the run.
        CheckpointError: if its weights are damaged.
        MissingPackageError: if a package that reads them is not installed.
        RunError: if `run_dir` can't be written to, or another process trains there; with `resume`, if a file of it is damaged.
        DivergedError: if the loss becomes NaN or infinite.
        OutOfMemoryError: if a batch does not fit into the memory.
        OSError: if a file can't be written.
    """
    plan = settle(recipe, run_dir, resume, evaluate_test, compressor, name)
    if isinstance(plan, RunResult):
        return plan
    with _occupied(plan), _named_memory_errors(plan):
        best, history = fit(plan)
        result = finish(plan, best, history)
    if plan.source.fallback:
        warn(plan.source.fallback)
    return result


# === Fit ===


def fit(plan):
    """Trains, or resumes the training.

    Args:
        plan: a `Plan`, whose folder is there.

    Returns:
        The `BestWeights`, and the history: a dict per epoch.
    """
    recipe, run_dir, compressor = plan.recipe, plan.run_dir, plan.compressor
    keras.utils.set_random_seed(recipe.seed)
    classifier = _compiled(plan, _starting_classifier(plan))
    if not plan.resumed:
        runs.write_json(run_dir / runs.RECIPE, recipe.settings())
        _write_record(plan)
    (run_dir / runs.CHECKPOINTS).mkdir(exist_ok=True)

    stopwatch, best = Stopwatch(), BestWeights(compressor.first_epoch)
    checkpoints = Checkpoints(run_dir, _data(plan), stopwatch, best, compressor.variables)
    checkpoints.restore(classifier)
    _write_record(plan)  # of a run that was killed before, or of an older version: by its checkpoint the images are the same
    finished = len(checkpoints.history)
    if finished:
        print(f"resuming after epoch {finished} of {recipe.epochs}", flush=True)
    elif plan.resumed:
        print(f"no finished epoch to resume from in {run_dir}: starting from epoch 1", flush=True)
    early_stopping = EarlyStopping(recipe.early_stopping, checkpoints, compressor.first_epoch)
    if finished == recipe.epochs or early_stopping.is_due:
        return best, checkpoints.history
    with StopAfterStep() as stop:
        classifier.fit(
            training_batches(plan.train, plan.num_classes, recipe, finished, plan.class_weights),
            initial_epoch=finished,
            epochs=recipe.epochs,
            steps_per_epoch=plan.steps_per_epoch,
            shuffle=False,  # the pipeline does
            validation_data=evaluation_batches(plan.validation, plan.num_classes, recipe.image_size),
            callbacks=[
                stop,
                HaltOnNaN(_advice(recipe)),
                compressor,
                stopwatch,
                best,
                *([keras.callbacks.SwapEMAWeights()] if recipe.ema else []),
                TensorBoard(run_dir / runs.TENSORBOARD, write_graph=False),
                checkpoints,  # an epoch that it holds is not trained again
                early_stopping,  # reads the history of the checkpoints
            ],
        )
    return best, checkpoints.history


def _write_record(plan):
    """Writes which image is in which split, unless the run has that already or must have none."""
    path = plan.run_dir / runs.IMAGES
    if plan.record is not None and not path.exists():
        with runs.whole(path) as unfinished:
            plan.record.write(unfinished)


def _starting_classifier(plan):
    """The network before its first step, with the weights that it starts from."""
    recipe, compressor = plan.recipe, plan.compressor
    classifier = _build(plan, recipe.precision)
    if plan.checkpoint:
        names = plan.checkpoint.preprocessing.class_names
        # A head of other classes, though as many, would have to be unlearned.
        head = names == plan.source.class_names
        plan.checkpoint.load_into(classifier.get_layer("cvt"), head=head)
        if compressor.settings is not None and not head:
            raise RecipeError(
                f"`data_dir` must lead to the images that {recipe.weights} was trained on, with the same classes. "
                f"Received: data_dir={recipe.data_dir}, with {_enumerated(plan.source.class_names)}",
                argument="data_dir",
            )
        print(
            "the head is that of the weights" if head else "the head is new: the weights do not name these classes", flush=True
        )
    if recipe.freeze is not None:
        freeze(classifier.get_layer("cvt"), recipe.freeze)
    classifier = compressor.wrap(classifier)
    if compressor.settings is not None:
        batches = evaluation_batches(plan.train, plan.num_classes, recipe.image_size)
        compressor.start(classifier, batches, plan.steps_per_epoch, recipe.epochs)
    return classifier


def _compiled(plan, classifier):
    recipe = plan.recipe
    classifier.compile(
        optimizer=make_optimizer(recipe, classifier, plan.steps_per_epoch * recipe.epochs),
        loss=keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=recipe.label_smoothing),
        # The loss has smoothed labels; the plain cross-entropy is what a reader can compare.
        metrics=["accuracy", keras.metrics.CategoricalCrossentropy(from_logits=True, name="cross_entropy")],
        jit_compile=recipe.xla == "on",
    )
    # `fit` would create these in its first step, and then trace the step twice, which takes as long as many steps.
    classifier.optimizer.build(classifier.trainable_variables)
    blank = np.zeros((1, plan.num_classes), "float32")
    classifier.compute_loss(None, blank, blank)
    classifier.compute_metrics(None, blank, blank)  # `fit` resets the values
    return classifier


def _build(plan, dtype):
    return build_classifier(
        plan.recipe.variant,
        input_shape=plan.image_shape,
        mean=plan.source.mean,
        std=plan.source.std,
        class_names=plan.source.class_names,
        dtype=dtype,
    )


def _data(plan):
    """What a checkpoint keeps to recognise its images by, and the weights of their classes."""
    data = plan.source.fingerprint()
    if plan.class_weights is not None:
        data[CLASS_WEIGHTS] = list(plan.class_weights)
    if plan.recipe.weights:
        data |= {"mean": list(plan.source.mean), "std": list(plan.source.std)}
    return data


def _advice(recipe):
    precision = "" if recipe.precision == "float32" else ", or with --precision float32"
    return f"Train anew in another --run-dir, at a lower --peak-learning-rate than {recipe.peak_learning_rate}{precision}"


def _enumerated(names, most=5):
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# === Finish ===


def finish(plan, best, history):
    """Writes the model with the best weights, its report and its page.

    Args:
        plan: a `Plan`.
        best: the `BestWeights` of the training.
        history: a dict per epoch.

    Returns:
        A `RunResult`.
    """
    recipe, run_dir = plan.recipe, plan.run_dir
    # What leaves the run is float32, whatever precision trained it, and carries no optimizer.
    classifier = plan.compressor.wrap(_build(plan, "float32"))
    classifier.set_weights(best.weights)
    compression = plan.compressor.check(classifier)
    # Before the model is written: a network that answers nothing leaves none.
    validation = metrics.evaluate(_logits(classifier, plan.validation, plan), plan.validation.labels)
    tested = {"test": None, "per_class": None, "confusion": None}
    shown = {}
    if plan.test is not None:
        logits, labels = _logits(classifier, plan.test, plan), plan.test.labels
        tested = {
            "test": metrics.evaluate(logits, labels),
            "per_class": metrics.per_class(logits, labels, plan.source.class_names),
            "confusion": metrics.confusion(logits, labels, plan.num_classes).tolist(),
        }
        shown = {"images": plan.test.images, "logits": logits, "labels": labels, "class_names": plan.source.class_names}
    with runs.whole(run_dir / runs.MODEL) as unfinished:
        classifier.save(unfinished)
    report = metrics.Report(
        dataset=plan.source.name,
        data_note=". ".join(filter(None, (plan.source.note, plan.source.fallback))),
        variant=recipe.variant_name,
        recipe=recipe.settings(),
        epochs=recipe.epochs,
        seed=recipe.seed,
        image_size=[recipe.image_size] * 2,
        train_images=len(plan.train),
        class_names=list(plan.source.class_names),
        parameters=sum(int(np.prod(variable.shape)) for variable in classifier.trainable_variables),
        macs=macs(recipe.variant, plan.image_shape, plan.num_classes),
        train_seconds=sum(row["seconds"] for row in history),
        train_images_per_second=_images_per_second(plan, history),
        validation=validation,
        **tested,
        compression=compression,
        data_warnings=list(plan.warnings),
        left_out=plan.source.left_out,
        class_weights=plan.class_weights and dict(zip(plan.source.class_names, plan.class_weights)),
        epochs_trained=len(history),
        kept_epoch=metrics.best_epoch(history, plan.compressor.first_epoch)["epoch"],
        test_images=len(plan.source.test.limit(recipe.test_limit)),
        train_images_per_class=np.bincount(plan.train.labels, minlength=plan.num_classes).tolist(),
        device=environment.device(),
        versions=environment.versions(),
    )
    figures.draw(run_dir, history, **shown, first_epoch=plan.compressor.first_epoch)
    # The page of a report without the test must not stay: with it the run would count as finished.
    (run_dir / runs.PAGE).unlink(missing_ok=True)
    runs.write_json(run_dir / runs.REPORT, dataclasses.asdict(report))
    page.write(run_dir)
    return RunResult(run_dir, report, history)


def _logits(classifier, split, plan):
    return classifier.predict(evaluation_batches(split, plan.num_classes, plan.recipe.image_size), verbose=0)


def _images_per_second(plan, history):
    images = plan.steps_per_epoch * plan.recipe.batch_size
    return images / float(np.median([row["train_seconds"] for row in history]))


# === The run folder and the memory ===


@contextlib.contextmanager
def _occupied(plan):
    """Makes the run folder, and keeps other processes out of it during the block.

    A folder that is still empty at the end is removed again, so that a refusal leaves nothing behind.

    Raises:
        BusyError: if another process trains there.
        OccupiedError: if another process has begun a run there meanwhile.
    """
    run_dir = plan.run_dir
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        with runs.lock(run_dir):
            if not plan.resumed:
                runs.require_vacant(run_dir)
            runs.sweep(run_dir)
            yield
    finally:
        with contextlib.suppress(OSError):  # one that is not empty ends the removal
            for folder in made:
                folder.rmdir()


@contextlib.contextmanager
def _named_memory_errors(plan):
    """Says what to do where TensorFlow has run out of memory, or the disk is full."""
    try:
        yield
    except tf.errors.ResourceExhaustedError as error:
        # TensorFlow has one error for both, and tells them apart in its text alone.
        reason = str(error.message).splitlines()[0]
        if not re.search("OOM|memory|allocat", reason, re.IGNORECASE):
            raise OSError(f"{plan.run_dir} can't be written: {reason}") from error
        # A compressed network's image size is that of the run before.
        image_size = "" if plan.recipe.compression else f" or --image-size than {plan.recipe.image_size}"
        raise OutOfMemoryError(
            f"a batch of {plan.recipe.batch_size} images does not fit into the memory of {environment.device()}",
            argument="batch_size",
            hint=f"Train in another --run-dir at a smaller --batch-size than {plan.recipe.batch_size}{image_size}",
        ) from error
