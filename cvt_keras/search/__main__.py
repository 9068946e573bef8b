"""Searches for a good recipe for your data and budget: python -m cvt_keras.search [RECIPE] --search-dir S"""

import dataclasses
import math
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

from cvt_keras.errors import DistributedError, RunError

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before TensorFlow is imported: its notes would break the progress bar

try:
    import tensorflow as tf
    import tyro

    from cvt_keras import runs, signals
    from cvt_keras.data import sources
    from cvt_keras.errors import CheckpointError, DataError, RecipeError
    from cvt_keras.search import distributed, oracles, results
    from cvt_keras.search import space as spaces
    from cvt_keras.search.tuner import RecipeTuner
    from cvt_keras.training import flags, loop
except (ImportError, ValueError) as error:  # ValueError: a KERAS_BACKEND that there is not
    sys.exit(f"search: {error}. Is all of requirements.txt installed, and KERAS_BACKEND unset?")
except KeyboardInterrupt:
    sys.exit(130)

PROGRAM = "python -m cvt_keras.search"
SEARCH = "search.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(flags.RecipeFlags):
    """All flags: the search's own, and those of the recipe that is varied."""

    search_dir: Path
    """Where the search is written; the same command goes on with the one that is there."""
    trials: int = 20
    """How many candidates are trained. A larger number goes on with a finished search."""
    algorithm: Literal["bayesian", "hyperband", "random"] = "bayesian"
    """Of keras-tuner. hyperband: many for few epochs, and the best of them anew for more, up to --epochs."""
    max_macs: Annotated[float | None, tyro.conf.arg(metavar="M")] = None
    """Multiply-accumulates of one image that a network may take, 55e6 for instance: a larger one is not trained."""
    space: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A JSON file of what to vary, in place of all: {"warmup": {"low": 0.02, "high": 0.3}, "stage0_depth": [1, 2]}.
    docs/search.md has the names."""
    chief: bool = False
    """Train nothing, and hand the trials to workers."""
    worker: bool = False
    """Train what the chief at --address hands out."""
    address: Annotated[str, tyro.conf.arg(metavar="HOST:PORT")] = "127.0.0.1:7171"
    """Where the chief listens; for workers on other machines one that they reach. There is no password."""
    worker_timeout: float = 120.0
    """Seconds without a word of a worker after which its trial goes to another, or the chief ends if there is none."""
    fresh: bool = False
    """Delete the search that is in the folder, after asking, and start over."""
    yes: bool = False
    """Delete without asking."""


def main(argv):
    """Runs the command line -> its exit code."""
    kept = [word for word in argv if word not in ("--fresh", "--yes")]
    again = shlex.join(["python", "-m", "cvt_keras.search", *kept])
    signals.raise_on_sigterm()
    try:
        _, arguments = flags.parse(argv, Arguments, PROGRAM, "Searches for a good recipe by keras-tuner.")
        return search(arguments)
    except (RecipeError, FileExistsError) as error:
        return _fail(error, 2)
    except (DistributedError, MemoryError, RunError) as error:
        return _fail(f"{error}. To go on: {again}", 1)
    except (CheckpointError, DataError) as error:
        return _fail(error, 1)
    except OSError as error:
        return _fail(f"{error}; finished trials and epochs are kept. To go on once that is mended: {again}", 1)
    except KeyboardInterrupt as stop:
        return _fail(f"stopped; finished trials and epochs are kept. To go on: {again}", signals.exit_code(stop))


def search(arguments):
    """Runs, or goes on with, a search -> an exit code.

    Args:
        arguments: an `Arguments`.

    Raises:
        RecipeError, FileExistsError: for an argument that can't be, or a folder of something else.
        DistributedError: for a chief without workers, or a worker without a chief.
        And what `cvt_keras.training.run` raises.
    """
    _check(arguments)
    tf.get_logger().setLevel("ERROR")  # that each trial traces functions of its own is no news
    if not arguments.worker:
        for name in [name for name in os.environ if name.startswith("KERASTUNER_")]:
            del os.environ[name]  # which would make keras-tuner a worker of its own
    recipe, search_dir = arguments.recipe, arguments.search_dir
    space = spaces.read(arguments.space, recipe) if arguments.space else spaces.space_of(recipe)
    if arguments.worker:
        patience = f"for {distributed.NO_CHIEF_SECONDS:g} s at most"
        print(f"asking the chief at {arguments.address} for trials, {patience}", flush=True)
        distributed.require_chief(arguments.address)
    stored = None if arguments.worker else _stored(search_dir, arguments.fresh)
    deletes = stored is not None and arguments.fresh
    if deletes and not _agreed(arguments):
        print(f"{search_dir} is left as it is", file=sys.stderr)
        return 1
    if recipe.dataset == "auto" and stored and not deletes:
        recipe = dataclasses.replace(recipe, dataset=stored["recipe"]["dataset"])
    if arguments.chief:
        tf.config.set_visible_devices([], "GPU")  # which is the workers'
    # Before any trial: that the images are there and enough, how many classes they have, and what auto is here.
    source = sources.load(recipe.dataset, recipe.data_dir, recipe.image_size)
    if recipe.dataset == "auto":
        recipe = dataclasses.replace(recipe, dataset=source.name)
    if source.fallback:
        print(f"WARNING: {source.fallback}", file=sys.stderr, flush=True)
    _require_trainable(_with_network(recipe, arguments.chief), space, source.train.limit(recipe.train_limit))
    budget = None if arguments.max_macs is None else int(arguments.max_macs)
    candidates = oracles.Candidates(recipe, space, len(source.class_names), budget)
    settings = {
        "recipe": recipe.settings(),
        "space": spaces.written(space),
        "algorithm": arguments.algorithm,
        "max_macs": budget,
        "data": source.fingerprint(),
    }
    del source
    oracle = oracles.make(arguments.algorithm, candidates, arguments.trials, settings)
    if arguments.worker:
        distributed.Worker(oracle, candidates, search_dir, arguments.address).search()
        print("nothing is left for this worker")
        return 0
    oracle.require_one()
    if stored and not deletes:
        _require_same(stored, settings, search_dir)
    search_dir.mkdir(parents=True, exist_ok=True)
    with runs.lock(search_dir):
        runs.sweep(search_dir)
        if deletes:
            _clear(search_dir)
        elif stored := _stored(search_dir, False):  # once more: another process may have begun there meanwhile
            _require_same(stored, settings, search_dir)
        if not stored or deletes:
            runs.write_json(search_dir / SEARCH, settings)
        _go_on(arguments, oracle, settings)
    return _tell(oracle, search_dir)


def _go_on(arguments, oracle, settings):
    """Runs what is left of the trials, or hands it to workers; the search's folder tells of each as it ends."""
    search_dir = arguments.search_dir
    oracle.open(search_dir / oracles.FOLDER)
    if why := oracle.candidates.left_out():
        print(f"the recipe itself is not tried: {why}", flush=True)
    if before := sum(map(oracles.is_over, oracle.trials.values())):
        print(f"going on with {search_dir}: {before} trial{'s are' if before > 1 else ' is'} done", flush=True)
    oracle.listener = lambda trial: print(oracles.line(oracle, trial), flush=True)

    def refresh():
        results.write(oracle, search_dir, settings)

    try:
        if arguments.chief:
            distributed.lead(oracle, arguments.address, arguments.worker_timeout, refresh)
        else:
            RecipeTuner(oracle, oracle.candidates, search_dir, refresh).search()
    finally:
        if oracle.trials:
            refresh()


def _tell(oracle, search_dir):
    if oracle.exhausted:
        print(f"WARNING: no more trials: {oracle.exhausted}", file=sys.stderr, flush=True)
    top = results.best(results.rows(oracle))
    if top is None:
        failed = next((oracles.reason(trial) for trial in oracle.trials.values() if trial.message), "")
        return _fail(f"no trial could be trained{failed and f'. The first: {failed}'}", 1)
    epochs = oracle.candidates.recipe.epochs
    short = f" after {top['epochs']} of {epochs} epochs" if top["epochs"] < epochs else ""
    found = f"best: trial {top['trial']}, {top['val_accuracy']:.2%} top-1 on the validation images{short}"
    print(f"{found}; page: {search_dir / runs.PAGE}")
    file = shlex.quote(str(search_dir / results.BEST))
    print(f"to train it on all images, as long as you like: python train.py --recipe-file {file} --epochs N")
    return 1 if oracle.failing else 0


def _with_network(recipe, chief):
    """The recipe with the variant of its weights; a chief, which trains nothing, need not have them.

    Raises:
        RecipeError, CheckpointError: as `loop.read_weights` does.
    """
    if recipe.weights is None or chief:
        return recipe
    return dataclasses.replace(recipe, variant=loop.read_weights(recipe).variant)


def _require_trainable(recipe, space, train):
    """Whether the recipe, and each value of the space by itself, fits the images.

    Raises:
        RecipeError: if one does not.
    """
    if recipe.variant is None:
        return
    loop.check(recipe, train)
    for name, where in space.items():
        for value in getattr(where, "values", where.ends):
            try:
                loop.check(spaces.apply(recipe, {name: value}), train)
            except RecipeError as error:
                raise RecipeError(f"the space must not hold {name} {value}: {error}") from error


def _check(arguments):
    """Whether the flags go together.

    Raises:
        RecipeError: if they don't.
    """
    if arguments.chief and arguments.worker:
        raise RecipeError("`--chief` and `--worker` are two processes: give one of them to each")
    if arguments.worker and arguments.fresh:
        raise RecipeError("`--fresh` is for the chief: a worker has no search of its own")
    if arguments.trials < 1:
        raise RecipeError(f"`--trials` must be at least 1. Received: --trials {arguments.trials}")
    if arguments.max_macs is not None and not 0 < arguments.max_macs < math.inf:
        raise RecipeError(f"`--max-macs` must be a finite number over 0. Received: --max-macs {arguments.max_macs}")
    least = distributed.MISSED_HEARTBEATS * distributed.HEARTBEAT_SECONDS
    if not least <= arguments.worker_timeout < math.inf:
        raise RecipeError(
            f"`--worker-timeout` must be at least {least:g} seconds, as workers are heard every "
            f"{distributed.HEARTBEAT_SECONDS:g}. Received: --worker-timeout {arguments.worker_timeout:g}"
        )
    port = re.fullmatch(r".+:(\d+)", arguments.address)
    if not port or not 0 < int(port[1]) < 65536:
        raise RecipeError(f"`--address` must be HOST:PORT, 127.0.0.1:7171 for instance. Received: {arguments.address}")
    if arguments.recipe.compression is not None:
        raise RecipeError("`--recipe-file` must not be of a compressed run: search the run that it came from")
    if arguments.recipe.variant is None and arguments.recipe.weights is None:
        raise RecipeError("`weights` must say what to start from (--weights SOURCE), or `variant` what to train anew")
    if arguments.max_macs is not None and arguments.recipe.weights is not None:
        raise RecipeError("`--max-macs` has nothing to choose: with --weights the network is theirs")


def _stored(search_dir, fresh):
    """What a folder's search is, or `None` where there is none yet; `{}` for one that is to be deleted anyhow.

    Raises:
        FileExistsError: if it holds something else.
        RecipeError: if it can't be written to.
        RunError: if it is broken.
    """
    if search_dir.exists() and not search_dir.is_dir():
        raise FileExistsError(f"`--search-dir` is no folder: {search_dir}")
    try:
        runs.require_writable(search_dir, "--search-dir")
    except RunError as error:
        raise RecipeError(str(error)) from error
    path = search_dir / SEARCH
    if path.exists():
        if fresh:
            return {}
        stored = runs.read_json(path)
        if not isinstance(stored, dict) or not all(isinstance(stored.get(part), dict) for part in ("recipe", "space", "data")):
            raise RunError(f"{path} is broken: start over by --fresh")
        return stored
    if search_dir.exists() and not all(map(runs.is_aside, search_dir.iterdir())):
        raise FileExistsError(f"`--search-dir` holds something, but no search: {search_dir}. Name another")
    return None


def _agreed(arguments):
    """Whether the search in the folder may be deleted.

    Raises:
        RecipeError: if nobody is there to ask.
    """
    if arguments.yes:
        return True
    if not sys.stdin.isatty():
        raise RecipeError(f"`--fresh` deletes the search in {arguments.search_dir}, and there is nobody to ask: give --yes")
    trials = len(list((arguments.search_dir / "trials").glob("*")))
    try:
        said = input(f"delete the search in {arguments.search_dir}, with the runs of {trials} trials? [y/N] ")
    except EOFError:  # Ctrl-D
        print(file=sys.stderr)
        return False
    return said.strip().lower() in ("y", "yes")


def _clear(search_dir):
    """Deletes the search and nothing else; killed on its way, the folder holds a search still, or none."""
    for name in (*results.FILES, oracles.TRIALS, oracles.FOLDER, SEARCH):
        if (path := search_dir / name).exists():
            path.rename(search_dir / f".{os.getpid()}-{name}")
    runs.remove_asides(search_dir)


def _require_same(stored, settings, search_dir):
    """A search goes on as it began.

    Raises:
        RecipeError: if it would not, naming what differs.
    """
    if differences := oracles.differences(stored, settings):
        raise RecipeError(
            f"`--search-dir` {search_dir} holds a different search: {differences}. "
            "Give it its own settings, name another folder, or start over by --fresh"
        )


def _fail(message, code):
    print(f"\nsearch: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
