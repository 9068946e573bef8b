import dataclasses
import json
import re

import pytest

from cvt_keras import VARIANTS, Preprocessing, Stage, Variant
from cvt_keras.errors import RecipeError
from cvt_keras.training.recipes import RECIPES, RESIZING, SMOKE, Recipe


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_documents_its_command(name):
    assert re.search(rf"^    cvt-keras train {name}\b", RECIPES[name].description, re.MULTILINE)


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
        ({"adamw_weight_decay": -0.1}, ["`adamw_weight_decay`", "adamw_weight_decay=-0.1"]),
        ({"adamw_weight_decay": float("inf")}, ["adamw_weight_decay=inf"]),
        ({"adamw_weight_decay": "0.1"}, ["`adamw_weight_decay` must be float or None"]),
        ({"gradient_clip": -1.0}, ["gradient_clip=-1.0"]),
        ({"warmup": 1.0}, ["warmup=1.0"]),
        ({"image_size": 0}, ["image_size=0"]),
        ({"image_size": True}, ["image_size=True"]),
        ({"image_size": "184by750"}, ["`image_size`", "'184by750'"]),
        ({"image_size": 20_000}, ["`image_size`", "67,108,864 pixels", "20000 pixels"]),
        ({"resize": "crop", "crop_pct": 1e-4}, ["`crop_pct`", "crop_pct=0.0001"]),
        ({"image_size": (184, 0)}, ["image_size=(184, 0)"]),
        ({"image_size": (3, 184, 750)}, ["image_size=(3, 184, 750)"]),
        ({"resize": "pad"}, ["'pad'", "stretch"]),
        ({"interpolation": "lanczos"}, ["'lanczos'", "bicubic"]),
        ({"crop_pct": 0.0}, ["`crop_pct`", "crop_pct=0.0"]),
        ({"crop_pct": 1.5}, ["crop_pct=1.5"]),
        ({"crop_pct": "0.9"}, ["`crop_pct` must be float or None"]),
        ({"scale": (0.0, 1.0)}, ["`scale`", "scale=(0.0, 1.0)"]),
        ({"scale": (0.5, 1.5)}, ["at most 1", "scale=(0.5, 1.5)"]),
        ({"scale": (0.9, 0.5)}, ["scale=(0.9, 0.5)"]),
        ({"scale": 0.5}, ["scale=0.5"]),
        ({"scale": (0.5,)}, ["scale=(0.5,)"]),
        ({"ratio": (-1.0, 1.0)}, ["`ratio`", "ratio=(-1.0, 1.0)"]),
        ({"ratio": (1.0, float("inf"))}, ["ratio=(1.0, inf)"]),
        ({"ratio": ("a", "b")}, ["ratio=('a', 'b')"]),
        ({"optimizer": "sgd"}, ["'sgd'", "muon"]),
        ({"decay": "step"}, ["'step'", "cosine"]),
        ({"adamw_ratio": -1.0}, ["adamw_ratio=-1.0"]),
        ({"rand_augment": -1}, ["rand_augment=-1"]),
        ({"rand_augment_magnitude": 11.0}, ["rand_augment_magnitude=11.0", "10"]),
        ({"erase": 1.5}, ["erase=1.5"]),
        ({"mixup": -0.2}, ["mixup=-0.2"]),
        ({"cutmix": float("nan")}, ["cutmix=nan"]),
        ({"label_smoothing": 1.0}, ["label_smoothing=1.0"]),
        ({"layer_decay": 0.0}, ["layer_decay=0.0"]),
        ({"layer_decay": 1.5}, ["layer_decay=1.5"]),
        ({"weights": 3}, ["`weights` must be str or None", "weights=3"]),
        ({"ema": -0.5}, ["ema=-0.5"]),
        ({"ema": 1.0}, ["ema=1.0"]),
        ({"keep": 0.0}, ["keep=0.0"]),
        ({"keep": 1.1}, ["keep=1.1"]),
        ({"epochs": 2.5}, ["`epochs` must be int", "epochs=2.5"]),
        ({"epochs": "3"}, ["epochs='3'"]),
        ({"epochs": True}, ["epochs=True"]),
        ({"seed": 1.5}, ["seed=1.5"]),
        ({"seed": None}, ["seed=None"]),
        ({"train_limit": 2.0}, ["`train_limit` must be int or None", "train_limit=2.0"]),
        ({"flip": "no"}, ["`flip` must be bool", "flip='no'"]),
        ({"erase": "0.5"}, ["`erase` must be float", "erase='0.5'"]),
        ({"data_dir": 3}, ["`data_dir` must be str or None", "data_dir=3"]),
        ({"skip_broken": "yes"}, ["`skip_broken` must be bool"]),
        ({"class_weights": ""}, ["`class_weights`"]),
        ({"class_weights": None}, ["class_weights=None"]),
        ({"early_stopping": -1}, ["early_stopping=-1"]),
        ({"early_stopping": 1.5}, ["early_stopping=1.5"]),
        ({"freeze": "head", "weights": "a.pth"}, ["backbone", "freeze=head"]),
        ({"freeze": 0, "weights": "a.pth"}, ["freeze=0"]),
        ({"freeze": "-1", "weights": "a.pth"}, ["freeze=-1"]),
        ({"freeze": True, "weights": "a.pth"}, ["freeze=True"]),
        ({"freeze": "backbone"}, ["`weights`", "freeze=backbone"]),
        ({"variant": 3}, ["`variant` must be str or Variant or None", "variant=3"]),
    ],
)
def test_errors_name_argument_and_value(change, parts):
    with pytest.raises(RecipeError) as error:
        dataclasses.replace(SMOKE, **change)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("name, example", [("scale", "--scale 0.08 1"), ("ratio", "--ratio 0.75 1.333")])
def test_bounds_of_random_areas_are_shown_by_an_example(name, example):
    with pytest.raises(RecipeError) as error:
        dataclasses.replace(SMOKE, **{name: (2.0, 1.0)})
    assert error.value.hint.endswith(example) and error.value.argument == name


def test_an_int_for_a_float_and_a_path_are_accepted(tmp_path):
    recipe = dataclasses.replace(SMOKE, mixup=1, data_dir=tmp_path)
    assert recipe.mixup == 1
    assert recipe.data_dir == str(tmp_path)
    json.dumps(recipe.settings())
    frozen = dataclasses.replace(SMOKE, freeze=2, weights="a.pth", class_weights=tmp_path / "weights.json")
    assert (frozen.freeze, frozen.class_weights) == ("2", str(tmp_path / "weights.json"))


@pytest.mark.parametrize("name", RECIPES)
def test_settings_survive_json(name):
    again = Recipe.from_settings(json.loads(json.dumps(RECIPES[name].settings())))
    assert again == dataclasses.replace(RECIPES[name], description="")


def test_settings_of_an_older_version_get_the_defaults_of_newer_fields():
    """The content of a recipe.json of version 0.4, with `cvt_cifar` as it was then, at a smaller width."""
    stage = {"dim": 8, "depth": 1, "heads": 1, "kernel_size": 3, "stride": 2, "padding": 1, "mlp_ratio": 2.0, "drop_path": 0.0}
    stage |= {"projection": "dw_bn", "qkv_bias": True, "stride_q": 1, "stride_kv": 2, "cls_token": False}
    settings = {**SMOKE.settings(), "variant": {"stages": [stage], "activation": "gelu", "stem": [32, 32]}}
    del settings["adamw_weight_decay"]
    recipe = Recipe.from_settings(settings)
    assert recipe.adamw_weight_decay is None
    assert recipe.variant == Variant((Stage(8, 1, 1, mlp_ratio=2.0),), "gelu", (32, 32))
    assert recipe.variant_name == "custom"


def test_preprocessing_holds_the_way_of_resizing():
    assert SMOKE.preprocessing == Preprocessing(image_size=(32, 32), resize="stretch", interpolation="bilinear")
    recipe = dataclasses.replace(SMOKE, image_size=(24, 32), resize="crop", crop_pct=0.75, interpolation="bicubic")
    assert recipe.preprocessing == Preprocessing(None, None, None, (24, 32), "crop", 0.75, "bicubic")
    assert Recipe.from_settings(json.loads(json.dumps(recipe.settings()))).preprocessing == recipe.preprocessing
    older = {name: value for name, value in SMOKE.settings().items() if name not in (*RESIZING, "scale", "ratio")}
    assert Recipe.from_settings(older).preprocessing == SMOKE.preprocessing


def test_the_weights_settle_only_what_is_open():
    published = Preprocessing(image_size=(224, 224), resize="crop", crop_pct=0.9, interpolation="bicubic")
    settled = SMOKE.resized_like(published)
    assert settled.preprocessing == published.replace(image_size=(32, 32))
    assert settled.open_resizing == () and settled.resized_like(Preprocessing()) == settled
    for name, value in {"resize": "stretch", "crop_pct": 0.5, "interpolation": "bilinear"}.items():
        recipe = dataclasses.replace(SMOKE, **{name: value}).resized_like(published)
        assert recipe.preprocessing == published.replace(image_size=(32, 32), **{name: value})


def test_a_variant_without_a_name_survives_json():
    recipe = dataclasses.replace(SMOKE, variant=Variant((Stage(8, 1, 1),)))
    assert recipe.variant_name == "custom"
    assert dataclasses.replace(SMOKE, variant=VARIANTS["cvt_13"]).variant_name == "cvt_13"
    gelu = dataclasses.replace(VARIANTS["cvt_13"], activation="gelu")
    assert dataclasses.replace(SMOKE, variant=gelu).variant_name == "cvt_13-gelu"
    again = Recipe.from_settings(json.loads(json.dumps(recipe.settings())))
    assert again.variant == recipe.variant


@pytest.mark.parametrize(
    "weights, name",
    [
        ("microsoft/cvt-13-384-22k", "cvt-13-384-22k"),
        ("weights/CvT-13-224x224-IN-1k.pth", "CvT-13-224x224-IN-1k"),
        ("runs/v1.2/model.keras", "model"),
        ("my-cvt/", "my-cvt"),
        (None, "custom"),
    ],
)
def test_a_variant_without_a_name_is_named_after_the_weights(weights, name, tmp_path):
    recipe = dataclasses.replace(RECIPES["finetune"], weights=weights)
    assert (recipe.image_size, recipe.variant) == (224, None)
    assert 0 < recipe.layer_decay < 1
    assert recipe.variant_name == name
    assert recipe.settings()["variant"] is None
    assert dataclasses.replace(recipe, variant=Variant((Stage(8, 1, 1),))).variant_name == name
    assert dataclasses.replace(recipe, variant="cvt_21").variant_name == "cvt_21"
    assert dataclasses.replace(recipe, weights=tmp_path / "a.pth").weights == str(tmp_path / "a.pth")


def test_settings_hold_the_whole_variant():
    assert SMOKE.settings()["variant"]["stages"][0]["dim"] == VARIANTS["cvt_tiny"].stages[0].dim
    assert "description" not in SMOKE.settings()


@pytest.mark.parametrize(
    "settings, part", [([], "dict"), ({"epoch": 3}, "epoch"), ({"variant": {"stages": [{"dim": 8}]}}, "depth")]
)
def test_invalid_settings_are_refused(settings, part):
    with pytest.raises(RecipeError) as error:
        Recipe.from_settings(settings)
    assert part in error.value.summary


def test_reference_is_adam_without_augmentation_and_regularisation():
    reference = RECIPES["reference"]
    assert (reference.variant, reference.optimizer, reference.peak_learning_rate) == ("cvt_13", "adamw", 1e-3)
    assert (reference.batch_size, reference.epochs, reference.decay) == (128, 10, "constant")
    off = ("flip", "crop_padding", "rand_augment", "erase", "mixup", "cutmix", "weight_decay", "warmup", "gradient_clip")
    for name in (*off, "label_smoothing", "ema"):
        assert not getattr(reference, name), name
