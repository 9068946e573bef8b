"""Checked by mypy and never run: the public names with the types that a user's code sees.

`.ci/run` checks it with `--strict` against an installed wheel, so that a public name without type hints is an error.
"""

from pathlib import Path
from typing import Any, assert_type

import cvt_keras
from cvt_keras import (
    VARIANTS,
    Classifier,
    CvT,
    Prediction,
    Preprocessing,
    Stage,
    Variant,
    build_classifier,
    load_run,
    macs,
    preprocessing_of,
)
from cvt_keras.attention import AttentionMap, attention_maps, grad_cam, rollout
from cvt_keras.compression import MagnitudePruning, QuantizationAwareTraining, WeightClustering, compress
from cvt_keras.errors import ImageError
from cvt_keras.export import Artifact, export
from cvt_keras.export.serving.client import Answer, Client
from cvt_keras.predict import Evaluation, evaluate
from cvt_keras.pretrained import to_torch_state_dict, transformers_config, transformers_processor
from cvt_keras.search import Choice, Range, SearchResult, search
from cvt_keras.training import RECIPES, Recipe, RunResult, run

assert_type(cvt_keras.__version__, str)

# === The network ===
variant = Variant((Stage(dim=64, depth=1, heads=1), Stage(dim=128, depth=2, heads=2, cls_token=True)), stem=(32,))
assert_type(VARIANTS["cvt_13"], Variant)
assert_type(variant.stages[0].dim, int)
assert_type(variant.stride, int)
assert_type(variant.grids(224, 224), list[tuple[int, int]])
assert_type(macs("cvt_13", (224, 224, 3), 1000), int)
assert_type(CvT(variant, 10, (32, 32, 3)), CvT)
assert_type(CvT.from_variant("cvt_13", num_classes=1000), CvT)
model = assert_type(CvT.from_pretrained(Path("CvT-13-224x224-IN-1k.pth"), num_classes=0), CvT)
assert_type(model.features([]), dict[str, Any])
classifier = build_classifier(variant, mean=[0.5] * 3, std=[0.25] * 3, class_names=["cat", "dog"])
assert_type(preprocessing_of(classifier), Preprocessing)
Preprocessing(mean=[0.5], std=(0.25,), class_names=["cat", "dog"], image_size=(32, 32))
maps = assert_type(attention_maps(classifier, []), list[AttentionMap])
assert_type(maps[0].key_grid, tuple[int, int])
rollout(maps).sum() + grad_cam(classifier, [], classes=[0, 1], stage=1).sum()

# === Training and what follows it ===
recipe = assert_type(RECIPES["smoke"], Recipe)
assert_type(Recipe.from_settings(recipe.settings()), Recipe)
result = assert_type(run(recipe, "runs/mine", resume=True), RunResult)
assert_type(result.run_dir, Path)
assert_type(result.history[-1]["epoch"], float)
assert_type(compress(result.run_dir, "runs/pruned", "prune", sparsity=0.5, epochs=1), RunResult)
assert_type(export("runs/pruned", formats=["float32", "int8"], verify_images=100), list[Artifact])
assert_type(search(recipe, "runs/search", trials=8), SearchResult | None)
MagnitudePruning(sparsity=0.5, layers=["stage1"])
WeightClustering(clusters=8, layers=lambda path: "mlp" in path)
QuantizationAwareTraining(keep_zeros=True)
assert_type(Range(1e-3, 1e-2, log=True).place(2e-3), float)
assert_type(Choice(("linear", "cosine")).values, tuple[float | str, ...])

# === Answers ===
answering = assert_type(load_run(Path("runs/mine")), Classifier)
assert_type(answering.class_names, tuple[str, ...])
assert_type(answering.predict(["cat.jpg"], top=3), list[Prediction])
assert_type(answering.predict("cat.jpg")[0].top, tuple[tuple[str, float], ...])
assert_type(next(answering.classify(["cat.jpg"])), Prediction | ImageError)
assert_type(evaluate(answering, "photos", page="evaluation.html"), Evaluation)

# === Other programs ===
assert_type(transformers_config(variant), dict[str, Any])
assert_type(transformers_processor(model), dict[str, Any])
to_torch_state_dict(model, "transformers")["cls_token"].tobytes()
with Client(protocol="rest") as client:
    assert_type(client.predict([b""]), list[Answer])
    client.close()
