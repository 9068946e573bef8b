import dataclasses

import pytest


@pytest.fixture(scope="session")
def trained(cifar10_dir, tmp_path_factory):
    """The folder of a short run on the made images: of a network with every layer, from a stem to a cls token."""
    from cvt_keras import Stage, Variant
    from cvt_keras.training import RECIPES, run

    run_dir = tmp_path_factory.mktemp("runs") / "trained"
    variant = Variant(
        (Stage(dim=16, depth=1, heads=1, mlp_ratio=2.0), Stage(dim=24, depth=1, heads=2, mlp_ratio=2.0, cls_token=True)),
        activation="gelu",
        stem=(8,),
    )
    recipe = dataclasses.replace(
        RECIPES["smoke"], variant=variant, dataset="cifar10", data_dir=str(cifar10_dir), epochs=4, flip=False,
        train_limit=1024, peak_learning_rate=1e-2,
    )  # fmt: skip
    run(recipe, run_dir)
    return run_dir


@pytest.fixture(scope="session")
def compressed(trained, tmp_path_factory):
    """Compresses by the command line, once for all tests. Returns the new run folder."""
    from cvt_keras import cli

    folder = tmp_path_factory.mktemp("compressed")

    def compress(name):
        """Takes a name such as `prune`, or `prune-qat` for one after the other."""
        run_dir = folder / name
        if not run_dir.exists():
            before, _, method = name.rpartition("-")
            source = compress(before) if before else trained
            assert cli.main([method, str(source), "--run-dir", str(run_dir), "--train-limit", "256", *EXTRA.get(name, ())]) == 0
        return run_dir

    return compress


EXTRA = {"cluster": ("--clusters", "8"), "prune-cluster": ("--clusters", "8")}


@pytest.fixture(scope="session")
def exported(compressed):
    """Exports a compressed run. Returns the folder of its TFLite files."""
    from cvt_keras import cli

    def export(name):
        run_dir = compressed(name)
        if not (run_dir / "export").exists():
            others = ["float16", "saved_model"] if name == "qat" else []
            formats = ["float32", "dynamic_int8", "int8", *others]
            assert cli.main(["export", str(run_dir), "--formats", *formats, "--verify-images", "100"]) == 0
        return run_dir / "export" / "tflite"

    return export
