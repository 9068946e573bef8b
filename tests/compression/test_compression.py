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
from typing import get_args, get_type_hints

import keras
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from tensorflow.lite.python import schema_py_generated as schema

from cvt_keras import cli, runs
from cvt_keras.compression import compress, methods
from cvt_keras.compression.__main__ import Arguments
from cvt_keras.compression.kernels import kernels, share_of_zeros
from cvt_keras.compression.pruning import MagnitudePruning
from cvt_keras.errors import CheckpointError, NoRunError, OccupiedError, OutOfMemoryError, RecipeError, RunError
from cvt_keras.export.verify import BOUNDS, QUANTIZED
from cvt_keras.quantized.layers import FakeQuantize, QuantizedConv
from cvt_keras.quantized.model import float_form, quantized_cvt_of
from cvt_keras.report import page
from cvt_keras.training import Recipe, RunResult, callbacks, run
from cvt_keras.training.recipes import COMPRESSIONS


def _classifier(run_dir):
    return keras.saving.load_model(run_dir / "model.keras", compile=False)


def _report(run_dir):
    return json.loads((run_dir / "report.json").read_text())


def _constants(file):
    """The arrays in a TFLite file, and the quantisation of each: `[(values, scales)]`."""
    model = schema.ModelT.InitFromPackedBuf(file.read_bytes(), 0)
    interpreter = Interpreter(str(file), experimental_op_resolver_type=OpResolverType.BUILTIN_REF)
    interpreter.allocate_tensors()
    details = {tensor["index"]: tensor for tensor in interpreter.get_tensor_details()}
    found = []
    for index, tensor in enumerate(model.subgraphs[0].tensors):
        data = model.buffers[tensor.buffer].data
        if data is not None and len(data):
            found.append((interpreter.get_tensor(index), details[index]["quantization_parameters"]["scales"]))
    return found


# === What is written ===


def test_a_pruned_run_is_a_run_with_its_compression_told(compressed):
    run_dir = compressed("prune")
    settings = json.loads((run_dir / "recipe.json").read_text())["compression"]
    assert settings == {
        "method": "prune",
        "sparsity": 0.7,
        "pattern": "unstructured",
        "schedule": "polynomial",
        "frequency": None,
        "layers": [],
    }
    report = _report(run_dir)
    assert report["recipe"]["compression"] == settings
    assert report["compression"]["sparsity"] == pytest.approx(0.7, abs=2e-3)
    assert set(report["compression"]["sparsity_by_layer"]) == set(kernels(_classifier(run_dir)))
    page = html.unescape((run_dir / "report.html").read_text())
    assert 'Pruned (sparsity 0.7, pattern "unstructured", schedule "polynomial"). 70.0% of the weights' in page


def test_the_zeros_are_in_the_files(compressed, exported):
    run_dir = compressed("prune")
    chosen = kernels(_classifier(run_dir))
    zeros = sum(int((np.asarray(kernel) == 0).sum()) for kernel in chosen.values())
    assert share_of_zeros(chosen.values()) == pytest.approx(0.7, abs=2e-3)
    for name in ("float32", "dynamic_int8", "int8"):
        found = [values for values, _ in _constants(exported("prune") / f"{name}.tflite")]
        assert sum(int((values == 0).sum()) for values in found if values.dtype in (np.float32, np.int8)) >= zeros, name


def test_the_few_values_are_in_the_files(compressed, exported):
    run_dir = compressed("cluster")
    chosen = [np.asarray(kernel) for kernel in kernels(_classifier(run_dir)).values()]
    assert {len(np.unique(kernel)) for kernel in chosen} == {8}
    # By size: the converter moves a scale or a sign into some of them.
    found = [values.size for values, _ in _constants(exported("cluster") / "float32.tflite") if len(np.unique(values)) == 8]
    assert not collections.Counter(kernel.size for kernel in chosen) - collections.Counter(found)
    # In integers each output channel has a scale of its own. Not int8.tflite: the converter moves a norm's scale, which is
    # by input, into fc1. Small kernels stay float in this one.
    found = [
        values.size
        for values, scales in _constants(exported("cluster") / "dynamic_int8.tflite")
        if len(scales) > 1 and all(len(np.unique(channel)) <= 8 for channel in values)
    ]
    large = collections.Counter(kernel.size for kernel in chosen if kernel.size > 1024)
    assert large and not large - collections.Counter(found)
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


def test_a_quantised_run_reloads_to_the_same_answers(compressed):
    run_dir = compressed("qat")
    classifier = _classifier(run_dir)
    ranges = _report(run_dir)["compression"]["ranges"]  # as they were found, before the file was written
    found = {layer.minimum.path.removesuffix("/minimum"): layer for layer in classifier._flatten_layers() if _has_limits(layer)}
    assert set(ranges) == set(found)
    for path, (least, most) in ranges.items():
        assert (np.min(found[path].minimum), np.max(found[path].maximum)) == (np.float32(least), np.float32(most))
    assert quantized_cvt_of(classifier).preprocessing.class_names == tuple(_report(run_dir)["class_names"])
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3)).astype("float32")
    again = _classifier(run_dir)
    np.testing.assert_array_equal(classifier(images), again(images))
    assert not np.array_equal(classifier(images), float_form(classifier)(images))


@pytest.mark.parametrize("name", ["qat", "prune-qat"])
def test_every_convolution_of_the_integer_file_is_int8_by_channel(exported, name):
    interpreter = Interpreter(str(exported(name) / "int8.tflite"), experimental_op_resolver_type=OpResolverType.BUILTIN_REF)
    interpreter.allocate_tensors()
    tensors = {tensor["index"]: tensor for tensor in interpreter.get_tensor_details()}
    operations = interpreter._get_ops_details()
    convolutions = [op for op in operations if op["op_name"] in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")]
    # Two blocks with three depthwise and six Dense each, of which the second's projections take the cls token by itself,
    # with normalisation, stem, two embeddings and the head.
    assert len(convolutions) >= 2 * 9 + 5
    for operation in convolutions:
        image, kernel = (tensors[index] for index in operation["inputs"][:2])
        axis = 3 if operation["op_name"] == "DEPTHWISE_CONV_2D" else 0
        assert (image["dtype"], kernel["dtype"]) == (np.int8, np.int8)
        assert len(kernel["quantization_parameters"]["scales"]) == kernel["shape"][axis] > 1
    assert not [tensor["name"] for tensor in tensors.values() if tensor["dtype"] in (np.float32, np.float16)]


@pytest.mark.parametrize("name", ["qat", "prune-qat"])
def test_the_files_ranges_are_those_that_training_found(compressed, exported, name):
    file = exported(name) / "int8.tflite"
    interpreter = Interpreter(str(file), experimental_op_resolver_type=OpResolverType.BUILTIN_REF)
    interpreter.allocate_tensors()
    in_file = np.array([tensor["quantization"] for tensor in interpreter.get_tensor_details()])
    by_channel = [scales for _, scales in _constants(file) if len(scales) > 1]
    compared = 0
    for layer in _classifier(compressed(name))._flatten_layers():
        if isinstance(layer, FakeQuantize) and layer.axis is None:
            minimum, maximum = float(np.asarray(layer.minimum)), float(np.asarray(layer.maximum))
            scale = (maximum - minimum) / 255
            zero_point = round(-128 - minimum / scale)
            near = np.isclose(in_file[:, 0], scale, rtol=1e-5) & (in_file[:, 1] == zero_point)
            assert near.any(), (layer.path, scale, zero_point)
            compared += 1
        elif isinstance(layer, QuantizedConv):
            expected = np.asarray(layer.kernel_quantizer.maximum) / 127
            assert any(len(scales) == len(expected) and np.allclose(scales, expected, rtol=1e-5) for scales in by_channel)
            compared += 1
    assert compared > 80


def test_zeros_of_a_pruned_run_are_in_its_integer_file(compressed, exported):
    kept = [
        layer.conv.kernel
        for layer in _classifier(compressed("prune-qat"))._flatten_layers()
        if isinstance(layer, QuantizedConv)
    ]
    zeros = sum(int((np.asarray(kernel) == 0).sum()) for kernel in kept)
    before = sum(int((np.asarray(kernel) == 0).sum()) for kernel in kernels(_classifier(compressed("prune"))).values())
    assert zeros >= before
    found = [values for values, _ in _constants(exported("prune-qat") / "int8.tflite") if values.dtype == np.int8]
    assert sum(int((values == 0).sum()) for values in found) >= zeros
    assert _report(compressed("prune-qat"))["compression"]["sparsity"] == pytest.approx(
        zeros / sum(int(np.prod(kernel.shape)) for kernel in kept)
    )


def test_float_files_of_a_quantised_run_have_no_rounding(compressed, exported):
    folder = exported("qat")
    report = json.loads((folder.parent / "report.json").read_text())
    rows = {row["name"]: row for row in report["artifacts"]}
    assert rows["float32"]["max_abs_diff"] < 1e-4  # beside the float form
    names = [operation["op_name"] for operation in _operations(folder / "float32.tflite")]
    assert not {"FAKE_QUANT", "QUANTIZE"} & set(names)
    assert "FAKE_QUANT" not in [operation["op_name"] for operation in _operations(folder / "int8.tflite")]
    assert rows["int8"]["bounds"] == dataclasses.asdict(QUANTIZED)
    assert rows["dynamic_int8"]["bounds"] == dataclasses.asdict(BOUNDS["dynamic_int8"])
    assert rows["int8"]["agreement"] >= 0.95 and rows["int8"]["float_tensors"] == {}
    assert report["calibration_images"] == 0


def _operations(file):
    interpreter = Interpreter(str(file), experimental_op_resolver_type=OpResolverType.BUILTIN_REF)
    interpreter.allocate_tensors()
    return interpreter._get_ops_details()


# === What is refused ===


@pytest.mark.parametrize(
    "method, options, argument",
    [
        ("prune", {"sparsity": 1.5}, "sparsity"),
        ("prune", {"sparsity": 0}, "sparsity"),
        ("prune", {"pattern": "2:4", "sparsity": 0.7}, "sparsity"),
        ("prune", {"pattern": "2:4", "schedule": "constant"}, "schedule"),
        ("prune", {"schedule": "constant", "frequency": 2}, "frequency"),
        ("prune", {"frequency": 10000}, "frequency"),
        ("prune", {"layers": ["stage7"]}, "layers"),
        ("prune", {"layers": ()}, "layers"),
        ("prune", {"layers": "stage1"}, "layers"),
        ("prune", {"clusters": 4}, "clusters"),
        ("prune", {"after": {"method": "qat"}}, "after"),
        ("cluster", {"layers": ["stage7"]}, "layers"),
        ("cluster", {"layers": []}, "layers"),
        ("cluster", {"clusters": 1}, "clusters"),
        ("cluster", {"clusters": 5000}, "clusters"),
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


def test_every_place_has_the_same_methods():
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


@pytest.mark.parametrize(
    "before, method",
    [
        ("prune", "prune"),
        ("cluster", "cluster"),
        ("qat", "qat"),
        ("cluster", "prune"),
        ("qat", "prune"),
        ("qat", "cluster"),
        ("cluster", "qat"),
    ],
)
def test_methods_that_can_not_follow_each_other_are_refused(before, method, compressed, tmp_path):
    with pytest.raises(RecipeError) as refusal:
        compress(compressed(before), tmp_path / "new", method)
    assert refusal.value.argument == "run" and before in refusal.value.summary
    assert not (tmp_path / "new").exists()


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(NoRunError) as refusal:
        compress(tmp_path, tmp_path / "new", "prune")
    assert (refusal.value.argument, refusal.value.exit_code) == ("run", 2)


def test_a_run_without_a_model_is_refused(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "model.keras").unlink()
    with pytest.raises(RunError) as refusal:
        compress(tmp_path / "run", tmp_path / "new", "qat")
    assert "model.keras" in refusal.value.summary
    assert (refusal.value.argument, refusal.value.exit_code) == ("run", 1)


@pytest.mark.parametrize("compression", [{"sparsity": 0.7}, {"method": "zip"}])
def test_a_damaged_recipe_is_called_damaged(compression, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    recipe = runs.read_json(trained / "recipe.json") | {"compression": compression}
    runs.write_json(tmp_path / "run" / "recipe.json", recipe)
    with pytest.raises(RunError) as refusal:
        compress(tmp_path / "run", tmp_path / "new", "prune")
    assert str(tmp_path / "run" / "recipe.json") in refusal.value.summary and "`compression`" in refusal.value.summary


def test_a_run_is_never_overwritten(trained, compressed):
    with pytest.raises(OccupiedError) as refusal:
        compress(trained, compressed("cluster"), "prune")
    assert refusal.value.argument == "run_dir"


def test_a_compressed_recipe_is_not_for_train_py(compressed, tmp_path):
    recipe = Recipe.from_settings(runs.read_json(compressed("prune") / "recipe.json"))
    with pytest.raises(RecipeError) as refusal:
        run(recipe, tmp_path / "run")
    assert refusal.value.argument == "compression"


def test_recipe_json_has_compression_only_if_there_is_one(trained):
    assert "compression" not in json.loads((trained / "recipe.json").read_text())
    assert dataclasses.replace(Recipe(), compression={"method": "qat"}).settings()["compression"] == {"method": "qat"}


# === How it trains ===


def test_flags_reach_the_recipe(trained, compressed, tmp_path):
    before, after = (json.loads((run_dir / "recipe.json").read_text()) for run_dir in (trained, compressed("prune")))
    assert after["peak_learning_rate"] == before["peak_learning_rate"] / 4
    assert (after["epochs"], after["train_limit"], after["test_limit"]) == (2, 256, 256)
    assert after["weights"] == str(trained / "model.keras")
    values = {
        "seed": 7,
        "epochs": 1,
        "batch_size": 16,
        "precision": "mixed_bfloat16",
        "train_limit": 64,
        "validation_limit": 60,
        "test_limit": 50,
        "peak_learning_rate": 0.003,
        "class_weights": "auto",
    }
    flags = [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    flags += ["--data-dir", before["data_dir"], "--skip-broken"]
    pruning = ["--sparsity", "0.4", "--schedule", "polynomial", "--frequency", "1", "--layers", "stage1"]
    assert cli.main(["prune", str(trained), "--run-dir", str(tmp_path / "new"), *flags, *pruning]) == 0
    stored = json.loads((tmp_path / "new" / "recipe.json").read_text())
    assert {name: stored[name] for name in values} == values
    assert stored["skip_broken"] is True
    assert stored["compression"] == {
        "method": "prune",
        "sparsity": 0.4,
        "pattern": "unstructured",
        "schedule": "polynomial",
        "frequency": 1,
        "layers": ["stage1"],
    }
    report = _report(tmp_path / "new")
    assert (report["validation"]["images"], report["test"]["images"]) == (60, 50)


@pytest.mark.parametrize("name", ["prune", "prune-cluster", "prune-qat"])
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
    assert "epochs was 2 and is 3" in capsys.readouterr().err


def test_only_epochs_with_all_zeros_are_kept(trained, tmp_path, monkeypatch):
    """Though the first epoch of two, half pruned, is the better one."""

    class Best(callbacks.BestWeights):
        def on_test_end(self, logs=None):
            super().on_test_end({**logs, "accuracy": 1.0 - self._epoch})

    monkeypatch.setattr("cvt_keras.training.loop.BestWeights", Best)
    result = compress(trained, tmp_path / "run", "prune", train_limit=256)
    assert isinstance(result, RunResult)
    assert [row["epoch"] for row in result.history] == [1, 2]
    assert result.report.compression == _report(tmp_path / "run")["compression"]
    assert result.report.compression["sparsity"] == pytest.approx(0.7, abs=2e-3)


@pytest.mark.parametrize("method, precision", [("prune", "auto"), ("cluster", "auto"), ("qat", "float32")])
def test_what_does_not_go_with_compression_is_off(method, precision, trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "run")
    recipe = runs.read_json(trained / "recipe.json")
    recipe |= {"ema": 0.999, "layer_decay": 0.8, "precision": "mixed_bfloat16", "xla": "on", "batch_size": 8}
    runs.write_json(tmp_path / "run" / "recipe.json", recipe)
    recipes = []
    monkeypatch.setattr(
        "cvt_keras.compression.methods.train", lambda recipe, run_dir, resume, compressor: recipes.append(recipe)
    )
    compress(tmp_path / "run", tmp_path / "new", method)
    [recipe] = recipes
    assert (recipe.ema, recipe.layer_decay, recipe.precision, recipe.xla, recipe.batch_size) == (0, 1, precision, "auto", 8)


def test_what_can_not_be_combined_is_refused_from_python_too(trained, tmp_path):
    recipe = dataclasses.replace(Recipe.from_settings(runs.read_json(trained / "recipe.json")), ema=0.9)
    with pytest.raises(RecipeError) as refusal:
        run(recipe, tmp_path / "run", compressor=MagnitudePruning())
    assert refusal.value.argument == "ema"
    assert not (tmp_path / "run").exists()


def test_images_of_other_classes_are_refused(trained, tmp_path):
    """The head would be a new one, trained at the low learning rate of a trained network."""
    recipe = runs.read_json(trained / "recipe.json") | {"dataset": "digits"}
    shutil.copytree(trained, tmp_path / "run")
    runs.write_json(tmp_path / "run" / "recipe.json", recipe)
    with pytest.raises(RecipeError) as refusal:
        compress(tmp_path / "run", tmp_path / "new", "prune")
    assert refusal.value.argument == "data_dir" and "0, 1, 2, 3, 4 and 5 more" in refusal.value.summary
    assert not (tmp_path / "new").exists()


def test_a_quantised_run_is_no_start_for_another_training(compressed, tmp_path):
    recipe = dataclasses.replace(Recipe.from_settings(runs.read_json(compressed("qat") / "recipe.json")), compression=None)
    recipe = dataclasses.replace(recipe, weights=str(compressed("qat") / "model.keras"))
    with pytest.raises(CheckpointError):
        run(recipe, tmp_path / "run")


def test_too_little_memory_names_only_flags_of_the_command(trained, tmp_path, monkeypatch):
    def exhaust(*args, **kwargs):
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating")

    monkeypatch.setattr(keras.Model, "fit", exhaust)
    with pytest.raises(OutOfMemoryError) as failure:
        compress(trained, tmp_path / "run", "qat")
    assert failure.value.argument == "batch_size"
    assert "--batch-size below 32" in failure.value.hint and "--image-size" not in failure.value.hint


# === Settings of the run before ===


def test_a_run_that_froze_layers_is_compressed_whole(tmp_path, monkeypatch):
    """A pruned network has every kernel trained; the weights of classes stay."""
    recipe = Recipe(weights="a.pth", freeze="backbone", class_weights="auto", early_stopping=3, ema=0.9, layer_decay=0.5)
    monkeypatch.setattr(methods.runs, "require_finished", lambda *_, **__: None)
    monkeypatch.setattr(methods, "read_recipe", lambda run: recipe)
    trained = []
    monkeypatch.setattr(methods, "train", lambda recipe, run_dir, **_: trained.append(recipe))
    compress(tmp_path / "run", tmp_path / "pruned", "prune")
    [compressed] = trained
    assert (compressed.freeze, compressed.ema, compressed.layer_decay) == (None, 0.0, 1.0)
    assert (compressed.class_weights, compressed.early_stopping) == ("auto", 3)
    with pytest.raises(RecipeError) as error:
        MagnitudePruning(0.5).require(recipe)
    assert error.value.argument == "freeze"
