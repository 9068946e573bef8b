import numpy as np
import pytest
from small_sources import small_source

from benchmarks import unknown
from benchmarks.unknown import Arguments, main, rows, without
from cvt_keras.data import sources
from cvt_keras.preprocessing import Calibration


def test_unknown_classes_are_left_out_of_every_split():
    source = small_source("1a 2b 3a", "4a 5b", "6b 7a 8b")
    three = source.__class__(**{**vars(source), "class_names": ("a", "b", "c")})
    known, images = without(three, ("b",))
    assert known.class_names == ("a", "c")
    assert [list(split.labels) for split in (known.train, known.validation, known.test)] == [[0, 0], [0], [0]]
    assert [int(image.max()) for image in known.train.images] == [1, 3]
    assert [int(image.max()) for image in images] == [6, 8]
    for names in ((), ("d",), ("a", "b")):
        with pytest.raises(ValueError, match="unknown="):
            without(three, names)


def test_rows_by_hand():
    known = np.log([[0.9, 0.1], [0.2, 0.8]])
    unknown = np.log([[0.5, 0.5], [0.85, 0.15], [0.6, 0.4], [0.55, 0.45]])
    [(name, count, before, after, unsure)] = rows(known, {"x": unknown}, Calibration(1.0, 0.58))
    # Of 2 * 4 pairs, one is in the wrong order: 0.8 is less than 0.85.
    assert (name, count, before, after, unsure) == ("x", 4, 7 / 8, 7 / 8, 0.5)


@pytest.mark.slow
def test_it_measures_a_trained_network(cifar10_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(unknown.RECIPES, "tiny", unknown.RECIPES["smoke"])
    names = sources.load("cifar10", str(cifar10_dir)).class_names
    model = tmp_path / "model.keras"
    arguments = Arguments("tiny", names[:2], 1, 64, data_dir=str(cifar10_dir), model=model)
    measured = main(arguments)
    assert [row[0] for row in measured] == [f"{names[0]} and {names[1]}", "handwritten digits", "noise"]
    assert all(0 <= value <= 1 for row in measured for value in row[2:])
    assert "of 8 classes" in capsys.readouterr().out and model.exists()
    monkeypatch.setattr(unknown, "fit", None)  # the stored classifier is used
    np.testing.assert_allclose([row[2:] for row in main(arguments)], [row[2:] for row in measured], atol=1e-6)
