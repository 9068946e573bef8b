import dataclasses
import json
from pathlib import Path

import pytest

from cvt_keras.errors import RecipeError
from cvt_keras.training import RECIPES, Recipe, flags
from cvt_keras.training.__main__ import Arguments


def parse(argv):
    return flags.parse(argv, Arguments, "cvt-keras train", "Train a network.")


def test_the_recipe_sets_the_defaults():
    name, arguments = parse(["smoke", "--seed", "3"])
    recipe = arguments.recipe
    assert (name, recipe.seed, recipe.epochs, recipe.variant) == ("smoke", 3, RECIPES["smoke"].epochs, "cvt_tiny")
    assert arguments.run_dir is None
    assert not arguments.resume


def test_without_a_recipe_the_default_is_used():
    name, arguments = parse(["--epochs", "3", "--run-dir", "somewhere", "--resume"])
    recipe = arguments.recipe
    assert (name, recipe.epochs, recipe.variant, recipe.batch_size) == (
        "cifar10",
        3,
        "cvt_cifar",
        RECIPES["cifar10"].batch_size,
    )
    assert arguments.run_dir == Path("somewhere")
    assert arguments.resume


def test_fine_tuning_leaves_the_network_to_the_weights():
    _, arguments = parse(["finetune", "--weights", "microsoft/cvt-13", "--image-size", "384"])
    assert (arguments.recipe.weights, arguments.recipe.image_size, arguments.recipe.variant) == ("microsoft/cvt-13", 384, None)
    assert arguments.recipe.variant_name == "cvt-13"
    assert parse(["finetune", "--variant", "cvt_21"])[1].recipe.variant == "cvt_21"


@pytest.mark.parametrize("words, size", [("64", 64), ("184x750", (184, 750)), ("184X750", (184, 750))])
def test_image_size_is_a_side_or_height_and_width(words, size):
    _, arguments = parse(["smoke", "--image-size", words])
    assert arguments.recipe.image_size == size


@pytest.mark.parametrize("words", ["184x", "x", "184x750x3", "-8", "64px", "184x0"])
def test_other_image_sizes_are_refused(words):
    with pytest.raises(RecipeError) as error:
        parse(["smoke", f"--image-size={words}"])
    assert error.value.argument == "image_size"
    assert "--image-size 184x750" in error.value.hint


def test_variant_none_on_the_command_line_is_none():
    _, arguments = parse(["cifar10", "--variant", "None", "--weights", "a.pth"])
    assert arguments.recipe.variant is None


def test_every_field_has_a_flag():
    flags = {
        "--variant": ("variant", "cvt_13"),
        "--image-size": ("image_size", 64),
        "--dataset": ("dataset", "tfds:mnist"),
        "--data-dir": ("data_dir", "somewhere"),
        "--cache": ("cache", "memory"),
        "--cache-dir": ("cache_dir", "elsewhere"),
        "--epochs": ("epochs", 7),
        "--batch-size": ("batch_size", 64),
        "--seed": ("seed", 7),
        "--precision": ("precision", "mixed_float16"),
        "--xla": ("xla", "on"),
        "--train-limit": ("train_limit", 100),
        "--validation-limit": ("validation_limit", 100),
        "--test-limit": ("test_limit", 100),
        "--crop-padding": ("crop_padding", 2),
        "--peak-learning-rate": ("peak_learning_rate", 0.5),
        "--warmup": ("warmup", 0.25),
        "--weight-decay": ("weight_decay", 0.25),
        "--gradient-clip": ("gradient_clip", 0.25),
        "--rand-augment": ("rand_augment", 2),
        "--rand-augment-magnitude": ("rand_augment_magnitude", 7.0),
        "--erase": ("erase", 0.25),
        "--mixup": ("mixup", 0.25),
        "--cutmix": ("cutmix", 0.25),
        "--optimizer": ("optimizer", "adamw"),
        "--adamw-ratio": ("adamw_ratio", 0.25),
        "--adamw-weight-decay": ("adamw_weight_decay", 0.25),
        "--decay": ("decay", "cosine"),
        "--label-smoothing": ("label_smoothing", 0.25),
        "--ema": ("ema", 0.25),
        "--keep": ("keep", 0.5),
        "--resize": ("resize", "crop"),
        "--crop-pct": ("crop_pct", 0.9),
        "--interpolation": ("interpolation", "bicubic"),
        "--weights": ("weights", "microsoft/cvt-13"),
        "--layer-decay": ("layer_decay", 0.25),
        "--class-weights": ("class_weights", "auto"),
        "--early-stopping": ("early_stopping", 3),
    }
    for flag, (field, value) in flags.items():
        recipe = parse([flag, str(value)])[1].recipe
        assert getattr(recipe, field) == value != getattr(RECIPES["cifar10"], field), flag
    assert not parse(["--no-flip"])[1].recipe.flip
    assert parse(["--skip-broken"])[1].recipe.skip_broken
    frozen = parse(["--weights", "microsoft/cvt-13", "--freeze", "2"])[1].recipe
    assert frozen.freeze == "2"
    areas = parse(["--scale", "0.5", "0.9", "--ratio", "0.8", "1.25"])[1].recipe
    assert (areas.scale, areas.ratio) == ((0.5, 0.9), (0.8, 1.25))
    others = {"flip", "skip_broken", "freeze", "scale", "ratio", "description", "compression"}
    assert {field for field, _ in flags.values()} | others == {field.name for field in dataclasses.fields(Recipe)}


def test_help_shows_the_recipe_and_plain_defaults(capsys):
    for argv, parts in (
        (["smoke"], ["cvt-keras train smoke", "(default: cvt_tiny)", "those of smoke: a few steps"]),
        (["finetune"], ["(default: None)", "those of finetune: fine-tunes"]),
    ):
        with pytest.raises(SystemExit) as stop:
            parse([*argv, "--help"])
        assert stop.value.code == 0
        printed = capsys.readouterr().out
        for part in parts:
            assert part in printed
        assert "`" not in printed and "['" not in printed  # neither docstrings nor lists


@pytest.fixture
def recipe_file(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(dataclasses.replace(RECIPES["smoke"], seed=5, epochs=7).settings()))
    return file


# In every spelling that tyro accepts.
@pytest.mark.parametrize(
    "flags",
    [["--recipe-file={}"], ["--recipe-file", "{}"], ["--recipe_file", "{}"], ["--recipe-file", "nowhere", "--recipe_file={}"]],
)
def test_a_file_sets_the_defaults(recipe_file, flags):
    name, arguments = parse([*(flag.format(recipe_file) for flag in flags), "--epochs", "9"])
    assert (arguments.recipe.seed, arguments.recipe.epochs, arguments.recipe.variant) == (5, 9, "cvt_tiny")
    assert arguments.recipe_file == recipe_file
    assert name == "mine"


def test_the_recipe_of_a_run_has_the_name_of_the_run(recipe_file, monkeypatch):
    file = recipe_file.rename(recipe_file.parent / "recipe.json")
    assert parse(["--recipe-file", str(file)])[0] == file.parent.name
    monkeypatch.chdir(file.parent)
    assert parse(["--recipe-file", "recipe.json"])[0] == file.parent.name


@pytest.mark.parametrize("content", ["{", "[]", '{"epoch": 3}', '{"epochs": 0}', None])
def test_a_file_that_is_not_a_recipe_is_named(tmp_path, content):
    file = tmp_path / "mine.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(RecipeError) as error:
        parse(["--recipe-file", str(file)])
    assert error.value.argument == "recipe_file"
    assert str(file) in error.value.summary


@pytest.mark.parametrize(
    "argv, argument",
    [(["smoke", "--recipe-file", "mine.json"], "recipe_file"), (["--seed", "3", "smoke"], "RECIPE"), (["cifar11"], "RECIPE")],
)
def test_a_recipe_that_is_given_twice_or_late_or_is_unknown_is_refused(argv, argument):
    with pytest.raises(RecipeError) as error:
        parse(argv)
    assert error.value.argument == argument
