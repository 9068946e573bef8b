"""What a search found: trials.csv, best.json, and a page."""

import dataclasses

import numpy as np

from cvt_keras import runs
from cvt_keras.report import figures, page
from cvt_keras.search import oracles
from cvt_keras.search.oracles import TrialStatus
from cvt_keras.search.space import Range

try:
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance
except ImportError as error:
    raise ImportError(
        f"The importance of what a search tried needs scikit-learn: pip install scikit-learn ({error})"
    ) from error

TRIALS = "trials.csv"
BEST = "best.json"
COORDINATES = "parallel_coordinates.png"
CURVES = "best_curves.png"
IMPORTANCE = "importance.png"
FILES = (TRIALS, BEST, runs.PAGE, runs.PLOTS)  # in the search's folder

MOST_CURVES = 5
LEAST_TRIALS = 8  # of which an importance is told
TREES = 200
REPEATS = 10  # of each shuffle


def rows(oracle):
    """A dict for each trial, in the order they began: what it tried, and what came of it."""
    candidates = oracle.candidates
    found = []
    for trial in list(oracle.trials.values()):
        values = trial.hyperparameters.values
        curve = oracles.curve(trial)
        done = trial.status == TrialStatus.COMPLETED
        found.append(
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
    return found


def ranked(found):
    """The rows of the trials that are done, by `oracles.order`, of equals the earliest first."""
    done = [row for row in found if row["status"] == "completed"]
    return sorted(done, key=lambda row: oracles.order(row["val_accuracy"], row["epochs"]))


def best(found):
    """The row of the best trial, or `None` before one is done."""
    return next(iter(ranked(found)), None)


def best_recipe(oracle, row):
    """The recipe of a row, for all images and as many epochs as the search was given."""
    candidates = oracle.candidates
    recipe = candidates.of({name: row[name] for name in candidates.space})
    return dataclasses.replace(recipe, train_limit=None, test_limit=None)


def importance(found, space):
    """How much of a random forest's fit is lost when the values of one name are shuffled, by scikit-learn.

    Args:
        found: `rows`.
        space: name -> `Range` or `Choice`.

    Returns:
        A dict of name -> (mean, standard deviation) over the shuffles, the most important first, and the forest's R² on trials
        that its trees had not seen; or `None`, `None` where too few trials are done, or all came to the same.
    """
    done = [row for row in found if row["status"] == "completed"]
    if len(done) < LEAST_TRIALS or len({row["val_accuracy"] for row in done}) == 1:
        return None, None
    axes = _axes(done, space)
    names = list(axes)
    values = np.array([[where.place(row[name]) for name, where in axes.items()] for row in done])
    scores = np.array([row["val_accuracy"] for row in done])
    forest = RandomForestRegressor(TREES, oob_score=True, random_state=0).fit(values, scores)
    lost = permutation_importance(forest, values, scores, n_repeats=REPEATS, random_state=0)
    order = np.argsort(-lost.importances_mean)
    return {names[i]: (float(lost.importances_mean[i]), float(lost.importances_std[i])) for i in order}, float(
        forest.oob_score_
    )


def _axes(done, space):
    """The space, with the epochs where they differ, as Hyperband's do."""
    epochs = [row["epochs"] for row in done]
    return space if len(set(epochs)) == 1 else {**space, "epochs": Range(min(epochs), max(epochs), log=True)}


def write(oracle, search_dir, settings):
    """Writes all of it, each file whole or not at all.

    Args:
        oracle: of `oracles.make`.
        search_dir: the search's folder.
        settings: what `search.json` holds.
    """
    found = rows(oracle)
    runs.write_csv(search_dir / TRIALS, found)
    top = best(found)
    figures = {}
    if top is not None:
        runs.write_json(search_dir / BEST, best_recipe(oracle, top).settings())
        space = oracle.candidates.space
        done = ranked(found)
        own = next((row["trial"] for row in done if oracle.candidates.is_own(row)), None)
        figures[COORDINATES] = figures.parallel_coordinates(done, _axes(done, space), own)
        curves = {row["trial"]: oracles.curve(oracle.trials[row["trial"]]) for row in done}
        shown = [row["trial"] for row in done[:MOST_CURVES]]
        figures[CURVES] = figures.best_curves(curves, shown, own)
        shares, fit = importance(found, space)
        if shares is not None:
            figures[IMPORTANCE] = figures.importance(shares)
        (search_dir / runs.PLOTS).mkdir(exist_ok=True)
        for name, figure in figures.items():
            figures.save(figure, search_dir / runs.PLOTS / name)
    else:
        own, fit = None, None
    _write_page(oracle, search_dir, settings, found, top, own, fit)


def _write_page(oracle, search_dir, settings, found, top, own, fit):
    recipe, why = oracle.candidates.recipe, oracle.candidates.left_out()
    lead = f"python train.py --recipe-file {search_dir / BEST} trains the best one on all images."
    page.write_document(
        search_dir / runs.PAGE,
        f"Search: {recipe.variant_name} on {settings['recipe']['dataset']}, {settings['algorithm']}",
        [
            f'<p class="quiet">{page.escape(lead)}</p>' if top else "",
            _tiles(oracle, found, top, own),
            f'<p class="quiet">The recipe itself is not among the trials: {page.escape(why)}.</p>' if why else "",
            *(_pictures(search_dir, found, fit) if top else ()),
            _chosen(oracle.candidates, top) if top else "",
            _table(oracle.candidates, found),
            page.settings("Settings", settings),
        ],
    )


def _tiles(oracle, found, top, own):
    candidates = oracle.candidates
    base = next((row for row in found if row["trial"] == own), None)
    failed = sum(row["status"] == "failed" for row in found)
    tiles = {"best top-1, validation": f"{top['val_accuracy']:.2%}" if top else "none yet"}
    if base:
        epochs = "" if base["epochs"] == top["epochs"] else f" in {base['epochs']} of {top['epochs']} epochs"
        tiles[f"of the recipe itself{epochs}"] = f"{base['val_accuracy']:.2%}"
    tiles["trials done"] = f"{sum(row['status'] == 'completed' for row in found)} of {oracle.max_trials}"
    if failed:
        tiles["failed"] = f"{failed}"
    if candidates.max_macs is not None:
        tiles["multiply-adds an image, at most"] = f"{candidates.max_macs / 1e6:,.1f} M"
    tiles["epochs each, at most"] = f"{candidates.recipe.epochs}"
    tiles["of training"] = page.duration(sum(row["seconds"] or 0 for row in found))
    return page.tiles(tiles)


def _pictures(search_dir, found, fit):
    others = len(ranked(found)) > MOST_CURVES
    shown = [
        page.picture(
            search_dir,
            COORDINATES,
            "Parallel coordinates",
            "A line for each trial, across what it tried; the colour and the last axis are its top-1 on the validation images. "
            "The best is thick, the recipe itself dashed.",
        ),
        page.picture(
            search_dir,
            CURVES,
            "The best curves",
            f"Top-1 on the validation images after each epoch{'; the other trials in grey' if others else ''}.",
        ),
    ]
    if fit is None:
        said = f"What mattered is told from {LEAST_TRIALS} trials on, if they came to different accuracies."
        return [*shown, f'<p class="quiet">{said}</p>']
    caption = (
        "What a random forest, fitted to the trials, loses of its R² when the values of one name are shuffled: the mean of "
        f"{REPEATS} shuffles and their standard deviation, by scikit-learn."
    )
    doubt = f"On trials that its trees had not seen the forest's R² is {fit:.2f}" + (
        ": it predicts them hardly better than their mean does, so this picture says little."
        if fit <= 0.1
        else "; 1 would be a perfect prediction, 0 none."
    )
    return [*shown, page.picture(search_dir, IMPORTANCE, "Importance", caption), f'<p class="quiet">{doubt}</p>']


def _chosen(candidates, top):
    own = candidates.own or {}
    cells = [[name, _shown(own.get(name)), _shown(top[name])] for name in candidates.space]
    return f"<h2>The best, trial {top['trial']}</h2>{page.table(['', 'the recipe', 'the best'], cells)}"


def _table(candidates, found):
    names = [name.replace("_", " ") for name in candidates.space]
    anew = any(row["repeats"] for row in found)
    heads = ["trial", "status", "top-1", "best epoch", "epochs", *(["repeats"] if anew else []), "MACs, M", "seconds", *names]
    cells = [
        [
            row["trial"],
            f"{row['status']}: {row['reason']}" if row["reason"] else row["status"],
            "" if row["val_accuracy"] is None else f"{row['val_accuracy']:.2%}",
            row["epoch"] or "",
            row["epochs"],
            *([row["repeats"] or ""] if anew else []),
            "" if row["macs"] is None else f"{row['macs'] / 1e6:,.1f}",
            "" if row["seconds"] is None else f"{row['seconds']:,.0f}",
            *(_shown(row[name]) for name in candidates.space),
        ]
        for row in [*ranked(found), *(row for row in found if row["status"] != "completed")]
    ]
    return f"<h2>Trials, the best first</h2>{page.table(heads, cells, 'exports')}"


def _shown(value):
    return "" if value is None else figures.shown(value)
