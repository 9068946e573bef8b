import json

import pytest
from eager import eagerly
from labelled_images import write_image

from benchmarks.pipeline import Arguments, main


@pytest.fixture
def photos(tmp_path):
    for i in range(60):
        write_image(tmp_path / "photos" / "ab"[i % 2] / f"{i}.png")
    return tmp_path / "photos"


@pytest.mark.parametrize("from_files", [False, True])
def test_the_benchmark_prints_all_rates_and_their_ratios(photos, from_files, capsys):
    data = {"data_dir": str(photos), "image_size": 16} if from_files else {"num_images": 32}
    with eagerly():  # tracing the training step takes ten times as long as running it twice
        main(Arguments(recipe="smoke", steps=1, turns=1, **data))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rates = result["images_per_second"]
    assert list(rates) == ["memory", "disk", *(["off"] if from_files else []), "training"]
    assert min(rates.values()) > 0
    assert result["disk_to_memory"][0] == pytest.approx(rates["disk"] / rates["memory"], abs=0.01)
    assert result["disk_to_training"][0] == pytest.approx(rates["disk"] / rates["training"], rel=0.01)
    assert 32 <= result["images"] < 60
    assert (result["variant"], result["precision"], result["xla"]) == ("cvt_tiny", "float32", "off")
    assert result["device"] and result["versions"]


def test_the_pipeline_alone_needs_no_training(photos, capsys):
    main(Arguments(recipe="smoke", steps=1, turns=1, data_dir=str(photos), image_size=16, resize="crop", pipeline_only=True))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(result["images_per_second"]) == ["memory", "disk", "off"]
    assert result["disk_to_training"] is None
    assert result["resize"] == "crop"


@pytest.mark.parametrize("change", [{"recipe": "mine"}, {"steps": 0}, {"turns": 0}, {"num_classes": 0}, {"num_images": 31}])
def test_invalid_arguments_raise(change):
    [(name, value)] = change.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        Arguments(**{"recipe": "smoke", **change})
