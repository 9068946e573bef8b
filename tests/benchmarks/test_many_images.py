import json

import pytest
from eager import eagerly

from benchmarks.many_images import Arguments, main


def test_the_benchmark_prints_times_and_memory(capsys):
    with eagerly():
        main(Arguments(images=100, height=40, width=60, image_size=32, resize="crop", batch_size=32))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["images"] == 100 > result["training_images"] > 60
    assert result["later_seconds"] < 100 / result["decoded_images_per_second"]
    assert result["kilobytes_per_file"] > 0.5
    assert result["cache_gigabytes"] == pytest.approx(100 * 36 * 54 * 3 / 1e9, abs=1e-3)
    assert result["training_gigabytes"] >= result["decoding_gigabytes"] > 0.1
    assert result["device"] and result["versions"]


@pytest.mark.parametrize("change", [{"images": 99}, {"height": 15}, {"width": 0}, {"image_size": 8}, {"batch_size": 0}])
def test_invalid_arguments_raise(change):
    [(name, value)] = change.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        Arguments(**change)
