"""A classifier loaded by `load_run`. tests/test_load_run.py tests it on every backend, tests/export/ exported files."""

import dataclasses
import shutil
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from PIL import ExifTags, Image

import cvt_keras
from cvt_keras import CvT, Preprocessing, Stage, Variant, load_run, runs
from cvt_keras.data import images
from cvt_keras.errors import ArgumentError, DivergedError, ImageError, NoRunError, RunError
from cvt_keras.predict import Prediction, networks


def _expected(classifier, pixels):
    """The calibrated probabilities of an image by Keras' own functions, on pixels resized as in validation."""
    fitted = images.fit(pixels, classifier.preprocessing).numpy()
    logits = classifier.model.predict_on_batch(fitted[None].astype("float32"))
    return keras.ops.convert_to_numpy(keras.ops.softmax(logits / 2))[0]


def test_paths_arrays_batches_and_pillow_images(classifier, photos):
    [path, *_], [pixels, *_] = photos.pixels, photos.pixels.values()
    expected = _expected(classifier, pixels)
    order = np.argsort(-expected)
    kinds = (path, str(path), pixels, [path], [pixels], pixels[None], Image.fromarray(pixels), [Image.open(path)])
    for kind in kinds:
        [answer] = classifier.predict(kind, top=3)
        assert answer.label == classifier.class_names[order[0]] == answer.top[0][0]
        assert answer.probability == answer.top[0][1]
        assert [label for label, _ in answer.top] == [classifier.class_names[i] for i in order]
        np.testing.assert_allclose([value for _, value in answer.top], expected[order], atol=1e-6)
    assert [answer.unsure for answer in classifier.predict(photos.pixels)] == [
        _expected(classifier, pixels).max() < 0.742 for pixels in photos.pixels.values()
    ]
    assert classifier.predict([path, pixels])[0].path == path
    assert classifier.predict([path, pixels])[1].path is None


def test_many_images_are_answered_in_order_and_batches(classifier, photos, monkeypatch):
    monkeypatch.setattr(classifier._network, "batch_size", 4)
    called = []
    monkeypatch.setattr(networks.KerasNetwork, "__call__", lambda network, batch, own=networks.KerasNetwork.__call__: (
        called.append(len(batch)) or own(network, batch)
    ))  # fmt: skip
    paths = [*photos.pixels, *photos.pixels]
    answers = classifier.predict(iter(paths), top=3)
    assert called == [4, 4, 4]
    assert [answer.path for answer in answers] == paths
    for answer, pixels in zip(answers, [*photos.pixels.values()] * 2):
        np.testing.assert_allclose(dict(answer.top)["pears"], _expected(classifier, pixels)[1], atol=1e-6)
    assert len({answer.probability for answer in answers}) > 1
    called.clear()
    monkeypatch.setattr("cvt_keras.predict.classifier._BATCH_BYTES", 2 * 16 * 24 * 3 - 1)
    classifier.predict(paths[:5])
    assert called == [2, 2, 1]
    assert classifier.predict([]) == []


def test_images_that_are_skipped_leave_the_batches_full(classifier, photos, monkeypatch):
    monkeypatch.setattr(classifier._network, "batch_size", 2)
    shapes = []
    predict = classifier.model.predict_on_batch
    monkeypatch.setattr(classifier.model, "predict_on_batch", lambda images: shapes.append(len(images)) or predict(images))
    (photos.folder / "bad.png").write_text("hello")
    paths = [*photos.pixels][:5]
    answers = [*classifier.classify([paths[0], photos.folder / "bad.png", *paths[1:]])]
    assert shapes == [2, 2, 1]
    assert [getattr(answer, "path", None) for answer in answers] == [paths[0], None, *paths[1:]]
    # As a backend may compile for each size, there are few: powers of two.
    rows = classifier._network([classifier._network.prepare(pixels) for pixels in [*photos.pixels.values()][:3]])
    assert shapes[-1] == 4 and rows.shape == (3, 3)


def test_top_is_limited_to_the_classes(classifier, photos):
    pixels = next(iter(photos.pixels.values()))
    assert [len(classifier.predict(pixels, top=top)[0].top) for top in (1, 2, 3, 9)] == [1, 2, 3, 3]
    with pytest.raises(ArgumentError) as error:
        classifier.predict(pixels, top=0)
    assert error.value.argument == "top"


@pytest.mark.parametrize("gives_probabilities", [False, True])
def test_top_1_is_argmax_even_among_equals_and_saturated_ones(gives_probabilities, classifier, photos, monkeypatch):
    network = classifier._network
    monkeypatch.setattr(network, "gives_probabilities", gives_probabilities)
    values = [[0.25, 0.5, 0.5], [0, 0, 0], [0, 0.125, 0]] if gives_probabilities else [[1, 2, 2], [0, 0, 0], [0, 300, 299]]
    monkeypatch.setattr(networks.KerasNetwork, "__call__", lambda network, batch: np.array(values, "float32"))
    answers = classifier.predict([*photos.pixels][:3], top=3)
    assert [answer.label for answer in answers] == ["pears", "apples", "pears"]
    assert [label for label, _ in answers[0].top] == ["pears", "plums", "apples"]
    if gives_probabilities:
        assert answers[2].probability == 0.125  # an exported file's own, not changed


def test_outputs_that_are_nan_raise(classifier, photos, monkeypatch):
    monkeypatch.setattr(networks.KerasNetwork, "__call__", lambda network, batch: np.full((1, 3), np.nan))
    with pytest.raises(DivergedError, match=r"fruit\.keras are NaN"):
        classifier.predict([*photos.pixels][:1])


def test_a_turned_photo_and_a_16_bit_png_are_read_as_in_training(classifier, tmp_path):
    upright = np.random.default_rng(0).integers(0, 256, (30, 50, 3), "uint8")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be rotated by 270 degrees
    Image.fromarray(np.rot90(upright)).save(tmp_path / "turned.png", exif=exif)
    grey = (np.arange(30 * 50).reshape(30, 50) * 40).astype("uint16")
    Image.fromarray(grey).save(tmp_path / "deep.png")
    eight_bits = np.repeat((grey >> 8).astype("uint8")[..., None], 3, axis=-1)
    for name, pixels in (("turned.png", upright), ("deep.png", eight_bits)):
        answers = classifier.predict([tmp_path / name, Image.open(tmp_path / name), pixels], top=3)
        assert len({answer.top for answer in answers}) == 1
        assert np.array_equal(images.decode((tmp_path / name).read_bytes()), pixels)


def test_a_bad_image_is_named_or_yielded(classifier, photos):
    [good, *_] = photos.pixels
    bad = photos.folder / "bad.png"
    bad.write_bytes(good.read_bytes()[:50])
    with pytest.raises(ImageError, match=rf"^{bad}: the image is broken: "):
        classifier.predict([good, bad])
    with pytest.raises(ImageError, match="No such file"):
        classifier.predict("nowhere.png")
    with pytest.raises(ImageError, match=r"^the image is broken"):
        classifier.predict(Image.open(bad))
    first, broken, last = classifier.classify([good, bad, good])
    assert isinstance(broken, ImageError) and first.path == last.path == good


@pytest.mark.parametrize(
    "wrong, received",
    [
        (np.zeros((4, 4, 3), "float32"), r"an array of float32 \(4, 4, 3\)"),
        ([np.zeros((4, 4), "uint8")], r"an array of uint8 \(4, 4\)"),
        (np.zeros((5, 6), "uint8"), r"an array of uint8 \(5, 6\)"),
        (np.zeros((1, 4, 4, 4), "uint8"), r"an array of uint8 \(4, 4, 4\)"),
        (np.zeros((0, 4, 3), "uint8"), r"an array of uint8 \(0, 4, 3\)"),
        (3, "int"),
        ([None], "NoneType"),
    ],
)
def test_other_types_are_refused(wrong, received, classifier):
    with pytest.raises(ArgumentError, match=rf"Received: {received}$") as error:
        classifier.predict(wrong)
    assert error.value.argument == "images"


def test_a_prediction_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Prediction("a", 1.0, (("a", 1.0),)).label = "b"


# === What can be loaded ===


def test_a_run_has_its_report(run_dir, keras_file, read_once):
    run = load_run(str(run_dir))
    assert run.class_names == ("apples", "pears", "plums") and run.path == run.run_dir == run_dir
    assert run.report["variant"] == "cvt_tiny"
    own = load_run(run_dir / runs.MODEL)
    assert own.run_dir == run_dir and own.report == run.report
    alone = load_run(keras_file)
    assert alone.run_dir is None and alone.report is None
    assert read_once == [run_dir / runs.MODEL] * 2 + [keras_file]
    assert cvt_keras.load_run is load_run


def _sizeless_network(path):
    CvT(Variant((Stage(dim=8, depth=1, heads=1),)), 2, (None, None, 3)).save(path / "other.keras")


def _other_network(path):
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]).save(path / "other.keras")


@pytest.mark.parametrize(
    "make, name, kind, message",
    [
        (lambda path: None, "nowhere", NoRunError, r"`run` must be a run folder, .* Received: .*nowhere, which does not exist"),
        (lambda path: None, "", NoRunError, "is none of these"),
        (lambda path: None, "model.onnx", NoRunError, "can't be an ONNX file"),
        (lambda path: (path / "labels.txt").write_text("a"), "labels.txt", NoRunError, "is none of these"),
        (lambda path: (path / "3").mkdir(), "", NoRunError, "is none of these"),
        (lambda path: (path / "recipe.json").write_text("{}"), "", RunError, "not finished: model.keras is missing"),
        (lambda path: (path / "other.keras").write_text("hello"), "other.keras", RunError, "other.keras is damaged"),
        (_sizeless_network, "other.keras", RunError, "can't be read: it does not say how large its images are"),
        (_other_network, "other.keras", RunError, "other.keras can't be read: `model` must be a `CvT`"),
        (lambda path: (path / "other.tflite").write_text("hello"), "other.tflite", RunError, "no metadata of an export"),
    ],
)
def test_what_can_not_be_loaded_is_refused(make, name, kind, message, tmp_path):
    make(tmp_path)
    with pytest.raises(kind, match=message):
        load_run(tmp_path / name)


@pytest.mark.parametrize(
    "image_shape, preprocessing, message",
    [
        ((16, 16, 1), {}, "takes images of 1 channels, not RGB"),
        ((None, None, 3), {}, "does not say how large its images are"),
        ((16, 16, 3), {"class_names": ["a", "b", "c"]}, "names 3 classes, but has 2 outputs"),
    ],
)
def test_networks_that_can_not_classify_photos_are_refused(image_shape, preprocessing, message, monkeypatch):
    model = SimpleNamespace(input_shape=(None, *image_shape), output_shape=(None, 2))
    monkeypatch.setattr("cvt_keras.model.load_classifier", lambda file: model)
    monkeypatch.setattr("cvt_keras.model.preprocessing_of", lambda model: Preprocessing(**preprocessing))
    with pytest.raises(RunError, match=message):
        networks.KerasNetwork("other.keras")


def test_a_run_without_a_report_is_not_finished(run_dir):
    (run_dir / runs.REPORT).unlink()
    with pytest.raises(RunError, match=r"report\.json is missing") as error:
        load_run(run_dir)
    assert "--resume" in error.value.hint
    shutil.rmtree(run_dir)
    with pytest.raises(NoRunError):
        load_run(run_dir)
