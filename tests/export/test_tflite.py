import io
import zipfile

import flatbuffers
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from flatbuffers.table import Table
from tensorflow.lite.python import schema_py_generated as schema

from cvt_keras import Stage, Variant, build_classifier, preprocessing_of
from cvt_keras.data.split import Split
from cvt_keras.export import tflite, verify
from cvt_keras.export.verify import TFLITE_FORMATS


@pytest.fixture(scope="module")
def files(exported):
    return {kind: exported / "export" / "tflite" / f"{kind}.tflite" for kind in TFLITE_FORMATS}


@pytest.fixture(scope="module")
def interpreters(files):
    found = {}
    for kind, file in files.items():
        found[kind] = Interpreter(str(file))
        found[kind].allocate_tensors()
    return found


@pytest.mark.parametrize("kind", TFLITE_FORMATS)
def test_it_takes_one_image_of_raw_pixels(kind, interpreters):
    [taken], [given] = interpreters[kind].get_input_details(), interpreters[kind].get_output_details()
    assert (tuple(taken["shape"]), taken["dtype"]) == ((1, 32, 32, 3), np.uint8)
    assert tuple(given["shape"]) == (1, 10)
    assert given["dtype"] == (np.uint8 if kind == "int8" else np.float32)
    if kind == "int8":
        assert taken["quantization"] == (1.0, 0)
        assert given["quantization"] == (1 / 256, 0)
    assert interpreters[kind].get_signature_list() == {"serving_default": {"inputs": ["images"], "outputs": ["probabilities"]}}


@pytest.mark.parametrize("kind", TFLITE_FORMATS)
def test_no_operation_is_tensorflows(kind, files):
    model = schema.ModelT.InitFromPackedBuf(files[kind].read_bytes(), 0)
    assert model.operatorCodes and not [code.customCode for code in model.operatorCodes if code.customCode]


def test_an_integer_file_has_no_float_inside(interpreters):
    kinds = {np.dtype(tensor["dtype"]).kind for tensor in interpreters["int8"].get_tensor_details()}
    assert "f" not in kinds and "i" in kinds
    assert "f" in {np.dtype(tensor["dtype"]).kind for tensor in interpreters["dynamic_int8"].get_tensor_details()}


def _floats(stage, activation, tmp_path):
    """What stays float in the int8 file of a small network."""
    variant = Variant(
        stages=(Stage(dim=16, depth=1, heads=1, kernel_size=3, stride=2, padding=1), stage), activation=activation
    )
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype="uint8")
    file = tmp_path / "int8.tflite"
    file.write_bytes(tflite.convert(build_classifier(variant, 2, (32, 32, 3)), ["a", "b"], "int8", images))
    answers = verify.answer(file, images)
    return dict(zip(answers["float_tensors"], answers["float_reasons"]))


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_the_papers_layers_leave_no_float(activation, tmp_path):
    stage = Stage(dim=32, depth=2, heads=2, kernel_size=3, stride=2, padding=1, drop_path=0.1, cls_token=True)
    assert _floats(stage, activation, tmp_path) == {}


def test_what_stays_float_is_known_with_its_reason(tmp_path):
    # Behind a cls token, the converter takes no average pooling for integers.
    stage = Stage(dim=32, depth=1, heads=2, kernel_size=3, stride=2, padding=1, projection="avg", cls_token=True)
    reasons = set(_floats(stage, "gelu", tmp_path).values())
    assert "the converter keeps AVERAGE_POOL_2D in floats here" in reasons


def test_files_are_as_small_as_their_kind_says():
    classifier = build_classifier("cvt_cifar", 10, (32, 32, 3))  # the tests' own has kernels too small to be worth it
    names = [str(i) for i in range(10)]
    sizes = {kind: len(tflite.convert(classifier, names, kind)) for kind in ("float32", "float16", "dynamic_int8")}
    assert sizes["float16"] < 0.55 * sizes["float32"]
    assert sizes["dynamic_int8"] < 0.32 * sizes["float32"]


@pytest.mark.parametrize("kind", TFLITE_FORMATS)
def test_labels_are_in_the_metadata(kind, files, classifier):
    data = files[kind].read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.read("labels.txt").decode().splitlines()
    assert tuple(names) == preprocessing_of(classifier).class_names
    model = schema.ModelT.InitFromPackedBuf(data, 0)
    [entry] = [entry for entry in model.metadata if entry.name == b"TFLITE_METADATA"]
    metadata = bytes(model.buffers[entry.buffer].data)
    assert metadata[4:8] == b"M001"
    # metadata_schema.fbs: ModelMetadata.subgraph_metadata[0].output_tensor_metadata[0].associated_files[0].name, and its type
    table = Table(metadata, flatbuffers.encode.Get(flatbuffers.packer.uoffset, metadata, 0))
    for slot in (3, 3, 6):
        table = Table(metadata, table.Indirect(table.Vector(table.Offset(4 + 2 * slot))))
    assert table.String(table.Offset(4) + table.Pos) == b"labels.txt"
    assert table.Get(flatbuffers.number_types.Uint8Flags, table.Offset(8) + table.Pos) == 2  # labels of its axis


def test_labels_are_a_line_for_each_class():
    names = ["fire truck", "a, b", "Café ☕", "a\nb", "a\r\nb", "a\u2028b", "", "\n"]
    expected = ["fire truck", "a, b", "Café ☕", "a b", "a b", "a b", "6", "7"]
    assert tflite.labels_text(names) == "".join(f"{name}\n" for name in expected)


def test_calibration_images_are_of_every_class_alike_and_drawn_by_the_seed():
    labels = np.repeat(np.arange(4), (50, 100, 5, 200))
    images = np.broadcast_to(np.arange(len(labels))[:, None, None, None], (len(labels), 2, 2, 3)).astype("uint16")
    split = Split(images, labels)
    chosen = tflite.calibration_images(split, 4, seed=0, n=40)[:, 0, 0, 0]
    assert list(np.bincount(labels[chosen])) == [10, 10, 5, 10]
    assert len(set(chosen)) == 35
    np.testing.assert_array_equal(chosen, tflite.calibration_images(split, 4, seed=0, n=40)[:, 0, 0, 0])
    assert not np.array_equal(chosen, tflite.calibration_images(split, 4, seed=1, n=40)[:, 0, 0, 0])


def test_calibration_reaches_black_and_white():
    images = np.full((2, 4, 4, 3), 100, "uint8")
    whole = tflite._whole_range(images)
    assert (whole.min(), whole.max()) == (0, 255)
    assert images.min() == 100
