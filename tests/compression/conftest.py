import dataclasses

import pytest


@pytest.fixture(scope="session")
def trained(cifar10_dir, tmp_path_factory):
    """The folder of a short run on the made images. Its network has every kind of layer, from whitening to a cls token."""
    from cvt_keras import Stage, Variant
    from cvt_keras.training import RECIPES, run

    run_dir = tmp_path_factory.mktemp("runs") / "trained"
    stage = Stage(dim=24, depth=1, heads=2, mlp_ratio=2.0, cls_token=True, pool=True, residual_convs=1, mlp_conv=True)
    variant = Variant((stage,), activation="gelu", stem=(8,), whitening=1)
    recipe = dataclasses.replace(
        RECIPES["smoke"], variant=variant, dataset="cifar10", data_dir=str(cifar10_dir), epochs=4, flip=False,
        train_limit=512, validation_limit=64, test_limit=100, peak_learning_rate=1e-2,
    )  # fmt: skip
    run(recipe, run_dir)
    return run_dir


@pytest.fixture(scope="session")
def compressed(trained, tmp_path_factory):
    """Compresses with the command, once for all tests. Returns the new run folder."""
    from cvt_keras import cli
    from cvt_keras.training import callbacks

    class FirstEpochIsBest(callbacks.BestWeights):
        def on_test_end(self, logs=None):
            super().on_test_end({**logs, "accuracy": 1.0 - self._epoch})

    folder = tmp_path_factory.mktemp("compressed")

    def compress(name):
        """Takes a name such as `prune`, or `prune-qat` for one method after the other."""
        run_dir = folder / name
        if not run_dir.exists():
            before, _, method = name.rpartition("-")
            source = compress(before) if before else trained
            with pytest.MonkeyPatch.context() as patch:
                if method == "prune":  # the best epoch must be one that has all zeros
                    patch.setattr("cvt_keras.training.loop.BestWeights", FirstEpochIsBest)
                assert cli.main([method, str(source), "--run-dir", str(run_dir), *FLAGS, *EXTRA.get(name, ())]) == 0
        return run_dir

    return compress


FLAGS = ("--train-limit", "256")
EXTRA = {"prune-cluster": ("--clusters", "8")}


@pytest.fixture(scope="session")
def exported(compressed):
    """The folder of the exported TFLite files of a pruned run that was then trained for quantisation."""
    from cvt_keras import cli

    run_dir = compressed("prune-qat")
    formats = ["saved_model", "float32", "float16", "dynamic_int8", "int8"]
    assert cli.main(["export", str(run_dir), "--formats", *formats, "--verify-images", "100"]) == 0
    return run_dir / "export" / "tflite"


@pytest.fixture(scope="session")
def _tiny():
    from cvt_keras import build_classifier

    classifier = build_classifier("cvt_tiny", 10, (32, 32, 3))
    return classifier, classifier.get_weights()


@pytest.fixture
def classifier(_tiny):
    """A small classifier with its initial weights."""
    classifier, weights = _tiny
    classifier.set_weights(weights)
    return classifier
