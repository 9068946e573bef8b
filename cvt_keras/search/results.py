"""What a search found: trials.csv, best.json, and a page."""

import dataclasses

import numpy as np

from cvt_keras import page, plots, runs
from cvt_keras.search import oracles
from cvt_keras.search.oracles import TrialStatus
from cvt_keras.training.space import Range, rounded

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
                "val_accuracy": rounded(max(curve)) if done else None,
                "epoch": int(np.argmax(curve)) + 1 if done else None,
                "epochs": candidates.of(values).epochs,
                "macs": candidates.macs(values),
                "seconds": round(oracles.seconds(trial), 1) if curve else None,
                **{name: rounded(values[name]) for name in candidates.space},
            }
        )
    return found


def best(found):
    """The row of the best trial, the earliest of equals; `None` before one is done."""
    return max((row for row in found if row["status"] == "completed"), key=lambda row: row["val_accuracy"], default=None)


def best_recipe(oracle, row):
    """The recipe of a row, for all training images and as many epochs as the search was given."""
    candidates = oracle.candidates
    recipe = candidates.of({name: row[name] for name in candidates.space})
    return dataclasses.replace(recipe, train_limit=None)


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
    names = [*space, *(["epochs"] if len({row["epochs"] for row in done}) > 1 else [])]
    logarithmic = {name for name, where in space.items() if isinstance(where, Range) and where.log}
    values = np.array([[np.log(row[name]) if name in logarithmic else row[name] for name in names] for row in done], float)
    scores = np.array([row["val_accuracy"] for row in done])
    forest = RandomForestRegressor(TREES, oob_score=True, random_state=0).fit(values, scores)
    lost = permutation_importance(forest, values, scores, n_repeats=REPEATS, random_state=0)
    order = np.argsort(-lost.importances_mean)
    return {names[i]: (float(lost.importances_mean[i]), float(lost.importances_std[i])) for i in order}, float(
        forest.oob_score_
    )


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
        done = sorted((row for row in found if row["status"] == "completed"), key=lambda row: -row["val_accuracy"])
        own = found[0]["trial"] if found[0]["status"] == "completed" and _is_own(oracle, found[0]) else None
        figures[COORDINATES] = plots.parallel_coordinates(done, space, own)
        curves = {row["trial"]: oracles.curve(oracle.trials[row["trial"]]) for row in done}
        shown = [row["trial"] for row in done[:MOST_CURVES]]
        figures[CURVES] = plots.best_curves(curves, shown, own)
        shares, fit = importance(found, space)
        if shares is not None:
            figures[IMPORTANCE] = plots.importance(shares)
        (search_dir / runs.PLOTS).mkdir(exist_ok=True)
        for name, figure in figures.items():
            plots.save(figure, search_dir / runs.PLOTS / name)
    else:
        own, fit = None, None
    _write_page(oracle, search_dir, settings, found, top, own, fit)


def _is_own(oracle, row):
    own = oracle.candidates.own
    return own is not None and all(row[name] == rounded(value) for name, value in own.items())


def _write_page(oracle, search_dir, settings, found, top, own, fit):
    counted = {status: sum(row["status"] == status for row in found) for status in ("completed", "failed")}
    base = next((row for row in found if row["trial"] == own), None)
    recipe = oracle.candidates.recipe
    tiles = {
        "best top-1, validation": f"{top['val_accuracy']:.2%}" if top else "none yet",
        **({"of the recipe itself": f"{base['val_accuracy']:.2%}"} if base else {}),
        "trials done": f"{counted['completed']} of {oracle.max_trials}",
        **({"failed": f"{counted['failed']}"} if counted["failed"] else {}),
        **({"over the budget, not tried": f"{oracle.refused:,}"} if settings["max_macs"] else {}),
        "epochs each, at most": f"{recipe.epochs}",
        "of training": page.duration(sum(row["seconds"] or 0 for row in found)),
    }
    captions = {
        COORDINATES: (
            "Parallel coordinates",
            "A line for each trial, across what it tried; the colour and the last axis are its top-1 on the validation images. "
            "The best is thick, the recipe itself dashed.",
        ),
        CURVES: ("The best curves", "Top-1 on the validation images after each epoch; the other trials in grey."),
        IMPORTANCE: (
            "Importance",
            "What a random forest, fitted to the trials, loses of its R² when the values of one name are shuffled: the mean of "
            f"{REPEATS} shuffles and their standard deviation, by scikit-learn.",
        ),
    }
    pictures = [page.picture(search_dir, name, *captions[name]) for name in (COORDINATES, CURVES)]
    if fit is not None:
        doubt = f"On trials that its trees had not seen the forest's R² is {fit:.2f}" + (
            ": it predicts them no better than their mean does, so this picture says little."
            if fit <= 0.1
            else "; 1 would be a perfect prediction, 0 none."
        )
        pictures += [page.picture(search_dir, IMPORTANCE, *captions[IMPORTANCE]), f'<p class="quiet">{doubt}</p>']
    elif top:
        pictures.append(f'<p class="quiet">The importance of each name is drawn from {LEAST_TRIALS} trials on.</p>')
    names = list(oracle.candidates.space)
    chosen = ""
    if top:
        own_values = oracle.candidates.own or {}
        cells = [[name, _shown(own_values.get(name)), _shown(top[name])] for name in names]
        chosen = f"<h2>The best, trial {top['trial']}</h2>" + page.table(["", "the recipe", "the best"], cells)
    ranked = sorted(found, key=lambda row: -(row["val_accuracy"] or -1))
    heads = [
        "trial",
        "status",
        "top-1",
        "best epoch",
        "epochs",
        "MACs, M",
        "seconds",
        *(name.replace("_", " ") for name in names),
    ]
    cells = [
        [
            row["trial"],
            row["status"],
            "" if row["val_accuracy"] is None else f"{row['val_accuracy']:.2%}",
            row["epoch"] or "",
            row["epochs"],
            "" if row["macs"] is None else f"{row['macs'] / 1e6:,.1f}",
            "" if row["seconds"] is None else f"{row['seconds']:,.0f}",
            *(_shown(row[name]) for name in names),
        ]
        for row in ranked
    ]
    title = f"Search: {recipe.variant_name} on {settings['recipe']['dataset']}, {settings['algorithm']}"
    lead = f"python train.py --recipe-file {search_dir / BEST} trains the best one on all images."
    page.write_document(
        search_dir / runs.PAGE,
        title,
        [
            f'<p class="quiet">{page.escape(lead)}</p>' if top else "",
            page.tiles(tiles),
            *pictures,
            chosen,
            f"<h2>Trials, the best first</h2>{page.table(heads, cells, 'exports')}",
            page.settings("Settings", settings),
        ],
    )


def _shown(value):
    return "" if value is None else f"{value:g}"
