"""Only what Keras lacks."""

import time

import keras


class Stopwatch(keras.callbacks.Callback):
    """Times the training batches of each epoch, without the validation after them.

    Attributes:
        epoch_seconds: a number for each epoch.
    """

    def on_train_begin(self, logs=None):
        self.epoch_seconds = []
        self._started = None

    def on_epoch_begin(self, epoch, logs=None):
        self._started = time.perf_counter()

    def on_test_begin(self, logs=None):
        self._stop()

    def on_epoch_end(self, epoch, logs=None):
        self._stop()

    def _stop(self):
        if self._started is not None:
            self.epoch_seconds.append(time.perf_counter() - self._started)
            self._started = None
