import dataclasses
from types import SimpleNamespace

import keras
import numpy as np
import pytest

from cvt_keras import CvT, Stage, Variant
from cvt_keras.training.optimizers import Muon, decays, learning_rate, make_optimizer, rate_scales
from cvt_keras.training.recipes import SMOKE

RECIPE = dataclasses.replace(SMOKE, optimizer="adamw", peak_learning_rate=1e-2, warmup=0.1, weight_decay=0.5, gradient_clip=0)
MUON = dataclasses.replace(RECIPE, optimizer="muon")


def _model():
    return CvT.from_variant("cvt_tiny", 10, (16, 16, 3))


def _rates(steps, **change):
    schedule = learning_rate(dataclasses.replace(RECIPE, **change), steps)
    return [float(schedule(step)) for step in range(steps + 1)]


@pytest.mark.parametrize("decay, quarter_way", [("linear", 0.75), ("cosine", 0.853553), ("constant", 1.0)])
def test_learning_rate_rises_then_decays(decay, quarter_way):
    rates = _rates(200, decay=decay)
    np.testing.assert_allclose(rates[:20], 1e-2 * np.arange(1, 21) / 20, rtol=1e-5)
    assert rates[20] == max(rates) == pytest.approx(1e-2)
    assert rates[65] == pytest.approx(quarter_way * 1e-2)
    assert rates[200] == pytest.approx(1e-2 if decay == "constant" else 0, abs=1e-8)
    assert np.all(np.diff(rates[20:]) <= 0)


@pytest.mark.parametrize("warmup, steps, peak", [(0.0, 100, 0), (0.5, 100, 49), (0.9, 1, 0)])
def test_warmup_is_a_fraction_of_the_steps(warmup, steps, peak):
    assert int(np.argmax(_rates(steps, warmup=warmup))) == peak


def test_the_schedule_survives_serialisation():
    schedule = learning_rate(RECIPE, 200)
    again = keras.optimizers.schedules.deserialize(keras.optimizers.schedules.serialize(schedule))
    assert [float(again(step)) for step in (0, 30, 150)] == [float(schedule(step)) for step in (0, 30, 150)]


def test_muon_updates_matrices_and_adamw_the_rest():
    model = _model()
    optimizer = make_optimizer(MUON, model, 100)
    optimizer.build(model.trainable_variables)
    # Keras' Muon has velocities only for the variables that AdamW updates.
    adamw = {v.path for v, velocity in zip(model.trainable_variables, optimizer.adam_velocities) if velocity is not None}
    muon = {v.path for v in model.trainable_variables} - adamw
    assert {path for path in muon if "stage1_block0" in path} == {
        *(f"stage1_block0/attention/{name}/kernel" for name in ("proj_q", "proj_k", "proj_v", "proj")),
        *(f"stage1_block0/mlp/{name}/kernel" for name in ("fc1", "fc2")),
    }
    assert {"stage0_embed/proj/kernel", "stage1_embed/proj/kernel"} <= muon
    assert {"head/kernel", "head/bias", "stage1_embed/cls_token"} <= adamw
    assert all("depthwise" in path or "norm" in path or not path.endswith("kernel") or path == "head/kernel" for path in adamw)


def _step(recipe, seed=0):
    """The change of each variable in one step at the peak learning rate, and the random gradients."""
    model = _model()
    optimizer = make_optimizer(dataclasses.replace(recipe, warmup=0.0, weight_decay=0.0), model, 10_000)
    random = np.random.default_rng(seed)
    before = {v.path: np.asarray(v) for v in model.trainable_variables}
    gradients = {v.path: random.normal(size=v.shape).astype("float32") for v in model.trainable_variables}
    optimizer.apply([*gradients.values()], model.trainable_variables)
    return {v.path: np.asarray(v) - before[v.path] for v in model.trainable_variables}, gradients


def test_muon_makes_the_update_of_a_convolution_orthogonal():
    changes, gradients = _step(MUON)
    for path in ("stage1_embed/proj/kernel", "stage1_block0/mlp/fc1/kernel"):
        matrix = changes[path].reshape(-1, changes[path].shape[-1])
        scale = 1e-2 * 0.2 * max(matrix.shape) ** 0.5
        singular = np.linalg.svd(matrix / scale, compute_uv=False)
        assert np.all((singular > 0.6) & (singular < 1.3)), path  # the range after five iterations
        assert np.sum(matrix * gradients[path].reshape(matrix.shape)) < 0  # downhill


def test_adamw_ratio_scales_adamw_only():
    whole, tenth = (_step(dataclasses.replace(MUON, adamw_ratio=ratio))[0] for ratio in (1.0, 0.1))
    np.testing.assert_allclose(tenth["head/kernel"], 0.1 * whole["head/kernel"], rtol=1e-3)
    np.testing.assert_allclose(tenth["stage1_embed/proj/kernel"], whole["stage1_embed/proj/kernel"], atol=1e-7)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_ema_averages_the_weights(optimizer):
    model = _model()
    recipe = dataclasses.replace(RECIPE, optimizer=optimizer, warmup=0.0, weight_decay=0.0, decay="constant", ema=0.75)
    optimizer = make_optimizer(recipe, model, 100)
    gradients = [np.ones(v.shape, "float32") for v in model.trainable_variables]
    path = []
    for _ in range(3):
        optimizer.apply(gradients, model.trainable_variables)
        path.append(np.asarray(model.trainable_variables[0]))
    [average] = [v for v in optimizer.variables if "average" in v.path][:1]
    # The average starts from the weights after the first step.
    expected = 0.75 * (0.75 * path[0] + 0.25 * path[1]) + 0.25 * path[2]
    np.testing.assert_allclose(np.asarray(average), expected, atol=1e-6)
    assert not make_optimizer(dataclasses.replace(recipe, ema=0.0), model, 100).use_ema


def test_layers_near_the_image_learn_slower():
    expected = {
        **{"whitening/bias": 1 / 16, "stem0/conv/kernel": 1 / 16},
        **{"cvt/stage0_embed/proj/kernel": 1 / 8, "stage0_conv1/conv/kernel": 1 / 8, "stage0_block0/norm1/gamma": 1 / 8},
        **{"stage1_embed/cls_token": 1 / 4, "stage1_conv0/norm/gamma": 1 / 4, "stage1_block0/mlp/fc1/kernel": 1 / 4},
        **{"stage1_block1/mlp/fc1/kernel": 1 / 2, "norm/gamma": 1.0, "head/kernel": 1.0},
    }
    assert rate_scales([SimpleNamespace(path=path) for path in expected], 0.5) == [*expected.values()]
    # In CvT-13: ten blocks, two, one.
    variables = CvT.from_variant("cvt_13", 10, (None, None, 3)).trainable_variables
    scales = dict(zip((v.path for v in variables), rate_scales(variables, 0.5)))
    assert scales["stage2_block9/mlp/fc1/kernel"] == 1 / 2
    assert scales["stage1_block1/mlp/fc1/kernel"] == 0.5**11
    assert scales["stage0_embed/proj/kernel"] == 0.5**13


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_layer_decay_scales_the_step(optimizer):
    recipe = dataclasses.replace(RECIPE, optimizer=optimizer, decay="constant")
    whole, scaled = (_step(dataclasses.replace(recipe, layer_decay=decay))[0] for decay in (1.0, 0.5))
    for path, scale in {"head/kernel": 1, "stage1_block1/mlp/fc1/kernel": 1 / 2, "stage0_embed/proj/kernel": 1 / 8}.items():
        np.testing.assert_allclose(scaled[path], scale * whole[path], rtol=1e-2, atol=1e-8)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_layer_decay_scales_the_weight_decay_too(optimizer):
    model = _model()
    recipe = dataclasses.replace(RECIPE, optimizer=optimizer, warmup=0.0, decay="constant", layer_decay=0.5)
    optimizer = make_optimizer(recipe, model, 100)
    variables = model.trainable_variables
    for variable in variables:
        variable.assign(np.ones(variable.shape))
    optimizer.apply([np.zeros(variable.shape, "float32") for variable in variables], variables)
    for variable, scale in zip(variables, rate_scales(variables, 0.5)):
        expected = 1 - 1e-2 * 0.5 * scale if decays(variable) else 1.0
        np.testing.assert_allclose(np.asarray(variable), expected, rtol=1e-6)


def test_muon_scales_both_of_its_weight_decays():
    model = _model()
    variables = model.trainable_variables
    optimizer = Muon(learning_rate=0.1, weight_decay=0.5, adam_weight_decay=0.2, rate_scales=[0.5] * len(variables))
    optimizer.build(variables)
    for variable in variables:
        variable.assign(np.ones(variable.shape))
    optimizer._apply_weight_decay(variables)
    kept = {variable.path: float(np.asarray(variable).flat[0]) for variable in variables}
    assert kept["stage1_block0/mlp/fc1/kernel"] == pytest.approx(1 - 0.1 * 0.5 * 0.5)
    assert kept["norm/gamma"] == pytest.approx(1 - 0.1 * 0.5 * 0.2)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_optimizer_survives_serialisation(optimizer):
    model = _model()
    optimizer = make_optimizer(dataclasses.replace(RECIPE, optimizer=optimizer, layer_decay=0.5), model, 100)
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert type(again) is type(optimizer)
    assert again.rate_scales == optimizer.rate_scales == rate_scales(model.trainable_variables, 0.5)
    assert make_optimizer(RECIPE, model, 100).rate_scales is None


def test_only_kernels_decay():
    model = _model()
    decayed = {variable.path for variable in model.trainable_variables if decays(variable)}
    kept = {variable.path for variable in model.trainable_variables} - decayed
    assert all(path.endswith("/kernel") for path in decayed)
    assert "stage1_block0/attention/conv_q/depthwise/kernel" in decayed
    assert "stage1_embed/cls_token" in kept
    assert {path.rpartition("/")[2] for path in kept} == {"cls_token", "bias", "gamma", "beta"}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_the_optimizer_decays_only_kernels(weight_decay, optimizer):
    model = _model()
    recipe = dataclasses.replace(RECIPE, optimizer=optimizer, warmup=0.0, weight_decay=weight_decay, decay="constant")
    optimizer = make_optimizer(recipe, model, 100)
    variables = model.trainable_variables
    for variable in variables:
        variable.assign(np.ones(variable.shape))
    zero = [np.zeros(variable.shape, "float32") for variable in variables]
    optimizer.apply(zero, variables)
    for variable in variables:
        expected = 1 - 1e-2 * weight_decay if decays(variable) else 1.0
        np.testing.assert_allclose(np.asarray(variable), expected, rtol=1e-5)


def _kept(recipe, variant="cvt_tiny"):
    """What a step without gradients keeps of each variable, all of which start at 1."""
    model = CvT.from_variant(variant, 10, (16, 16, 3))
    variables = model.trainable_variables
    optimizer = make_optimizer(dataclasses.replace(recipe, warmup=0.0, decay="constant"), model, 100)
    for variable in variables:
        variable.assign(np.ones(variable.shape))
    optimizer.apply([np.zeros(variable.shape, "float32") for variable in variables], variables)
    return {variable.path: float(np.asarray(variable).flat[0]) for variable in variables}


def test_adamw_weight_decay_applies_to_the_head_and_depthwise_kernels():
    stage = Stage(8, 1, 1, pool=True, residual_convs=1, mlp_conv=True)
    kept = _kept(dataclasses.replace(MUON, adamw_weight_decay=2.0), Variant((stage,), whitening=2))
    adamw, muon = pytest.approx(1 - 1e-2 * 2.0), pytest.approx(1 - 1e-2 * 0.5)
    for name in ("head", "stage0_block0/attention/conv_q/depthwise", "stage0_block0/mlp/depthwise"):
        assert kept[f"{name}/kernel"] == adamw, name
    for name in ("stage0_embed/proj", "stage0_conv0/conv", "stage0_block0/attention/proj_q", "stage0_block0/mlp/fc1"):
        assert kept[f"{name}/kernel"] == muon, name
    assert {value for path, value in kept.items() if not path.endswith("/kernel")} == {1.0}
    assert "whitening/bias" in kept and "whitening/kernel" not in kept


def test_adamw_weight_decay_defaults_to_weight_decay_and_is_for_muon_only():
    assert _kept(MUON) == _kept(dataclasses.replace(MUON, adamw_weight_decay=0.5))
    assert _kept(RECIPE) == _kept(dataclasses.replace(RECIPE, adamw_weight_decay=2.0))


@pytest.mark.parametrize("clip, norm", [(0, 100.0), (1.5, 1.5)])
def test_gradient_clip_bounds_the_global_norm(clip, norm):
    model = _model()
    optimizer = make_optimizer(dataclasses.replace(RECIPE, gradient_clip=clip), model, 100)
    size = sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)
    gradients = [np.full(variable.shape, 100 / size**0.5, "float32") for variable in model.trainable_variables]
    optimizer.apply(gradients, model.trainable_variables)
    # Adam's first moment is a tenth of the first gradient.
    moments = [np.asarray(v) for v in optimizer.variables if v.path.endswith("_momentum")]
    assert len(moments) == len(gradients)
    assert np.linalg.norm(np.concatenate([10 * moment.ravel() for moment in moments])) == pytest.approx(norm, rel=1e-4)
