import io
import json
import zipfile

import flatbuffers
import keras
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from flatbuffers.table import Table
from tensorflow.lite.python import schema_py_generated as schema

from cvt_keras import Calibration, Preprocessing, Stage, Variant, build_classifier, preprocessing_of
from cvt_keras.data.split import Split
from cvt_keras.export import tflite, verify
from cvt_keras.export.verify import TFLITE_FORMATS
from cvt_keras.model import set_calibration


@pytest.fixture(scope="module")
def files(exported):
    return {kind: exported / "export" / "tflite" / f"{kind}.tflite" for kind in TFLITE_FORMATS}


@pytest.fixture(scope="module")
def interpreters(files):
    interpreters = {kind: Interpreter(str(file)) for kind, file in files.items()}
    for interpreter in interpreters.values():
        interpreter.allocate_tensors()
    return interpreters


@pytest.mark.parametrize("kind", TFLITE_FORMATS)
def test_the_input_is_one_image_of_raw_pixels(kind, interpreters):
    [input_], [output] = interpreters[kind].get_input_details(), interpreters[kind].get_output_details()
    assert (tuple(input_["shape"]), input_["dtype"]) == ((1, 24, 40, 3), np.uint8)
    assert tuple(output["shape"]) == (1, 10)
    assert output["dtype"] == (np.uint8 if kind == "int8" else np.float32)
    if kind == "int8":
        assert input_["quantization"] == (1.0, 0)
        assert output["quantization"] == (1 / 256, 0)
    assert interpreters[kind].get_signature_list() == {"serving_default": {"inputs": ["images"], "outputs": ["probabilities"]}}


@pytest.mark.parametrize("kind", TFLITE_FORMATS)
def test_all_operations_are_builtins(kind, files):
    model = schema.ModelT.InitFromPackedBuf(files[kind].read_bytes(), 0)
    assert model.operatorCodes and not [code.customCode for code in model.operatorCodes if code.customCode]


def test_an_int8_file_has_no_float_tensor(interpreters):
    kinds = {np.dtype(tensor["dtype"]).kind for tensor in interpreters["int8"].get_tensor_details()}
    assert "f" not in kinds and "i" in kinds
    assert "f" in {np.dtype(tensor["dtype"]).kind for tensor in interpreters["dynamic_int8"].get_tensor_details()}


def _floats(stage, activation, tmp_path, **kwargs):
    """The float tensors in the int8 file of a small network, with their reasons."""
    first = Stage(dim=16, depth=1, heads=1, kernel_size=3, stride=2, padding=1)
    variant = Variant(stages=(first, stage), activation=activation, **kwargs)
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype="uint8")
    file = tmp_path / "int8.tflite"
    file.write_bytes(tflite.convert(build_classifier(variant, 2, (16, 16, 3)), ["a", "b"], "int8", images))
    answers = verify.answer(file, images)
    # The output is uint8 with a scale of 1/256.
    np.testing.assert_allclose(answers["probabilities"].sum(axis=1), 1, rtol=0, atol=2 / 256)
    return dict(zip(answers["float_tensors"], answers["float_reasons"]))


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_the_papers_layers_leave_no_float_tensor(activation, tmp_path):
    stage = Stage(dim=32, depth=1, heads=2, kernel_size=3, stride=2, padding=1, drop_path=0.1, cls_token=True)
    assert _floats(stage, activation, tmp_path) == {}


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_the_layers_of_cvt_cifar_leave_no_float_tensor(norm, tmp_path):
    stage = Stage(dim=32, depth=1, heads=2, stride_kv=4, cls_token=norm == "layer", pool=True, residual_convs=1, mlp_conv=True)
    assert _floats(stage, "gelu", tmp_path, whitening=2, norm=norm, attention_scale="head") == {}


def test_float_tensors_have_a_reason(tmp_path):
    # With a cls token, the converter keeps average pooling in floats.
    stage = Stage(dim=32, depth=1, heads=2, kernel_size=3, stride=2, padding=1, projection="avg", cls_token=True)
    reasons = set(_floats(stage, "gelu", tmp_path).values())
    assert "the converter keeps AVERAGE_POOL_2D in floats here" in reasons


def test_compressed_files_are_smaller():
    # Wide kernels: the converter leaves small ones, such as those of cvt_tiny, in float32.
    variant = Variant(stages=(Stage(dim=256, depth=1, heads=1, kernel_size=7, stride=4, padding=2),))
    classifier = build_classifier(variant, 2, (16, 16, 3))
    sizes = {kind: len(tflite.convert(classifier, ["a", "b"], kind)) for kind in ("float32", "float16", "dynamic_int8")}
    assert sizes["float16"] < 0.55 * sizes["float32"]
    assert sizes["dynamic_int8"] < 0.32 * sizes["float32"]


def test_layer_normalization_is_restored_even_after_an_error():
    original = keras.layers.LayerNormalization.call
    with pytest.raises(ZeroDivisionError), tflite._integer_layer_norm():
        assert keras.layers.LayerNormalization.call is not original
        raise ZeroDivisionError
    assert keras.layers.LayerNormalization.call is original


@pytest.mark.parametrize("kind", TFLITE_FORMATS)
def test_the_metadata_has_the_labels(kind, files, classifier):
    data = files[kind].read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.read("labels.txt").decode().splitlines()
    assert tuple(names) == preprocessing_of(classifier).class_names
    assert b"resized as in training: resize=stretch, interpolation=bilinear." in data
    model = schema.ModelT.InitFromPackedBuf(data, 0)
    [entry] = [entry for entry in model.metadata if entry.name == b"TFLITE_METADATA"]
    metadata = bytes(model.buffers[entry.buffer].data)
    assert metadata[4:8] == b"M001"
    # metadata_schema.fbs: ModelMetadata.subgraph_metadata[0].output_tensor_metadata[0].associated_files[0].name, and its type
    table = Table(metadata, flatbuffers.encode.Get(flatbuffers.packer.uoffset, metadata, 0))
    for slot in (3, 3, 6):
        table = Table(metadata, table.Indirect(table.Vector(table.Offset(4 + 2 * slot))))
    assert table.String(table.Offset(4) + table.Pos) == b"labels.txt"
    assert table.Get(flatbuffers.number_types.Uint8Flags, table.Offset(8) + table.Pos) == 2  # labels of the output's axis


def test_labels_txt_has_a_line_for_each_class():
    names = ["fire truck", "a, b", "Café ☕", "a\nb", "a\r\nb", "a\u2028b", "", "\n"]
    expected = ["fire truck", "a, b", "Café ☕", "a b", "a b", "a b", "6", "7"]
    assert tflite.labels_text(names) == "".join(f"{name}\n" for name in expected)


def test_calibration_images_are_balanced_and_drawn_by_the_seed():
    labels = np.repeat(np.arange(4), (50, 100, 5, 200))
    images = np.broadcast_to(np.arange(len(labels))[:, None, None, None], (len(labels), 2, 2, 3)).astype("uint16")
    split = Split(images, labels)
    chosen = tflite.calibration_images(split, 4, seed=0, n=40)[:, 0, 0, 0]
    assert list(np.bincount(labels[chosen])) == [10, 10, 5, 10]
    assert len(set(chosen)) == 35
    np.testing.assert_array_equal(chosen, tflite.calibration_images(split, 4, seed=0, n=40)[:, 0, 0, 0])
    assert not np.array_equal(chosen, tflite.calibration_images(split, 4, seed=1, n=40)[:, 0, 0, 0])


def test_calibration_covers_0_to_255():
    images = np.full((2, 4, 4, 3), 100, "uint8")
    calibration = tflite._whole_range(images)
    assert (calibration.min(), calibration.max()) == (0, 255)
    assert images.min() == 100


def test_the_metadata_says_how_to_resize():
    preprocessing = Preprocessing(resize="crop", crop_pct=0.9, interpolation="bicubic")
    assert b"resize=crop, crop_pct=0.9, interpolation=bicubic." in tflite._metadata(preprocessing, Calibration())


def test_a_file_has_calibrated_probabilities_and_says_when_an_answer_is_unsure(tmp_path, litert):
    variant = Variant((Stage(dim=16, depth=1, heads=1),))
    classifier = build_classifier(variant, 2, (16, 16, 3))
    set_calibration(classifier, Calibration(0.02, 0.625))  # far apart, as an untrained network's logits are close together
    before = classifier.get_weights()
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype="uint8")
    logits = keras.ops.convert_to_numpy(classifier(images.astype("float32")))
    for kind, tolerance in (("float32", 1e-4), ("int8", 0.06)):
        file = tmp_path / f"{kind}.tflite"
        file.write_bytes(tflite.convert(classifier, ["a", "b"], kind, images))
        expected = keras.ops.softmax(logits / 0.02)
        np.testing.assert_allclose(litert(file, images), expected, atol=tolerance)
    with zipfile.ZipFile(file) as archive:
        assert json.loads(archive.read("calibration.json")) == {"temperature": 0.02, "threshold": 0.625}
    assert b"An answer is unsure if the highest is below 0.6250." in file.read_bytes()
    for now, then in zip(classifier.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)
