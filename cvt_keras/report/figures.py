"""The pictures of a run, of files beside each other, and of a search."""

from scipy.special import softmax

from cvt_keras import runs
from cvt_keras.report import metrics

try:
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator, PercentFormatter, ScalarFormatter
except ImportError as error:
    raise ImportError(f"A run's plots need matplotlib: pip install matplotlib ({error})") from error

# In the order of the page.
CURVES = "curves.png"
CONFUSION = "confusion.png"
CALIBRATION = "calibration.png"
MOST_WRONG = "most_wrong.png"

TRAINING, VALIDATION, GREY = "#0072B2", "#D55E00", "#666666"  # Okabe and Ito: apart for every eye
MOST_LABELS = 40  # as many as can be read along an axis
MOST_NUMBERS = 20  # and in a matrix
MOST_AXES = 12  # side by side, of parallel coordinates
MOST_POINTS = 0.03  # of accuracy that a picture of trades shows
MOST_CHARACTERS = 16  # of a class name, where there is little room


def draw(run_dir, history, images=None, logits=None, labels=None, class_names=None, first_epoch=0):
    """Draws a run into its folder's plots: the curves, and with test images the other three.

    Args:
        run_dir: the run folder.
        history: a dict for each epoch, as `history.csv` has them.
        images: uint8 `(n, height, width, 3)`, of the test split.
        logits: float `(n, classes)`, for them.
        labels: int `(n,)`, of them.
        class_names: in the order of the labels.
        first_epoch: counted from 0, whose weights could be kept.
    """
    figures = {CURVES: curves(history, first_epoch)}
    if logits is not None:
        figures[CONFUSION] = confusion(metrics.confusion(logits, labels, len(class_names)), class_names)
        figures[CALIBRATION] = calibration(logits, labels)
        figures[MOST_WRONG] = most_wrong(images, logits, labels, class_names)
    (run_dir / runs.PLOTS).mkdir(exist_ok=True)
    for name, figure in figures.items():
        save(figure, run_dir / runs.PLOTS / name)


def save(figure, path):
    """Writes a `Figure` as .png, whole or not at all."""
    with runs.whole(path) as aside:
        FigureCanvasAgg(figure)
        figure.savefig(aside, format="png", dpi=144)


def curves(history, first_epoch=0):
    """Accuracy and cross-entropy of each epoch, the best from `first_epoch` on marked, and the learning rate -> `Figure`."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    accuracy, loss, rate = figure.subplots(1, 3)
    epochs = [row["epoch"] for row in history]
    # The first of equals, as the run keeps it.
    best = max(range(first_epoch, len(history)), key=lambda i: history[i]["val_accuracy"])
    for axes, key, title in ((accuracy, "accuracy", "Accuracy"), (loss, "cross_entropy", "Cross-entropy, nats")):
        training, validation = [row[key] for row in history], [row[f"val_{key}"] for row in history]
        axes.plot(epochs, training, "o-", color=TRAINING, markersize=3, label="training, as it goes")
        axes.plot(epochs, validation, "o-", color=VALIDATION, markersize=3, label="validation")
        axes.plot(epochs[best], validation[best], "o", color=VALIDATION, markersize=9, fillstyle="none")
        axes.annotate(
            f"{validation[best]:.1%}" if key == "accuracy" else f"{validation[best]:.3f}",
            (epochs[best], validation[best]),
            xytext=(0, 12 if key == "accuracy" else -12),  # away from the curves
            textcoords="offset points",
            ha="center",
            va="center",
            color=VALIDATION,
        )
        axes.margins(y=0.15)
        axes.set_title(title, loc="left")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1))
    accuracy.legend(frameon=False, loc="lower right", fontsize="small")
    rate.plot(epochs, [row["learning_rate"] for row in history], "o-", color=GREY, markersize=3)
    rate.set_title("Learning rate after the epoch", loc="left")
    rate.set_ylim(bottom=0)
    for axes in (accuracy, loss, rate):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        _plain(axes)
    return figure


def confusion(counts, class_names):
    """A matrix of images -> `Figure`: a row for each label, a column for each prediction, as shares of the label's images."""
    n = len(class_names)
    names = [_shortened(name) for name in class_names]
    shares = counts / counts.sum(axis=1, keepdims=True).clip(1)
    side = min(max(4.5, 2.5 + 0.45 * n), 12)  # inches; the least that the title needs
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    step = -(-n // MOST_LABELS)
    upright = n > 5 or max(map(len, names)) > 6
    axes.set_xticks(range(0, n, step), names[::step], rotation=90 if upright else 0, parse_math=False)
    axes.set_yticks(range(0, n, step), names[::step], parse_math=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("label")
    axes.set_title("Test images of each label by prediction", loc="left")
    if n <= MOST_NUMBERS:
        for row in range(n):
            for column in range(n):
                if counts[row, column]:
                    colour = "white" if shares[row, column] > 0.5 else "black"
                    axes.text(column, row, counts[row, column], ha="center", va="center", fontsize="small", color=colour)
    figure.colorbar(drawn, ax=axes, shrink=0.8, format=PercentFormatter(1), label="share of the label's images")
    return figure


def calibration(logits, labels):
    """A reliability diagram -> `Figure`: the accuracy among images of about the same confidence, and how many these are."""
    confidence, accuracy, images = metrics.reliability(logits, labels)
    figure = Figure(figsize=(5, 5), layout="constrained")
    diagram, count = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    width = 1 / len(images)
    left = [i * width for i in range(len(images))]
    diagram.bar(left, accuracy, width, align="edge", color=TRAINING, edgecolor="white", alpha=0.6)
    diagram.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1, label="perfectly calibrated")
    diagram.plot(confidence, accuracy, "o", color=VALIDATION, markersize=4, clip_on=False, label="mean confidence of the bin")
    diagram.set_ylabel("accuracy")
    diagram.set_ylim(0, 1)
    diagram.legend(frameon=False, loc="upper left", fontsize="small")
    error = metrics.calibration_error(confidence, accuracy, images)
    diagram.set_title(f"Calibration: expected error {error:.1%}", loc="left")
    count.bar(left, images, width, align="edge", color=GREY, edgecolor="white")
    count.set_ylabel("images")
    count.set_xlabel("confidence")
    count.set_xlim(0, 1)
    count.xaxis.set_major_formatter(PercentFormatter(1))
    diagram.yaxis.set_major_formatter(PercentFormatter(1))
    for axes in (diagram, count):
        _plain(axes)
    return figure


def most_wrong(images, logits, labels, class_names, n=24):
    """The images with the highest cross-entropy -> `Figure`: each with its label, and what it was taken for."""
    chosen = metrics.worst(logits, labels, n)
    columns = 6
    rows = max(1, -(-len(chosen) // columns))
    figure = Figure(figsize=(columns * 1.6, rows * 2 + 0.4), layout="constrained")
    title = "The most wrong test images: label, prediction" if len(chosen) else "No test image is wrong"
    figure.suptitle(title, x=0.01, ha="left")
    predicted = metrics.predictions(logits, labels)
    probabilities = softmax(logits, axis=1)
    for place, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.axis("off")
        if place < len(chosen):
            i = chosen[place]
            axes.imshow(images[i], interpolation="nearest")
            axes.set_title(
                f"{_shortened(class_names[labels[i]])} {probabilities[i, labels[i]]:.1%}\n"
                f"as {_shortened(class_names[predicted[i]])} {probabilities[i, predicted[i]]:.0%}",
                fontsize=8,
                parse_math=False,  # a folder's class may hold a dollar sign
            )
    return figure


def trade(files):
    """Accuracy against the bytes that are sent -> `Figure`: a point for each file, a line along those that none beats in both.

    A colour is a run, a mark a kind of file. Files far below the best one lie on the lower edge, with their accuracy beside
    them: they would press the others together.

    Args:
        files: dicts of `run`, `file` (its kind), `top1` and `gzip` (bytes).
    """
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    floor = max(file["top1"] for file in files) - MOST_POINTS
    front = sorted(pareto(files), key=lambda file: file["gzip"])
    [line] = axes.plot(
        [file["gzip"] / 1e6 for file in front],
        [max(floor, file["top1"]) for file in front],
        drawstyle="steps-post",
        color=GREY,
        linewidth=1,
        label="no file is both smaller and better",
    )
    runs_of = list(dict.fromkeys(file["run"] for file in files))
    shades = colormaps["tab20"].colors  # ten strong ones, each followed by its pale one
    shades = [*shades[::2], *shades[1::2]]
    colours = {run: shades[i % len(shades)] for i, run in enumerate(runs_of)}
    marks = dict(zip(sorted({file["file"] for file in files}), "osD^"))
    low = []  # MB of those on the edge
    for file in files:
        place = file["gzip"] / 1e6, max(floor, file["top1"])
        axes.plot(*place, marks[file["file"]], color=colours[file["run"]], markersize=8, alpha=0.8, clip_on=False)
        if file["top1"] < floor:
            height = 8 + 10 * sum(0.9 < other / place[0] < 1.1 for other in low)  # of neighbours one above the other
            axes.annotate(f"{file['top1']:.1%}", place, xytext=(0, height), textcoords="offset points", ha="center", fontsize=8)
            low.append(place[0])
    if any(file["top1"] < floor for file in files):
        axes.set_ylim(bottom=floor)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(ScalarFormatter())
    axes.set_xlabel("MB, as gzip sends them")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    axes.set_title("Top-1 on the test images", loc="left")
    kinds = [
        Line2D([], [], marker=mark, color=GREY, linestyle="", label=kind.replace("_", " ")) for kind, mark in marks.items()
    ]
    axes.legend(handles=[line, *kinds], frameon=False, loc="lower right", fontsize="small")
    shown = [Line2D([], [], marker="o", color=colour, linestyle="", label=run) for run, colour in colours.items()]
    figure.legend(handles=shown, frameon=False, loc="outside right upper", fontsize="small")
    _plain(axes)
    return figure


def pareto(files):
    """Those of which no other is as good and smaller, or as small and better."""
    return [
        file
        for file in files
        if not any(
            other["top1"] >= file["top1"]
            and other["gzip"] <= file["gzip"]
            and (other["top1"], other["gzip"]) != (file["top1"], file["gzip"])
            for other in files
        )
    ]


def parallel_coordinates(trials, space, own=None):
    """A line for each trial of a search across an axis for each name of its space -> `Figure`.

    Rows of axes, as many as can be read, each of which ends with the accuracy.

    Args:
        trials: dicts of `trial`, `val_accuracy` and a value for each name, the best first.
        space: name -> `Range` or `Choice`, with `marks` and their `place`.
        own: the trial of the recipe that is varied, or `None`.
    """
    names = list(space)
    count = -(-len(names) // MOST_AXES)
    width = -(-len(names) // count)
    figure = Figure(figsize=(max(6, 1.8 + 0.78 * width), 4.4 * count), layout="constrained")
    for row, axes in enumerate(figure.subplots(count, 1, squeeze=False).flat):
        _draw_coordinates(axes, trials, space, names[row * width : (row + 1) * width], own)
        axes.set_xlim(-0.4, width + 0.4)
    return figure


def _draw_coordinates(axes, trials, space, names, own):
    accuracies = [trial["val_accuracy"] for trial in trials]
    low, high = min(accuracies), max(accuracies)
    spread = high - low or 1.0
    shades = colormaps["viridis"]
    for place, trial in reversed(list(enumerate(trials))):  # the best on top
        is_own = trial["trial"] == own
        heights = [*(space[name].place(trial[name]) for name in names), (trial["val_accuracy"] - low) / spread]
        axes.plot(
            range(len(names) + 1),
            heights,
            "--" if is_own else "-",
            color=VALIDATION if is_own else shades((trial["val_accuracy"] - low) / spread),
            linewidth=3.5 if place == 0 else 2 if is_own else 1,
            alpha=1 if place == 0 or is_own else 0.6,
            zorder=3 if is_own else 2,
        )
    marks = [[(where.place(value), shown(value)) for value in where.marks] for where in map(space.get, names)]
    for place, column in enumerate([*marks, [(0.0, f"{low:.1%}"), (1.0, f"{high:.1%}")]]):
        axes.axvline(place, color=GREY, linewidth=0.5, zorder=0)
        for height, text in column:
            shift, across, up = {0: ((0, -5), "center", "top"), 1: ((0, 5), "center", "bottom")}.get(
                height, ((4, 0), "left", "center")
            )
            at = {"xytext": shift, "textcoords": "offset points", "ha": across, "va": up, "fontsize": 8}
            axes.annotate(text, (place, height), **at)
    titles = [name.replace("_", " ") for name in names]
    axes.set_xticks(range(len(names) + 1), [*titles, "top-1, validation"], rotation=35, ha="right", rotation_mode="anchor")
    axes.tick_params(axis="x", length=0, pad=14)
    axes.set_yticks([])
    axes.set_ylim(-0.03, 1.08)
    axes.spines[:].set_visible(False)


def shown(value):
    """A value of a recipe as it is told: a number without needless digits."""
    return value if isinstance(value, str) else f"{value:g}"


def best_curves(curves, best, own=None):
    """Validation accuracy after each epoch -> `Figure`: of the best trials in colour, of the others in grey.

    Args:
        curves: trial -> a list.
        best: the trials to name, the best first.
        own: the trial of the recipe that is varied, or `None`: it is named too.
    """
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    shades = colormaps["viridis_r"]
    named = dict.fromkeys([*best, *([own] if own is not None else [])])
    for trial, curve in curves.items():
        if trial not in named:
            axes.plot(range(1, len(curve) + 1), curve, "-", color=GREY, alpha=0.3, linewidth=1)
    for place, trial in enumerate(named):
        curve = curves[trial]
        label = f"{trial}: {max(curve):.1%}" + (", the recipe itself" if trial == own else "")
        colour = VALIDATION if trial == own else shades(0.15 + 0.7 * place / max(len(best), 1))
        style = "o--" if trial == own else "o-"
        axes.plot(range(1, len(curve) + 1), curve, style, color=colour, markersize=3, label=label)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small", title="trial")  # over no curve
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_title("Top-1 on the validation images", loc="left")
    _plain(axes)
    return figure


def importance(shares):
    """A bar for each name with its deviation -> `Figure`.

    Args:
        shares: name -> (mean, standard deviation), the most important first.
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


def _shortened(name):
    return name if len(name) <= MOST_CHARACTERS else f"{name[: MOST_CHARACTERS - 1]}…"


def _plain(axes):
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
