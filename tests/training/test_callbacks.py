import time

import pytest

from cvt_keras.training.callbacks import Stopwatch


def test_stopwatch_leaves_validation_out():
    watch = Stopwatch()
    watch.on_train_begin()
    for validated in (True, False):
        watch.on_epoch_begin(0)
        time.sleep(0.05)
        if validated:
            watch.on_test_begin()
            time.sleep(0.5)
        watch.on_epoch_end(0)
    assert watch.epoch_seconds == pytest.approx([0.05, 0.05], abs=0.04)
