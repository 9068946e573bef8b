"""`load_run` on exported files gives the answers of the Keras classifier."""

import shutil
import warnings
import zipfile

import numpy as np
import pytest
import tensorflow as tf
from photos import encoded

from cvt_keras import load_run
from cvt_keras.errors import RunError
from cvt_keras.export import tflite
from cvt_keras.predict import evaluate
from cvt_keras.predict.networks import resizing_in
from cvt_keras.preprocessing import Calibration, Preprocessing

# Largest difference of a probability from Keras'.
BOUNDS = {
    "export/tflite/float32.tflite": 1e-4,
    "export/tflite/int8.tflite": 0.3,  # the run's temperature, below 1, widens the steps of 8 bits
    "export/saved_model/1": 1e-4,
    "export/saved_model": 1e-4,
}


@pytest.fixture(scope="module")
def keras_answers(exported):
    return load_run(exported)


@pytest.mark.parametrize("name", BOUNDS)
def test_an_export_answers_as_keras_does(name, exported, keras_answers, tmp_path):
    classifier = load_run(exported / name)
    assert classifier.class_names == keras_answers.class_names
    assert classifier.run_dir == exported and classifier.report == keras_answers.report
    assert classifier.model is None
    assert classifier.calibration == keras_answers.calibration and classifier.calibration.temperature != 1
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (side, 50, 3), "uint8") for side in (24, 31, 70)]
    (tmp_path / "photo.gif").write_bytes(encoded(images[0], "GIF"))  # a SavedModel alone would refuse it
    for image in (*images, tmp_path / "photo.gif"):
        [answer], [expected] = classifier.predict(image, top=10), keras_answers.predict(image, top=10)
        for label, value in answer.top:
            assert value == pytest.approx(dict(expected.top)[label], abs=BOUNDS[name]), label
        assert answer.path == expected.path
        assert answer.unsure == (answer.probability < classifier.calibration.threshold)


def test_files_of_older_versions_are_not_calibrated(exported, tmp_path):
    data = (exported / "export" / "tflite" / "float32.tflite").read_bytes()
    file = tmp_path / "old.tflite"
    file.write_bytes(data)
    with zipfile.ZipFile(file) as archive:
        labels, model = archive.read("labels.txt"), data[: archive.infolist()[0].header_offset]
    file.write_bytes(model)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("labels.txt", labels)
    classifier = load_run(file)
    assert classifier.calibration == Calibration()
    assert not classifier.predict(np.zeros((24, 40, 3), "uint8"))[0].unsure
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("calibration.json", '{"temperature": 0}')
    with pytest.raises(RunError, match=r"calibration in .* is damaged: .*temperature=0"):
        load_run(file)


def test_a_saved_model_without_its_threshold_is_refused(exported, tmp_path):
    shutil.copytree(exported / "export" / "saved_model" / "1", tmp_path / "1")
    (tmp_path / "1" / "assets.extra" / "calibration.json").unlink()
    with pytest.raises(RunError, match=r"calibration\.json is missing"):
        load_run(tmp_path / "1")


def test_the_newest_version_of_a_saved_model_is_loaded(exported, tmp_path):
    shutil.copytree(exported / "export" / "saved_model" / "1", tmp_path / "10")
    (tmp_path / "9").mkdir()
    (tmp_path / "9" / "saved_model.pb").write_text("damaged")
    assert load_run(tmp_path).predict(np.zeros((9, 9, 3), "uint8"))
    with pytest.raises(RunError, match="9 can't be read"):
        load_run(tmp_path / "9")


def test_an_exported_file_is_evaluated(exported, keras_answers, tmp_path):
    random = np.random.default_rng(0)
    for name in keras_answers.class_names[:2]:
        (tmp_path / name).mkdir()
        for i in range(3):
            (tmp_path / name / f"{i}.png").write_bytes(encoded(random.integers(0, 256, (24, 40, 3), "uint8")))
    scores = evaluate(load_run(exported / "export" / "tflite" / "float32.tflite"), tmp_path).scores
    expected = evaluate(keras_answers, tmp_path).scores
    assert scores.pop("top1_interval") == pytest.approx(expected.pop("top1_interval"), abs=1e-3)
    assert scores == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    "preprocessing",
    [Preprocessing(interpolation="bicubic"), Preprocessing(resize="crop", crop_pct=0.875, interpolation="bicubic")],
)
def test_resizing_is_read_from_the_metadata(preprocessing):
    assert Preprocessing(**resizing_in(b"..." + tflite._metadata(preprocessing, Calibration()) + b"...")) == preprocessing


def test_resizing_in_files_of_older_versions_and_other_projects():
    assert resizing_in(b"...An image of raw pixels, 0 to 255.\0...") == {}
    assert resizing_in(b"...Input image to be classified.\0...") is None


def test_a_tflite_file_with_other_labels_or_none_is_refused(exported, tmp_path):
    data = (exported / "export" / "tflite" / "float32.tflite").read_bytes()
    file = tmp_path / "other.tflite"
    file.write_bytes(data[: data.rindex(b"PK\3\4")])
    with pytest.raises(RunError, match="no metadata of an export"):
        load_run(file)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("labels.txt", "a\nb\n")
    with pytest.raises(RunError, match="names 2 classes, but has 10 outputs"):
        load_run(file)
    file.write_bytes(data.replace(b"TFL3", b"TFL9", 1))
    with pytest.raises(RunError, match="can't be read"):
        load_run(file)


def test_a_saved_model_of_another_project_is_refused(tmp_path):
    class Other(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None, 4), tf.float32)])
        def __call__(self, values):
            return {"probabilities": values}

    module = Other()
    for name, signatures in (("1", None), ("2", {"serving_bytes": module.__call__})):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tf.saved_model.save(module, str(tmp_path / name), signatures=signatures)
        with pytest.raises(RunError, match=f"{name} does not have an export's signature serving_bytes"):
            load_run(tmp_path / name)
