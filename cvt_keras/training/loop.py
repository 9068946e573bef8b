"""A training run: trains by a recipe, and writes the run folder and its report."""

import contextlib
import dataclasses
import os
from typing import NamedTuple

import keras
import numpy as np

from cvt_keras import attention, environment, runs
from cvt_keras.data.pipeline import evaluation_batches, training_batches
from cvt_keras.data.split import Split
from cvt_keras.errors import DistributedError, OutOfMemoryError, RecipeError, RunError
from cvt_keras.model import build_classifier, set_calibration
from cvt_keras.preprocessing import size_text
from cvt_keras.quantized.model import quantized_cvt_of
from cvt_keras.report import figures, metrics, page, predictions
from cvt_keras.training import distributed
from cvt_keras.training.callbacks import (
    CLASS_WEIGHTS,
    BestWeights,
    Checkpoints,
    EarlyStopping,
    HaltOnNaN,
    StopAfterStep,
    Stopwatch,
    TensorBoard,
    stored_machine,
)
from cvt_keras.training.compressor import Compressor
from cvt_keras.training.freeze import freeze
from cvt_keras.training.objective import WHITENING_IMAGES, adapt_whitening, compile_classifier
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
    devices: distributed.Devices | None = None,
) -> RunResult:
    """Trains by `recipe` and writes a run folder.

    On JAX, the processes of a group that `distributed.join` formed train together. The first of them writes the run folder,
    which all must see. After the last epoch the group parts.

    Args:
        recipe: a `Recipe`.
        run_dir: a new or empty folder or, with `resume`, that of a run. Defaults to `runs/<name>-<dataset>-<variant>`, with the
            data set that `auto` loaded.
        resume: resume the run in `run_dir` after its last finished epoch. The result is that of an uninterrupted run, bit by
            bit if the backend is deterministic, unless the backend or the number of devices changed. A finished run is not
            changed.
        evaluate_test: whether to evaluate on the test images at the end. Nothing else uses them.
        compressor: a `Compressor` of `cvt_keras.compression`; it starts from the recipe's `weights`.
        name: the name of the recipe, for the default run folder.
        devices: the number of devices to train on, or `"all"`; more than one on JAX only. `None` is 1, and for a process of a
            group all of its own.

    Returns:
        A `RunResult`. In a group, its report is `None` in all processes except the first.

    Raises:
        ArgumentError: if there are fewer devices.
        DistributedError: if the processes of a group have different settings or images, or one of them failed.
        OccupiedError: if `run_dir` is not empty without `resume`, or holds something other than a run.
        DataError: if the images can't be loaded.
        RecipeError: if the recipe does not fit the images, its weights or, with `resume`, the run.
        CheckpointError: if the weights are damaged.
        MissingPackageError: if the package that reads the weights is not installed.
        RunError: if `run_dir` can't be written to, another process trains there or, with `resume`, a file in it is damaged.
        DivergedError: if the loss becomes NaN or infinite.
        OutOfMemoryError: if a batch does not fit into memory.
        OSError: if a file can't be written.
    """
    with distributed.quiet():
        with distributed.agreeing("settle"):
            plan = settle(recipe, run_dir, resume, evaluate_test, compressor, name, devices)
        distributed.require_same("finished", {"finished run": isinstance(plan, RunResult)})
        if isinstance(plan, RunResult):
            distributed.leave()
            return plan
        distributed.require_same("plan", plan.fingerprint())
        with contextlib.ExitStack() as stack:
            with distributed.agreeing("occupied"):
                if distributed.is_first():
                    stack.enter_context(_occupied(plan))
            with distributed.agreeing("shared"):
                _require_shared(plan)
            stack.enter_context(_named_errors(plan))
            with distributed.spread(plan.devices):
                best, history = fit(plan)
            is_first = distributed.is_first()
            distributed.leave()
            if not is_first:
                return RunResult(plan.run_dir, None, history)
            result = finish(plan, best, history)
        if plan.source.fallback:
            warn(plan.source.fallback)
        return result


# === Fit ===


def fit(plan):
    """Trains from the first epoch, or after the last finished one.

    Args:
        plan: a `Plan`. Its run folder must exist.

    Returns:
        The `BestWeights`, and the history: a dict per epoch.
    """
    recipe, run_dir, compressor = plan.recipe, plan.run_dir, plan.compressor
    keras.utils.set_random_seed(recipe.seed)
    classifier = _starting_classifier(plan)
    compile_classifier(classifier, recipe, plan.steps_per_epoch * recipe.epochs)
    if distributed.is_first():
        if not plan.resumed:
            runs.write_json(run_dir / runs.RECIPE, recipe.settings())
            _write_record(plan)
        (run_dir / runs.CHECKPOINTS).mkdir(exist_ok=True)

    stopwatch, best = Stopwatch(), BestWeights(compressor.first_epoch)
    checkpoints = Checkpoints(run_dir, _data(plan), stopwatch, best, compressor.variables, plan.share.devices)
    checkpoints.restore(classifier)
    if not checkpoints.history and plan.checkpoint is None:
        first = evaluation_batches(plan.train.limit(WHITENING_IMAGES), plan.num_classes, recipe.preprocessing)
        adapt_whitening(classifier, first)
    checkpoints.share_state(classifier)
    # The checkpoint shows that the images are the same. Writes the record if a kill or an older version left none.
    if distributed.is_first():
        _write_record(plan)
    finished = len(checkpoints.history)
    if finished:
        print(f"resuming after epoch {finished} of {recipe.epochs}", flush=True)
        if finished < recipe.epochs and checkpoints.former_machine != checkpoints.machine:
            before, now = map(_machine_text, (checkpoints.former_machine, checkpoints.machine))
            print(f"not an exact resume: the run trained on {before}, and continues on {now}", flush=True)
    elif plan.resumed:
        print(f"no finished epoch to resume from in {run_dir}: starting from epoch 1", flush=True)
    early_stopping = EarlyStopping(recipe.early_stopping, checkpoints, compressor.first_epoch)
    if finished == recipe.epochs or early_stopping.is_due:
        return best, checkpoints.history
    with StopAfterStep() as stop:
        classifier.fit(
            training_batches(plan.train, plan.num_classes, recipe, finished, plan.class_weights, plan.share),
            initial_epoch=finished,
            epochs=recipe.epochs,
            steps_per_epoch=plan.steps_per_epoch,
            shuffle=False,  # the pipeline shuffles
            validation_data=evaluation_batches(plan.validation, plan.num_classes, recipe.preprocessing, plan.share),
            callbacks=[
                stop,
                HaltOnNaN(_advice(recipe)),
                compressor,
                stopwatch,
                best,
                *([keras.callbacks.SwapEMAWeights()] if recipe.ema else []),
                *([TensorBoard(run_dir / runs.TENSORBOARD, write_graph=False)] if distributed.is_first() else []),
                checkpoints,  # last of all that an epoch needs: an epoch in a checkpoint is not trained again
                early_stopping,  # reads the history of `checkpoints`
            ],
        )
    return best, checkpoints.history


def _machine_text(machine):
    devices = machine["devices"]
    return f"{machine['backend']} with {devices} {'device' if devices == 1 else 'devices'}"


def _write_record(plan):
    """Writes images.csv, unless it exists or the plan has no record."""
    path = plan.run_dir / runs.IMAGES
    if plan.record is not None and not path.exists():
        with runs.whole(path) as unfinished:
            plan.record.write(unfinished)


def _starting_classifier(plan):
    """The network before the first step, with the weights to start from."""
    recipe, compressor = plan.recipe, plan.compressor
    classifier = _build(plan, recipe.precision)
    if plan.checkpoint:
        names = plan.checkpoint.preprocessing.class_names
        # A head for other classes is of no use, even if their number is the same.
        same_classes = names == plan.source.class_names
        plan.checkpoint.load_into(classifier.get_layer("cvt"), head=same_classes)
        if compressor.settings is not None and not same_classes:
            raise RecipeError(
                f"`data_dir` must hold the classes that {recipe.weights} was trained on. "
                f"Received: data_dir={recipe.data_dir}, with {_enumerated(plan.source.class_names)}",
                argument="data_dir",
            )
        if same_classes:
            print("head: loaded from the weights, which have the same classes", flush=True)
        else:
            print("head: new, as the weights do not name these classes", flush=True)
    if recipe.freeze is not None:
        freeze(classifier.get_layer("cvt"), recipe.freeze)
    classifier = compressor.wrap(classifier)
    if compressor.settings is not None:
        batches = evaluation_batches(plan.train, plan.num_classes, recipe.preprocessing)
        compressor.start(classifier, batches, plan.steps_per_epoch, recipe.epochs)
    return classifier


def _build(plan, dtype):
    return build_classifier(
        plan.recipe.variant,
        input_shape=plan.image_shape,
        mean=plan.source.mean,
        std=plan.source.std,
        class_names=plan.source.class_names,
        preprocessing=plan.recipe.preprocessing,
        dtype=dtype,
    )


def _data(plan):
    """The part of a checkpoint that must not change before a resume: the images, and the weights of their classes."""
    data = plan.source.fingerprint()
    if plan.class_weights is not None:
        data[CLASS_WEIGHTS] = list(plan.class_weights)
    if plan.recipe.weights:
        data |= {"mean": list(plan.source.mean), "std": list(plan.source.std)}
    return data


def _advice(recipe):
    precision = "" if recipe.precision == "float32" else ", or with --precision float32"
    return f"Train again in another --run-dir with a --peak-learning-rate below {recipe.peak_learning_rate}{precision}"


def _enumerated(names, most=5):
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# === Finish ===


def finish(plan, best, history):
    """Evaluates the best weights, and writes the model, the report and its page.

    Args:
        plan: a `Plan`.
        best: the `BestWeights` of `fit`.
        history: a dict per epoch.

    Returns:
        A `RunResult`.
    """
    run_dir = plan.run_dir
    # The saved model is float32, whatever the precision of training, and has no optimizer.
    classifier = plan.compressor.wrap(_build(plan, "float32"))
    classifier.set_weights(best.weights)
    compression = plan.compressor.check(classifier)
    # Before the model is written, as this raises for a model whose outputs are NaN or the same for every class.
    validation = _Evaluated(plan.validation, _logits(classifier, plan.validation, plan))
    calibration = metrics.fit_calibration(validation.logits, validation.split.labels, plan.recipe.keep)
    set_calibration(classifier, calibration)
    test = None if plan.test is None else _Evaluated(plan.test, _logits(classifier, plan.test, plan))
    scores = _scores(plan, validation, test, calibration)
    with runs.whole(run_dir / runs.MODEL) as unfinished:
        classifier.save(unfinished)
    if test is not None:
        predicted = metrics.predictions(test.logits)
        predictions.write(
            run_dir, predictions.from_labels(test.split.digests, test.split.labels, predicted, plan.source.class_names)
        )
    report = _report(plan, classifier, history, compression, scores)
    shown = {}
    if test is not None:
        calibrated = calibration.scaled(test.logits)
        shown = {"images": test.split.images, "logits": calibrated, "labels": test.split.labels}
        shown |= {"class_names": plan.source.class_names, "maps": _maps(classifier, plan, calibrated)}
    figures.draw(run_dir, history, **shown, first_epoch=plan.compressor.first_epoch)
    # Remove the page of an earlier report without test results: with that page the run would count as finished.
    (run_dir / runs.PAGE).unlink(missing_ok=True)
    runs.write_json(run_dir / runs.REPORT, dataclasses.asdict(report))
    page.write(run_dir)
    return RunResult(run_dir, report, history)


class _Evaluated(NamedTuple):
    split: Split
    logits: np.ndarray


def _logits(classifier, split, plan):
    return classifier.predict(evaluation_batches(split, plan.num_classes, plan.recipe.preprocessing), verbose=0)


def _scores(plan, validation, test, calibration):
    """The fields of the report that come from logits."""
    scores = {"validation": metrics.evaluate(validation.logits, validation.split.labels)}
    scores |= {"test": None, "per_class": None, "confusion": None}
    if test is not None:
        labels = test.split.labels
        scores["test"] = metrics.evaluate(test.logits, labels)
        scores["per_class"] = metrics.per_class(test.logits, labels, plan.source.class_names)
        scores["confusion"] = metrics.confusion(test.logits, labels, plan.num_classes).tolist()
    name, judged = ("validation", validation) if test is None else ("test", test)
    scores["calibration"] = metrics.calibration_report(judged.logits, judged.split.labels, calibration, plan.recipe.keep, name)
    return scores


def _report(plan, classifier, history, compression, scores):
    recipe = plan.recipe
    return metrics.Report(
        dataset=plan.source.name,
        data_note=". ".join(filter(None, (plan.source.note, plan.source.fallback))),
        variant=recipe.variant_name,
        recipe=recipe.settings(),
        epochs=recipe.epochs,
        seed=recipe.seed,
        image_size=list(recipe.preprocessing.image_size),
        train_images=len(plan.train),
        class_names=list(plan.source.class_names),
        parameters=sum(int(np.prod(variable.shape)) for variable in classifier.trainable_variables),
        macs=macs(recipe.variant, plan.image_shape, plan.num_classes),
        train_seconds=sum(row["seconds"] for row in history),
        train_images_per_second=_images_per_second(plan, history),
        **scores,
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
        **stored_machine(plan.run_dir),
    )


def _maps(classifier, plan, logits):
    """Grad-CAM for the predicted class of the most wrong test images, for `figures.most_wrong`.

    Returns:
        A dict: the index of an image -> its pixels as the network sees them, and its map. It is empty for a network with int8
        rounding, which has no gradients, and where the memory does not suffice.
    """
    maps = {}
    if quantized_cvt_of(classifier) is not None:
        return maps
    worst = metrics.worst(logits, plan.test.labels, figures.MOST_WRONG_IMAGES)
    predicted, indices = iter(metrics.predictions(logits)[worst]), iter(worst.tolist())
    try:
        for images, _ in evaluation_batches(plan.test.take(worst), plan.num_classes, plan.recipe.preprocessing):
            drawn = attention.grad_cam(classifier, images, [next(predicted) for _ in images])
            maps |= {next(indices): pair for pair in zip(images.numpy(), drawn)}
    except environment.errors() as error:
        if not environment.lacks_memory(error):
            raise
        warn("too little memory for the Grad-CAM of the most wrong images, which the report shows without")
        return {}
    return maps


def _images_per_second(plan, history):
    images = plan.steps_per_epoch * plan.recipe.batch_size
    return images / float(np.median([row["train_seconds"] for row in history]))


# === The run folder and the memory ===


@contextlib.contextmanager
def _occupied(plan):
    """Creates and locks the run folder during the block. Removes it after an error if it is still empty.

    Raises:
        BusyError: if another process trains there.
        OccupiedError: if another process has started a run there in the meantime.
    """
    run_dir = plan.run_dir
    created = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        with runs.lock(run_dir):
            if not plan.resumed:
                runs.require_vacant(run_dir)
            runs.sweep(run_dir)
            yield
    finally:
        with contextlib.suppress(OSError):  # stops at the first folder that is not empty
            for folder in created:
                folder.rmdir()


def _require_shared(plan):
    """Raises unless this process sees the run folder, which process 0 has created."""
    if not plan.run_dir.is_dir():
        raise RunError(
            f"`run_dir` must be a folder that all processes see. Received: {plan.run_dir.resolve()}, "
            "which is not the folder of process 0",
            argument="run_dir",
            hint="Use a folder on a shared disk",
        )


@contextlib.contextmanager
def _named_errors(plan):
    """Turns a backend's errors for too little memory, a full disk or an unreadable image into ones that say how to fix it."""
    try:
        yield
    except environment.errors() as error:
        if not environment.is_exhausted(error):
            for split in (plan.source.train, plan.source.validation, plan.source.test):
                for first in getattr(split.images, "errors", ())[:1]:
                    raise first from error
            if distributed.is_lost(error):
                reason = str(error).partition("\n")[0]
                summary = f"another process died or was stopped: this process {distributed.LOST} ({reason})"
                raise DistributedError(summary, hint="To resume, start all processes with --resume") from error
            raise
        if not environment.lacks_memory(error):
            raise OSError(f"{plan.run_dir} can't be written: {str(error).partition(chr(10))[0]}") from error
        size = size_text(plan.recipe.preprocessing.image_size)
        image_size = "" if plan.recipe.compression else f" or an --image-size below {size}"  # compression has no such flag
        raise OutOfMemoryError(
            f"a batch of {plan.recipe.batch_size} images does not fit into the memory of {environment.device()}",
            argument="batch_size",
            hint=f"Train in another --run-dir with a --batch-size below {plan.recipe.batch_size}{image_size}",
        ) from error
