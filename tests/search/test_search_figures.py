import numpy as np
import pytest

from cvt_keras.search import figures
from cvt_keras.search.space import Choice, Range


@pytest.fixture
def searched():
    """Four trials of a search, the best first, and its space."""
    space = {"peak_learning_rate": Range(1e-3, 4e-3, log=True), "stage0_depth": Choice((1, 2, 3))}
    rows = [(0.6, 2e-3, 3), (0.5, 1e-3, 1), (0.4, 4e-3, 2), (0.2, 2.5e-3, 1)]
    return [
        {"trial": f"{i}", "val_accuracy": top1, "peak_learning_rate": rate, "stage0_depth": depth}
        for i, (top1, rate, depth) in enumerate(rows)
    ], space


def test_parallel_coordinates_have_an_axis_per_name_and_a_line_per_trial(searched):
    trials, space = searched
    [axes] = figures.parallel_coordinates(trials, space, own="1").axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["peak learning rate", "stage0 depth", "top-1, validation"]
    lines = [line for line in axes.lines if len(line.get_xdata()) == 3]
    worst, *_, best = lines
    np.testing.assert_allclose(best.get_ydata(), [0.5, 1, 1])  # the geometric mean is half way up
    assert worst.get_ydata()[-1] == 0 and best.get_linewidth() > worst.get_linewidth()
    assert [line.get_linestyle() for line in lines].count("--") == 1
    assert {text.get_text() for text in axes.texts} == {"0.001", "0.004", "1", "3", "20.0%", "60.0%"}


def test_words_are_evenly_spaced_on_their_axis(searched):
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


def test_the_best_curves_and_that_of_the_recipe_are_in_the_legend():
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
