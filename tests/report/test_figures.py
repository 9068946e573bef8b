import itertools
import runpy
import sys

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from cvt_keras.errors import MissingPackageError
from cvt_keras.report import figures

HISTORY = [
    {
        "epoch": epoch,
        "learning_rate": 1e-3,
        "accuracy": accuracy - 0.1,
        "cross_entropy": 1.0,
        "val_accuracy": accuracy,
        "val_cross_entropy": 0.9,
    }
    for epoch, accuracy in enumerate([0.5, 0.75, 0.75], start=1)
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
    assert "No test image is misclassified" in figure._suptitle.get_text()


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackageError) as error:
        runpy.run_path(figures.__file__)
    assert error.value.hint == "Install it: pip install matplotlib" and "pip" not in error.value.summary
