import dataclasses

import keras
import numpy as np
import pytest

from cvt_keras import Stage, Variant, build_classifier
from cvt_keras.errors import RecipeError
from cvt_keras.training import freeze
from cvt_keras.training.optimizers import make_optimizer
from cvt_keras.training.recipes import SMOKE

VARIANT = Variant(
    (
        Stage(dim=8, depth=1, heads=1, residual_convs=1),
        Stage(dim=8, depth=1, heads=1, pool=True, residual_convs=1, mlp_conv=True),
    ),
    stem=(8,),
    whitening=1,
    norm="batch",
)


pytestmark = pytest.mark.usefixtures("eager")


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("what, trained", [("backbone", ("head",)), ("1", ("stage1", "norm", "head")), ("2", ("norm", "head"))])
def test_frozen_layers_do_not_change(what, trained, optimizer):
    classifier = build_classifier(VARIANT, 3, (16, 16, 3))
    freeze.freeze(classifier.get_layer("cvt"), what)
    recipe = dataclasses.replace(SMOKE, optimizer=optimizer, layer_decay=0.5, ema=0.5, peak_learning_rate=0.1)
    classifier.compile(make_optimizer(recipe, classifier, 2), "mse")
    classifier.optimizer.build(classifier.trainable_variables)
    before = {variable.path: np.array(variable) for variable in classifier.weights}
    images, labels = np.random.default_rng(0).uniform(0, 255, (4, 16, 16, 3)), np.eye(3)[[0, 1, 2, 0]]
    classifier.fit(
        images, labels, batch_size=2, verbose=0, validation_data=(images, labels), callbacks=[keras.callbacks.SwapEMAWeights()]
    )
    for variable in classifier.weights:
        part = variable.path.removeprefix("cvt/")
        changed = not np.array_equal(before[variable.path], np.array(variable))
        # Includes the statistics of batch norms. Not all biases: the gradient of a key's bias is 0.
        if not part.startswith(trained):
            assert not changed, part
        elif part.endswith("kernel") or "moving" in part:
            assert changed, part


def test_more_stages_than_the_network_has_are_refused():
    recipe = dataclasses.replace(SMOKE, variant=VARIANT, weights="a.keras")
    for what in (None, "backbone", 2):
        freeze.require(dataclasses.replace(recipe, freeze=what))
    with pytest.raises(RecipeError) as error:
        freeze.require(dataclasses.replace(recipe, freeze=3))
    assert error.value.argument == "freeze"
    assert "at most 2" in error.value.summary
