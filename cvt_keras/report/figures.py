"""The pictures of a run.

Drawn by matplotlib, not by a chart library in JavaScript, so that a report is one page without scripts: it opens offline and in
a mail, and its pictures can be copied.
"""

from scipy.special import softmax

from cvt_keras import runs
from cvt_keras.errors import MissingPackageError
from cvt_keras.report import metrics

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter
except ImportError as error:
    raise MissingPackageError(
        f"the figures of a run need matplotlib: {error}", hint="Install it: pip install matplotlib"
    ) from error

CURVES = "curves.png"
CONFUSION = "confusion.png"
CALIBRATION = "calibration.png"
MOST_WRONG = "most_wrong.png"

TRAINING, VALIDATION, GREY = "#0072B2", "#D55E00", "#666666"  # Okabe and Ito: safe for colour-blind readers
MOST_LABELS = 40  # along an axis
MOST_NUMBERS = 20  # in a row of a matrix
MOST_CHARACTERS = 16  # of a class name


def draw(run_dir, history, images=None, logits=None, labels=None, class_names=None, first_epoch=0):
    """Draws the figures of a run into its folder: the curves and, with test images, the other three.

    Args:
        run_dir: the run folder.
        history: a dict per epoch, as `runs.read_history` returns them.
        images: the test images, uint8 `(n, height, width, 3)`, or `None`.
        logits: float `(n, classes)`.
        labels: int `(n,)`.
        class_names: in the order of the labels.
        first_epoch: index into `history` of the first epoch whose weights could be kept.
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
    """Draws accuracy, cross-entropy and learning rate by epoch. A ring marks the best epoch from `first_epoch` on.

    Returns:
        A `Figure`.
    """
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    accuracy, loss, rate = figure.subplots(1, 3)
    epochs = [row["epoch"] for row in history]
    # Among equals the first, as `BestWeights` keeps it.
    best = max(range(first_epoch, len(history)), key=lambda i: history[i]["val_accuracy"])
    for axes, key, title in ((accuracy, "accuracy", "Accuracy"), (loss, "cross_entropy", "Cross-entropy, nats")):
        training, validation = [row[key] for row in history], [row[f"val_{key}"] for row in history]
        axes.plot(epochs, training, "o-", color=TRAINING, markersize=3, label="training, during the epoch")
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
        axes.margins(x=0.12, y=0.15)  # room for the number beside the ring
        axes.set_title(title, loc="left")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1))
    accuracy.legend(frameon=False, loc="lower right", fontsize="small")
    rate.plot(epochs, [row["learning_rate"] for row in history], "o-", color=GREY, markersize=3)
    rate.set_title("Learning rate after the epoch", loc="left")
    rate.set_ylim(bottom=0)
    for axes in (accuracy, loss, rate):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        style(axes)
    return figure


def confusion(counts, class_names):
    """Draws a confusion matrix: a row for each label, a column for each prediction, coloured by share of the label's images.

    Returns:
        A `Figure`.
    """
    n = len(class_names)
    names = [_shortened(name) for name in class_names]
    shares = counts / counts.sum(axis=1, keepdims=True).clip(1)
    side = min(max(4.5, 2.5 + 0.45 * n), 12)  # inches; the title needs 4.5
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    step = -(-n // MOST_LABELS)
    upright = n > 5 or max(map(len, names)) > 6
    axes.set_xticks(range(0, n, step), names[::step], rotation=90 if upright else 0, parse_math=False)
    axes.set_yticks(range(0, n, step), names[::step], parse_math=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("label")
    axes.set_title("Test images by label and prediction", loc="left")
    if n <= MOST_NUMBERS:
        for row in range(n):
            for column in range(n):
                if counts[row, column]:
                    colour = "white" if shares[row, column] > 0.5 else "black"
                    axes.text(column, row, counts[row, column], ha="center", va="center", fontsize="small", color=colour)
    figure.colorbar(drawn, ax=axes, shrink=0.8, format=PercentFormatter(1), label="share of the label's images")
    return figure


def calibration(logits, labels):
    """Draws a reliability diagram: accuracy by confidence, and the number of images in each bin.

    Returns:
        A `Figure`.
    """
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
        style(axes)
    return figure


def most_wrong(images, logits, labels, class_names, n=24):
    """Draws the misclassified images with the highest cross-entropy, each with its label and its prediction.

    Returns:
        A `Figure`.
    """
    chosen = metrics.worst(logits, labels, n)
    columns = 6
    rows = max(1, -(-len(chosen) // columns))
    figure = Figure(figsize=(columns * 1.6, rows * 2 + 0.4), layout="constrained")
    title = "The most wrong test images: label, prediction" if len(chosen) else "No test image is misclassified"
    figure.suptitle(title, x=0.01, ha="left")
    predicted = metrics.predictions(logits)
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
                parse_math=False,  # a class name may hold a dollar sign
            )
    return figure


def _shortened(name):
    return name if len(name) <= MOST_CHARACTERS else f"{name[: MOST_CHARACTERS - 1]}…"


def style(axes):
    """Removes the box around a plot, and adds horizontal grid lines."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
