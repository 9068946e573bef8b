"""Trains each candidate for `cvt_cifar` for one epoch, for docs/results/stem.csv: python benchmarks/ablation.py --help

One seed and one epoch show only differences of several points.
"""

import dataclasses
import tempfile
from pathlib import Path

import tyro

from cvt_keras import Stage, Variant
from cvt_keras.training import RECIPES, run
from result_tables import add_rows


def candidate(stem, dims, depths, mlp_ratios=(2.0, 2.0, 2.0), stride_kv=2):
    """Three stages opened by 3x3 convolutions of stride 2, with heads of about 64 channels."""
    heads = [max(1, dim // 64) for dim in dims[:-1]] + [4]
    stages = [Stage(*sizes, mlp_ratio=ratio) for *sizes, ratio in zip(dims, depths, heads, mlp_ratios)]
    stages[0] = dataclasses.replace(stages[0], stride_kv=stride_kv)
    return Variant(tuple(stages), activation="gelu", stem=stem)


CANDIDATES = {
    "stem 32, depths 1 2 3": candidate((32,), (64, 128, 256), (1, 2, 3)),
    "stem 32 32, depths 1 2 1": candidate((32, 32), (64, 128, 256), (1, 2, 1)),
    "stem 32 32, depths 1 2 2, first keys at stride 4": candidate((32, 32), (64, 128, 256), (1, 2, 2), stride_kv=4),
    "stem 32 32, depths 1 3 1, first MLP ratio 1": candidate((32, 32), (64, 128, 256), (1, 3, 1), (1.0, 2.0, 2.0)),
    "stem 32 56, depths 1 1 1": candidate((32, 56), (64, 128, 256), (1, 1, 1)),
    "stem 40 40, dims 48 96 192, depths 1 2 2": candidate((40, 40), (48, 96, 192), (1, 2, 2)),
    "stem 24 24, depths 1 2 1, MLP ratios 1 3 4": candidate((24, 24), (64, 128, 256), (1, 2, 1), (1.0, 3.0, 4.0)),
    "stem 24 32 32, depths 1 1 1": candidate((24, 32, 32), (64, 128, 256), (1, 1, 1)),
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Validation top-1 of each candidate after one epoch."""

    data_dir: str | None = None
    """TFDS' folder; defaults to TFDS_DATA_DIR, or else ~/tensorflow_datasets."""
    peak_learning_rate: float = 2e-3
    """Reached after a tenth of the epoch."""
    train_limit: int | None = None
    """Train on the first N images only."""
    only: str = ""
    """Train only the candidates whose names contain this text."""
    csv: Path | None = None
    """Also write the results into this CSV file."""


def main(arguments):
    for name, variant in CANDIDATES.items():
        if arguments.only in name:
            recipe = dataclasses.replace(
                RECIPES["cifar10"],
                variant=variant,
                dataset="cifar10",
                optimizer="adamw",
                decay="cosine",
                epochs=1,
                data_dir=arguments.data_dir,
                peak_learning_rate=arguments.peak_learning_rate,
                train_limit=arguments.train_limit,
            )
            with tempfile.TemporaryDirectory() as run_dir:
                report = run(recipe, run_dir, evaluate_test=False).report
            row = {
                "candidate": name,
                "peak_learning_rate": arguments.peak_learning_rate,
                "train_limit": arguments.train_limit or "",
                "macs_millions": f"{report.macs / 1e6:.1f}",
                "top1_percent": f"{100 * report.validation['top1']:.1f}",
            }
            print(f"{name}: {row['macs_millions']} M MACs, {row['top1_percent']}% top-1 after one epoch", flush=True)
            if arguments.csv:
                add_rows(arguments.csv, [row], ("candidate", "peak_learning_rate", "train_limit"))
    print(f"{report.device}, {report.versions}, {report.data_note}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
