"""Everything that is settled and checked before the first training step."""

import dataclasses
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import cvt_keras
from cvt_keras import environment, runs
from cvt_keras.conversion import checkpoint as checkpoints
from cvt_keras.conversion.checkpoint import Checkpoint
from cvt_keras.data import sources
from cvt_keras.data.pipeline import batches_per_epoch
from cvt_keras.data.record import ImageRecord
from cvt_keras.data.split import Source, Split
from cvt_keras.errors import (
    ArgumentError,
    CheckpointError,
    RecipeError,
    RunError,
)
from cvt_keras.preprocessing import Preprocessing, size_text
from cvt_keras.report.metrics import Report
from cvt_keras.training import class_weights, distributed, freeze, held_out
from cvt_keras.training.callbacks import stored_data, stored_history
from cvt_keras.training.compressor import Compressor
from cvt_keras.training.recipes import Recipe
from cvt_keras.training.resume import read_stored_run
from cvt_keras.variants import get_variant, named

RUNS = Path("runs")  # the parent of the default run folders
# Settings that may differ between processes that train together. The weights to start from are those of process 0, and the
# weights of the classes are compared by their values.
MACHINE_SETTINGS = ("data_dir", "cache", "cache_dir", "weights", "class_weights", "skip_broken")


@dataclass(frozen=True)
class RunResult:
    """The result of a run.

    Args:
        run_dir: the run folder.
        report: the `Report`, as in `report.json`. `None` in a process that does not write the run folder.
        history: a dict per epoch, as in `history.csv`; `"epoch"` counts from 1.
    """

    run_dir: Path
    report: Report | None
    history: list[dict[str, float]]


@dataclass(frozen=True)
class Plan:
    """A run that is ready to start.

    Args:
        recipe: the `Recipe`, with every `auto` replaced, and with the variant of its weights.
        run_dir: the run folder.
        resumed: whether `run_dir` already holds the run.
        source: the data set, with the mean and std that the network uses.
        train, validation: the `Split`s to train and to validate on, after the recipe's limits.
        test: the `Split` to test on; `None` leaves the test images untouched.
        checkpoint: the `Checkpoint` to start from, or `None`.
        compressor: a `Compressor`.
        record: the split of each image, for images.csv; `None` if that file must not be written, see `held_out.settle`.
        class_weights: a float per class, or `None` for equal weights.
        warnings: sentences about the images.
        devices: JAX's devices of all processes, or `None` for one device.
    """

    recipe: Recipe
    run_dir: Path
    resumed: bool
    source: Source
    train: Split
    validation: Split
    test: Split | None
    checkpoint: Checkpoint | None
    compressor: Compressor
    record: ImageRecord | None = None
    class_weights: tuple[float, ...] | None = None
    warnings: tuple[str, ...] = ()
    devices: list | None = None

    @property
    def num_classes(self):
        return len(self.source.class_names)

    @property
    def steps_per_epoch(self):
        return batches_per_epoch(self.train, self.recipe)

    @property
    def image_shape(self):
        return *self.recipe.preprocessing.image_size, 3

    @property
    def share(self):
        """The `Share` of each batch that this process reads."""
        return distributed.share(self.devices)

    def fingerprint(self):
        """What must be the same in all processes that train together: a dict of JSON values."""
        settings = {name: value for name, value in self.recipe.settings().items() if name not in MACHINE_SETTINGS}
        return {
            **settings,
            **self.source.fingerprint(),
            "class weights": self.class_weights and list(self.class_weights),
            "mean": list(self.source.mean),  # with `std` part of the network, but no variables
            "std": list(self.source.std),
            "classes of the weights": self.checkpoint and list(self.checkpoint.preprocessing.class_names or ()),
            "finished epochs": len(stored_history(self.run_dir)),
            "test images": None if self.test is None else len(self.test),
            "devices": self.share.devices,
            "version": cvt_keras.__version__,
            "versions": environment.versions(),
        }


def settle(recipe, run_dir=None, resume=False, evaluate_test=True, compressor=None, name="run", devices=None):
    """Completes the recipe, loads the data and the weights, and checks that the run can start. Writes nothing.

    Args, raises: as `cvt_keras.training.run`.

    Returns:
        A `Plan`, or the `RunResult` of a run that is already finished.
    """
    compressor = compressor or Compressor()
    environment.require_backend(*(environment.TRAINING_BACKENDS if compressor.settings is None else ("tensorflow",)))
    environment.keep_tensorflow_on_cpu()
    devices = distributed.devices_of(devices)
    run_dir, stored = _locate(recipe, run_dir, resume, name)
    resolved = _resolved(recipe, stored, compressor)
    _require_divisible(resolved.batch_size, devices)
    print(f"{_devices_text(devices)}, {resolved.precision}, XLA {resolved.xla}", flush=True)
    if stored is not None and (result := _finished(run_dir, evaluate_test)) is not None:
        stored.require_same(resolved, images_known=False)
        print(f"the run in {run_dir} is already finished", flush=True)
        return result
    if distributed.is_first():
        runs.require_writable(run_dir or RUNS)
    _warn_of_unseen_gpu()

    weights_per_class = class_weights.read(resolved.class_weights)
    with_variant, checkpoint, preprocessing = _starting_point(resolved, run_dir, stored)
    freeze.require(with_variant)
    loaded, source = load_images(with_variant)
    if stored is not None and recipe.dataset == "auto" and source.name == "digits":
        reason = "this run was started on scikit-learn's digits instead of CIFAR-10. For CIFAR-10, train in another --run-dir"
        source = dataclasses.replace(source, fallback=reason)
    if source.fallback:
        warn(source.fallback)
    resumed_dir = run_dir if stored is not None else None
    source, record, differences = held_out.settle(source, resumed_dir, loaded.weights, held_out.named_classes(checkpoint))
    settled = dataclasses.replace(loaded, flip=loaded.flip and source.mirror)
    if stored is not None:
        stored.require_same(settled)
        settled = dataclasses.replace(settled, weights=stored.recipe.weights)  # as in recipe.json
    if run_dir is None:
        run_dir = default_run_dir(name, settled)
        runs.require_vacant(run_dir)
    train, validation = source.train.limit(settled.train_limit), source.validation.limit(settled.validation_limit)
    counts = np.bincount(train.labels, minlength=len(source.class_names))
    weights_per_class = class_weights.settle(weights_per_class, source.class_names, counts)
    test = source.test.limit(settled.test_limit) if evaluate_test else None
    test_counts = None if test is None else np.bincount(test.labels, minlength=len(source.class_names))
    few = class_weights.warnings(source.class_names, counts, len(validation), weights_per_class is not None, test_counts)
    plan = Plan(
        recipe=settled,
        run_dir=run_dir,
        resumed=stored is not None,
        source=_normalized_like(source, preprocessing),
        train=train,
        validation=validation,
        test=test,
        checkpoint=checkpoint,
        compressor=compressor,
        record=record,
        class_weights=weights_per_class,
        warnings=(*source.warnings, *differences, *few),
        devices=devices,
    )
    require_fit(settled, plan.train)
    _show_resizing(settled)
    _show_counts(plan)
    for warning in plan.warnings:
        warn(warning)
    return plan


def load_images(recipe):
    """Loads the data set of a recipe. Only here is the data set `auto` replaced.

    Args:
        recipe: a `Recipe`.

    Returns:
        The recipe with the name of the loaded data set, and the `Source`.

    Raises:
        DataError: if the images can't be loaded.
    """
    source = sources.load(
        recipe.dataset, recipe.data_dir, recipe.preprocessing, recipe.pixel_cache, skip_broken=recipe.skip_broken
    )
    dataset = source.name if recipe.dataset == "auto" else recipe.dataset
    return dataclasses.replace(recipe, dataset=dataset), source


def _normalized_like(source, preprocessing):
    """The source with the mean and std of the weights, where the weights have them."""
    known = {field: getattr(preprocessing, field) for field in ("mean", "std") if getattr(preprocessing, field)}
    return dataclasses.replace(source, **known)


def default_run_dir(name, recipe, dataset=None):
    """The default run folder: `runs/<recipe>-<dataset>-<variant>`.

    Args:
        name: the name of the recipe.
        recipe: a `Recipe`.
        dataset: the name of the data set; defaults to the recipe's.
    """
    folder = f"{name}-{dataset or recipe.dataset}-{recipe.variant_name}"
    return RUNS / folder.replace(":", "-").replace("/", "-")


def _resolved(recipe, stored, compressor):
    """The recipe with its compression, and with every `auto` replaced except the data set of a new run."""
    if recipe.compression is not None and compressor.settings is None:
        raise RecipeError(
            "`compression` can't be trained by `run`, only by `cvt_keras.compression.compress`. "
            f"Received: compression={recipe.compression}",
            argument="compression",
            hint="Use cvt-keras prune, cluster or qat on a finished run",
        )
    recipe = dataclasses.replace(recipe, compression=compressor.settings)
    if recipe.xla == "off" and environment.backend() == "jax":
        print("xla=off is ignored: JAX compiles all steps with XLA", flush=True)
    recipe = resolve(recipe if stored is None else stored.completed(recipe))
    compressor.require(recipe)
    return recipe


def _require_divisible(batch_size, devices):
    if devices and (rest := batch_size % len(devices)):
        below, above = batch_size - rest, batch_size - rest + len(devices)
        nearest = above if 2 * rest > len(devices) or not below else below
        raise RecipeError(
            f"`batch_size` must be a multiple of {len(devices)}, the number of devices. Received: batch_size={batch_size}",
            argument="batch_size",
            hint=f"Use --batch-size {nearest}",
        )


def _devices_text(devices):
    text = _count_text(devices) + environment.device()
    return f"JAX, {text}" if environment.backend() == "jax" else text


def _count_text(devices):
    if not devices:
        return ""
    number = f"{len(devices)} {'device' if len(devices) == 1 else 'devices'}"
    if distributed.count() > 1:
        return f"{distributed.count()} processes with {number} in all: "
    return f"{number}: "


def _warn_of_unseen_gpu():
    if environment.gpus() or not environment.has_nvidia_device():
        return
    name, install = {"tensorflow": ("TensorFlow", "tensorflow[and-cuda]"), "jax": ("JAX", "jax[cuda13]")}[environment.backend()]
    warn(f'this machine has an NVIDIA device that {name} can\'t use. Try pip install "{install}"')


def _locate(recipe, run_dir, resume, name):
    """Finds the run folder, and the run to resume in it.

    Returns:
        The path, or `None` if it depends on the data set that `auto` loads; and a `StoredRun`, or `None` for a new run.
    """
    if run_dir is None and recipe.dataset != "auto":
        run_dir = default_run_dir(name, recipe)
    elif run_dir is None and resume:
        # Version 0.1 named a folder after `auto` itself.
        candidates = [default_run_dir(name, recipe, dataset) for dataset in ("cifar10", "digits", "auto")]
        candidates = [candidate for candidate in candidates if (candidate / runs.RECIPE).exists()]
        if len(candidates) > 1:
            raise ArgumentError(
                f"`run_dir` is required, as several runs could be resumed: {', '.join(map(str, candidates))}",
                argument="run_dir",
                hint="Choose one with --run-dir",
            )
        run_dir = candidates[0] if candidates else None
    if run_dir is None:
        if resume:
            print(f"no run to resume in {RUNS}: starting from epoch 1", flush=True)
        return None, None
    run_dir = Path(run_dir)
    stored = read_stored_run(run_dir) if resume else None
    if stored is None:
        runs.require_vacant(run_dir)
        if resume:
            print(f"no run to resume in {run_dir}: starting from epoch 1", flush=True)
    return run_dir, stored


def resolve(recipe):
    """The recipe with `precision` and `xla` for this machine where they are `auto`."""
    gpus = environment.gpus()
    precision, xla = recipe.precision, recipe.xla
    if precision == "auto":
        on_gpu = "mixed_bfloat16" if gpus and environment.supports_bfloat16(gpus[0]) else "mixed_float16"
        precision = on_gpu if gpus else "float32"
    if environment.backend() == "jax":
        xla = "on"
    elif xla == "auto":
        xla = "on" if gpus else "off"
    return dataclasses.replace(recipe, precision=precision, xla=xla)


def _finished(run_dir, evaluate_test):
    """The `RunResult` of the run in `run_dir`, or `None` if the run is not complete.

    Raises:
        RunError: if it is damaged.
    """
    if not all((run_dir / name).exists() for name in (runs.MODEL, runs.HISTORY, runs.PLOTS, runs.REPORT, runs.PAGE)):
        return None
    path = run_dir / runs.REPORT
    try:
        report = Report(**runs.read_json(path))
    except (TypeError, RunError) as error:
        raise RunError(f"{path} is damaged: {error}", hint="Remove it, and --resume writes it again") from error
    if evaluate_test and report.test is None:
        return None
    return RunResult(run_dir, report, runs.read_history(run_dir))


def _starting_point(recipe, run_dir, stored):
    """Reads the weights to start from, and the mean and std of their images.

    Returns:
        The recipe with the variant and the resizing of the weights, a `Checkpoint` or `None`, and a `Preprocessing`.
    """
    data = stored_data(run_dir) if stored is not None else None
    if data is not None:
        # The run has a checkpoint of its own and no longer needs the weights, whose file may be gone.
        stored.require_same(recipe, images_known=False)
        return recipe, None, Preprocessing(data.get("mean"), data.get("std"))
    checkpoint = read_weights(recipe)
    if checkpoint is None:
        return recipe.resized_like(Preprocessing()), None, Preprocessing()
    recipe = dataclasses.replace(recipe, variant=named(checkpoint.variant)).resized_like(checkpoint.preprocessing)
    print(f"starting from {recipe.weights}: {recipe.variant_name} (activation {checkpoint.variant.activation})", flush=True)
    return recipe, checkpoint, checkpoint.preprocessing


def read_weights(recipe):
    """Reads the checkpoint that a recipe starts from. Returns `None` if it starts from random weights.

    Raises:
        RecipeError: if the checkpoint does not exist, or does not fit the recipe.
        CheckpointError: if it can't be read.
    """
    if recipe.weights is None:
        if recipe.variant is None:
            raise RecipeError(
                "`weights` or `variant` is required: weights to start from, or a network to train from random weights. "
                "Received: weights=None, variant=None",
                argument="weights",
                hint="Use --weights SOURCE or --variant NAME",
            )
        return None
    try:
        checkpoint = checkpoints.read(recipe.weights, recipe.variant, argument="weights")
    except CheckpointError as error:
        if error.details:
            variant = ["--variant", recipe.variant] if isinstance(recipe.variant, str) else []
            command = shlex.join(["cvt-keras", "convert", recipe.weights, "all.keras", *variant])
            error.hint = f"To see all faults: {command}"
        raise
    except ArgumentError as error:
        if error.argument != "variant":
            raise RecipeError(error.summary, argument=error.argument, hint=error.hint) from error
        hint = "The recipe finetune, without --variant, uses the network of the weights"
        raise RecipeError(f"`weights` can't be used: {error.summary}", argument="variant", hint=hint) from error
    except OSError as error:
        raise CheckpointError(f"{recipe.weights} can't be read: {error}") from error
    if checkpoint.channels != 3:
        raise RecipeError(
            f"`weights` must be for images with 3 channels. Received: {recipe.weights}, with {checkpoint.channels}",
            argument="weights",
        )
    return checkpoint


def require_fit(recipe, train):
    """Raises unless the recipe fits the images.

    Args:
        recipe: a `Recipe`; its variant must not be `None`.
        train: the training `Split`, after the recipe's limit.

    Raises:
        RecipeError: if it doesn't.
    """
    if not batches_per_epoch(train, recipe):
        raise RecipeError(
            f"`batch_size` must not exceed the {len(train):,} training images. Received: batch_size={recipe.batch_size}",
            argument="batch_size",
            hint=f"Use --batch-size {len(train)} or less",
        )
    variant = get_variant(recipe.variant)
    size = recipe.preprocessing.image_size
    if min(size) < variant.min_side:
        raise RecipeError(
            f"`image_size` must be at least {variant.min_side} for {recipe.variant_name}. "
            f"Received: image_size={size_text(size)}",
            argument="image_size",
        )
    if recipe.preprocessing.resize == "stretch" and recipe.crop_padding >= min(size):
        raise RecipeError(
            f"`crop_padding` must be less than `image_size`. "
            f"Received: crop_padding={recipe.crop_padding}, image_size={size_text(size)}",
            argument="crop_padding",
            hint="Use --crop-padding 0, or a larger --image-size",
        )


def _show_resizing(recipe):
    preprocessing = recipe.preprocessing
    if preprocessing.resize == "crop":
        sizes = f"{size_text(preprocessing.image_size)} of {size_text(preprocessing.crop_from)}"
        areas = " to ".join(f"{bound:.0%}" for bound in recipe.scale)
        print(
            f"resize: crop, {sizes}, {preprocessing.interpolation}; training draws areas of {areas} of the image, "
            "in place of crop_padding",
            flush=True,
        )


def _show_counts(plan):
    counts = {"training": plan.train, "validation": plan.validation, "test": plan.test}
    shown = ", ".join(f"{len(split):,} {name}" for name, split in counts.items() if split is not None)
    note = f" ({plan.source.note})" if plan.source.note else ""
    print(f"{plan.source.name}: {shown} images{note}", flush=True)


def warn(text):
    """Prints a warning to standard error."""
    print(f"WARNING: {text}", file=sys.stderr, flush=True)
