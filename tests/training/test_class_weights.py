import json
import unicodedata

import numpy as np
import pytest

from cvt_keras.errors import RecipeError
from cvt_keras.training import class_weights


@pytest.fixture
def written(tmp_path):
    """A function that writes a file of weights and returns its path."""

    def write(content):
        path = tmp_path / "weights.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return str(path)

    return write


def test_auto_gives_each_class_the_same_weight():
    counts = np.array([152, 8, 0, 40])
    weights = np.array(class_weights.settle("auto", "abcd", counts))
    np.testing.assert_allclose(weights[[0, 1, 3]] * counts[[0, 1, 3]], 200 / 3)
    assert weights[2] == 0  # no images
    assert np.sum(weights * counts) / counts.sum() == pytest.approx(1)
    assert class_weights.settle("none", "abcd", counts) is None
    assert (class_weights.read("auto"), class_weights.read("none")) == ("auto", "none")


def test_a_file_names_each_class(written):
    weights = class_weights.read(written({"dog": 2, unicodedata.normalize("NFD", "é"): 0.5}))
    assert class_weights.settle(weights, ("é", "dog"), [1, 1]) == (0.5, 2.0)
    with pytest.raises(RecipeError) as error:
        class_weights.settle(weights, ("cat", "dog"), [1, 1])
    assert error.value.argument == "class_weights"
    assert error.value.details == ("missing: cat", "unknown: é")


@pytest.mark.parametrize(
    "content, part",
    [
        ("{", "JSON"),
        ("[1, 2]", "object"),
        ('{"a": 1, "a": 2}', "a occurs twice"),
        ({"a": 0}, "positive"),
        ({"a": -1.0}, "positive"),
        ({"a": float("inf")}, "positive"),
        ({"a": float("nan")}, "positive"),
        ({"a": "1"}, "positive"),
        ({"a": True}, "positive"),
    ],
)
def test_an_invalid_file_is_refused(written, content, part):
    path = written(content)
    with pytest.raises(RecipeError) as error:
        class_weights.read(path)
    assert (error.value.argument, error.value.exit_code) == ("class_weights", 2)
    assert path in error.value.summary and part in error.value.summary
    assert "--class-weights" in error.value.hint


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path / "automatic", tmp_path):
        with pytest.raises(RecipeError) as error:
            class_weights.read(str(path))
        assert str(path) in error.value.summary


def test_few_images_and_unequal_classes_are_warned_of():
    def warnings(counts, validation=100, weighted=False):
        return class_weights.warnings("abcdef"[: len(counts)], counts, validation, weighted)

    assert warnings([49, 10]) == []
    [unequal] = warnings([50, 10])
    assert "a has 50 training images and b 10" in unequal and "--class-weights auto" in unequal
    assert warnings([50, 10], weighted=True) == []
    [few] = warnings([9, 10, 8, 9, 9, 0])  # a class without images does not count as unequal
    assert few == "classes with fewer than 10 training images: f 0, c 8, a 9 and 2 more classes"
    [validation] = warnings([20, 20], validation=49)
    assert "49 validation images" in validation
    assert warnings([20, 20], validation=50) == []
    [test] = class_weights.warnings("ab", [20, 20], 100, False, test_counts=[5, 4])
    assert test == "classes with fewer than 5 test images, too few for a reliable accuracy: b 4"
