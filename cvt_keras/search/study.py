"""`search`: checks its arguments, runs the trials and returns the best recipe."""

import contextlib
import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import tensorflow as tf

from cvt_keras import environment, runs
from cvt_keras.errors import RecipeError, SearchError
from cvt_keras.preprocessing import Preprocessing
from cvt_keras.search import distributed, folder, oracles, results
from cvt_keras.search import space as spaces
from cvt_keras.search.candidates import Candidates
from cvt_keras.search.options import Algorithm, Options
from cvt_keras.search.space import Choice, Range
from cvt_keras.search.tuner import RecipeTuner
from cvt_keras.training import held_out
from cvt_keras.training.plan import load_images, read_weights, require_fit, warn
from cvt_keras.training.recipes import RESIZING, Recipe
from cvt_keras.training.resume import newer_fields, without_newer_fields


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Args:
        search_dir: the search's folder.
        recipe: the best `Recipe`, without limits on the number of images.
        recipe_file: the file with that recipe, for `cvt-keras train --recipe-file`.
        best: the row of the best trial.
        rows: a dict per trial, as in `trials.csv`, in the order in which they started.
        stopped: the reason why there are fewer trials than requested, or `None`.
        failing: whether that reason is failed trials.
    """

    search_dir: Path
    recipe: Recipe
    recipe_file: Path
    best: dict
    rows: list[dict]
    stopped: str | None
    failing: bool


def search(
    recipe: Recipe,
    search_dir: str | Path,
    *,
    trials: int = Options.trials,
    algorithm: Algorithm = Options.algorithm,
    max_macs: float | None = None,
    space: dict[str, Range | Choice] | str | Path | None = None,
    chief: bool = False,
    worker: bool = False,
    address: str = Options.address,
    worker_timeout: float = Options.worker_timeout,
    fresh: bool = False,
) -> SearchResult | None:
    """Searches for a better recipe around `recipe`, or resumes the search in the folder.

    Each trial is a run with its own folder in `search_dir/trials`. The test images are never used.

    Args:
        recipe: the `Recipe` to vary. It is the first trial, if it is within the space and the budget.
        search_dir: the search's folder. A search in it is resumed if its settings are the same.
        trials: number of candidates to train. A larger number extends a finished search.
        algorithm: `"bayesian"`, `"hyperband"` or `"random"`, of keras-tuner.
        max_macs: maximum multiply-accumulates per image, or `None` for no limit.
        space: the search space: a dict of name -> `Range` or `Choice`, or the path of a JSON file. Defaults to every name that
            can be varied, around the recipe's own values.
        chief: hand out trials to workers and train none here. This process then uses no GPU.
        worker: train the trials that the chief at `address` hands out.
        address: HOST:PORT that the chief listens on.
        worker_timeout: seconds without a heartbeat after which a worker's trial goes to another worker. The chief stops after
            as many seconds without any worker.
        fresh: delete the search in the folder, with the runs of its trials, and start over.

    Returns:
        A `SearchResult`, or `None` for a worker: the chief has the result.

    Raises:
        ArgumentError: for a wrong option, or options that exclude each other.
        RecipeError: if the recipe or a value of the space does not fit the images, if nothing is within the budget, or if the
            search in the folder has other settings.
        OccupiedError: if `search_dir` contains files, but no search.
        RunError: if a file of the search is damaged, or another process is writing to `search_dir`.
        SearchError: if no trial could be trained.
        DistributedError: for a chief without workers, or a worker without a chief.
        The errors of `cvt_keras.training.run`, except those that mark a trial as failed: a loss that is NaN or infinite, and
        too little memory.
    """
    options = Options(
        trials=trials,
        algorithm=algorithm,
        max_macs=max_macs,
        chief=chief,
        worker=worker,
        address=address,
        worker_timeout=worker_timeout,
        fresh=fresh,
    )
    options.require(recipe)
    environment.keep_tensorflow_on_cpu()
    space = spaces.space_of(recipe) if space is None else spaces.read(space, recipe)
    with _isolated():
        if worker:
            return _work(recipe, space, Path(search_dir), options)
        return _search(recipe, space, Path(search_dir), options)


def _work(recipe, space, search_dir, options):
    print(f"waiting up to {distributed.NO_CHIEF_SECONDS:g} s for the chief at {options.address}", flush=True)
    distributed.require_chief(options.address)
    oracle, _ = _settle(recipe, space, options)
    distributed.Worker(oracle, oracle.candidates, search_dir, options.address).search()
    print("no more trials for this worker")


def _search(recipe, space, search_dir, options):
    folder.require_usable(search_dir)
    exists = folder.holds_search(search_dir)
    replaces = exists and options.fresh
    stored = folder.read_settings(search_dir) if exists and not replaces else None  # --fresh may delete a damaged one
    if stored is not None:
        recipe = without_newer_fields(recipe, newer_fields(stored["recipe"]))
        # Versions that did not store how images are resized stretched them.
        resizing = {name: stored["recipe"][name] for name in RESIZING if name in stored["recipe"]}
        recipe = recipe.resized_like(Recipe.from_settings(resizing).preprocessing)
        if recipe.dataset == "auto":
            recipe = dataclasses.replace(recipe, dataset=stored["recipe"]["dataset"])
    if options.chief:
        environment.hide_gpus()  # they are for workers on this machine
    oracle, settings = _settle(recipe, space, options)
    oracle.require_one()
    _require_same(stored, settings, search_dir)
    search_dir.mkdir(parents=True, exist_ok=True)
    with runs.lock(search_dir):
        runs.sweep(search_dir)
        if replaces:
            _clear(search_dir)
        elif folder.holds_search(search_dir):  # checked again: another process may have started one
            _require_same(folder.read_settings(search_dir), settings, search_dir)
        if not folder.holds_search(search_dir):
            runs.write_json(search_dir / folder.SEARCH, settings)
        _run_trials(oracle, settings, search_dir, options)
    return _result(oracle, search_dir)


def _settle(recipe, space, options):
    """Loads the images, and checks that the recipe and the space fit them.

    Returns:
        The oracle, and the settings of the search for `search.json`.
    """
    # A chief does not train: it does not need the weights, unless they say how images are resized.
    needs_weights = recipe.weights is not None and (not options.chief or recipe.open_resizing)
    checkpoint = read_weights(recipe) if needs_weights else None
    recipe = recipe.resized_like(checkpoint.preprocessing if checkpoint else Preprocessing())
    if recipe.resize == "crop" and "crop_padding" in space:
        raise RecipeError(
            "`space` can't vary `crop_padding`, which has no effect with resize=crop. Received: space with crop_padding",
            argument="space",
            hint="Remove crop_padding from the space, or use --resize stretch",
        )
    recipe, source = load_images(recipe)
    if source.fallback:
        warn(source.fallback)
    names = held_out.named_classes(checkpoint)
    usable, _, differences = held_out.settle(source, weights=checkpoint and recipe.weights, class_names=names)
    for warning in (*source.warnings, *differences):
        warn(warning)
    network = checkpoint.variant if checkpoint else recipe.variant
    if network is not None:
        _require_trainable(dataclasses.replace(recipe, variant=network), space, usable.train.limit(recipe.train_limit))
    max_macs = None if options.max_macs is None else int(options.max_macs)
    settings = {
        "recipe": recipe.settings(),
        "space": spaces.written(space),
        "algorithm": options.algorithm,
        "max_macs": max_macs,
        "data": source.fingerprint(),
    }
    candidates = Candidates(recipe, space, len(source.class_names), max_macs)
    return oracles.make(options.algorithm, candidates, options.trials, settings), settings


def _require_trainable(recipe, space, train):
    """Raises a `RecipeError` unless the recipe, and each value of the space on its own, fits the images."""
    require_fit(recipe, train)
    for name, axis in space.items():
        for value in axis.values_to_check:
            try:
                require_fit(spaces.apply(recipe, {name: value}), train)
            except RecipeError as error:
                raise RecipeError(f"`space` has an invalid value, {name}={value}: {error.summary}", argument="space") from error


def _require_same(stored, settings, search_dir):
    """Raises a `RecipeError` that names every difference between the stored settings and `settings`.

    Args:
        stored: the settings of the search in the folder, or `None` if there is no search to resume.
    """
    if stored is not None and (differences := oracles.differences(stored, settings)):
        raise RecipeError(
            f"`search_dir` holds a different search: {search_dir}. {differences}",
            argument="search_dir",
            hint="Resume with the same flags, choose another folder with --search-dir, or start over with --fresh",
        )


def _clear(search_dir):
    """Deletes the search, and no other file. `search.json` goes last, so that after a kill the folder still holds a search."""
    for name in (*results.FILES, folder.TRIALS, folder.ORACLE, folder.SEARCH):
        if (path := search_dir / name).exists():
            path.rename(search_dir / f".{os.getpid()}-{name}")
    runs.remove_unfinished(search_dir)


def _run_trials(oracle, settings, search_dir, options):
    """Trains the remaining trials, or hands them to workers, and writes the page after each."""
    oracle.open(search_dir / folder.ORACLE)
    if reason := oracle.candidates.left_out():
        print(f"not trying the recipe itself: {reason}", flush=True)
    if done := sum(map(oracles.is_over, oracle.trials.values())):
        print(f"resuming the search in {search_dir}: {done} {'trials are' if done > 1 else 'trial is'} done", flush=True)
    oracle.listener = lambda trial: print(oracles.line(oracle, trial), flush=True)

    def refresh():
        results.write(oracle, search_dir, settings)

    try:
        if options.chief:
            distributed.lead(oracle, options.address, options.worker_timeout, refresh)
        else:
            RecipeTuner(oracle, oracle.candidates, search_dir, refresh).search()
    finally:
        if oracle.trials:
            refresh()


def _result(oracle, search_dir):
    if oracle.exhausted:
        warn(f"the search stopped early: {oracle.exhausted}")
    rows = results.rows(oracle)
    best = results.best(rows)
    if best is None:
        reason = next((row["reason"] for row in rows if row["reason"]), None)
        raise SearchError("no trial could be trained" + (f". The first failed: {reason}" if reason else ""))
    return SearchResult(
        search_dir=search_dir,
        recipe=results.best_recipe(oracle, best),
        recipe_file=search_dir / results.BEST,
        best=best,
        rows=rows,
        stopped=oracle.exhausted,
        failing=oracle.failing,
    )


@contextlib.contextmanager
def _isolated():
    """Quiets TensorFlow and hides keras-tuner's environment variables, and restores both at the end."""
    logger = tf.get_logger()
    level = logger.level
    logger.setLevel("ERROR")  # hides the retracing warning of each trial
    # If these are set, keras-tuner takes every search for a worker.
    before = _keras_tuner_variables()
    _unset(before)
    try:
        yield
    finally:
        _unset(_keras_tuner_variables())
        os.environ.update(before)
        logger.setLevel(level)


def _keras_tuner_variables():
    return {name: value for name, value in os.environ.items() if name.startswith("KERASTUNER_")}


def _unset(names):
    for name in names:
        del os.environ[name]
