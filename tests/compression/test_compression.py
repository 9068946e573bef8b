"""Compression of real runs: what it writes, what it refuses, and how it resumes."""

import collections
import dataclasses
import html
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import keras
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from tensorflow.lite.python import schema_py_generated as schema

from cvt_keras import calibration_of, cli, runs
from cvt_keras.compression import compress, methods
from cvt_keras.compression.__main__ import Arguments
from cvt_keras.compression.kernels import kernels, share_of_zeros
from cvt_keras.compression.pruning import MagnitudePruning
from cvt_keras.errors import CheckpointError, NoRunError, OccupiedError, OutOfMemoryError, RecipeError, RunError
from cvt_keras.export import tflite
from cvt_keras.export.verify import BOUNDS, QUANTIZED
from cvt_keras.quantized.layers import FakeQuantize, QuantizedConv
from cvt_keras.quantized.model import float_form, quantized_cvt_of
from cvt_keras.report import page
from cvt_keras.training import Recipe, callbacks, run
from cvt_keras.training.recipes import COMPRESSIONS


def _classifier(run_dir):
    return keras.saving.load_model(run_dir / "model.keras", compile=False)


def _edited(run_dir, folder, **settings):
    """Copies a run without what no compression reads, and changes settings of its recipe. Returns the copy's folder."""
    shutil.copytree(run_dir, folder, ignore=shutil.ignore_patterns("checkpoints", "tensorboard", "plots", "export"))
    runs.write_json(folder / "recipe.json", runs.read_json(run_dir / "recipe.json") | settings)
    return folder


def _report(run_dir):
    return json.loads((run_dir / "report.json").read_text())


def _interpreter(file):
    interpreter = Interpreter(model_content=file, experimental_op_resolver_type=OpResolverType.BUILTIN_REF)
    interpreter.allocate_tensors()
    return interpreter


def _constants(file):
    """The constants of a TFLite file, given as bytes, with the quantisation scales of each: `[(values, scales)]`."""
    model = schema.ModelT.InitFromPackedBuf(file, 0)
    interpreter = _interpreter(file)
    details = {tensor["index"]: tensor for tensor in interpreter.get_tensor_details()}
    return [
        (interpreter.get_tensor(index), details[index]["quantization_parameters"]["scales"])
        for index, tensor in enumerate(model.subgraphs[0].tensors)
        if (data := model.buffers[tensor.buffer].data) is not None and len(data)
    ]


def _convert(run_dir, kind):
    classifier = _classifier(run_dir)
    return tflite.convert(classifier, _report(run_dir)["class_names"], kind)


# === What is written ===


def test_a_pruned_run_reports_its_compression(trained, compressed):
    run_dir = compressed("prune")
    before, after = (json.loads((folder / "recipe.json").read_text()) for folder in (trained, run_dir))
    assert after["peak_learning_rate"] == before["peak_learning_rate"] / 4
    assert (after["epochs"], after["train_limit"], after["test_limit"]) == (2, 256, 100)
    assert after["weights"] == str(trained / "model.keras")
    assert after["compression"] == {
        "method": "prune",
        "sparsity": 0.7,
        "pattern": "unstructured",
        "schedule": "polynomial",
        "frequency": None,
        "layers": [],
    }
    report = _report(run_dir)
    assert report["recipe"]["compression"] == after["compression"]
    assert set(report["compression"]["sparsity_by_layer"]) == set(kernels(_classifier(run_dir)))
    page = html.unescape((run_dir / "report.html").read_text())
    assert 'Pruned (sparsity 0.7, pattern "unstructured", schedule "polynomial"). 70.0% of the weights' in page


def test_only_epochs_with_all_zeros_are_kept(compressed):
    # The fixture scores the first of the two epochs best, in which half of the zeros are missing.
    run_dir = compressed("prune")
    assert len((run_dir / "history.csv").read_text().splitlines()) == 1 + 2
    assert _report(run_dir)["compression"]["sparsity"] == pytest.approx(0.7, abs=2e-3)
    assert share_of_zeros(kernels(_classifier(run_dir)).values()) == pytest.approx(0.7, abs=2e-3)


def test_the_zeros_are_in_the_file(compressed):
    """In dynamic_int8.tflite. `test_pruning.py` looks for them in the two other kinds."""
    run_dir = compressed("prune")
    zeros = sum(int((np.asarray(kernel) == 0).sum()) for kernel in kernels(_classifier(run_dir)).values())
    constants = [values for values, _ in _constants(_convert(run_dir, "dynamic_int8"))]
    assert sum(int((values == 0).sum()) for values in constants if values.dtype in (np.float32, np.int8)) >= zeros


def test_the_few_values_are_in_the_files(compressed):
    run_dir = compressed("prune-cluster")
    chosen = [np.asarray(kernel) for kernel in kernels(_classifier(run_dir)).values()]
    assert {len(np.unique(kernel)) for kernel in chosen} == {8}
    # Compared by size: the converter moves a scale or a sign into some of them. In the residual convolution each output channel
    # has a scale of its own, that of BatchNorm.
    sizes = [
        values.size
        for values, _ in _constants(_convert(run_dir, "float32"))
        if len(np.unique(values)) == 8 or (values.shape == (24, 3, 3, 24) and max(len(np.unique(c)) for c in values) == 8)
    ]
    assert not collections.Counter(kernel.size for kernel in chosen) - collections.Counter(sizes)
    # With int8 weights each output channel has a scale of its own. Small kernels stay float in this file. In int8.tflite the
    # converter moves a norm's scale, which is per input, into fc1.
    sizes = [
        values.size
        for values, scales in _constants(_convert(run_dir, "dynamic_int8"))
        if len(scales) > 1 and all(len(np.unique(channel)) <= 8 for channel in values)
    ]
    large = collections.Counter(kernel.size for kernel in chosen if kernel.size > 1024)
    assert large and not large - collections.Counter(sizes)
    assert set(_report(run_dir)["compression"]["values_by_layer"].values()) == {8}


def test_a_clustered_run_keeps_the_zeros_that_it_was_pruned_to(compressed):
    before, after = kernels(_classifier(compressed("prune"))), kernels(_classifier(compressed("prune-cluster")))
    for path, kernel in after.items():
        assert (np.asarray(kernel)[np.asarray(before[path]) == 0] == 0).all()
        assert len(np.unique(np.asarray(kernel))) == 8
    settings = json.loads((compressed("prune-cluster") / "recipe.json").read_text())["compression"]
    assert settings["after"]["method"] == "prune"
    assert "Pruned (" in (page := (compressed("prune-cluster") / "report.html").read_text()) and "then clustered" in page


def _has_limits(layer):
    return isinstance(layer, FakeQuantize) and layer.limits is None


def test_a_quantised_run_reloads_to_the_same_outputs(compressed):
    run_dir = compressed("prune-qat")
    classifier = _classifier(run_dir)
    ranges = _report(run_dir)["compression"]["ranges"]  # measured before the file was written
    layers = {
        layer.minimum.path.removesuffix("/minimum"): layer for layer in classifier._flatten_layers() if _has_limits(layer)
    }
    assert set(ranges) == set(layers)
    for path, (minimum, maximum) in ranges.items():
        limits = np.min(layers[path].minimum), np.max(layers[path].maximum)
        assert limits == (np.float32(minimum), np.float32(maximum))
    assert quantized_cvt_of(classifier).preprocessing.class_names == tuple(_report(run_dir)["class_names"])
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3)).astype("float32")
    np.testing.assert_array_equal(classifier(images), _classifier(run_dir)(images))
    assert not np.array_equal(classifier(images), float_form(classifier)(images))


def test_every_convolution_of_the_int8_file_is_quantised_per_channel(exported):
    interpreter = _interpreter((exported / "int8.tflite").read_bytes())
    tensors = {tensor["index"]: tensor for tensor in interpreter.get_tensor_details()}
    operations = interpreter._get_ops_details()
    convolutions = [op for op in operations if op["op_name"] in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")]
    # The block's four depthwise and six Dense layers, normalisation, whitening, stem, embedding, residual convolution and head.
    assert len(convolutions) >= 10 + 6
    for operation in convolutions:
        image, kernel = (tensors[index] for index in operation["inputs"][:2])
        axis = 3 if operation["op_name"] == "DEPTHWISE_CONV_2D" else 0
        assert (image["dtype"], kernel["dtype"]) == (np.int8, np.int8)
        assert len(kernel["quantization_parameters"]["scales"]) == kernel["shape"][axis] > 1
    assert not [tensor["name"] for tensor in tensors.values() if tensor["dtype"] in (np.float32, np.float16)]


def test_the_int8_file_has_the_ranges_of_the_training(compressed, exported):
    file = (exported / "int8.tflite").read_bytes()
    in_file = np.array([tensor["quantization"] for tensor in _interpreter(file).get_tensor_details()])
    by_channel = [scales for _, scales in _constants(file) if len(scales) > 1]
    compared = 0
    classifier = _classifier(compressed("prune-qat"))
    for layer in classifier._flatten_layers():
        # In the file, the head divides the logits by the temperature.
        divisor = calibration_of(classifier).temperature if "head" in (layer.path or "").split("/") else 1
        if isinstance(layer, FakeQuantize) and layer.axis is None:
            minimum, maximum = (float(np.asarray(limit)) / divisor for limit in (layer.minimum, layer.maximum))
            scale = (maximum - minimum) / 255
            zero_point = round(-128 - minimum / scale)
            near = np.isclose(in_file[:, 0], scale, rtol=1e-5) & (in_file[:, 1] == zero_point)
            assert near.any(), (layer.path, scale, zero_point)
            compared += 1
        elif isinstance(layer, QuantizedConv):
            expected = np.asarray(layer.kernel_quantizer.maximum) / 127 / divisor
            assert any(len(scales) == len(expected) and np.allclose(scales, expected, rtol=1e-5) for scales in by_channel)
            compared += 1
    assert compared > 40


def test_zeros_of_a_pruned_run_are_in_its_int8_file(compressed, exported):
    quantized = [
        layer.conv.kernel
        for layer in _classifier(compressed("prune-qat"))._flatten_layers()
        if isinstance(layer, QuantizedConv)
    ]
    zeros = sum(int((np.asarray(kernel) == 0).sum()) for kernel in quantized)
    before = sum(int((np.asarray(kernel) == 0).sum()) for kernel in kernels(_classifier(compressed("prune"))).values())
    assert zeros >= before
    constants = [values for values, _ in _constants((exported / "int8.tflite").read_bytes()) if values.dtype == np.int8]
    assert sum(int((values == 0).sum()) for values in constants) >= zeros
    assert _report(compressed("prune-qat"))["compression"]["sparsity"] == pytest.approx(
        zeros / sum(int(np.prod(kernel.shape)) for kernel in quantized)
    )


def test_float_files_of_a_quantised_run_have_no_rounding(exported):
    report = json.loads((exported.parent / "report.json").read_text())
    rows = {row["name"]: row for row in report["artifacts"]}
    assert rows["float32"]["max_abs_diff"] < 1e-4  # compared with the float form
    assert not {"FAKE_QUANT", "QUANTIZE"} & _operations(exported / "float32.tflite")
    assert "FAKE_QUANT" not in _operations(exported / "int8.tflite")
    temperature = report["calibration"]["temperature"]
    for name, bounds in (("int8", QUANTIZED), ("dynamic_int8", BOUNDS["dynamic_int8"])):
        assert rows[name]["bounds"] == dataclasses.asdict(bounds.scaled_for(temperature))
    assert rows["int8"]["agreement"] >= 0.95 and rows["int8"]["float_tensors"] == {}
    assert report["calibration_images"] == 0


def _operations(file):
    return {operation["op_name"] for operation in _interpreter(file.read_bytes())._get_ops_details()}


@pytest.mark.parametrize("name", ["prune", "prune-cluster", "prune-qat"])
def test_no_compression_changes_the_whitening_kernel(name, trained, compressed):
    before, after = (
        _classifier(run_dir).get_layer("cvt").get_layer("whitening").kernel for run_dir in (trained, compressed(name))
    )
    np.testing.assert_array_equal(after, before)


# === What is refused ===


@pytest.mark.parametrize(
    "method, options, argument",
    [
        ("prune", {"sparsity": 1.5}, "sparsity"),
        ("prune", {"sparsity": 0}, "sparsity"),
        ("prune", {"pattern": "2:4", "sparsity": 0.7}, "sparsity"),
        ("prune", {"pattern": "2:4", "schedule": "constant"}, "schedule"),
        ("prune", {"schedule": "constant", "frequency": 2}, "frequency"),
        ("prune", {"layers": ["stage7"]}, "layers"),  # refused once the network is built
        ("prune", {"layers": ()}, "layers"),
        ("prune", {"layers": "stage1"}, "layers"),
        ("prune", {"clusters": 4}, "clusters"),
        ("prune", {"after": {"method": "qat"}}, "after"),
        ("cluster", {"layers": []}, "layers"),
        ("cluster", {"clusters": 1}, "clusters"),
        ("qat", {"precision": "mixed_bfloat16"}, "precision"),
        ("qat", {"epochs": 0}, "epochs"),
        ("zip", {}, "method"),
    ],
)
def test_a_wrong_argument_is_named(method, options, argument, trained, tmp_path):
    with pytest.raises(RecipeError) as refusal:
        compress(trained, tmp_path / "new", method, **options)
    assert f"`{argument}`" in refusal.value.summary
    assert refusal.value.argument == argument or argument == "epochs"
    assert "--" not in refusal.value.summary
    assert not (tmp_path / "new").exists()


def test_commands_flags_and_report_have_the_same_methods():
    commands = {name for name, command in cli.COMMANDS.items() if command.module == "cvt_keras.compression.__main__"}
    flags = {arguments.method for arguments in Arguments.__subclasses__()}
    assert set(COMPRESSIONS) == commands == flags == set(methods.METHODS) == set(page.COMPRESSED)
    assert set(COMPRESSIONS) == set(get_args(get_type_hints(compress)["method"]))


def test_a_wrong_flag_is_refused_without_keras(tmp_path):
    wrong = [
        ("prune", "--sparsity", "1.5"),
        ("prune", "--layers"),
        ("prune", "--pattern", "2:4", "--frequency", "3"),
        ("cluster", "--clusters", "1"),
        ("cluster", "--layers"),
        ("qat",),  # the run does not exist
    ]
    code = (
        "import sys\n"
        "from cvt_keras import cli\n"
        f"for method, *flags in {wrong}:\n"
        "    assert cli.main([method, 'none', '--run-dir', 'new', *flags]) == 2, (method, flags)\n"
        "assert not {'keras', 'tensorflow', 'tensorflow_model_optimization'} & set(sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"cvt-keras {method}" for method, *_ in wrong]
    assert [line.split("`")[1] for line in lines[:-1]] == ["sparsity", "layers", "frequency", "clusters", "layers"]


@pytest.mark.parametrize("flags", [["--sparsity", "1.5"], ["--layers"]])
def test_a_wrong_value_of_a_flag_is_one_line(flags, trained, tmp_path, capsys):
    assert cli.main(["prune", str(trained), "--run-dir", str(tmp_path / "new"), *flags]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cvt-keras prune: ")]
    assert f"`{flags[0].removeprefix('--')}`" in line


def test_methods_that_can_not_follow_each_other_are_refused(trained, tmp_path):
    pairs = ("prune", "prune"), ("cluster", "cluster"), ("qat", "qat")
    pairs += ("cluster", "prune"), ("qat", "prune"), ("qat", "cluster"), ("cluster", "qat")
    for before, method in pairs:
        run_dir = _edited(trained, tmp_path / f"{before}-{method}", compression={"method": before})
        with pytest.raises(RecipeError) as refusal:
            compress(run_dir, tmp_path / "new", method)
        assert refusal.value.argument == "run" and before in refusal.value.summary
    assert not (tmp_path / "new").exists()


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(NoRunError) as refusal:
        compress(tmp_path, tmp_path / "new", "prune")
    assert (refusal.value.argument, refusal.value.exit_code) == ("run", 2)


def test_a_run_without_a_model_is_refused(trained, tmp_path):
    (_edited(trained, tmp_path / "run") / "model.keras").unlink()
    with pytest.raises(RunError) as refusal:
        compress(tmp_path / "run", tmp_path / "new", "qat")
    assert "model.keras" in refusal.value.summary
    assert (refusal.value.argument, refusal.value.exit_code) == ("run", 1)


@pytest.mark.parametrize("compression", [{"sparsity": 0.7}, {"method": "zip"}])
def test_a_damaged_recipe_is_refused(compression, trained, tmp_path):
    run_dir = _edited(trained, tmp_path / "run", compression=compression)
    with pytest.raises(RunError) as refusal:
        compress(run_dir, tmp_path / "new", "prune")
    assert str(run_dir / "recipe.json") in refusal.value.summary and "`compression`" in refusal.value.summary


def test_a_run_is_never_overwritten(trained, compressed):
    with pytest.raises(OccupiedError) as refusal:
        compress(trained, compressed("prune"), "cluster")
    assert refusal.value.argument == "run_dir"


def test_training_refuses_the_recipe_of_a_compressed_run(compressed, tmp_path):
    recipe = Recipe.from_settings(runs.read_json(compressed("prune") / "recipe.json"))
    with pytest.raises(RecipeError) as refusal:
        run(recipe, tmp_path / "run")
    assert refusal.value.argument == "compression"


def test_recipe_json_has_compression_only_if_there_is_one(trained):
    assert "compression" not in json.loads((trained / "recipe.json").read_text())
    assert dataclasses.replace(Recipe(), compression={"method": "qat"}).settings()["compression"] == {"method": "qat"}


# === How it trains ===


def test_flags_reach_the_recipe(trained, tmp_path, monkeypatch, capsys):
    calls = []

    def train(recipe, run_dir, **options):
        calls.append((recipe, run_dir, options))
        return SimpleNamespace(run_dir=run_dir, report=SimpleNamespace(test={"top1": 0.5, "images": 50}))

    monkeypatch.setattr(methods, "train", train)
    values = {
        "seed": 7,
        "epochs": 1,
        "batch_size": 16,
        "precision": "mixed_bfloat16",
        "data_dir": "photos",
        "train_limit": 64,
        "validation_limit": 60,
        "test_limit": 50,
        "peak_learning_rate": 0.003,
        "class_weights": "auto",
    }
    flags = [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    pruning = ["--sparsity", "0.4", "--schedule", "polynomial", "--frequency", "1", "--layers", "stage0"]
    assert cli.main(["prune", str(trained), "--run-dir", "new", *flags, "--skip-broken", "--resume", *pruning]) == 0
    [(recipe, run_dir, options)] = calls
    assert {name: getattr(recipe, name) for name in values} == values
    assert recipe.skip_broken is True
    assert (run_dir, options["resume"]) == (Path("new"), True)
    assert options["compressor"].settings == {
        "method": "prune",
        "sparsity": 0.4,
        "pattern": "unstructured",
        "schedule": "polynomial",
        "frequency": 1,
        "layers": ["stage0"],
    }
    top1, export = capsys.readouterr().out.splitlines()[-2:]
    assert top1 == "50.00% top-1 on 50 test images; the run is in new"
    assert export == "To export it: cvt-keras export new"


# Clustering has the most state in its checkpoint: float weights, centroids, members and the masks of the zeros.
@pytest.mark.parametrize(
    "name", [pytest.param("prune", marks=pytest.mark.slow), "prune-cluster", pytest.param("prune-qat", marks=pytest.mark.slow)]
)
def test_a_stopped_run_resumes_to_the_same_weights(name, trained, compressed, tmp_path, monkeypatch, capsys):
    before, _, method = name.rpartition("-")
    source = compressed(before) if before else trained
    flags = ["--clusters", "8"] if method == "cluster" else []
    command = [method, str(source), "--run-dir", str(tmp_path / "run"), "--train-limit", "256", *flags]

    class Stopped(callbacks.Checkpoints):
        def on_epoch_end(self, epoch, logs=None):
            super().on_epoch_end(epoch, logs)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cvt_keras.training.loop.Checkpoints", Stopped)
        assert cli.main(command) == 130
    assert f"To resume: cvt-keras {method} " in capsys.readouterr().err
    assert not (tmp_path / "run" / "model.keras").exists()
    assert cli.main([*command, "--resume"]) == 0
    assert "resuming after epoch 1 of 2" in capsys.readouterr().out
    for value, expected in zip(_classifier(tmp_path / "run").get_weights(), _classifier(compressed(name)).get_weights()):
        np.testing.assert_allclose(value, expected, atol=1e-4)
    assert cli.main([*command, "--resume", "--epochs", "3"]) == 2
    assert "epochs: 2 in the run, now 3" in capsys.readouterr().err


@pytest.mark.parametrize("method, precision", [("prune", "auto"), ("cluster", "auto"), ("qat", "float32")])
def test_settings_that_compression_turns_off_or_keeps(method, precision, tmp_path, monkeypatch):
    before = Recipe(
        weights="a.pth", freeze="backbone", ema=0.999, layer_decay=0.8, precision="mixed_bfloat16", xla="on",
        batch_size=8, class_weights="auto", early_stopping=3,
    )  # fmt: skip
    monkeypatch.setattr(methods.runs, "require_finished", lambda *_, **__: None)
    monkeypatch.setattr(methods, "read_recipe", lambda run: before)
    monkeypatch.setattr(methods, "train", lambda recipe, run_dir, **_: recipe)
    after = compress(tmp_path / "run", tmp_path / "new", method)
    assert (after.freeze, after.ema, after.layer_decay) == (None, 0.0, 1.0)
    assert (after.precision, after.xla) == (precision, "auto")
    assert (after.batch_size, after.class_weights, after.early_stopping) == (8, "auto", 3)


def test_settings_that_do_not_go_with_compression_are_refused_from_python(trained, tmp_path):
    recipe = dataclasses.replace(Recipe.from_settings(runs.read_json(trained / "recipe.json")), ema=0.9)
    with pytest.raises(RecipeError) as refusal:
        run(recipe, tmp_path / "run", compressor=MagnitudePruning())
    assert refusal.value.argument == "ema"
    assert not (tmp_path / "run").exists()
    with pytest.raises(RecipeError) as refusal:
        MagnitudePruning().require(Recipe(weights="a.pth", freeze="backbone"))
    assert refusal.value.argument == "freeze"


def test_images_of_other_classes_are_refused(trained, tmp_path):
    """They would replace the head, and the learning rate is too low to train a new one."""
    with pytest.raises(RecipeError) as refusal:
        compress(_edited(trained, tmp_path / "run", dataset="digits"), tmp_path / "new", "prune")
    assert refusal.value.argument == "data_dir" and "0, 1, 2, 3, 4 and 5 more" in refusal.value.summary
    assert not (tmp_path / "new").exists()


def test_training_can_not_start_from_a_quantised_run(compressed, tmp_path):
    run_dir = compressed("prune-qat")
    recipe = dataclasses.replace(Recipe.from_settings(runs.read_json(run_dir / "recipe.json")), compression=None)
    with pytest.raises(CheckpointError):
        run(dataclasses.replace(recipe, weights=str(run_dir / "model.keras")), tmp_path / "run")


def test_the_hint_about_memory_names_only_flags_of_the_command(trained, tmp_path, monkeypatch):
    def exhaust(*args, **kwargs):
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating")

    monkeypatch.setattr(keras.Model, "fit", exhaust)
    with pytest.raises(OutOfMemoryError) as failure:
        compress(trained, tmp_path / "run", "prune")
    assert failure.value.argument == "batch_size"
    assert "--batch-size below 32" in failure.value.hint and "--image-size" not in failure.value.hint
