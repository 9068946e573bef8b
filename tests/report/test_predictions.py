import numpy as np
import pytest

from cvt_keras.errors import RunError
from cvt_keras.report import predictions
from cvt_keras.report.predictions import Row

NAMES = ("cat", "a, 狗")


def test_predictions_are_read_as_they_were_written(tmp_path):
    assert predictions.read(tmp_path) is None
    written = predictions.from_labels(None, np.array([0, 1]), np.array([1, 1]), NAMES)
    assert written == [Row("0", "cat", "a, 狗"), Row("1", "a, 狗", "a, 狗")]
    predictions.write(tmp_path, written)
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.csv"]
    assert predictions.read(tmp_path) == written
    assert predictions.from_labels(("ab", "cd"), np.array([0, 0]), np.array([0, 1]), NAMES)[1] == Row("cd", "cat", "a, 狗")


@pytest.mark.parametrize("text", ["", "image,label\n0,cat\n", "image,label,prediction\n0,cat\n"])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / "predictions.csv").write_text(text)
    with pytest.raises(RunError, match=r"predictions\.csv is damaged") as error:
        predictions.read(tmp_path)
    assert error.value.hint.startswith("Remove it")
