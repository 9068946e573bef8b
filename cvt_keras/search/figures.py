"""Figures of a search: parallel coordinates, curves, importance."""

from cvt_keras.errors import MissingPackageError
from cvt_keras.report.figures import GREY, TRAINING, VALIDATION, style
from cvt_keras.search import space as spaces

try:
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter
except ImportError as error:
    raise MissingPackageError(
        f"the figures of a search need matplotlib: {error}", hint="Install it: pip install matplotlib"
    ) from error

MAX_AXES = 12  # in a row of parallel coordinates


def parallel_coordinates(trials, space, own=None):
    """Plots a line per trial through an axis per name of the space.

    The axes take as many rows as they need. Each row ends with the accuracy.

    Args:
        trials: dicts with `trial`, `val_accuracy` and the value of each name, the best first.
        space: name -> `Range` or `Choice`.
        own: the id of the trial of the recipe itself, or `None`. Its line is dashed.

    Returns:
        A `Figure`.
    """
    names = list(space)
    count = -(-len(names) // MAX_AXES)
    width = -(-len(names) // count)
    figure = Figure(figsize=(max(6, 1.8 + 0.78 * width), 4.4 * count), layout="constrained")
    for row, axes in enumerate(figure.subplots(count, 1, squeeze=False).flat):
        in_row = {name: space[name] for name in names[row * width : (row + 1) * width]}
        _draw_trials(axes, trials, in_row, own)
        _draw_marks(axes, trials, in_row)
        axes.set_xlim(-0.4, width + 0.4)
    return figure


def _draw_trials(axes, trials, space, own):
    low, high = _accuracies(trials)
    shades = colormaps["viridis"]
    for rank, trial in reversed(list(enumerate(trials))):  # draws the best last, on top
        is_own = trial["trial"] == own
        accuracy = (trial["val_accuracy"] - low) / (high - low or 1.0)
        axes.plot(
            range(len(space) + 1),
            [*(axis.place(trial[name]) for name, axis in space.items()), accuracy],
            "--" if is_own else "-",
            color=VALIDATION if is_own else shades(accuracy),
            linewidth=3.5 if rank == 0 else 2 if is_own else 1,
            alpha=1 if rank == 0 or is_own else 0.6,
            zorder=3 if is_own else 2,
        )


def _draw_marks(axes, trials, space):
    low, high = _accuracies(trials)
    marks = [[(axis.place(mark), spaces.shown(mark)) for mark in axis.marks] for axis in space.values()]
    for x, column in enumerate([*marks, [(0.0, f"{low:.1%}"), (1.0, f"{high:.1%}")]]):
        axes.axvline(x, color=GREY, linewidth=0.5, zorder=0)
        for height, text in column:
            if height == 0:
                position = {"xytext": (0, -5), "ha": "center", "va": "top"}
            elif height == 1:
                position = {"xytext": (0, 5), "ha": "center", "va": "bottom"}
            else:
                position = {"xytext": (4, 0), "ha": "left", "va": "center"}
            axes.annotate(text, (x, height), textcoords="offset points", fontsize=8, **position)
    titles = [*(name.replace("_", " ") for name in space), "top-1, validation"]
    axes.set_xticks(range(len(titles)), titles, rotation=35, ha="right", rotation_mode="anchor")
    axes.tick_params(axis="x", length=0, pad=14)
    axes.set_yticks([])
    axes.set_ylim(-0.03, 1.08)
    axes.spines[:].set_visible(False)


def _accuracies(trials):
    """The lowest and the highest validation accuracy."""
    accuracies = [trial["val_accuracy"] for trial in trials]
    return min(accuracies), max(accuracies)


def best_curves(curves, best, own=None):
    """Plots the validation accuracy by epoch: the best trials in colour, the others in grey.

    Args:
        curves: trial id -> a list of the accuracy after each epoch.
        best: the ids of the trials in colour, the best first.
        own: the id of the trial of the recipe itself, or `None`. It is drawn in colour too.

    Returns:
        A `Figure`.
    """
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    shades = colormaps["viridis_r"]
    coloured = dict.fromkeys([*best, *([own] if own is not None else [])])
    for trial, curve in curves.items():
        if trial not in coloured:
            axes.plot(range(1, len(curve) + 1), curve, "-", color=GREY, alpha=0.3, linewidth=1)
    for rank, trial in enumerate(coloured):
        curve = curves[trial]
        label = f"{trial}: {max(curve):.1%}" + (", the recipe itself" if trial == own else "")
        colour = VALIDATION if trial == own else shades(0.15 + 0.7 * rank / max(len(best), 1))
        line = "o--" if trial == own else "o-"
        axes.plot(range(1, len(curve) + 1), curve, line, color=colour, markersize=3, label=label)
    # Outside the plot, so that it hides no curve.
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small", title="trial")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_title("Top-1 on the validation images", loc="left")
    style(axes)
    return figure


def importance(shares):
    """Plots a bar with an error bar per name.

    Args:
        shares: name -> (mean, standard deviation), the most important first.

    Returns:
        A `Figure`.
    """
    figure = Figure(figsize=(7, 1 + 0.27 * len(shares)), layout="constrained")
    axes = figure.subplots()
    names = list(shares)[::-1]
    means, deviations = zip(*(shares[name] for name in names))
    axes.barh([name.replace("_", " ") for name in names], means, xerr=deviations, color=TRAINING, ecolor=GREY, height=0.7)
    axes.set_xlabel("R² lost when shuffled")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    return figure
