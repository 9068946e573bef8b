import json

import pytest
from eager import eagerly

from benchmarks.pipeline import Arguments, main


def test_the_benchmark_prints_both_rates_and_their_ratio(capsys):
    with eagerly():  # tracing the training step takes ten times as long as running it twice
        main(Arguments(recipe="smoke", num_images=32, steps=1, turns=2))
    result = json.loads(capsys.readouterr().out)
    assert result["ratio"] == pytest.approx(
        result["pipeline_images_per_second"] / result["training_images_per_second"], rel=0.01
    )
    assert result["training_images_per_second"] > 0
    assert len(result["ratios"]) == 2
    assert (result["variant"], result["precision"], result["xla"]) == ("cvt_tiny", "float32", "off")
    assert result["device"] and result["versions"]


@pytest.mark.parametrize("change", [{"recipe": "mine"}, {"steps": 0}, {"turns": 0}, {"num_classes": 0}, {"num_images": 31}])
def test_invalid_arguments_raise(change):
    [(name, value)] = change.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        Arguments(**{"recipe": "smoke", **change})
