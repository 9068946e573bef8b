import dataclasses
import re

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

from benchmarks import networks
from benchmarks.networks import Network, Settings
from cvt_keras import CvT, Stage, Variant, macs
from cvt_keras.training import Recipe
from cvt_keras.training.optimizers import make_optimizer

VARIANT = Variant((Stage(8, 1, 1, mlp_ratio=2.0), Stage(16, 2, 2, mlp_ratio=2.0)), activation="gelu", stem=(4,))
STAGES = networks.Stage(8, 1, 1, embed="conv"), networks.Stage(16, 2, 2, embed="conv")
NETWORK = Network(STAGES, stem=(4,))


def _path(name):
    """The path in `CvT` of a weight of `NETWORK`."""
    name = re.sub(r"^(stage\d)/(embed|block\d)/", r"\1_\2/", name)
    name = re.sub(r"/(conv_.)/kernel", r"/attention/\1/depthwise/kernel", name)
    name = re.sub(r"/norm_(.)/", r"/attention/conv_\1/norm/", name)
    name = re.sub(r"/(fc.)/", r"/mlp/\1/", name)
    return re.sub(r"(_block\d)/(proj\w*)/", r"\1/attention/\2/", name)


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    return CvT(VARIANT, 10, (32, 32, 3))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(6, 32, 32, 3)).astype("float32")


def _variables(model):
    variables = {variable.path.removeprefix("cvt/"): variable for variable in model.trainable_variables}
    return {name: variables[_path(name)] for name in networks.weights_of(NETWORK).listed}


def _weights(model):
    listed = networks.weights_of(NETWORK).listed
    return {
        name: np.array(keras.ops.convert_to_numpy(variable)).reshape(listed[name].shape)
        for name, variable in _variables(model).items()
    }


def _hyper(**settings):
    return networks.hyper_of(Settings(**settings), 0, 5, np.zeros((12, 24), "float32"))


def test_it_is_the_projects_network(model, images):
    listed = networks.weights_of(NETWORK)
    assert len(listed.listed) == len(model.trainable_variables)
    assert listed.macs == macs(VARIANT, (32, 32, 3), 10)
    state = networks.initial_state(NETWORK, Settings(), 0)
    tracer = networks.Tracer(_weights(model), state["statistics"], _hyper(), jax.random.key(0))
    logits = networks.apply(NETWORK, tracer, jnp.asarray(images))
    expected = keras.ops.convert_to_numpy(model(images, training=True))
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_it_takes_the_steps_of_the_projects_muon(model, images):
    recipe = Recipe(epochs=4, label_smoothing=0.1, weight_decay=0.05)
    optimizer = make_optimizer(recipe, model, 20)
    variables = _variables(model)
    optimizer.build(list(model.trainable_variables))
    hyper = _hyper(epochs=4)
    state = networks.initial_state(NETWORK, Settings(), 0)
    state["weights"] = {name: jnp.asarray(value) for name, value in _weights(model).items()}
    labels = jnp.eye(10)[: len(images)]

    @jax.jit
    def step(state):
        def loss(weights):
            tracer = networks.Tracer(weights, state["statistics"], hyper, jax.random.key(0))
            logits = networks.apply(NETWORK, tracer, jnp.asarray(images))
            return -jnp.mean(jnp.sum(labels * jax.nn.log_softmax(logits), axis=-1))

        gradients = jax.grad(loss)(state["weights"])
        listed = networks.weights_of(NETWORK).listed
        parts = (state[name] for name in ("moments", "velocities", "step"))
        weights, moments, velocities = networks.updated(listed, state["weights"], gradients, *parts, hyper, 5)
        new = {**state, "weights": weights, "moments": moments, "velocities": velocities, "step": state["step"] + 1}
        return new, gradients

    for _ in range(20):
        state, gradients = step(state)
        by_path = {variables[name].path: gradient for name, gradient in gradients.items()}
        optimizer.apply(
            [
                keras.ops.convert_to_tensor(np.asarray(by_path[variable.path]).reshape(variable.shape))
                for variable in model.trainable_variables
            ],
            model.trainable_variables,
        )
    for name, value in _weights(model).items():
        np.testing.assert_allclose(state["weights"][name], value, atol=1e-4, err_msg=name)
