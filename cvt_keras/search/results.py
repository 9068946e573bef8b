"""The results of a search: trials.csv, best.json, figures and an HTML page."""

import dataclasses
import shlex
from pathlib import Path

import numpy as np

from cvt_keras import runs
from cvt_keras.errors import MissingPackageError
from cvt_keras.report import page
from cvt_keras.report.figures import save
from cvt_keras.search import figures, oracles
from cvt_keras.search import space as spaces
from cvt_keras.search.oracles import TrialStatus
from cvt_keras.search.space import Range

try:
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance
except ImportError as error:
    raise MissingPackageError(
        f"the results of a search need scikit-learn: {error}", hint="Install it: pip install scikit-learn"
    ) from error

TRIALS = "trials.csv"
BEST = "best.json"
COORDINATES = "parallel_coordinates.png"
CURVES = "best_curves.png"
IMPORTANCE = "importance.png"
FILES = (TRIALS, BEST, runs.PAGE, runs.PLOTS)  # all that `write` writes
TEMPLATE = Path(__file__).parent / "templates" / "search.html"

MAX_CURVES = 5  # in colour
MIN_TRIALS = 8  # for the importance
TREES = 200
REPEATS = 10  # shuffles per name


def rows(oracle):
    """A dict per trial, in the order in which they started: its values and its results."""
    candidates = oracle.candidates
    trials = []
    for trial in list(oracle.trials.values()):
        values = trial.hyperparameters.values
        curve = oracles.curve(trial)
        done = trial.status == TrialStatus.COMPLETED
        trials.append(
            {
                "trial": trial.trial_id,
                "status": trial.status.lower(),
                "val_accuracy": round(max(curve), 6) if done else None,
                "epoch": int(np.argmax(curve)) + 1 if done else None,
                "epochs": candidates.of(values).epochs,
                "repeats": oracles.repeated(trial),
                "macs": candidates.macs(values),
                "seconds": round(oracles.seconds(trial), 1) if curve else None,
                "reason": oracles.reason(trial) or None,
                **{name: values[name] for name in candidates.space},
            }
        )
    return trials


def ranked(trials):
    """The rows of the completed trials, sorted by `oracles.order`, then by start."""
    done = [row for row in trials if row["status"] == "completed"]
    return sorted(done, key=lambda row: oracles.order(row["val_accuracy"], row["epochs"]))


def best(trials):
    """The row of the best trial, or `None` if none is completed."""
    return next(iter(ranked(trials)), None)


def best_recipe(oracle, row):
    """The recipe of a row, without limits on the number of images, and with the epochs of the search."""
    candidates = oracle.candidates
    recipe = candidates.of({name: row[name] for name in candidates.space})
    return dataclasses.replace(recipe, train_limit=None, validation_limit=None, test_limit=None)


def importance(trials, space):
    """Permutation importance: the R² that a random forest loses when the values of one name are shuffled (scikit-learn).

    Args:
        trials: as `rows` returns them.
        space: name -> `Range` or `Choice`.

    Returns:
        A dict of name -> (mean, standard deviation) over the shuffles, the most important first, and the forest's out-of-bag
        R². `None`, `None` if too few trials are completed, or if all have the same accuracy.
    """
    done = [row for row in trials if row["status"] == "completed"]
    if len(done) < MIN_TRIALS or len({row["val_accuracy"] for row in done}) == 1:
        return None, None
    axes = _axes(done, space)
    names = list(axes)
    values = np.array([[axis.place(row[name]) for name, axis in axes.items()] for row in done])
    scores = np.array([row["val_accuracy"] for row in done])
    forest = RandomForestRegressor(TREES, oob_score=True, random_state=0).fit(values, scores)
    scores_lost = permutation_importance(forest, values, scores, n_repeats=REPEATS, random_state=0)
    shares = {
        names[i]: (float(scores_lost.importances_mean[i]), float(scores_lost.importances_std[i]))
        for i in np.argsort(-scores_lost.importances_mean)
    }
    return shares, float(forest.oob_score_)


def _axes(done, space):
    """The space, and the epochs as another name if they differ, as in Hyperband."""
    epochs = [row["epochs"] for row in done]
    return space if len(set(epochs)) == 1 else {**space, "epochs": Range(min(epochs), max(epochs), log=True)}


def write(oracle, search_dir, settings):
    """Writes the table, the best recipe, the figures and the page, each file atomically.

    Args:
        oracle: an oracle made by `oracles.make`.
        search_dir: the search's folder.
        settings: the contents of `search.json`.
    """
    trials = rows(oracle)
    runs.write_csv(search_dir / TRIALS, trials)
    done = ranked(trials)
    own = next((row for row in done if oracle.candidates.is_own(row)), None)
    forest_r2 = None
    if done:
        runs.write_json(search_dir / BEST, best_recipe(oracle, done[0]).settings())
        forest_r2 = _draw(oracle, search_dir, trials, own)
    _write_page(oracle, search_dir, settings, trials, own, forest_r2)


def _draw(oracle, search_dir, trials, own):
    """Writes the figures. Returns the R² of `importance`."""
    space, own_trial = oracle.candidates.space, own and own["trial"]
    done = ranked(trials)
    curves = {row["trial"]: oracles.curve(oracle.trials[row["trial"]]) for row in done}
    pictures = {
        COORDINATES: figures.parallel_coordinates(done, _axes(done, space), own_trial),
        CURVES: figures.best_curves(curves, [row["trial"] for row in done[:MAX_CURVES]], own_trial),
    }
    shares, forest_r2 = importance(trials, space)
    if shares is not None:
        pictures[IMPORTANCE] = figures.importance(shares)
    (search_dir / runs.PLOTS).mkdir(exist_ok=True)
    for name, picture in pictures.items():
        save(picture, search_dir / runs.PLOTS / name)
    return forest_r2


def _write_page(oracle, search_dir, settings, trials, own, forest_r2):
    candidates = oracle.candidates
    done = ranked(trials)
    top = done[0] if done else None
    page.render(
        TEMPLATE,
        search_dir / runs.PAGE,
        title=f"Search: {candidates.recipe.variant_name} on {settings['recipe']['dataset']}, {settings['algorithm']}",
        recipe_file=shlex.quote(str(search_dir / BEST)),
        best=top,
        own=own,
        left_out=candidates.left_out(),
        done=len(done),
        failed=sum(row["status"] == "failed" for row in trials),
        max_trials=oracle.max_trials,
        max_macs=candidates.max_macs,
        epochs=candidates.recipe.epochs,
        seconds=sum(row["seconds"] or 0 for row in trials),
        pictures={Path(name).stem: page.picture(search_dir, name) for name in (COORDINATES, CURVES, IMPORTANCE)},
        some_are_grey=len(done) > MAX_CURVES,
        forest_r2=forest_r2,
        min_trials=MIN_TRIALS,
        repeats=REPEATS,
        best_values=_best_values(candidates, top),
        **_table(candidates, trials),
        search_settings=settings,
    )


def _best_values(candidates, top):
    """A row of cells per name of the space: the name, the recipe's own value, the best trial's value."""
    own = candidates.own or {}
    return [[name, _shown(own.get(name)), _shown(top[name])] for name in candidates.space] if top else []


def _table(candidates, trials):
    """The table of all trials, the best first: the heads in `trial_names`, the rows of cells in `trials`."""
    repeats = any(row["repeats"] for row in trials)
    space = [name.replace("_", " ") for name in candidates.space]
    names = [
        "trial",
        "status",
        "top-1",
        "best epoch",
        "epochs",
        *(["repeats"] if repeats else []),
        "MACs, M",
        "seconds",
        *space,
    ]
    cells = [
        [
            row["trial"],
            f"{row['status']}: {row['reason']}" if row["reason"] else row["status"],
            "" if row["val_accuracy"] is None else f"{row['val_accuracy']:.2%}",
            row["epoch"] or "",
            row["epochs"],
            *([row["repeats"] or ""] if repeats else []),
            "" if row["macs"] is None else f"{row['macs'] / 1e6:,.1f}",
            "" if row["seconds"] is None else f"{row['seconds']:,.0f}",
            *(_shown(row[name]) for name in candidates.space),
        ]
        for row in [*ranked(trials), *(row for row in trials if row["status"] != "completed")]
    ]
    return {"trial_names": names, "trials": cells}


def _shown(value):
    return "" if value is None else spaces.shown(value)
