import dataclasses

import numpy as np
import pytest

from cvt_keras import CvT
from cvt_keras.training.optimizers import decays, learning_rate, make_optimizer
from cvt_keras.training.recipes import SMOKE

RECIPE = dataclasses.replace(SMOKE, peak_learning_rate=1e-2, warmup=0.1, weight_decay=0.5, gradient_clip=0)


def _model():
    return CvT.from_variant("cvt_tiny", 10, (16, 16, 3))


def test_learning_rate_rises_then_falls_to_zero():
    rates = [float(learning_rate(RECIPE, 200)(step)) for step in range(201)]
    assert rates[0] == 0
    assert rates[10] == pytest.approx(0.5e-2)
    assert rates[20] == max(rates) == pytest.approx(1e-2)
    assert rates[110] == pytest.approx(0.5e-2)  # half of the way down
    assert rates[200] == pytest.approx(0, abs=1e-8)
    assert np.all(np.diff(rates[20:]) < 0)


@pytest.mark.parametrize("warmup", [0.0, 0.5])
def test_warmup_share_is_read(warmup):
    rates = [float(learning_rate(dataclasses.replace(RECIPE, warmup=warmup), 100)(step)) for step in range(100)]
    assert int(np.argmax(rates)) == max(1, round(100 * warmup))


def test_kernels_alone_decay():
    model = _model()
    decayed = {variable.path for variable in model.trainable_variables if decays(variable)}
    kept = {variable.path for variable in model.trainable_variables} - decayed
    assert all(path.endswith("/kernel") for path in decayed)
    assert "stage1_block0/attention/conv_q/depthwise/kernel" in decayed
    assert "stage1_embed/cls_token" in kept
    assert {path.rpartition("/")[2] for path in kept} == {"cls_token", "bias", "gamma", "beta"}


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_optimizer_decays_what_it_should(weight_decay):
    model = _model()
    optimizer = make_optimizer(dataclasses.replace(RECIPE, warmup=0.01, weight_decay=weight_decay), model, 100)
    variables = model.trainable_variables
    for variable in variables:
        variable.assign(np.ones(variable.shape))
    zero = [np.zeros(variable.shape, "float32") for variable in variables]
    optimizer.apply(zero, variables)  # the first step of the warm-up, at 0
    optimizer.apply(zero, variables)  # the second, at the peak
    for variable in variables:
        expected = 1 - 1e-2 * weight_decay if decays(variable) else 1.0
        np.testing.assert_allclose(np.asarray(variable), expected, rtol=1e-5)


@pytest.mark.parametrize("clip, norm", [(0, 100.0), (1.5, 1.5)])
def test_gradient_clip_bounds_the_norm_of_all(clip, norm):
    model = _model()
    optimizer = make_optimizer(dataclasses.replace(RECIPE, gradient_clip=clip), model, 100)
    size = sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)
    gradients = [np.full(variable.shape, 100 / size**0.5, "float32") for variable in model.trainable_variables]
    optimizer.apply(gradients, model.trainable_variables)
    # Adam's first moment is a tenth of the first gradient.
    moments = [np.asarray(v) for v in optimizer.variables if v.path.endswith("_momentum")]
    assert len(moments) == len(gradients)
    assert np.linalg.norm(np.concatenate([10 * moment.ravel() for moment in moments])) == pytest.approx(norm, rel=1e-4)
