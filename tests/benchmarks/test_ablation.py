from pathlib import Path

from benchmarks.ablation import CANDIDATES, Arguments, main
from cvt_keras import VARIANTS, macs

ROOT = Path(__file__).parents[2]


def test_the_chosen_candidate_is_cvt_cifar():
    assert CANDIDATES["stem 32 32, depths 1 2 1"] == VARIANTS["cvt_cifar"]


def test_candidates_stay_within_60_million_macs():
    for variant in CANDIDATES.values():
        assert macs(variant, (32, 32, 3), 10) <= 60e6


def test_it_writes_a_row_per_candidate(cifar10_dir, monkeypatch, tmp_path):
    monkeypatch.setitem(CANDIDATES, "tiny", VARIANTS["cvt_tiny"])
    main(Arguments(data_dir=str(cifar10_dir), only="tiny", train_limit=128, csv=tmp_path / "stem.csv"))
    columns, row = (tmp_path / "stem.csv").read_text().splitlines()
    assert columns == (ROOT / "docs" / "results" / "stem.csv").read_text().splitlines()[0]
    assert row.startswith("tiny,0.002,128,0.8,")
