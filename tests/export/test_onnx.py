"""The ONNX file: what it holds, and its answers in onnxruntime."""

import importlib.util
import json
import shutil

import numpy as np
import pytest
import tensorflow as tf
from tools import require

from cvt_keras import Calibration, Preprocessing, Stage, Variant, build_classifier, calibration_of, cli
from cvt_keras.errors import ArgumentError, ExportError, MissingPackageError
from cvt_keras.export import artifacts, export, onnx, verify
from cvt_keras.export.__main__ import parse


@pytest.fixture(scope="module", autouse=True)
def packages():
    require(all(map(importlib.util.find_spec, verify.ONNX_PACKAGES)), "pip install -r requirements-dev.txt")


@pytest.fixture(scope="module")
def run_dir(trained, tmp_path_factory):
    """A copy of the run, exported as ONNX. Not to be written to."""
    run_dir = tmp_path_factory.mktemp("onnx") / "run"
    shutil.copytree(trained, run_dir, ignore=shutil.ignore_patterns("export"))
    assert cli.main(["export", str(run_dir), "--formats", "onnx"]) == 0
    return run_dir


@pytest.fixture(scope="module")
def model(run_dir):
    import onnx

    return onnx.load(str(run_dir / "export" / "onnx" / "model.onnx"))


def _metadata(model):
    return {entry.key: entry.value for entry in model.metadata_props}


def _described(tensor):
    kind = tensor.type.tensor_type
    return tensor.name, kind.elem_type, [dim.dim_param or dim.dim_value for dim in kind.shape.dim]


def _answers(data, images):
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return session.run(["probabilities"], {"images": images})[0]


def test_a_run_is_exported_and_reported(run_dir):
    [row] = json.loads((run_dir / "export" / "report.json").read_text())["artifacts"]
    file = run_dir / "export" / "onnx" / "model.onnx"
    assert (row["name"], row["path"], row["bytes"]) == ("onnx", "export/onnx/model.onnx", file.stat().st_size)
    assert (row["passed"], row["images"], row["agreement"], row["opset"]) == (True, 256, 1.0, onnx.OPSET)
    assert row["runtime"].startswith("ONNX Runtime ") and row["milliseconds"] > 0
    assert (row["reference_max_abs_diff"], row["float_tensors"]) == (None, {})
    assert "<td>onnx</td>" in (run_dir / "report.html").read_text()


def test_names_types_and_shapes_are_those_of_the_saved_model(model):
    import onnx as library

    library.checker.check_model(model, full_check=True)
    assert [entry.version for entry in model.opset_import if not entry.domain] == [onnx.OPSET]
    [images], [probabilities] = model.graph.input, model.graph.output
    assert _described(images) == ("images", library.TensorProto.UINT8, ["batch", 24, 40, 3])
    assert _described(probabilities) == ("probabilities", library.TensorProto.FLOAT, ["batch", 10])


def test_any_number_of_images_gets_the_answers_of_keras(model, classifier, test_images):
    data = model.SerializeToString()
    for images in (test_images[0][:1], test_images[0][:7]):
        expected = calibration_of(classifier).probabilities(classifier.predict_on_batch(images.astype("float32")))
        np.testing.assert_allclose(_answers(data, images), expected, rtol=0, atol=1e-5)


def test_the_metadata_has_the_classes_the_resizing_and_the_calibration(model, classifier):
    metadata = _metadata(model)
    assert set(metadata) == {"class_names", "image_size", "resize", "interpolation", "temperature", "threshold"}
    assert Calibration(float(metadata["temperature"]), float(metadata["threshold"])) == calibration_of(classifier)
    assert json.loads(metadata["class_names"])[:2] == ["airplane", "automobile"]
    assert json.loads(metadata["image_size"]) == [24, 40]
    assert (metadata["resize"], metadata["interpolation"]) == ("stretch", "bilinear")


def test_the_layers_of_cvt_cifar_convert_exactly():
    import onnx as library

    stage = Stage(dim=16, depth=1, heads=2, stride_kv=4, pool=True, residual_convs=1, mlp_conv=True)
    variant = Variant((stage,), activation="gelu", whitening=2, norm="batch", attention_scale="head")
    resizing = {"resize": "crop", "crop_pct": 0.9, "interpolation": "bicubic"}
    names = ["Café ☕", "a, b", "c", "d"]
    classifier = build_classifier(variant, 4, (16, 20, 3), preprocessing=Preprocessing(class_names=names, **resizing))
    random = np.random.default_rng(0)
    # Random weights, because the blocks of a new network add little to its answers.
    for variable in classifier.trainable_variables:
        variable.assign(variable + 0.1 * random.standard_normal(variable.shape))
    data = onnx.convert(classifier, names)
    images = random.integers(0, 256, (5, 16, 20, 3), dtype="uint8")
    expected = tf.nn.softmax(classifier.predict_on_batch(images.astype("float32"))).numpy()
    assert expected.std(axis=0).max() > 0.01
    np.testing.assert_allclose(_answers(data, images), expected, rtol=0, atol=1e-5)
    model = library.load_from_string(data)
    assert "Erf" in {node.op_type for node in model.graph.node}
    assert _metadata(model) == {"class_names": json.dumps(names, ensure_ascii=False), "image_size": "[16, 20]"} | {
        name: str(value) for name, value in (resizing | Calibration().get_config()).items()
    }


def test_a_network_that_cannot_be_converted_raises(monkeypatch):
    import tf2onnx

    def fail(*args, **kwargs):
        raise ValueError("model exceeds 2GB.\nmore")

    monkeypatch.setattr(tf2onnx.convert, "from_function", fail)
    with pytest.raises(ExportError) as raised:
        onnx.convert(build_classifier("cvt_tiny", 1), ["a"])
    assert raised.value.summary == "onnx can't be written: model exceeds 2GB"


def test_a_file_that_differs_from_keras_fails(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"")
    expected = np.eye(4) * 0.9 + 0.025
    answers = {"probabilities": expected + 2e-4, "milliseconds": 1.0, "runtime": "none", "opset": 15}
    artifact = verify.compare("onnx", tmp_path / "model.onnx", "", np.arange(4), expected, answers)
    assert (artifact.broken, artifact.opset) == (["max_abs_diff"], 15)


def test_the_defaults_leave_onnx_out(tmp_path):
    assert set(verify.FORMATS) - set(verify.DEFAULT_FORMATS) == {"onnx"}
    assert parse([str(tmp_path)]).formats == verify.DEFAULT_FORMATS


@pytest.mark.parametrize("quantized", [False, True])
def test_onnx_is_a_float_format(quantized):
    assert artifacts._form("onnx", quantized) == "float"


def test_a_missing_package_is_named_before_anything_is_read(tmp_path, monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tf2onnx" else real(name))
    with pytest.raises(MissingPackageError) as raised:
        export(tmp_path / "nowhere", "onnx")
    assert raised.value.summary == "the format onnx needs tf2onnx" and raised.value.argument == "formats"
    assert cli.main(["export", str(tmp_path / "nowhere"), "--formats", "onnx"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("cvt-keras export: ") and line.endswith("pip install tf2onnx onnxruntime")
    assert verify.checked(["int8"], None) == ("int8",)
    with pytest.raises(ArgumentError):
        verify.checked(["onnxx"], None)
