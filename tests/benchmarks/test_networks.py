import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

from benchmarks import networks
from benchmarks.networks import Network, Settings
from cvt_keras import CvT, Stage, Variant, macs
from cvt_keras.data import tfds
from cvt_keras.layers import WHITENING_EPSILON, Whitening
from cvt_keras.training import Recipe
from cvt_keras.training.optimizers import make_optimizer

VARIANT = Variant((Stage(8, 1, 2, mlp_ratio=2.0),), activation="gelu", stem=(4,))
NETWORK = Network((networks.Stage(8, 1, 2, embed="conv"),), stem=(4,))
# As small as that, with each part of `c12`.
_FIRST, _SECOND = (Stage(8 * i, i, 2, mlp_ratio=1.0, pool=True, residual_convs=i, mlp_conv=True, stride_kv=i) for i in (1, 2))
_C12 = {"activation": "gelu", "whitening": 2, "norm": "batch", "attention_scale": "head"}
C12_VARIANT = Variant((_FIRST, _SECOND), **_C12)
C12_STAGES = tuple(networks.Stage(8 * i, i, 2, mlp_ratio=1.0, stride_kv=i, local=i, mlp="local") for i in (1, 2))
C12_NETWORK = Network(C12_STAGES, whiten="valid", norm="batch")
STEPS = 5


@pytest.fixture(scope="module", autouse=True)
def programs_that_compile_quickly():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def _path(name):
    """The path in `CvT` of a weight of a `Network`."""
    name = re.sub(r"^whiten/", "whitening/", name)
    name = re.sub(r"^(stage\d)/token$", r"\1_embed/cls_token", name)
    name = re.sub(r"^(stage\d)/local(\d)/", r"\1_conv\2/", name)
    name = re.sub(r"/local/kernel", "/mlp/depthwise/kernel", name)
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


def _variables(model, network=NETWORK):
    variables = {variable.path.removeprefix("cvt/"): variable for variable in model.trainable_variables}
    return {name: variables[_path(name)] for name in networks.weights_of(network).listed}


def _weights(model, network=NETWORK):
    listed = networks.weights_of(network).listed
    return {
        name: np.array(keras.ops.convert_to_numpy(variable)).reshape(listed[name].shape)
        for name, variable in _variables(model, network).items()
    }


def _hyper(**settings):
    return networks.hyper_of(Settings(**settings), 0, STEPS, np.zeros((12, 24), "float32"))


@pytest.mark.parametrize(
    "variant, network, tolerance",
    [
        (VARIANT, NETWORK, 1e-5),
        (C12_VARIANT, C12_NETWORK, 1e-4),
        (
            dataclasses.replace(C12_VARIANT, stages=(_FIRST, dataclasses.replace(_SECOND, cls_token=True))),
            dataclasses.replace(C12_NETWORK, class_token=True),
            1e-4,
        ),
    ],
    ids=["paper", "c12", "c12 with class token"],
)
@pytest.mark.slow
def test_it_is_the_projects_network(variant, network, tolerance, images):
    keras.utils.set_random_seed(0)
    model = CvT(variant, 10, (32, 32, 3))
    listed = networks.weights_of(network)
    assert len(listed.listed) == len(model.trainable_variables)
    assert listed.macs == macs(variant, (32, 32, 3), 10)
    hyper = _hyper(head_scale=variant.attention_scale == "head")
    if variant.whitening:
        hyper["whitening"] = keras.ops.convert_to_numpy(model.get_layer("whitening").kernel).reshape(12, 24)
    state = networks.initial_state(network, Settings(), 0)
    # Larger than the initial weights, for which attention is almost the same at every scale.
    weights = {name: 2 * value for name, value in _weights(model, network).items()}
    for name, variable in _variables(model, network).items():
        variable.assign(weights[name].reshape(variable.shape))
    tracer = networks.Tracer(weights, state["statistics"], hyper, jax.random.key(0))
    logits = networks.apply(network, tracer, jnp.asarray(images))
    expected = keras.ops.convert_to_numpy(model(images, training=True))
    np.testing.assert_allclose(logits, expected, atol=tolerance)


@pytest.mark.parametrize("name, network", [("cvt_cifar", "c12"), ("cvt_cifar_large", "large")])
def test_the_networks_for_cifar_are_here(name, network):
    network = (networks.NETWORKS | networks.LARGE)[network]
    model = CvT(name, 10, (32, 32, 3))
    listed = networks.weights_of(network)
    assert listed.macs == macs(name, (32, 32, 3), 10)
    assert len(listed.listed) == len(model.trainable_variables)
    for name, variable in _variables(model, network).items():
        assert np.prod(variable.shape) == np.prod(listed.listed[name].shape), name
    for ours, theirs in zip(model.variant.stages, network.stages, strict=True):
        assert (ours.heads, ours.stride_kv) == (theirs.heads, theirs.stride_kv)


def test_the_whitening_kernel_is_the_projects_but_for_signs_and_order():
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3)).cumsum(axis=2).astype("uint8")
    kernel = networks.whitening_kernel(networks.whitening_axes(images), WHITENING_EPSILON)[:, 11::-1]
    layer = Whitening()
    layer.adapt(networks.normalized(images))
    np.testing.assert_allclose(
        np.abs(keras.ops.convert_to_numpy(layer.kernel).reshape(12, 24)[:, :12]), np.abs(kernel), atol=1e-4
    )


@pytest.mark.slow
def test_it_takes_the_steps_of_the_projects_muon(model, images):
    optimizer = make_optimizer(Recipe(), model, 10 * STEPS)
    variables = _variables(model)
    optimizer.build(list(model.trainable_variables))
    hyper = _hyper()
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

    for _ in range(STEPS):
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


def _batch(**settings):
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    mirrored = np.arange(8) % 2 == 0
    augmented = jax.jit(networks.augmented)
    batch, labels = augmented(pixels, jnp.eye(10)[:8], mirrored, _hyper(**settings), jax.random.key(0))
    return pixels, np.asarray(batch), np.asarray(labels)


def test_it_mirrors_what_was_chosen():
    pixels, batch, labels = _batch(crop_padding=0)
    pixels[::2] = pixels[::2, :, ::-1]
    np.testing.assert_allclose(batch, networks.normalized(pixels), atol=1e-5)
    np.testing.assert_array_equal(labels, np.eye(10)[:8])


def test_a_crop_moves_by_at_most_its_padding():
    pixels, batch, _ = _batch(crop_padding=2)
    pixels[::2] = pixels[::2, :, ::-1]
    padded = networks.normalized(np.pad(pixels, ((0, 0), (2, 2), (2, 2), (0, 0)), "reflect"))
    for image, cropped in zip(padded, batch):
        windows = [image[i : i + 32, j : j + 32] for i in range(5) for j in range(5)]
        assert any(np.allclose(window, cropped, atol=1e-5) for window in windows)


def test_cutmix_mixes_labels_as_pixels():
    _, _, labels = _batch(cutmix=1.0)
    np.testing.assert_allclose(labels.sum(axis=1), 1, atol=1e-6)
    assert (np.count_nonzero(labels, axis=1) == 2).any()


def test_whitened_patches_are_uncorrelated():
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3)).cumsum(axis=2) % 256
    kernel = networks.whitening_kernel(networks.whitening_axes(images.astype("uint8")), 0.0)[:, :12]
    x = networks.normalized(images)
    patches = np.concatenate([x[:, i : i + 31, j : j + 31] for i in (0, 1) for j in (0, 1)], axis=-1).reshape(-1, 12)
    white = patches @ kernel
    np.testing.assert_allclose(white.T @ white / len(white), np.eye(12), atol=1e-3)


def test_every_network_keeps_the_budget():
    for name, network in networks.NETWORKS.items():
        listed = networks.weights_of(network)
        assert listed.macs <= 60e6, name
        assert network.widths or listed.block_macs > listed.macs / 5, name


def test_lookahead_restarts_from_the_slow_weights():
    hyper = _hyper(lookahead=0.5) | {"steps": 10}
    fast, slow = {"w": jnp.float32(1)}, {"w": jnp.float32(0)}
    weights, average = networks.averaged(fast, slow, 3, hyper)
    assert (weights["w"], average["w"]) == (1, 0)
    weights, average = networks.averaged(fast, slow, 4, hyper)  # the fifth of ten steps: half of the time
    assert weights["w"] == average["w"] == 1 - 0.5 * 0.5**3


def test_without_an_average_the_weights_are_their_own():
    weights, average = networks.averaged({"w": jnp.float32(1)}, {"w": jnp.float32(0)}, 4, _hyper())
    assert weights["w"] == average["w"] == 1


def test_the_design_changes_every_pair_of_factors_equally_often():
    design = networks.design().astype(int)
    assert design.shape == (24, len(networks.FACTORS))
    signs = 2 * design - 1
    np.testing.assert_array_equal(signs.T @ signs, 24 * np.eye(len(networks.FACTORS)))
    np.testing.assert_array_equal(signs[:12], -signs[12:])
    first = networks.EXPERIMENTS["c10, design 1"].settings
    changed = {name: changes for (name, changes), is_changed in zip(networks.FACTORS.items(), design[0]) if is_changed}
    expected = {name: value for changes in changed.values() for name, value in changes.items()}
    assert first == dataclasses.replace(networks.S, **expected)


def test_ablations_change_what_they_name():
    listed = {name: networks.weights_of(network) for name, network in networks.ABLATIONS.items()}
    for network in ("c10", "c12"):
        base = networks.weights_of(networks.NETWORKS[network])
        assert "stage2/token" in listed[f"{network}, class token"].listed
        assert not any("conv_q" in name for name in listed[f"{network}, linear projection"].listed)
        assert listed[f"{network}, full keys and values"].macs > base.macs
        assert listed[f"{network}, without blocks"].macs == base.macs - base.block_macs
    without = listed["c12, no residual convolution"].listed
    assert base.listed.keys() - without.keys() == {name for name in base.listed if name.startswith("stage1/local0/")}
    base = networks.weights_of(networks.NETWORKS["c10"])
    assert listed["c10, trained whitening"].macs == base.macs
    assert listed["c10, trained whitening"].listed.keys() - base.listed.keys() == {"whiten/kernel"}


def test_the_class_token_sees_the_grid_and_decides(images):
    network = Network((networks.Stage(8, 1, 2, mlp="local"),), class_token=True)
    state = networks.initial_state(network, Settings(fan_in=True), 0)

    def logits(pixels):
        tracer = networks.Tracer(state["weights"], state["statistics"], _hyper())
        return networks.apply(network, tracer, jnp.asarray(pixels))

    assert not np.allclose(logits(images), logits(images[:, ::-1] * 2))
    weights = state["weights"]
    state["weights"] = weights | {"stage0/token": weights["stage0/token"] + 1}
    changed = logits(images)
    state["weights"] = weights
    assert not np.allclose(changed, logits(images))


def test_experiments_that_can_share_a_program_do():
    groups = networks.grouped(list(networks.EXPERIMENTS.values()), 6)
    assert sum(len(group) for group in groups) == len(networks.EXPERIMENTS)
    assert all(len(group) <= 6 and len({experiment.network for experiment in group}) == 1 for group in groups)


@pytest.mark.slow
def test_it_writes_a_line_per_run(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (networks.VALIDATION_IMAGES + 40, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images, labels=random.integers(0, 10, len(images)))
    tiny = networks.Experiment("tiny", Network(whiten="valid", widths=(4,)), Settings(batch_size=10, epochs=2))
    monkeypatch.setitem(networks.EXPERIMENTS, "tiny", tiny)
    out = tmp_path / "out.jsonl"
    networks.main(networks.Arguments(out, ("tiny",), seeds=2, data=tmp_path / "images.npz", train_limit=40))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["experiment"], line["seed"], len(line["validation"])) for line in lines] == [("tiny", 0, 2), ("tiny", 1, 2)]
    assert lines[0]["loss"] != lines[1]["loss"]


def test_the_constants_of_cifar10_are_those_of_the_data_set():
    """Written out in the script, which runs where the package is not installed."""
    assert (networks.MEAN, networks.STD) == (tfds.CIFAR10_MEAN, tfds.CIFAR10_STD)
    assert networks.VALIDATION_IMAGES == tfds.VALIDATION_IMAGES
