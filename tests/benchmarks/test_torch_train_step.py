import json

import pytest
import torch

from benchmarks.torch_train_step import Arguments, main


def test_it_measures_transformers_network(capsys):
    result = main(Arguments("cvt_tiny", image_size=16, num_classes=3, batch_size=2, steps=1, repetitions=2))
    assert 0 < result["images_per_second_min"] <= result["images_per_second"] <= result["images_per_second_max"]
    assert 0 < result["share_of_matrix_product"] < 1
    assert result["device"] and result["versions"]["torch"] == torch.__version__
    assert json.loads(capsys.readouterr().out) == result


@pytest.mark.parametrize("field", ["steps", "batch_size", "image_size", "num_classes", "repetitions"])
def test_a_size_below_one_is_refused(field):
    with pytest.raises(ValueError, match=f"{field}=0"):
        Arguments(**{field: 0})
