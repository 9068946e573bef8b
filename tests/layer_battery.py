"""What every layer must do, whatever it computes. After keras-hub's layer tests in spirit.

Several layers share one model, so that one training step and one file check them all.
"""

import inspect
import json
from typing import NamedTuple

import keras
import numpy as np
from keras import ops, tree

PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")


class Case(NamedTuple):
    """A layer, and what is expected of it.

    Args:
        cls: the layer's class.
        arguments: for `cls`, as few as its tests need.
        shapes: of the inputs, in the order of `call`'s arguments, batch first.
        output_shapes: of the outputs, a list too.
        weights: number of values in the trainable variables.
        statistics: the same for the other variables, without a random generator's state.
    """

    cls: type
    arguments: dict
    shapes: list
    output_shapes: list
    weights: int
    statistics: int


def check_config(case):
    """Checks that each argument is an attribute and a key of the config, and that the config makes the same layer."""
    layer = case.cls(**case.arguments)
    config = layer.get_config()
    own = [name for name in inspect.signature(case.cls).parameters if name != "kwargs"]
    for name in own:
        assert config[name] == getattr(layer, name), name
    for name, value in case.arguments.items():
        assert config[name] == value, name
    assert case.cls.from_config(config).get_config() == config
    stored = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
    assert keras.saving.deserialize_keras_object(stored).get_config() == config


def check_layers(cases, precision, tmp_path, compiled=False):
    """Builds the layers of the cases in one model, trains it for a step, calls it, saves it and loads it.

    Args:
        cases: a list of `Case`.
        precision: one of PRECISIONS.
        tmp_path: a folder to write to.
        compiled: train compiled, with XLA, instead of eagerly: that takes much longer than the step itself.
    """
    layers, symbols, outputs = [], [], []
    for cls, arguments, shapes, output_shapes, weights, statistics in cases:
        layer = cls(**arguments, dtype=precision)
        inputs = [keras.Input(shape[1:]) for shape in shapes]
        results = tree.flatten(layer(*inputs))
        assert [result.shape[1:] for result in results] == [shape[1:] for shape in output_shapes], cls
        _check_variables(layer, weights, statistics)
        layers.append(layer)
        symbols += inputs
        outputs += results
    model = keras.Model(symbols, outputs)
    images = [_random(0, shape) for case in cases for shape in case.shapes]
    # No target is a multiple of what a norm gives, so that every weight has a gradient.
    targets = [_random(1, shape) for case in cases for shape in case.output_shapes]
    _check_training_step(model, layers, images, targets, compiled)
    values = model(images)
    for value, target in zip(tree.flatten(values), targets, strict=True):
        assert value.shape == target.shape
        assert keras.backend.standardize_dtype(value.dtype) == layers[0].compute_dtype
        assert np.all(np.isfinite(_numpy(value)))
    model.save(tmp_path / "layers.keras")
    reloaded = keras.saving.load_model(tmp_path / "layers.keras")
    for ours, theirs in zip(tree.flatten(values), tree.flatten(reloaded(images)), strict=True):
        np.testing.assert_array_equal(_numpy(ours), _numpy(theirs))


def _check_variables(layer, weights, statistics):
    """Checks the sizes and names of the layer's variables, and that its sublayers have its precision."""
    assert _size(layer.trainable_variables) == weights, layer.path
    assert _size(v for v in layer.non_trainable_variables if "seed" not in v.path) == statistics, layer.path
    paths = [variable.path for variable in layer.variables]
    assert len(set(paths)) == len(paths)
    for sublayer in layer._flatten_layers():
        assert sublayer.dtype_policy.name == layer.dtype_policy.name, sublayer.path


def _check_training_step(model, layers, images, targets, compiled):
    before = [(variable, ops.convert_to_numpy(variable)) for layer in layers for variable in layer.trainable_variables]
    model.compile(keras.optimizers.Adam(0.01), loss="mse", run_eagerly=not compiled, jit_compile=compiled)
    losses = model.train_on_batch(images, targets if len(targets) > 1 else targets[0])
    assert np.all(np.isfinite(losses))
    for variable, value in before:
        # Softmax does not see what a key's bias adds to a whole row.
        if not variable.path.endswith(("proj_k/bias", "conv_k/norm/beta")):
            assert not np.array_equal(ops.convert_to_numpy(variable), value), variable.path


def _random(seed, shape):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def _numpy(tensor):
    return ops.convert_to_numpy(ops.cast(tensor, "float32"))


def _size(variables):
    return sum(int(np.prod(variable.shape)) for variable in variables)
