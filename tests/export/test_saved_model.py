import faulthandler
import shutil
import subprocess
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from photos import PHOTO, REENCODED, encoded, exif, photos, png, with_header
from PIL import Image
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel
from tensorflow_serving.apis import prediction_log_pb2
from tools import require

from cvt_keras import Preprocessing, calibration_of, preprocessing_of
from cvt_keras.data import images
from cvt_keras.data.images import stretch
from cvt_keras.export import saved_model
from cvt_keras.export.saved_model import WARM_UP

INVALID = tf.errors.InvalidArgumentError


@pytest.fixture(scope="module")
def folder(exported):
    return exported / "export" / "saved_model" / "1"


@pytest.fixture(scope="module")
def loaded(folder):
    return tf.saved_model.load(str(folder))


def test_signatures_have_the_documented_names_shapes_and_types(loaded):
    shapes = {
        name: (
            {key: (tuple(spec.shape), spec.dtype.name) for key, spec in signature.structured_input_signature[1].items()},
            {key: (tuple(spec.shape), spec.dtype.name) for key, spec in signature.structured_outputs.items()},
        )
        for name, signature in loaded.signatures.items()
    }
    images = {"images": ((None, 24, 40, 3), "uint8")}
    answer = {"probabilities": ((None, 10), "float32"), "classes": ((None,), "string"), "unsure": ((None,), "bool")}
    assert shapes == {
        "serving_default": (images, answer),
        "serving_bytes": ({"image_bytes": ((None,), "string")}, answer),
        "logits": (images, {"logits": ((None, 10), "float32")}),
    }


@pytest.mark.parametrize("batch", [1, 256])
def test_every_signature_matches_keras(batch, loaded, classifier, test_images):
    images = test_images[0][:batch]
    logits = classifier.predict(images.astype("float32"), verbose=0)
    np.testing.assert_allclose(loaded.signatures["logits"](images=tf.constant(images))["logits"], logits, atol=1e-4)
    files = tf.constant([encoded(image) for image in images])
    names = np.array(preprocessing_of(classifier).class_names)
    for answer in (
        loaded.signatures["serving_default"](images=tf.constant(images)),
        loaded.signatures["serving_bytes"](image_bytes=files),
    ):
        calibration = calibration_of(classifier)
        assert calibration.temperature != 1 and 0 < calibration.threshold < 1
        expected = calibration.probabilities(logits)
        np.testing.assert_allclose(answer["probabilities"], expected, atol=1e-5)
        near = np.abs(expected.max(axis=1) - calibration.threshold) < 1e-5
        assert ((answer["unsure"].numpy() == calibration.unsure(expected)) | near).all()
        assert [name.decode() for name in answer["classes"].numpy()] == list(names[logits.argmax(axis=1)])


def test_photos_of_every_kind_match_training(loaded, classifier):
    kinds = {kind: data for kind, data in photos().items() if kind not in REENCODED}
    pixels = np.stack([stretch(images.decode(data), (24, 40)) for data in kinds.values()])
    expected = calibration_of(classifier).probabilities(classifier(pixels.astype("float32"), training=False))
    answers = loaded.signatures["serving_bytes"](image_bytes=tf.constant(list(kinds.values())))["probabilities"].numpy()
    largest = dict(zip(kinds, np.abs(answers - expected).max(axis=1)))
    # The pixels are equal; the network computes in another order.
    assert max(largest.values()) < 1e-5, f"largest differences of a probability: {largest}"


@pytest.mark.parametrize("resize", ["stretch", "crop"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_serving_bytes_resizes_as_training(resize, interpolation, tmp_path):
    # A network whose probabilities show every pixel: one level more makes a probability 2% larger.
    network = keras.Sequential([keras.Input((24, 40, 3)), keras.layers.Rescaling(1 / 51), keras.layers.Flatten()])
    network.preprocessing = Preprocessing(resize=resize, crop_pct=0.9, interpolation=interpolation)
    saved_model.write(network, [""] * (24 * 40 * 3), tmp_path / "1")
    serve = tf.saved_model.load(str(tmp_path / "1")).signatures["serving_bytes"]
    random = np.random.default_rng(0)
    # Reduced, turned, enlarged, a strip of each kind, the network's size, and a photo.
    sides = [(90, 120), (61, 47), (12, 20), (3, 700), (500, 1), (24, 40)]
    files = [encoded(random.integers(0, 256, (*side, 3)).astype("uint8")) for side in sides]
    files += [encoded(Image.open(PHOTO), "JPEG", exif=exif(6))]
    preprocessing = network.preprocessing.replace(image_size=(24, 40))
    expected = [images.fit(images.decode(data), preprocessing) for data in files]
    expected = tf.nn.softmax(tf.reshape(tf.cast(expected, "float32") / 51, (len(files), -1)))
    np.testing.assert_allclose(serve(image_bytes=tf.constant(files))["probabilities"], expected, rtol=1e-3)


def test_bad_bytes_fail_one_request_and_not_the_next(loaded, test_images):
    serve, good = loaded.signatures["serving_bytes"], encoded(test_images[0][0])
    bad_files = (
        b"",
        b"hello",
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        with_header(png(8, 2), 100, 100),
        with_header(png(8, 2), 50_000, 50_000),
        with_header(png(8, 2), 2**32 - 1, 2**32 - 1),
        encoded(np.zeros((9, 9, 3), "uint8"), "GIF"),
        encoded(np.zeros((9, 9, 3), "uint8"), "BMP"),
        encoded(np.zeros((99, 99, 3), "uint8"))[:60],
        encoded(np.zeros((99, 99, 3), "uint8"), "JPEG")[:300],
    )
    for data in bad_files:
        with pytest.raises(INVALID):
            serve(image_bytes=tf.constant([good, data]))
    assert len(serve(image_bytes=tf.constant([good]))["classes"]) == 1


@pytest.mark.parametrize("n", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_mutated_images_are_answered_or_refused(n, loaded, test_images):
    random = np.random.default_rng(0)
    pixels = test_images[0]
    answered = 0
    photo = np.asarray(Image.open(PHOTO).resize((320, 213)))
    faulthandler.dump_traceback_later(300, exit=True)  # a hang must fail
    for i in range(n):
        data = bytearray(encoded(photo if i % 10 < 2 else pixels[i % len(pixels)], "PNG" if i % 2 else "JPEG"))
        kind = i // 2 % 4
        if kind == 0:
            for place in random.integers(len(data), size=random.integers(1, 20)):
                data[place] = random.integers(256)
        elif kind == 1:
            del data[random.integers(len(data)) :]
        elif kind == 2:
            at = random.integers(len(data))
            data[at:at] = random.bytes(random.integers(1, 100))
        else:
            at = random.integers(min(64, len(data)))  # among the headers
            data[at] ^= 1 << random.integers(8)
        try:
            answer = loaded.signatures["serving_bytes"](image_bytes=tf.constant([bytes(data)]))
            assert np.isfinite(answer["probabilities"]).all()
            answered += 1
        except INVALID:
            pass
    faulthandler.cancel_dump_traceback_later()
    assert 0 < answered < n


def test_warm_up_requests_are_answered(folder, loaded):
    logs = [
        prediction_log_pb2.PredictionLog.FromString(record.numpy()) for record in tf.data.TFRecordDataset(str(folder / WARM_UP))
    ]
    requests = set()
    for log in logs:
        request = log.predict_log.request
        inputs = {name: tf.constant(tf.make_ndarray(value)) for name, value in request.inputs.items()}
        loaded.signatures[request.model_spec.signature_name](**inputs)
        [value] = inputs.values()
        requests.add((request.model_spec.signature_name, len(value)))
    assert requests == {(name, batch) for name in loaded.signatures for batch in (1, 8)}


def _graph(folder):
    [graph] = SavedModel.FromString((folder / "saved_model.pb").read_bytes()).meta_graphs
    return graph


def test_no_xla_is_baked_in(classifier, tmp_path):
    classifier.compile(jit_compile=True)  # as on a GPU
    classifier.predict(np.zeros((1, 24, 40, 3)), verbose=0)
    names = preprocessing_of(classifier).class_names
    saved_model.write(classifier, names, tmp_path / "1")
    graph = _graph(tmp_path / "1").graph_def
    functions = graph.library.function
    assert functions and not [function.signature.name for function in functions if function.attr["_XlaMustCompile"].b]
    nodes = [*graph.node, *(node for function in functions for node in function.node_def)]
    assert not [node.name for node in nodes if "Xla" in node.op or node.attr["_XlaMustCompile"].b]


def test_each_weight_is_stored_once(folder, classifier):
    stored = sum(path.stat().st_size for path in (folder / "variables").iterdir())
    weights = sum(4 * np.prod(variable.shape) for variable in classifier.weights)
    assert weights < stored < weights + 300 * len(classifier.weights)  # up to 300 bytes for the name of each


def test_a_c_program_runs_it(folder, classifier, test_images, tmp_path):
    """The SavedModel needs neither Python nor Keras: TensorFlow's C API runs it, as from any language."""
    require(shutil.which("gcc"), "apt-get install gcc")
    program = tmp_path / "classify"
    library = Path(tf.sysconfig.get_lib())
    names = [next(library.glob(f"libtensorflow_{name}.so.*")).name for name in ("cc", "framework")]
    command = ["gcc", "-O1", str(Path(__file__).parent / "classify.c"), "-o", str(program)]
    command += [f"-I{tf.sysconfig.get_include()}", f"-L{library}", *(f"-l:{name}" for name in names), f"-Wl,-rpath,{library}"]
    subprocess.run(command, check=True)
    signature = _graph(folder).signature_def["serving_default"]
    tensors = [signature.inputs["images"].name.removesuffix(":0"), signature.outputs["probabilities"].name]
    images = test_images[0][:3]
    (tmp_path / "images").write_bytes(images.tobytes())
    command = [str(program), str(folder), str(tmp_path / "images"), "3", "24", "40", *tensors]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    probabilities = np.array([line.split() for line in done.stdout.splitlines()], "float64")
    expected = calibration_of(classifier).probabilities(classifier.predict(images.astype("float32"), verbose=0))
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)
