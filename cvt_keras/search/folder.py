"""The folder of a search: its files and its checks."""

from cvt_keras import runs
from cvt_keras.errors import ArgumentError, OccupiedError, RunError

SEARCH = "search.json"
TRIALS = "trials"  # a run folder per trial
ORACLE = "oracle"  # keras-tuner's state


def holds_search(search_dir):
    """Whether a folder holds a search."""
    return (search_dir / SEARCH).exists()


def require_usable(search_dir):
    """Raises unless a search can be written to a folder, or resumed in it.

    Args:
        search_dir: a path.

    Raises:
        OccupiedError: if it holds something else or is not a folder.
        ArgumentError: if it is not writable.
    """
    hint = "Choose another folder with --search-dir"
    if search_dir.exists() and not search_dir.is_dir():
        raise OccupiedError(f"`search_dir` is not a folder: {search_dir}", argument="search_dir", hint=hint)
    try:
        runs.require_writable(search_dir, "search_dir")
    except RunError as error:
        raise ArgumentError(error.summary, argument=error.argument, hint=error.hint) from error
    if search_dir.exists() and not holds_search(search_dir) and not all(map(runs.is_unfinished, search_dir.iterdir())):
        raise OccupiedError(f"`search_dir` contains files, but no search: {search_dir}", argument="search_dir", hint=hint)


def read_settings(search_dir):
    """Reads the settings of the search in a folder.

    Returns:
        The dict in `search.json`.

    Raises:
        RunError: if it is damaged.
    """
    path, hint = search_dir / SEARCH, "Start over with --fresh"
    try:
        settings = runs.read_json(path)
    except RunError as error:
        raise RunError(error.summary, hint=hint) from error
    if not isinstance(settings, dict) or not all(isinstance(settings.get(part), dict) for part in ("recipe", "space", "data")):
        raise RunError(f"{path} is damaged: it does not contain the settings of a search", hint=hint)
    return settings


def trial_dirs(search_dir):
    """The run folders of the trials, in any order."""
    return list((search_dir / TRIALS).glob("*"))
