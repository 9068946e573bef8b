import dataclasses
import json

import numpy as np
import pytest

from benchmarks.network import GOLDEN
from cvt_keras import VARIANTS, Stage, Variant
from cvt_keras.conversion import configs
from cvt_keras.conversion.configs import variant_from_microsoft, variant_from_transformers
from cvt_keras.errors import CheckpointError
from cvt_keras.pretrained import transformers_config

TINY = Variant((Stage(8, 1, 1, 7, 4, 2), Stage(16, 2, 2, drop_path=0.1, cls_token=True)), activation="gelu")


def _write(folder, processor=None, **change):
    """Writes config.json, and preprocessor_config.json from a dict or a text. Returns the path of config.json."""
    names = {str(i): f"class {i}" for i in range(5)}
    (folder / "config.json").write_text(json.dumps({**transformers_config(TINY), "id2label": names, **change}))
    if processor is not None:
        text = processor if isinstance(processor, str) else json.dumps(processor)
        (folder / "preprocessor_config.json").write_text(text)
    return folder / "config.json"


# === Networks ===


@pytest.mark.parametrize(
    "key, value",
    [("KERNEL_QKV", [3, 5, 3]), ("DROP_RATE", [0, 0, 0.1]), ("ATTN_DROP_RATE", [0.1, 0, 0]), ("POS_EMBED", [1, 0, 0])],
)
def test_an_unsupported_setting_is_refused(key, value):
    with np.load(GOLDEN / "ms_tiny_64x64.npz") as arrays:
        spec = json.loads(bytes(arrays["spec_json"]))
    with pytest.raises(ValueError) as error:
        variant_from_microsoft({**spec, key: value})
    assert f"`{key}`" in str(error.value)
    assert str(value) in str(error.value)


@pytest.mark.parametrize("name", ["cvt_13", "cvt_21", "cvt_w24"])
def test_a_config_round_trip(name):
    variant = variant_from_transformers(json.loads(json.dumps(transformers_config(name))))
    assert variant == dataclasses.replace(VARIANTS[name], activation="gelu")


def test_missing_entries_default_to_cvt_13():
    config = {"model_type": "cvt", "depth": [1, 4, 16]}
    assert variant_from_transformers(config) == dataclasses.replace(VARIANTS["cvt_21"], activation="gelu")


@pytest.mark.parametrize(
    "change, part",
    [
        ({"model_type": "vit"}, "`model_type` must be cvt. Received: vit"),
        ({"depth": [1]}, "each stage"),
        ({"depth": [1, "x"]}, "'x'"),
        ({"depth": None}, "`depth`"),
        ({"embed_dim": 64}, "`embed_dim`"),
        ({"id2label": ["cat"]}, "`id2label`"),
        ({"kernel_qkv": [3, 5]}, "`kernel_qkv`"),
        ({"kernel_qkv": [], "padding_q": [], "padding_kv": []}, "`kernel_qkv`"),
        ({"padding_q": [1, 2]}, "`kernel_qkv`"),
        ({"drop_rate": [0, 0.1]}, "`drop_rate`"),
        ({"qkv_bias": ["yes", "yes"]}, "`qkv_bias`"),
        ({"cls_token": [0, 1]}, "`cls_token`"),
        ({"id2label": {"0": 1, "1": 2}}, "`id2label`"),
    ],
)
def test_an_invalid_config_is_refused_in_one_line(change, part, tmp_path):
    with pytest.raises(CheckpointError) as error:
        configs.read(_write(tmp_path, **change), 3)
    [line] = str(error.value).splitlines()
    assert line.startswith("config.json is not a valid config of a CvT: ")
    assert part in line


@pytest.mark.parametrize("text, part", [("{", "Expecting property name"), ("[]", "list"), ("{}", "`model_type`")])
def test_a_file_that_is_no_config_is_refused(text, part, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError) as error:
        configs.read(tmp_path / "config.json", 3)
    assert "config.json" in error.value.summary and part in error.value.summary


# === Images ===


def test_default_labels_are_not_class_names(tmp_path):
    variant, preprocessing = configs.read(_write(tmp_path), 3)
    assert variant == TINY
    assert preprocessing.class_names == tuple(f"class {i}" for i in range(5))
    _, preprocessing = configs.read(_write(tmp_path, id2label={str(i): f"LABEL_{i}" for i in range(5)}), 3)
    assert preprocessing.class_names is None


@pytest.mark.parametrize(
    "processor, expected",
    [
        (None, {"image_size": [224, 224], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}),
        ({}, {"image_size": [224, 224], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}),
        ({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}, {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}),
        ({"size": 96}, {"image_size": [96, 96]}),
        ({"size": {"shortest_edge": 96}}, {"image_size": [96, 96]}),
        ({"size": {"height": 64, "width": 96}}, {"image_size": [64, 96]}),
        ({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}, {"image_size": [224, 224]}),
        ({"size": 96, "crop_size": 64, "do_center_crop": False}, {"image_size": [96, 96]}),
        ({"size": 96, "crop_size": None, "image_mean": None, "rescale_factor": None}, {"image_size": [96, 96]}),
        ({"do_normalize": False}, {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}),
        ({"do_normalize": False, "rescale_factor": 0.00392156}, {"mean": [0.0] * 3, "std": [1 / (255 * 0.00392156)] * 3}),
        # Means and deviations of pixels in 0..255 and in 0..2.
        (
            {"do_rescale": False, "image_mean": [51, 102, 255], "image_std": [51, 51, 51]},
            {"mean": [0.2, 0.4, 1], "std": [0.2] * 3},
        ),
        ({"rescale_factor": 2 / 255, "image_mean": [1, 1, 1], "image_std": [1, 1, 1]}, {"mean": [0.5] * 3, "std": [0.5] * 3}),
    ],
)
def test_every_form_of_an_image_processor_is_read(processor, expected, tmp_path):
    _, preprocessing = configs.read(_write(tmp_path, processor), 3)
    assert preprocessing.replace(**expected) == preprocessing


BICUBIC_CROP = {"resize": "crop", "crop_pct": 0.875, "interpolation": "bicubic"}
STRETCH = {"resize": "stretch", "crop_pct": 0.875}


@pytest.mark.parametrize(
    "processor, expected",
    [
        (None, BICUBIC_CROP),
        ({}, BICUBIC_CROP),
        # As microsoft/cvt-13 and microsoft/cvt-13-384 have them, in the forms of several versions of transformers.
        ({"crop_pct": 0.875, "feature_extractor_type": "ConvNextFeatureExtractor", "resample": 3, "size": 224}, BICUBIC_CROP),
        ({"crop_pct": 0.8, "resample": 2, "size": {"shortest_edge": 224}}, {"crop_pct": 0.8, "interpolation": "bilinear"}),
        ({"crop_pct": 0.875, "resample": 3, "size": {"shortest_edge": 384}}, {**STRETCH, "interpolation": "bicubic"}),
        ({"size": 384}, {**STRETCH, "image_size": [384, 384], "interpolation": "bicubic"}),
        ({"size": 224, "do_resize": False}, {"resize": "stretch"}),
        # Other processors.
        ({"image_processor_type": "ViTImageProcessor", "size": 96}, {**STRETCH, "interpolation": "bilinear"}),
        ({"image_processor_type": "ViTImageProcessor", "size": {"height": 64, "width": 96}, "resample": 3}, STRETCH),
        (
            {"image_processor_type": "ViTImageProcessor", "size": {"shortest_edge": 96}},
            {"image_size": [96, 96], "resize": "crop", "crop_pct": 1.0, "interpolation": "bilinear"},
        ),
        (
            {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 256}, "crop_size": 224},
            {**BICUBIC_CROP, "image_size": [224, 224]},
        ),
        ({"image_processor_type": "CLIPImageProcessor", "size": 224, "crop_size": 224}, {"resize": "crop", "crop_pct": 1.0}),
        ({"size": {"height": 256, "width": 256}, "crop_size": {"height": 224, "width": 224}}, BICUBIC_CROP),
        ({"size": {"height": 224, "width": 224}, "crop_size": {"height": 224, "width": 224}}, STRETCH),
        ({"size": {"shortest_edge": 64}, "crop_size": 96}, {"image_size": [96, 96], "crop_pct": 1.0}),  # transformers pads
        ({"size": 96, "resample": 1}, {"interpolation": "bicubic"}),
        ({"size": 96, "resample": 0}, {"interpolation": "bilinear"}),
    ],
)
def test_the_way_of_resizing_is_read(processor, expected, tmp_path):
    _, preprocessing = configs.read(_write(tmp_path, processor), 3)
    assert preprocessing.replace(**expected) == preprocessing


# `int(crop / (crop / resized))` is less than `resized` for the last three.
@pytest.mark.parametrize("crop, resized", [(224, 256), (224, 248), (64, 93), (112, 177), (128, 186)])
def test_a_crop_size_gives_the_box_that_it_is_cut_from(crop, resized, tmp_path):
    _, preprocessing = configs.read(_write(tmp_path, {"size": {"shortest_edge": resized}, "crop_size": crop}), 3)
    assert preprocessing.crop_from == (resized, resized)


def test_published_files_without_a_config_crop_small_inputs_and_stretch_large_ones():
    small, large, wide = (
        configs.published_preprocessing(VARIANTS[variant], 3, name)
        for variant, name in (("cvt_13", "CvT-13-224x224-IN-1k"), ("cvt_21", "CvT-21-384x384-IN-1k"), ("cvt_w24", "weights"))
    )
    assert (small.resize, small.crop_from, small.interpolation) == ("crop", (256, 256), "bicubic")
    for preprocessing in (large, wide):
        assert (preprocessing.resize, preprocessing.image_size, preprocessing.interpolation) == (
            "stretch",
            (384, 384),
            "bicubic",
        )


def test_four_channels_do_not_get_imagenets_mean(tmp_path):
    _, preprocessing = configs.read(_write(tmp_path), 4)
    assert (preprocessing.mean, preprocessing.std) == (None, None)


@pytest.mark.parametrize(
    "processor, part",
    [
        ("[]", "JSON object"),
        ({"size": {"longest": 3}}, "`size`"),
        ({"size": 224.7}, "`size`"),
        ({"size": 0}, "`size`"),
        ({"resample": 7}, "`resample`"),
        ({"resample": "bicubic"}, "`resample`"),
        ({"crop_pct": 1.5}, "`crop_pct`"),
        ({"size": "large"}, "`size`"),
        ({"image_mean": [True, True, True]}, "`image_mean`"),
        ({"rescale_factor": "1/255"}, "`rescale_factor`"),
        ({"rescale_factor": 10**400}, "too large"),
        ({"size": [1, 2, 3]}, "`size`"),
        ({"image_mean": 3}, "`image_mean`"),
        ({"image_mean": [0.5, 0.5, 0.5, 0.5]}, "`mean`"),
        ('{"image_mean": [0.5, 0.5, NaN]}', "`mean`"),
        ({"image_mean": [1.5, 0.5, 0.5]}, "`mean`"),  # no classifier accepts it
        ({"image_std": [0.5, 0, 0.5]}, "`std`"),
        ({"rescale_factor": 0}, "`rescale_factor`"),
        ({"rescale_offset": True}, "`rescale_offset`"),
    ],
)
def test_an_invalid_image_processor_is_refused_in_one_line(processor, part, tmp_path):
    with pytest.raises(CheckpointError) as error:
        configs.read(_write(tmp_path, processor), 3)
    [line] = str(error.value).splitlines()
    assert line.startswith("preprocessor_config.json is not a valid config of an image processor: ")
    assert part in line
