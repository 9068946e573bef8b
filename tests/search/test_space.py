import dataclasses
import json

import pytest

from cvt_keras import Stage, Variant
from cvt_keras.errors import RecipeError
from cvt_keras.search.space import Choice, Range, apply, read, rounded, space_of, values_of, written
from cvt_keras.training import RECIPES
from cvt_keras.variants import VARIANTS, get_variant

CIFAR10 = RECIPES["cifar10"]
# Its stages have one MLP ratio and strided embeddings, unlike those of `cvt_cifar`.
STRIDED = dataclasses.replace(CIFAR10, variant=Variant(tuple(Stage(dim, 2, dim // 64) for dim in (64, 128, 256))))


def _first_stages(recipe):
    """Names of a recipe's space, those of stages 0 and 2 left out."""
    return [name for name in space_of(recipe) if not name.startswith("stage") or name[5] == "1"]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_own_values_of_a_recipe_give_the_recipe_back(name):
    recipe = dataclasses.replace(CIFAR10, variant=name, image_size=224)
    space = space_of(recipe)
    values = values_of(recipe, space)
    assert None not in values.values() and values.keys() == space.keys()
    assert apply(recipe, values).settings() == recipe.settings()


@pytest.mark.parametrize(
    ("recipe", "name"), [(recipe, name) for recipe in (CIFAR10, STRIDED) for name in _first_stages(recipe)]
)
def test_each_name_changes_only_its_setting(recipe, name):
    where = space_of(recipe)[name]
    own = values_of(recipe, {name: where})[name]
    value = where.ends[0] if own == where.ends[1] else where.ends[1]
    changed = apply(recipe, {name: value})
    before, after = recipe.settings(), changed.settings()
    assert [field for field in after if after[field] != before[field]] == [field if (field := name) in after else "variant"]
    own_variant, variant = get_variant(recipe.variant), get_variant(changed.variant)
    assert dataclasses.replace(variant, stages=own_variant.stages) == own_variant  # whitening and norm are not varied
    stages = list(zip(own_variant.stages, variant.stages))
    if name == "drop_path":
        assert [stage.drop_path for _, stage in stages] == [0.0, value / 2, value]
    elif name == "mlp_ratio":
        assert all(stage.mlp_ratio == value for _, stage in stages)
    elif name.startswith("stage1_"):
        field = name.removeprefix("stage1_")
        expected = {field: value}
        if field == "dim":
            expected["heads"] = 6 if recipe is CIFAR10 else 3  # 192 / heads: 32 or 64 wide, as before
        elif field == "kernel_size":
            expected["padding"] = value // 2
        assert stages[1][1] == dataclasses.replace(stages[1][0], **expected)
        assert stages[0][0] == stages[0][1] and stages[2][0] == stages[2][1]


def test_a_stage_that_pools_keeps_its_stride_unless_a_space_names_it():
    assert not [name for name in space_of(CIFAR10) if name.endswith("_stride")]
    assert "stage1_stride" in space_of(STRIDED)
    assert get_variant(apply(CIFAR10, {"stage1_stride": 4}).variant).stages[1].stride == 4
    assert read({"stage1_stride": [2, 4]}, CIFAR10) == {"stage1_stride": Choice((2, 4))}
    with pytest.raises(RecipeError, match="stage1_stride: `pool` needs a `stride` of at least 2"):
        read({"stage1_stride": [1, 2]}, CIFAR10)


def test_mlp_ratios_vary_by_stage_if_they_differ():
    assert [name for name in space_of(CIFAR10) if name.endswith("mlp_ratio")] == [f"stage{i}_mlp_ratio" for i in range(3)]
    assert [name for name in space_of(STRIDED) if name.endswith("mlp_ratio")] == ["mlp_ratio"]
    for recipe in (CIFAR10, STRIDED):
        assert read({"stage1_mlp_ratio": {"low": 1, "high": 2.5}}, recipe)
        stages = get_variant(apply(recipe, {"mlp_ratio": 3, "stage1_mlp_ratio": 2.5}).variant).stages
        assert [stage.mlp_ratio for stage in stages] == [3.0, 2.5, 3.0]


def test_heads_of_the_default_network_keep_about_their_width():
    for i, width in enumerate((24, 32, 32)):
        for dim in space_of(CIFAR10)[f"stage{i}_dim"].values:
            stage = get_variant(apply(CIFAR10, {f"stage{i}_dim": dim}).variant).stages[i]
            assert 2 / 3 < dim / stage.heads / width < 1.5


def test_a_kernel_of_another_size_keeps_the_grid_of_a_stage_that_pools():
    variant = get_variant(CIFAR10.variant)
    for size in (3, 5, 7):
        changed = get_variant(apply(CIFAR10, {f"stage{i}_kernel_size": size for i in range(3)}).variant)
        assert changed.grids(32, 32) == variant.grids(32, 32)


def test_the_weight_decay_of_adamw_may_vary():
    assert apply(CIFAR10, {"adamw_weight_decay": 0.02}).adamw_weight_decay == 0.02
    assert read({"adamw_weight_decay": {"low": 0.01, "high": 0.1, "log": True}}, CIFAR10)


def test_the_number_of_heads_divides_a_new_width():
    recipe = dataclasses.replace(CIFAR10, variant=Variant((Stage(dim=64, depth=1, heads=1), Stage(dim=96, depth=1, heads=2))))
    stage = get_variant(apply(recipe, {"stage1_dim": 120}).variant).stages[1]
    assert (stage.dim, stage.heads) == (120, 3)  # 40 wide; 60 is as far from 48, and fewer


def test_drop_path_applies_to_a_network_of_one_stage():
    recipe = dataclasses.replace(CIFAR10, variant=Variant((Stage(dim=64, depth=2, heads=1),)))
    assert get_variant(apply(recipe, {"drop_path": 0.1}).variant).stages[0].drop_path == 0.1


def test_the_network_is_not_varied_with_weights():
    recipe = dataclasses.replace(CIFAR10, weights="somewhere.keras")
    space = space_of(recipe)
    assert "layer_decay" in space and not any(name.startswith("stage") or name == "mlp_ratio" for name in space)
    assert apply(recipe, {"layer_decay": 0.7}).layer_decay == 0.7


@pytest.mark.parametrize("name", RECIPES)
def test_the_space_is_around_the_recipe(name):
    recipe = dataclasses.replace(RECIPES[name], weights=None, variant=RECIPES[name].variant or "cvt_cifar")
    space = space_of(recipe)
    for field in ("peak_learning_rate", "weight_decay") if recipe.weight_decay else ("peak_learning_rate",):
        own = getattr(recipe, field)
        assert space[field].ends == pytest.approx((own / 4, own * 4)) and space[field].log
    assert None not in values_of(recipe, space).values()
    far = dataclasses.replace(recipe, label_smoothing=0.5, rand_augment=5, decay="constant")
    assert None not in values_of(far, space_of(far)).values()


@pytest.mark.parametrize("name", ["peak_learning_rate", "weight_decay"])
def test_a_rate_or_weight_decay_of_zero_is_not_varied(name):
    recipe = dataclasses.replace(CIFAR10, **{name: 0.0})
    assert name not in space_of(recipe)
    assert read({name: [0.01, 0.1]}, recipe)


def test_a_choice_may_hold_words(tmp_path):
    file = tmp_path / "space.json"
    file.write_text('{"decay": ["linear", "constant"], "optimizer": ["muon", "adamw"]}')
    space = read(file, CIFAR10)
    assert space == {"decay": Choice(("linear", "constant")), "optimizer": Choice(("muon", "adamw"))}
    assert json.loads(json.dumps(written(space))) == {"decay": ["linear", "constant"], "optimizer": ["muon", "adamw"]}
    assert values_of(CIFAR10, space) == {"decay": "linear", "optimizer": "muon"}
    assert apply(CIFAR10, {"decay": "constant"}).decay == "constant"
    assert "linear" in space["decay"] and "cosine" not in space["decay"] and 1 not in space["decay"]
    assert "linear" not in Choice((1, 2))


def test_values_have_the_type_of_their_choice():
    """keras-tuner would take 1 and 1.0 for two candidates."""
    for values, kind in (((0, 1), int), ((0.0, 1), float), ((0.5, 1), float)):
        own = values_of(CIFAR10, {"gradient_clip": Choice(values)})["gradient_clip"]
        assert own == 1 and type(own) is kind
    assert type(values_of(CIFAR10, {"mixup": Range(0, 1)})["mixup"]) is float


def test_a_value_outside_the_space_is_none():
    assert values_of(CIFAR10, {"ema": Range(0.9, 0.99)}) == {"ema": None}


def test_numbers_of_a_range_have_four_digits_and_stay_within_it():
    assert rounded(0.00123456, Range(1e-4, 1.0)) == 0.001235
    assert rounded(0.29998, Range(0.1, 0.29999)) == 0.29999
    assert rounded(0.123456, Choice((0.123456, 1))) == 0.123456


def test_the_own_width_of_a_stage_is_among_the_choices():
    recipe = dataclasses.replace(CIFAR10, variant=Variant((Stage(dim=100, depth=2, heads=1),)))
    assert 100 in space_of(recipe)["stage0_dim"]


def test_a_space_is_read_from_a_file(tmp_path):
    file = tmp_path / "space.json"
    space = {
        "peak_learning_rate": Range(1e-3, 4e-3, log=True),
        "batch_size": Choice((64, 128)),
        "ema": Range(0.0, 0.9),
        "stage0_depth": Choice((2, 1)),
    }
    file.write_text(json.dumps(written(space)))
    assert read(file, CIFAR10) == space
    assert list(read(file, CIFAR10)["stage0_depth"].values) == [1, 2]


@pytest.mark.parametrize(
    "text, part",
    [
        ("{}", "`space` {file} must map at least one name to its values. Received: {}"),
        ("[1]", "at least one name"),
        ("{", "can't be read"),
        ('{"width": [1, 2]}', "unknown name: width. Known: peak_learning_rate"),
        ('{"stage7_depth": [1, 2]}', "unknown name: stage7_depth"),
        ('{"epochs": [1, 2]}', "unknown name: epochs"),
        ('{"warmup": {"low": 0.3, "high": 0.1}}', "warmup: `low` must be less than `high`. Received: low=0.3, high=0.1"),
        ('{"warmup": {"low": 0.1, "high": 1.5}}', "warmup: `warmup` must be at least 0 and less than 1"),
        ('{"warmup": {"low": 0.0, "high": 0.1, "log": true}}', "`low` must be positive if `log` is true"),
        ('{"warmup": {"low": "a", "high": 0.1}}', "must be finite numbers"),
        ('{"warmup": {"low": 0.0, "high": 0.1, "log": 1}}', "`log` must be true or false"),
        ('{"warmup": {"low": 0.0}}', 'must be {"low": .., "high": ..'),
        ('{"warmup": []}', "at least two values. Received: []"),
        ('{"warmup": [0.1, 0.1]}', "at least two values"),
        ('{"warmup": ["a", "b"]}', ": must be a list of finite numbers"),
        ('{"mlp_ratio": ["a", "b"]}', ": must be a list of finite numbers"),
        ('{"warmup": ["a", 0.1]}', "a list of finite numbers or of words"),
        ('{"decay": [0, 1]}', "decay: must be a list of some of linear, cosine, constant. Received: [0, 1]"),
        ('{"decay": {"low": 0, "high": 1}}', "decay: must be a list of some of linear, cosine, constant"),
        ('{"decay": ["linear", "steep"]}', "decay: `decay` must be"),
        ('{"precision": ["float32", "mixed_bfloat16"]}', "unknown name: precision"),
        ('{"resize": ["stretch", "crop"]}', "unknown name: resize"),
        ('{"interpolation": ["bilinear", "bicubic"]}', "unknown name: interpolation"),
        ('{"crop_pct": [0.8, 0.9]}', "unknown name: crop_pct"),
        ('{"batch_size": {"low": 32, "high": 64}}', "batch_size: must be a list of integers, not a range"),
        ('{"batch_size": [32, 64.5, 128]}', "`batch_size` must be int"),
        ('{"stage0_dim": [32, 64.0]}', "`dim` must be a positive integer"),
        ('{"warmup": {"low": 0, "high": 1' + "0" * 400 + "}}", "must be finite numbers"),
        ('{"stage0_dim": [0, 32]}', "`dim` must be a positive integer. Received: dim=0"),
        ('{"stage0_dim": [1.5, 32]}', "`dim` must be a positive integer. Received: dim=1.5"),
        ('{"stage0_depth": [0, 1]}', "`depth` must be a positive integer"),
        ('{"train_limit": [100, 200]}', "unknown name: train_limit"),
        ('{"adamw_weight_decay": [-0.1, 0.1]}', "adamw_weight_decay: `adamw_weight_decay` must be a finite number"),
    ],
)
def test_an_invalid_space_is_refused_in_one_line(text, part, tmp_path):
    file = tmp_path / "space.json"
    file.write_text(text)
    with pytest.raises(RecipeError) as error:
        read(file, CIFAR10)
    assert (
        part.replace("{file}", str(file)) in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value)
    )


def test_a_missing_space_file_is_refused(tmp_path):
    with pytest.raises(RecipeError) as error:
        read(tmp_path / "none.json", CIFAR10)
    assert error.value.argument == "space"
    assert "none.json" in error.value.summary
