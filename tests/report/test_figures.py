import itertools
import pathlib
import runpy
import sys
import warnings

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from cvt_keras.errors import MissingPackageError
from cvt_keras.report import figures, metrics

HISTORY = [
    {
        "epoch": epoch,
        "learning_rate": 1e-3,
        "accuracy": accuracy - 0.1,
        "cross_entropy": 1.0,
        "val_accuracy": accuracy,
        "val_cross_entropy": 0.9,
        "val_loss": 1.0,
    }
    for epoch, accuracy in enumerate([0.5, 0.75, 0.75], start=1)
]
NAMES = ("a", "$b", "c")


@pytest.fixture
def shown():
    """Nine test images of three classes, three of them predicted as the next class."""
    labels = np.arange(9) % 3
    predicted = np.where(np.arange(9) < 3, (labels + 1) % 3, labels)
    logits = np.eye(3, dtype="float32")[predicted] * np.arange(1, 10, dtype="float32")[:, None]
    images = np.zeros((9, 6, 10, 3), "uint8") + np.arange(9, dtype="uint8")[:, None, None, None]
    return {"images": images, "logits": logits, "labels": labels}


def _texts(axes):
    return [text.get_text() for text in axes.texts]


def test_every_figure_is_written(tmp_path, shown):
    figures.draw(tmp_path, HISTORY, **shown, class_names=NAMES)
    files = {path.name: np.asarray(Image.open(path)) for path in (tmp_path / "plots").iterdir()}
    assert set(files) == {figures.CURVES, figures.CONFUSION, figures.CALIBRATION, figures.MOST_WRONG}
    for pixels in files.values():
        assert pixels.shape[0] > 200 and pixels.std() > 1
    assert not any(figures.is_numbered(path) for path in (tmp_path / "plots").iterdir())  # the names can be drawn


def test_without_test_images_only_the_curves_are_drawn(tmp_path):
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


def test_an_epoch_whose_weights_are_never_kept_is_not_marked():
    accuracy, loss, _ = figures.curves(HISTORY, first_epoch=2).axes
    assert list(accuracy.lines[2].get_xdata()) == list(loss.lines[2].get_xdata()) == [3]


def test_confusion_shows_counts_and_shares():
    counts = np.array([[3, 1], [0, 0]])
    axes = figures.confusion(counts, figures.picture_names(("a", "b"))).axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), [[0.75, 0.25], [0, 0]])
    assert _texts(axes) == ["3", "1"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]


@pytest.mark.parametrize("names", [("a", "b"), ("Cavalier King Charles spaniel", "an airport"), tuple("abcde")])
def test_the_labels_of_confusion_are_inside_the_figure_and_apart(names):
    n = len(names)
    figure = figures.confusion(np.eye(n, dtype=int), figures.picture_names(names))
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


def test_confusion_of_many_classes_stays_legible():
    names = [f"{i}" for i in range(100)]
    axes = figures.confusion(np.eye(100, dtype=int), figures.picture_names(names)).axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == names[::3]
    assert not axes.texts


def test_calibration_draws_the_bins(shown):
    diagram, count = figures.calibration(shown["logits"], shown["labels"]).axes
    assert sum(bar.get_height() for bar in count.patches) == 9
    assert "Expected calibration error" in diagram.get_title(loc="left")


def test_the_most_wrong_images_are_titled_with_label_and_prediction(shown):
    figure = figures.most_wrong(**shown, names=figures.picture_names(NAMES))
    pictures = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert [picture[0, 0, 0] for picture in pictures] == [2, 1, 0]
    assert pictures[0].shape == (6, 10, 3)
    first, second, *_ = (axes.get_title() for axes in figure.axes)
    assert first.startswith("c ") and "as a" in first
    assert second.startswith("$b ") and "as c" in second


@pytest.mark.parametrize("name", ["Cavalier King Charles spaniel", "MITSUBISHI OUTLANDER", "W" * 16])
def test_the_titles_of_the_most_wrong_do_not_overlap(name, shown):
    names = (name, f"{name}, liver and white", "c")
    figure = figures.most_wrong(**shown, names=figures.picture_names(names))
    FigureCanvasAgg(figure).draw()
    boxes = [axes.title.get_window_extent() for axes in figure.axes if axes.images]
    assert not any(one.overlaps(other) for one, other in itertools.pairwise(boxes))


def test_each_of_the_most_wrong_has_its_map_below_it(shown):
    pixels, maps = np.full((3, 8, 12, 3), 255.0), np.zeros((3, 2, 3))
    maps[0, 0, 0] = maps[1, 1, 2] = 1
    worst = metrics.worst(shown["logits"], shown["labels"], 3)
    drawn = dict(zip(worst.tolist(), zip(pixels, maps)))
    figure = figures.most_wrong(**shown, names=figures.picture_names(NAMES), maps=drawn)
    pictures = [axes.images[0].get_array() if axes.images else None for axes in figure.axes]
    assert len(pictures) == 12 and [picture is None for picture in pictures] == [False, False, False, True, True, True] * 2
    assert [picture[0, 0, 0] for picture in pictures[:3]] == [2, 1, 0]
    first, second, empty = (np.asarray(picture).sum(axis=-1) for picture in pictures[6:9])
    assert first.shape == (8, 12) and first[0, 0] == first.max() and second[-1, -1] == second.max()
    assert first[-1, -1] < first.max() and second[0, 0] < second.max()
    assert np.ptp(empty) == 0
    assert "Grad-CAM" in figure._suptitle.get_text()
    shown["logits"] = np.eye(3, dtype="float32")[shown["labels"]]
    assert "Grad-CAM" not in figures.most_wrong(**shown, names=figures.picture_names(NAMES))._suptitle.get_text()


def test_an_explanation_shows_image_maps_and_overlays_in_one_scale(tmp_path):
    image, maps = np.full((20, 40, 3), 200, "uint8"), np.zeros((2, 2, 4), "float32")
    maps[0, 0, 0], maps[1, 1, 3] = 4, 1
    figure = figures.explanation(image, maps, [2, 1], [0.75, 0.125], figures.picture_names(NAMES))
    picture, strong, weak, blank, *below = figure.axes
    assert [axes.get_title() for axes in (picture, strong, weak)] == ["image", "c 75.0%", "$b 12.5%"]
    np.testing.assert_array_equal(picture.images[0].get_array(), image)
    assert np.ptp(strong.images[0].get_array()) > 2 * np.ptp(weak.images[0].get_array())
    assert not blank.images
    for axes, values in zip(below, maps):
        np.testing.assert_array_equal(axes.images[0].get_array(), values)
        assert axes.images[0].get_clim() == (0, 4)
    figures.save(figure, tmp_path / "explanation.png")
    drawn = np.asarray(Image.open(tmp_path / "explanation.png"))
    assert drawn.shape[1] > 400 and drawn.std() > 1
    numbered = figures.PictureNames(["1", "2", "3"], figures.picture_names(NAMES).families, numbered=True)
    assert figures.explanation(image, maps * 0, [2, 1], [0.75, 0.125], numbered).axes[1].get_title() == "class 3 75.0%"


def test_a_perfect_network_has_no_wrong_images(shown):
    shown["logits"] = np.eye(3, dtype="float32")[shown["labels"]]
    figure = figures.most_wrong(**shown, names=figures.picture_names(NAMES))
    assert not any(axes.images for axes in figure.axes)
    assert "No image is misclassified" in figure._suptitle.get_text()


@pytest.fixture
def matplotlibs_fonts(monkeypatch):
    """Hides all fonts but matplotlib's own: Latin, Greek, Cyrillic, Hebrew, Arabic, some emoji and symbols."""
    manager = figures.font_manager.fontManager
    monkeypatch.setattr(manager, "ttflist", [])  # read anew: the user's cache of it can be of an environment that is gone
    for path in sorted(pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf").glob("*.ttf")):
        manager.addfont(path)


@pytest.mark.parametrize(
    "name",
    [
        *("猫", "tiger 虎", "แมว", "बिल्ली", "\U0001fae0"),  # no font has them
        *("قطة", "חתול"),  # DejaVu Sans has them, but from right to left
        *(
            "❤\ufe0f",
            "e\u0329",
            "a\tb",
            "a\u202eb",
            "\ue000",
        ),  # a selector, a mark without a letter of its own, controls, private
    ],
)
def test_all_classes_are_numbered_if_one_name_cannot_be_drawn(name, matplotlibs_fonts):
    names = figures.picture_names(("cat", name, "dog"))
    assert names.numbered and names.texts == ["1", "2", "3"]


def test_names_are_drawn_in_fonts_that_have_them(matplotlibs_fonts):
    names = figures.picture_names(("🐱 кот", "γάτα", "cafe\u0301\u3000noir"))
    assert names.texts == ["🐱 кот", "γάτα", "café noir"] and not names.numbered
    mixed = figures.picture_names(("ᶁ", "cat"))  # of matplotlib's fonts STIX alone has it
    assert mixed == figures.PictureNames(["ᶁ", "cat"], (*names.families, "STIXGeneral"), False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of missing glyphs
        FigureCanvasAgg(figures.confusion(np.eye(2, dtype=int), mixed)).draw()


def test_a_font_without_outlines_draws_nothing(matplotlibs_fonts, monkeypatch):
    monkeypatch.setattr(figures, "_drawn", lambda path, characters: set())  # like a font of coloured emoji
    assert figures.picture_names(("ᶁ", "cat")).numbered
    monkeypatch.undo()
    assert figures._drawn(figures.font_manager.findfont("DejaVu Sans"), {"a", "猫", "\u200b"}) == {"a"}
    assert figures._drawn(__file__, {"a"}) == set()  # no font at all


def test_long_names_stay_distinct(matplotlibs_fonts):
    assert figures.picture_names(("a long and winding name", "b")).texts == ["a long and wind…", "b"]
    alike = figures.picture_names(("Cavalier King Charles spaniel", "Cavalier King Charles toy", "ox")).texts
    assert alike == ["Cavali…s spaniel", "Cavali…arles toy", "ox"]
    middle = figures.picture_names(tuple(f"the same start {i} and the same end" for i in range(3)))
    assert middle.numbered and middle.texts == ["1", "2", "3"]


def test_numbered_figures_store_the_names(tmp_path, shown, matplotlibs_fonts):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures.draw(tmp_path, HISTORY, **shown, class_names=("猫", "قطة", "cat"))
    numbered = {path.name for path in (tmp_path / "plots").iterdir() if figures.is_numbered(path)}
    assert numbered == {figures.CONFUSION, figures.MOST_WRONG}
    assert Image.open(tmp_path / "plots" / figures.CONFUSION).info[figures.CLASS_NAMES] == "1: 猫\n2: قطة\n3: cat"
    names = figures.picture_names(("猫", "قطة", "cat"))
    axes = figures.confusion(np.eye(3, dtype=int), names).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "2", "3"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("prediction, class number", "label, class number")
    assert figures.most_wrong(**shown, names=names).axes[0].get_title().startswith("class 3: ")


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackageError) as error:
        runpy.run_path(figures.__file__)
    assert error.value.hint == "Install it: pip install matplotlib" and "pip" not in error.value.summary
