"""`load_run` on every backend. tests/predict/ tests the rest."""

import keras
import numpy as np
import pytest

from cvt_keras import CvT, load_run
from cvt_keras.data import images


def test_a_bare_cvt_gets_its_normalisation_and_classifies(tmp_path):
    preprocessing = {"mean": [0.4] * 3, "std": [0.2] * 3, "image_size": [16, 16]}
    model = CvT("cvt_tiny", 3, (None, None, 3), preprocessing=preprocessing)
    model.set_weights([value + 0.1 for value in model.get_weights()])
    model.save(tmp_path / "bare.keras")
    bare = load_run(tmp_path / "bare.keras")
    assert bare.class_names == ("0", "1", "2")
    assert bare.preprocessing.image_size == (16, 16)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 40, 3), "uint8")
    normalized = (images.stretch(pixels, (16, 16)).numpy() / 255 - 0.4) / 0.2
    logits = keras.ops.convert_to_numpy(model(normalized[None].astype("float32")))[0]
    [answer] = bare.predict(pixels, top=3)
    expected = np.exp(logits) / np.exp(logits).sum()
    assert dict(answer.top) == pytest.approx(dict(zip("012", expected.tolist())), abs=1e-5)
