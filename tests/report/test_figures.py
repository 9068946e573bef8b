import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from cvt_keras.report import figures
from cvt_keras.search.space import Choice, Range

HISTORY = [
    {
        "epoch": epoch,
        "learning_rate": 1e-3,
        "accuracy": accuracy - 0.1,
        "cross_entropy": 1.0,
        "val_accuracy": accuracy,
        "val_cross_entropy": 0.9,
    }
    for epoch, accuracy in enumerate([0.5, 0.75, 0.75])
]
NAMES = ("a", "$b", "c")


@pytest.fixture
def shown():
    """Nine test images of three classes, three of them taken for the next class."""
    labels = np.arange(9) % 3
    predicted = np.where(np.arange(9) < 3, (labels + 1) % 3, labels)
    logits = np.eye(3, dtype="float32")[predicted] * np.arange(1, 10, dtype="float32")[:, None]
    images = np.zeros((9, 8, 8, 3), "uint8") + np.arange(9, dtype="uint8")[:, None, None, None]
    return {"images": images, "logits": logits, "labels": labels}


def _texts(axes):
    return [text.get_text() for text in axes.texts]


def test_every_picture_is_drawn_whole(tmp_path, shown):
    figures.draw(tmp_path, HISTORY, **shown, class_names=NAMES)
    files = {path.name: np.asarray(Image.open(path)) for path in (tmp_path / "plots").iterdir()}
    assert set(files) == {figures.CURVES, figures.CONFUSION, figures.CALIBRATION, figures.MOST_WRONG}
    for pixels in files.values():
        assert pixels.shape[0] > 200 and pixels.std() > 1


def test_without_test_images_there_are_the_curves(tmp_path):
    figures.draw(tmp_path, HISTORY)
    assert [path.name for path in (tmp_path / "plots").iterdir()] == [figures.CURVES]


def test_curves_count_epochs_from_one_and_mark_the_best():
    accuracy, loss, rate = figures.curves(HISTORY).axes
    training, validation, mark = accuracy.lines
    assert training.get_xdata().tolist() == [1, 2, 3]
    assert list(validation.get_ydata()) == [0.5, 0.75, 0.75]
    assert list(mark.get_xdata()) == [2]  # the first of equals
    assert (_texts(accuracy), _texts(loss)) == (["75.0%"], ["0.900"])
    assert rate.lines[0].get_ydata().tolist() == [1e-3] * 3


def test_an_epoch_that_could_not_be_kept_is_not_marked():
    accuracy, loss, _ = figures.curves(HISTORY, first_epoch=2).axes
    assert list(accuracy.lines[2].get_xdata()) == list(loss.lines[2].get_xdata()) == [3]


FILES = [
    {"run": "ten", "file": "float32", "top1": 0.84, "gzip": 4_000_000},
    {"run": "ten", "file": "int8", "top1": 0.84, "gzip": 1_000_000},
    {"run": "pruned", "file": "int8", "top1": 0.83, "gzip": 500_000},
    {"run": "clustered", "file": "int8", "top1": 0.82, "gzip": 600_000},
]


def test_the_front_is_of_files_that_none_beats():
    assert figures.pareto(FILES) == FILES[1:3]
    assert figures.pareto([FILES[0], dict(FILES[0])]) == [FILES[0]] * 2


def test_the_trade_shows_each_file_and_the_front():
    figure = figures.trade(FILES)
    [axes] = figure.axes
    front, *points = axes.lines
    assert (list(front.get_xdata()), list(front.get_ydata())) == ([0.5, 1.0], [0.83, 0.84])
    assert [(point.get_xdata()[0], point.get_ydata()[0]) for point in points] == [
        (file["gzip"] / 1e6, file["top1"]) for file in FILES
    ]
    assert len({point.get_color() for point in points}) == len({file["run"] for file in FILES})
    assert [text.get_text() for text in axes.get_legend().get_texts()][1:] == ["float32", "int8"]
    [runs] = figure.legends
    assert [text.get_text() for text in runs.get_texts()] == list(dict.fromkeys(file["run"] for file in FILES))
    assert not axes.texts


def test_a_file_far_below_the_best_does_not_press_the_others_together():
    [axes] = figures.trade([*FILES, {"run": "lost", "file": "int8", "top1": 0.2, "gzip": 100_000}]).axes
    assert axes.get_ylim()[0] == pytest.approx(0.84 - figures.MOST_POINTS)
    assert _texts(axes) == ["20.0%"]


def test_a_picture_is_saved_whole(tmp_path):
    figures.save(figures.trade(FILES), tmp_path / "trade.png")
    assert np.asarray(Image.open(tmp_path / "trade.png")).std() > 1
    assert [path.name for path in tmp_path.iterdir()] == ["trade.png"]


def test_confusion_shows_counts_and_shares():
    counts = np.array([[3, 1], [0, 0]])
    axes = figures.confusion(counts, ("a", "b")).axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), [[0.75, 0.25], [0, 0]])
    assert _texts(axes) == ["3", "1"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]


@pytest.mark.parametrize("names", [("a", "b"), ("Cavalier King Charles spaniel", "an airport"), tuple("abcde")])
def test_nothing_of_confusion_is_cut_off(names):
    n = len(names)
    figure = figures.confusion(np.eye(n, dtype=int), names)
    FigureCanvasAgg(figure).draw()
    matrix, bar = figure.axes
    boxes = [
        text.get_window_extent() for text in (matrix.title, matrix._left_title, bar.yaxis.label, *matrix.get_xticklabels())
    ]
    for box in boxes:
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1
    labels = boxes[3:]
    assert not any(one.overlaps(other) for one, other in itertools.pairwise(labels))
    assert max(len(label.get_text()) for label in matrix.get_xticklabels()) <= figures.MOST_CHARACTERS


def test_confusion_of_many_classes_stays_legible():
    names = [f"{i}" for i in range(100)]
    axes = figures.confusion(np.eye(100, dtype=int), names).axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == names[::3]
    assert not axes.texts


def test_calibration_draws_the_bins(shown):
    diagram, count = figures.calibration(shown["logits"], shown["labels"]).axes
    assert sum(bar.get_height() for bar in count.patches) == 9
    assert "expected error" in diagram.get_title(loc="left")


def test_the_most_wrong_come_first_with_label_and_prediction(shown):
    figure = figures.most_wrong(**shown, class_names=NAMES)
    assert [axes.images[0].get_array()[0, 0, 0] for axes in figure.axes if axes.images] == [2, 1, 0]
    first, second, *_ = (axes.get_title() for axes in figure.axes)
    assert first.startswith("c ") and "as a" in first
    assert second.startswith("$b ") and "as c" in second


def test_the_names_of_the_most_wrong_do_not_run_into_each_other(shown):
    names = ("Cavalier King Charles spaniel", "English springer spaniel, liver and white", "c")
    figure = figures.most_wrong(**shown, class_names=names)
    FigureCanvasAgg(figure).draw()
    boxes = [axes.title.get_window_extent() for axes in figure.axes if axes.images]
    assert not any(one.overlaps(other) for one, other in itertools.pairwise(boxes))


def test_a_perfect_network_has_no_wrong_images(shown):
    shown["logits"] = np.eye(3, dtype="float32")[shown["labels"]]
    figure = figures.most_wrong(**shown, class_names=NAMES)
    assert not any(axes.images for axes in figure.axes)
    assert "No test image is wrong" in figure._suptitle.get_text()


@pytest.fixture
def searched():
    """Four trials of a search, the best first, and its space."""
    space = {"peak_learning_rate": Range(1e-3, 4e-3, log=True), "stage0_depth": Choice((1, 2, 3))}
    rows = [(0.6, 2e-3, 3), (0.5, 1e-3, 1), (0.4, 4e-3, 2), (0.2, 2.5e-3, 1)]
    return [
        {"trial": f"{i}", "val_accuracy": top1, "peak_learning_rate": rate, "stage0_depth": depth}
        for i, (top1, rate, depth) in enumerate(rows)
    ], space


def test_parallel_coordinates_have_an_axis_for_each_name_and_a_line_for_each_trial(searched):
    trials, space = searched
    [axes] = figures.parallel_coordinates(trials, space, own="1").axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["peak learning rate", "stage0 depth", "top-1, validation"]
    lines = [line for line in axes.lines if len(line.get_xdata()) == 3]
    worst, *_, best = lines
    np.testing.assert_allclose(best.get_ydata(), [0.5, 1, 1])  # the geometric mean is half way up
    assert worst.get_ydata()[-1] == 0 and best.get_linewidth() > worst.get_linewidth()
    assert [line.get_linestyle() for line in lines].count("--") == 1
    assert {text.get_text() for text in axes.texts} == {"0.001", "0.004", "1", "3", "20.0%", "60.0%"}


def test_words_have_a_place_each_on_their_axis(searched):
    trials, _ = searched
    space = {"decay": Choice(("linear", "cosine", "constant"))}
    words = [{**trial, "decay": word} for trial, word in zip(trials, ("constant", "cosine", "linear"))]
    [axes] = figures.parallel_coordinates(words, space).axes
    heights = [line.get_ydata()[0] for line in axes.lines if len(line.get_xdata()) == 2 and list(line.get_xdata()) == [0, 1]]
    assert sorted(heights) == [0, 0.5, 1][: len(words)]
    assert {"linear", "cosine", "constant"} <= {text.get_text() for text in axes.texts}


def test_many_names_take_several_rows(searched):
    trials, _ = searched
    names = [f"name{i}" for i in range(23)]
    space = dict.fromkeys(names, Range(0.0, 1.0))
    rows = figures.parallel_coordinates([{**trial, **dict.fromkeys(names, 0.5)} for trial in trials], space).axes
    assert [len(axes.get_xticklabels()) for axes in rows] == [13, 12]


def test_the_best_curves_are_named_and_the_recipe_s_own_too():
    curves = {"0": [0.1, 0.2], "1": [0.3, 0.5], "2": [0.2, 0.4], "3": [0.1, 0.1]}
    [axes] = figures.best_curves(curves, ["1", "2"], own="0").axes
    assert len(axes.lines) == 4
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "1: 50.0%",
        "2: 40.0%",
        "0: 20.0%, the recipe itself",
    ]


def test_the_most_important_name_is_at_the_top():
    [axes] = figures.importance({"warmup": (0.5, 0.1), "peak_learning_rate": (0.2, 0.1)}).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["peak learning rate", "warmup"]
    assert [bar.get_width() for bar in axes.patches] == [0.2, 0.5]
