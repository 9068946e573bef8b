"""Figures of a run: curves, confusion matrix, calibration, most wrong images. And that of an image with its Grad-CAM.

matplotlib draws them, not a chart library in JavaScript: the report is then one page without scripts, which opens offline and
in a mail, and its figures can be copied.
"""

import collections
import contextlib
import functools
import io
import itertools
import unicodedata
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.special import softmax

from cvt_keras import runs
from cvt_keras.errors import MissingPackageError
from cvt_keras.report import metrics

try:
    from matplotlib import colormaps, font_manager, ft2font
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.textpath import text_to_path
    from matplotlib.ticker import MaxNLocator, PercentFormatter
except ImportError as error:
    raise MissingPackageError(
        f"the figures of a run need matplotlib: {error}", hint="Install it: pip install matplotlib"
    ) from error

CURVES = "curves.png"
CONFUSION = "confusion.png"
CALIBRATION = "calibration.png"
MOST_WRONG = "most_wrong.png"

MAP_COLOURS = "inferno"  # of maps: brightness rises evenly, also for colour-blind readers
# Okabe and Ito's other colours come after these two. Yellow is left out: it is too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
TRAINING, VALIDATION, GREY = "#0072B2", "#D55E00", "#666666"  # Okabe and Ito: safe for colour-blind readers
MAX_TICK_LABELS = 40
MAX_CLASSES_WITH_COUNTS = 20  # in a confusion matrix; the cells of a larger one are too small for numbers
MAX_NAME_WIDTH = 9  # of a class name, in font sizes: about 16 lower-case letters or 9 Chinese characters
MOST_WRONG_IMAGES = 24
CLASS_NAMES = "Class names"  # key of the .png metadata


def draw(run_dir, history, images=None, logits=None, labels=None, class_names=None, first_epoch=0, maps=None):
    """Writes the figures of a run to its folder: the curves and, if there are test images, the other three.

    Args:
        run_dir: the run folder.
        history: a dict per epoch, as `runs.read_history` returns it.
        images: the test images, uint8 arrays `(height, width, 3)` of any size; `None` without test results.
        logits: float `(n, classes)`.
        labels: int `(n,)`.
        class_names: in the order of the labels.
        first_epoch: index into `history` of the first epoch whose weights could be kept.
        maps: as in `most_wrong`.
    """
    (run_dir / runs.PLOTS).mkdir(exist_ok=True)
    save(curves(history, first_epoch), run_dir / runs.PLOTS / CURVES)
    if logits is not None:
        draw_results(run_dir / runs.PLOTS, images, logits, labels, class_names, maps)


def draw_results(folder, images, logits, labels, class_names, maps=None):
    """Writes three figures of test images to a folder: confusion matrix, calibration and the most wrong images.

    Args:
        folder: the folder.
        images, maps: as for `most_wrong`.
        logits, labels, class_names: as for `draw`.
    """
    names = picture_names(class_names)
    metadata = {CLASS_NAMES: legend_of(class_names)} if names.numbered else None
    save(confusion(metrics.confusion(logits, labels, len(class_names)), names), folder / CONFUSION, metadata)
    save(calibration(logits, labels), folder / CALIBRATION)
    save(most_wrong(images, logits, labels, names, maps), folder / MOST_WRONG, metadata)


def save(figure, path, metadata=None):
    """Writes a `Figure` as .png, atomically.

    Args:
        figure: a `Figure`.
        path: the file.
        metadata: a dict of key -> text to store in the file, or `None`.
    """
    with runs.whole(path) as temporary_path:
        temporary_path.write_bytes(png(figure, metadata))


def png(figure, metadata=None):
    """The bytes of a `Figure` as .png. For `metadata` see `save`."""
    FigureCanvasAgg(figure)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=144, metadata=metadata)
    return file.getvalue()


def is_numbered(path):
    """Whether a .png labels the classes with numbers instead of names.

    Read from the file's metadata: the page may be rewritten on a machine with other fonts.
    """
    with Image.open(path) as image:
        return CLASS_NAMES in image.info


def legend_of(class_names):
    """A line `number: name` for each class, counted from 1."""
    return "\n".join(f"{number}: {name}" for number, name in enumerate(class_names, start=1))


def curves(history, first_epoch=0):
    """Plots accuracy, cross-entropy and learning rate by epoch. A ring marks the best epoch from `first_epoch` on.

    Returns:
        A `Figure`.
    """
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    accuracy, loss, rate = figure.subplots(1, 3)
    epochs = [row["epoch"] for row in history]
    best = metrics.best_epoch(history, first_epoch)
    for axes, key, title in ((accuracy, "accuracy", "Accuracy"), (loss, "cross_entropy", "Cross-entropy, nats")):
        training, validation = [row[key] for row in history], [row[f"val_{key}"] for row in history]
        axes.plot(epochs, training, "o-", color=TRAINING, markersize=3, label="training, during the epoch")
        axes.plot(epochs, validation, "o-", color=VALIDATION, markersize=3, label="validation")
        value = best[f"val_{key}"]
        axes.plot(best["epoch"], value, "o", color=VALIDATION, markersize=9, fillstyle="none")
        axes.annotate(
            f"{value:.1%}" if key == "accuracy" else f"{value:.3f}",
            (best["epoch"], value),
            xytext=(0, 12 if key == "accuracy" else -12),  # clear of the curves
            textcoords="offset points",
            ha="center",
            va="center",
            color=VALIDATION,
        )
        axes.margins(x=0.12, y=0.15)  # room for the ring's number
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


def compared_curves(histories, kept_epochs, names):
    """Plots validation accuracy, validation and training cross-entropy of several runs by epoch. Rings mark the kept epochs.

    Args:
        histories: a history per run, as `runs.read_history` returns it.
        kept_epochs: the epoch per run, from 1, whose weights were kept, or `None` if it is unknown.
        names: a name per run.

    Returns:
        A `Figure`.
    """
    labels = picture_names(names)
    figure = Figure(figsize=(10, 3.9 + 0.2 * -(-len(names) // 3)), layout="constrained")
    panels = {
        "val_accuracy": "Accuracy, validation",
        "val_cross_entropy": "Cross-entropy, validation, nats",
        "cross_entropy": "Cross-entropy, training, nats",
    }
    for axes, (key, title) in zip(figure.subplots(1, len(panels)), panels.items()):
        lines = []
        for i, (history, kept) in enumerate(zip(histories, kept_epochs)):
            colour = COLOURS[i % len(COLOURS)]
            dashes = ("-", "--", ":")[i // len(COLOURS) % 3]
            epochs, values = [row["epoch"] for row in history], [row[key] for row in history]
            lines += axes.plot(epochs, values, dashes, marker="o", color=colour, markersize=3)
            if kept is not None and key != "cross_entropy":
                axes.plot(kept, values[epochs.index(kept)], "o", color=colour, markersize=9, fillstyle="none")
        axes.set_title(title, loc="left")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        style(axes)
        if key == "val_accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(1))
            axes.set_ylim(top=min(axes.get_ylim()[1], 1.01))
    texts = [text if labels.numbered else f"{number}: {text}" for number, text in enumerate(labels.texts, start=1)]
    legend = figure.legend(lines, texts, loc="outside lower left", ncols=3, frameon=False, fontsize="small")
    for text in legend.get_texts():
        text.set(fontfamily=labels.families, parse_math=False)  # a name may contain a dollar sign
    return figure


def confusion(counts, names):
    """Plots a confusion matrix: labels in rows, predictions in columns, coloured by each row's shares.

    Args:
        counts: int `(classes, classes)`.
        names: a `PictureNames`.

    Returns:
        A `Figure`.
    """
    n = len(names.texts)
    shares = counts / counts.sum(axis=1, keepdims=True).clip(1)
    side = min(max(4.5, 2.5 + 0.45 * n), 12)  # inches; the title needs 4.5
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    matrix = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    step = -(-n // MAX_TICK_LABELS)
    vertical = n > (99 if names.numbered else 5) or max(_width(text, names.families) for text in names.texts) > 3.5
    ticks = {"labels": names.texts[::step], "fontfamily": names.families, "parse_math": False}
    axes.set_xticks(range(0, n, step), rotation=90 if vertical else 0, **ticks)
    axes.set_yticks(range(0, n, step), **ticks)
    unit = ", class number" if names.numbered else ""
    axes.set_xlabel(f"prediction{unit}")
    axes.set_ylabel(f"label{unit}")
    axes.set_title("Images by label and prediction", loc="left")
    if n <= MAX_CLASSES_WITH_COUNTS:
        for row in range(n):
            for column in range(n):
                if counts[row, column]:
                    colour = "white" if shares[row, column] > 0.5 else "black"
                    axes.text(column, row, counts[row, column], ha="center", va="center", fontsize="small", color=colour)
    figure.colorbar(matrix, ax=axes, shrink=0.8, format=PercentFormatter(1), label="share of the label's images")
    return figure


def calibration(logits, labels):
    """Plots a reliability diagram: accuracy by confidence, and the number of images per bin.

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
    diagram.plot(confidence, accuracy, "o", color=VALIDATION, markersize=4, clip_on=False, label="mean confidence")
    diagram.set_ylabel("accuracy")
    diagram.set_ylim(0, 1)
    diagram.legend(frameon=False, loc="upper left", fontsize="small")
    error = metrics.calibration_error(confidence, accuracy, images)
    diagram.set_title(f"Expected calibration error {error:.1%}", loc="left")
    count.bar(left, images, width, align="edge", color=GREY, edgecolor="white")
    count.set_ylabel("images")
    count.set_xlabel("confidence")
    count.set_xlim(0, 1)
    count.xaxis.set_major_formatter(PercentFormatter(1))
    diagram.yaxis.set_major_formatter(PercentFormatter(1))
    for axes in (diagram, count):
        style(axes)
    return figure


def most_wrong(images, logits, labels, names, maps=None):
    """Plots the misclassified images with the highest cross-entropy, each with its label and prediction.

    Args:
        images: uint8 arrays `(height, width, 3)` of any size; or a dict with those of `metrics.worst` by index.
        logits: float `(n, classes)`.
        labels: int `(n,)`.
        names: a `PictureNames`.
        maps: a dict: the index of an image -> its pixels as the network sees them, `(height, width, 3)` in 0..255, and its
            Grad-CAM for the predicted class, `(height, width)`. Each overlay is below its image.

    Returns:
        A `Figure`.
    """
    worst = metrics.worst(logits, labels, MOST_WRONG_IMAGES)
    columns = 6
    rows = max(1, -(-len(worst) // columns))
    overlaid = bool(maps) and len(worst) > 0
    figure = Figure(figsize=(columns * 1.6, rows * (3.6 if overlaid else 2) + 0.4), layout="constrained")
    title = "Most wrong images: label, prediction" if len(worst) else "No image is misclassified"
    note = ". Below: the evidence for the prediction (Grad-CAM)" if overlaid else ""
    figure.suptitle(title + note, x=0.01, ha="left")
    predicted = metrics.predictions(logits)
    probabilities = softmax(logits, axis=1)
    grid = figure.subplots(rows * (2 if overlaid else 1), columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    if overlaid:
        for axes, i in zip(grid[1::2].flat, worst):
            pixels, values = maps[i]
            axes.imshow(overlay(pixels, values, values.max()), interpolation="nearest")
    for place, axes in enumerate(grid[:: 2 if overlaid else 1].flat):
        if place < len(worst):
            i = worst[place]
            axes.imshow(images[i], interpolation="nearest")
            label, prediction = (
                f"class {names.texts[c]}:" if names.numbered else names.texts[c] for c in (labels[i], predicted[i])
            )
            axes.set_title(
                f"{label} {probabilities[i, labels[i]]:.1%}\nas {prediction} {probabilities[i, predicted[i]]:.0%}",
                fontsize=8,
                fontfamily=names.families,
                parse_math=False,  # a class name may contain a dollar sign
            )
    return figure


# === Grad-CAM ===


def explanation(image, maps, classes, probabilities, names):
    """Plots an image and, for some classes, Grad-CAM as an overlay and as the map itself. All classes have one colour scale.

    Args:
        image: the pixels that the network sees, `(height, width, 3)` in 0..255.
        maps: for each class a map of `attention.grad_cam`, `(n, height, width)`.
        classes: the indices of the classes, `(n,)`.
        probabilities: of these classes, `(n,)`.
        names: a `PictureNames` of all classes.

    Returns:
        A `Figure`.
    """
    columns = len(maps) + 1
    tall = image.shape[0] / image.shape[1]
    figure = Figure(figsize=(columns * 2 + 0.8, 4 * min(max(tall, 0.4), 2.5) + 0.4), layout="constrained")
    grid = figure.subplots(2, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    top = np.max(maps)
    grid[0, 0].imshow(np.uint8(image), interpolation="nearest")
    grid[0, 0].set_title("image", fontsize=9)
    for (above, below), values, i, probability in zip(grid[:, 1:].T, maps, classes, probabilities, strict=True):
        above.imshow(overlay(image, values, top), interpolation="nearest")
        above.set_title(
            f"{'class ' if names.numbered else ''}{names.texts[i]} {probability:.1%}",
            fontsize=9,
            fontfamily=names.families,
            parse_math=False,
        )
        cell = tall * values.shape[1] / values.shape[0]  # height over width
        shown = below.imshow(values, cmap=MAP_COLOURS, vmin=0, vmax=top or 1, aspect=cell, interpolation="nearest")
    figure.colorbar(shown, ax=grid, aspect=40, pad=0.01, label="Grad-CAM")
    return figure


def overlay(image, values, top):
    """Lays a map over the grey form of an image.

    Args:
        image: `(height, width, 3)` in 0..255.
        values: the map, floats of at least 0, of any size: it is stretched bilinearly.
        top: the value of the brightest colour.

    Returns:
        Floats in 0..1, `(height, width, 3)`.
    """
    height, width = image.shape[:2]
    scaled = np.asarray(values, "float32") / (top or 1)
    stretched = np.asarray(Image.fromarray(scaled).resize((width, height), Image.Resampling.BILINEAR))
    grey = np.asarray(image, "float32").mean(axis=-1, keepdims=True) / 255
    return (0.5 * grey + 0.5 * colormaps[MAP_COLOURS](stretched)[..., :3]).clip(0, 1)


# === Class names ===


@dataclass(frozen=True)
class PictureNames:
    """The labels of the classes in figures.

    Args:
        texts: a short, unique label per class.
        families: the font families. matplotlib takes each glyph from the first that has it.
        numbered: whether `texts` are numbers, from 1, because some name can't be drawn.
    """

    texts: list[str]
    families: tuple[str, ...]
    numbered: bool


def picture_names(class_names):
    """Shortens class names for figures and finds fonts for them. If one can't be drawn, all classes get numbers instead.

    Returns:
        `PictureNames`.
    """
    names = [_composed(name) for name in class_names]
    characters = {character for name in names for character in name}
    if all(map(_stands_alone, characters)) and (families := _families(characters)) and (texts := _shortened(names, families)):
        return PictureNames(texts, families, numbered=False)
    return PictureNames([f"{number}" for number in range(1, len(names) + 1)], _default_families(), numbered=True)


def _composed(name):
    """Composes accents with their letters, which macOS stores as two characters, and replaces other spaces by plain ones."""
    return "".join(
        " " if unicodedata.category(character) == "Zs" else character for character in unicodedata.normalize("NFC", name)
    )


def _stands_alone(character):
    """Whether a character looks the same beside any other and is written from left to right.

    Before version 3.11 matplotlib draws glyph by glyph. It does not write from right to left (Arabic, Hebrew), join letters
    (Arabic), place vowels and accents around a letter (Devanagari, Thai) or combine emoji. Version 3.11 does, but it reverses
    a whole line in which such a name stands beside a number. Names with these characters are therefore not drawn.
    """
    right_to_left = unicodedata.bidirectional(character) in ("R", "AL", "AN")
    # Letters, numbers, punctuation, symbols and spaces; not marks, controls, joiners or private characters.
    return not right_to_left and (unicodedata.category(character)[0] in "LNPS" or character == " ")


def _shortened(names, families):
    """Shortens names to `MAX_NAME_WIDTH`: cuts the end or, if two would then be the same, the middle.

    Returns:
        A list, or `None` if two are the same either way.
    """
    for tail in (0.0, MAX_NAME_WIDTH / 2):
        texts = []
        for name in names:
            if _width(name, families) > MAX_NAME_WIDTH:
                end = _head(name[::-1], tail, families)[::-1].lstrip()
                name = f"{_head(name, MAX_NAME_WIDTH - 1 - tail, families).rstrip()}…{end}"
            texts.append(name)
        if len(set(texts)) == len(texts):
            return texts
    return None


def _head(text, max_width, families):
    """The longest prefix of `text` that is at most `max_width` font sizes wide."""
    widths = itertools.accumulate(_advance(character, families) for character in text)
    return text[: sum(width <= max_width for width in widths)]


def _width(text, families):
    """The width of a text, in font sizes."""
    return sum(_advance(character, families) for character in text)


@functools.cache
def _advance(character, families):
    font = font_manager.FontProperties(family=families, size=1)
    return text_to_path.get_text_width_height_descent(character, font, ismath=False)[0]


def _default_families():
    return tuple(font_manager.FontProperties().get_family())


def _families(characters):
    """The default font families, and installed ones for the characters that the default lacks.

    Returns:
        A tuple, or `None` if a character is in no installed font.
    """
    families = _default_families()
    missing = characters - {" "}
    missing -= _drawn(font_manager.findfont(font_manager.FontProperties()), missing)
    if not missing:
        return families
    mapped = collections.defaultdict(set)
    for entry in font_manager.fontManager.ttflist:
        # A last-resort font "has" every character, as a box.
        if entry.style == "normal" and "lastresort" not in entry.name.lower().replace(" ", ""):
            mapped[entry.name] |= _mapped(entry.fname, missing)
    for family in sorted(mapped, key=lambda name: (-len(mapped[name]), name)):
        # `findfont` gives the file that matplotlib will draw the family with.
        if mapped[family] & missing and (drawn := _drawn(font_manager.findfont(family), missing)):
            families += (family,)
            missing -= drawn
    return None if missing else families


def _mapped(path, characters):
    """The `characters` in the font's character map."""
    with contextlib.suppress(OSError, RuntimeError):  # a font that FreeType can't read
        table = ft2font.FT2Font(path).get_charmap()
        return {character for character in characters if ord(character) in table}
    return set()


def _drawn(path, characters):
    """The `characters` that the font has outlines for. Colour fonts have bitmaps, which matplotlib can't draw."""
    drawn = set()
    with contextlib.suppress(OSError, RuntimeError):
        font = ft2font.FT2Font(path)
        font.set_size(12, 72)
        for character in _mapped(path, characters):
            font.load_char(ord(character), flags=ft2font.LoadFlags.NO_HINTING)
            vertices, _ = font.get_path()
            if len(vertices):
                drawn.add(character)
    return drawn


# === Style ===


def style(axes):
    """Removes the top and right spines, and adds horizontal grid lines."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
