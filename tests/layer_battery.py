"""What every layer must do, whatever it computes. After keras-hub's layer tests in spirit."""

import inspect
import json

import keras
import numpy as np
from keras import ops, tree

PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")


def check_layer(cls, arguments, shapes, output_shapes, weights, statistics, precision, tmp_path):
    """Runs the battery.

    Args:
        cls: the layer's class.
        arguments: for `cls`, as few as its tests need.
        shapes: of the inputs, in the order of `call`'s arguments, batch first.
        output_shapes: what comes out, a list too.
        weights: numbers of values in the trainable variables.
        statistics: likewise in the others, a random generator's state left out.
        precision: one of PRECISIONS.
        tmp_path: a folder to write to.
    """
    inputs = [np.random.default_rng(0).normal(size=shape).astype("float32") for shape in shapes]
    _check_config(cls, arguments)
    layer = cls(**arguments, dtype=precision)
    model = _check_symbolic_call(layer, shapes, output_shapes)
    _check_eager_call(cls, arguments, precision, inputs, output_shapes)
    _check_weights(layer, weights, statistics)
    _check_training_step(model, layer, inputs, output_shapes)
    _check_save_and_load(model, inputs, tmp_path)


def _check_config(cls, arguments):
    layer = cls(**arguments)
    config = layer.get_config()
    own = [name for name in inspect.signature(cls).parameters if name != "kwargs"]
    for name in own:
        assert config[name] == getattr(layer, name), name
    for name, value in arguments.items():
        assert config[name] == value, name
    assert cls.from_config(config).get_config() == config
    stored = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
    assert keras.saving.deserialize_keras_object(stored).get_config() == config


def _check_symbolic_call(layer, shapes, output_shapes):
    symbols = [keras.Input(shape[1:]) for shape in shapes]
    outputs = layer(*symbols)
    assert [output.shape[1:] for output in tree.flatten(outputs)] == [shape[1:] for shape in output_shapes]
    assert layer.built
    return keras.Model(symbols, outputs)


def _check_eager_call(cls, arguments, precision, inputs, output_shapes):
    layer = cls(**arguments, dtype=precision)
    outputs = tree.flatten(layer(*inputs))
    assert [tuple(output.shape) for output in outputs] == output_shapes
    for output in outputs:
        assert keras.backend.standardize_dtype(output.dtype) == layer.compute_dtype
        assert np.all(np.isfinite(ops.convert_to_numpy(ops.cast(output, "float32"))))
    for sublayer in layer._flatten_layers():
        assert sublayer.dtype_policy.name == precision, sublayer.path


def _check_weights(layer, weights, statistics):
    assert _values(layer.trainable_variables) == weights
    assert _values(v for v in layer.non_trainable_variables if "seed" not in v.path) == statistics
    paths = [variable.path for variable in layer.variables]
    assert len(set(paths)) == len(paths)


def _check_training_step(model, layer, inputs, output_shapes):
    before = [ops.convert_to_numpy(v) for v in layer.trainable_variables]
    # No target is a multiple of what a norm gives, so that every weight has a gradient.
    targets = [np.random.default_rng(1).normal(size=shape).astype("float32") for shape in output_shapes]
    model.compile(keras.optimizers.Adam(0.01), loss="mse")
    targets = targets if len(targets) > 1 else targets[0]
    assert np.all(np.isfinite(model.train_on_batch(inputs, targets)))
    for variable, value in zip(layer.trainable_variables, before):
        # Softmax does not see what a key's bias adds to a whole row.
        if not variable.path.endswith(("proj_k/bias", "conv_k/norm/beta")):
            assert not np.array_equal(ops.convert_to_numpy(variable), value), variable.path


def _check_save_and_load(model, inputs, tmp_path):
    path = tmp_path / "layer.keras"
    model.save(path)
    reloaded = keras.saving.load_model(path)
    for ours, theirs in zip(tree.flatten(model(inputs)), tree.flatten(reloaded(inputs)), strict=True):
        np.testing.assert_array_equal(*(ops.convert_to_numpy(ops.cast(x, "float32")) for x in (ours, theirs)))


def _values(variables):
    return sum(int(np.prod(variable.shape)) for variable in variables)
