import dataclasses

import pytest

from cvt_keras.training.recipes import RECIPES, SMOKE, RecipeError


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_its_command(name):
    assert f"python train.py {name}\n" in RECIPES[name].description


@pytest.mark.parametrize(
    "change, parts",
    [
        ({"variant": "cvt_14"}, ["'cvt_14'", "cvt_cifar"]),
        ({"precision": "fp16"}, ["'fp16'", "mixed_float16"]),
        ({"xla": True}, ["xla=True", "auto"]),
        ({"dataset": "mnist"}, ["'mnist'", "cifar10"]),
        ({"peak_learning_rate": float("inf")}, ["peak_learning_rate=inf"]),
        ({"epochs": 0}, ["`epochs`", "epochs=0"]),
        ({"batch_size": -1}, ["batch_size=-1"]),
        ({"train_limit": 0}, ["train_limit=0"]),
        ({"test_limit": 0}, ["test_limit=0"]),
        ({"seed": -1}, ["seed=-1"]),
        ({"seed": 2**32}, ["2**32", "seed=4294967296"]),
        ({"crop_padding": -4}, ["crop_padding=-4"]),
        ({"peak_learning_rate": -1e-3}, ["peak_learning_rate=-0.001"]),
        ({"weight_decay": float("nan")}, ["weight_decay=nan"]),
        ({"gradient_clip": -1.0}, ["gradient_clip=-1.0"]),
        ({"warmup": 1.0}, ["warmup=1.0"]),
    ],
)
def test_errors_name_argument_and_value(change, parts):
    with pytest.raises(RecipeError) as error:
        dataclasses.replace(SMOKE, **change)
    for part in parts:
        assert part in str(error.value)
