"""MediaPipe's ImageClassifier, which apps on Android and iOS use, against LiteRT on the same pixels."""

import re
import subprocess
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from sklearn import datasets
from tools import require

from benchmarks import mediapipe_resize
from cvt_keras import build_classifier, preprocessing_of
from cvt_keras.data import images
from cvt_keras.export import tflite
from cvt_keras.export.verify import TFLITE_FORMATS

# Both run TFLite's kernels in float32 with XNNPACK, each those of its own build. For int8 the two builds may round differently,
# by one step of the uint8 probabilities: 1/256.
TOLERANCE = {"float32": 1e-5, "float16": 1e-5, "dynamic_int8": 1e-5, "int8": 1 / 256}


@pytest.fixture(scope="module")
def classify():
    require(mediapipe_resize.PYTHON.exists(), mediapipe_resize.INSTALL)
    return mediapipe_resize.classify


def _scores(answers):
    """The probabilities of MediaPipe's answers, `(n, classes)`, in the order of the output."""
    return np.array([[row["score"] for row in sorted(rows, key=lambda row: row["index"])] for rows in answers])


def _sampled(image, size):
    """Resizes as MediaPipe does on a CPU: bilinear, without half-pixel centres or antialiasing.

    It samples at `i * side / size`, rounded to a 32nd of a pixel.
    """
    for axis, target in enumerate(size):
        side = image.shape[axis]
        position = np.round(32 * np.arange(target) * side / target) / 32
        low = position.astype(int)
        weight = (position - low)[:, None] if axis else (position - low)[:, None, None]
        image = image.take(low, axis) * (1 - weight) + image.take(np.minimum(low + 1, side - 1), axis) * weight
    return np.floor(image + 0.5).astype("uint8")


@pytest.mark.parametrize("kind", TFLITE_FORMATS)
def test_names_and_probabilities_match_litert(kind, classify, exported, classifier, test_images, litert):
    file = exported / "export" / "tflite" / f"{kind}.tflite"
    sides = [(24, 40)] * 20 + [(64, 64), (50, 70), (20, 45), (33, 31), (480, 640)]  # height, width
    images = [
        np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))
        for image, (height, width) in zip(test_images[0], sides)
    ]
    images += datasets.load_sample_images().images  # two photos
    _, answers = classify(file, images)
    names = preprocessing_of(classifier).class_names
    for rows in answers:
        assert {row["index"]: row["category_name"] for row in rows} == dict(enumerate(names))
        assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
        assert sum(row["score"] for row in rows) == pytest.approx(1, abs=0.02)  # uint8: each rounded to 1/256
    expected = litert(file, [_sampled(image, (24, 40)) for image in images])
    np.testing.assert_allclose(_scores(answers), expected, rtol=0, atol=TOLERANCE[kind])


def test_other_ways_of_resizing_exceed_the_tolerance(classify, exported, test_images, litert):
    """Checks the test above: it would notice another way of resizing."""
    file = exported / "export" / "tflite" / "float32.tflite"
    images = [np.asarray(Image.fromarray(image).resize((224, 160))) for image in test_images[0][:10]]
    scores = _scores(classify(file, images)[1])
    for antialias in (False, True):  # both with half-pixel centres
        other = [np.round(tf.image.resize(image, (24, 40), antialias=antialias)).astype("uint8") for image in images]
        assert np.abs(litert(file, other) - scores).max() > 100 * TOLERANCE["float32"]


def test_options_choose_among_the_categories(classify, exported, test_images):
    file = exported / "export" / "tflite" / "int8.tflite"
    images = test_images[0][:5]
    all_of_them = classify(file, images)[1]
    assert classify(file, images, max_results=3)[1] == [rows[:3] for rows in all_of_them]
    threshold = all_of_them[0][1]["score"]
    expected = [[row for row in rows if row["score"] >= threshold] for rows in all_of_them]
    assert classify(file, images, score_threshold=threshold)[1] == expected
    assert {row["category_name"] for [row] in classify(file, images, category_allowlist=["cat"])[1]} == {"cat"}


@pytest.mark.parametrize("mode", ["RGBA", "P", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("RGB", "L"))])
def test_the_script_in_the_docs_reads_a_photo_as_training_does(mode, classify, exported, litert, tmp_path):
    """A photo with an EXIF orientation: partly transparent, with a palette, in colour, in grey."""
    text = (Path(__file__).parents[2] / "docs" / "guides" / "mobile.md").read_text()
    [lines] = re.findall(r"<<'PYTHON'\n(.*?)\nPYTHON\n", text, re.DOTALL)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "photos").symlink_to(exported)
    photo = Image.fromarray(datasets.load_sample_image("flower.jpg")).convert(mode)
    if mode == "RGBA":
        photo.putalpha(Image.linear_gradient("L").resize(photo.size))
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "cat.jpg", "PNG", exif=exif)
    command = [mediapipe_resize.PYTHON, "-c", lines.replace("(64, 64)", "(40, 24)")]  # the tests' run: (width, height)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    pixels = images.stretch(images.decode((tmp_path / "cat.jpg").read_bytes()), (24, 40)).numpy()
    expected = litert(exported / "export" / "tflite" / "float32.tflite", [pixels])[0]
    names = (exported / "export" / "labels.txt").read_text().splitlines()
    rows = [line.rpartition(" ")[::2] for line in done.stdout.splitlines()]
    assert [name for name, _ in rows] == [names[i] for i in np.argsort(-expected)[:3]]
    # Pillow resizes in fixed-point arithmetic and rounds after each axis, so a pixel may differ by 1 of 255.
    np.testing.assert_allclose([float(score) for _, score in rows], np.sort(expected)[:-4:-1], atol=0.01)


def test_unusual_class_names_are_kept(classify, tmp_path):
    names = ["fire truck", "a, b", "Café ☕ 猫", " space ", "a\nb", "a\r\nb", "", "a\rb", "twice", "twice"]
    keras.utils.set_random_seed(0)
    model = build_classifier("cvt_tiny", 10, (32, 32, 3))
    file = tmp_path / "odd.tflite"
    file.write_bytes(tflite.convert(model, names, "float32"))
    [rows] = classify(file, [np.zeros((32, 32, 3), "uint8")])[1]
    expected = ["fire truck", "a, b", "Café ☕ 猫", " space ", "a b", "a b", "6", "a b", "twice", "twice"]
    assert {row["index"]: row["category_name"] for row in rows} == dict(enumerate(expected))
