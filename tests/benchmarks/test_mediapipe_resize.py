import numpy as np
import pytest

from benchmarks import mediapipe_resize
from benchmarks.mediapipe_resize import Arguments, halved
from cvt_keras import Preprocessing


def test_halving_keeps_the_mean_and_ends_at_the_size():
    image = np.random.default_rng(0).integers(0, 256, (128, 64, 3), "uint8")
    small = halved(image, (32, 32))
    assert (small.shape, small.dtype) == ((32, 32, 3), np.uint8)
    np.testing.assert_allclose(small, image.reshape(32, 4, 32, 2, 3).mean(axis=(1, 3)), atol=0.76)  # rounding twice
    assert halved(image[:20, :45], (32, 48)).shape == (32, 48, 3)


def test_the_middle_is_what_the_network_sees():
    image = np.random.default_rng(0).integers(0, 256, (64, 130, 3), "uint8")
    preprocessing = Preprocessing(image_size=(8, 6), resize="crop", crop_pct=0.5)  # the image covers 16x12
    np.testing.assert_array_equal(mediapipe_resize.middle(image, preprocessing), image[16:48, 53:77])
    assert mediapipe_resize.middle(image, preprocessing.replace(resize="stretch")) is image


@pytest.mark.parametrize("change", [{"images": 0}, {"sides": ()}, {"sides": (0,)}])
def test_bad_arguments_are_refused(change, tmp_path):
    [name] = change
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1"):
        Arguments(tmp_path, **change)


def test_an_error_of_mediapipe_is_passed_on(monkeypatch, tmp_path):
    reason = "OSError: libEGL.so.1: cannot open shared object file: No such file or directory"
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho 'Traceback (most recent call last):' >&2\necho '{reason}' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(mediapipe_resize, "PYTHON", python)
    with pytest.raises(RuntimeError, match=f"^MediaPipe does not run: {reason}$"):
        mediapipe_resize.classify("a.tflite", [np.zeros((32, 32, 3), "uint8")])
