"""The CSV files of docs/results, and the function that writes them."""

import csv
from pathlib import Path

import pytest

from benchmarks import cifar10, compression
from result_tables import add_rows

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def _stored(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_added_and_replaced_by_their_key(tmp_path):
    file = tmp_path / "a.csv"
    add_rows(file, [{"name": "a, b", "ms": 1.5}, {"name": "c", "ms": 2}], ("name",))
    add_rows(file, [{"name": "d", "ms": 3}, {"name": "a, b", "ms": 4}], ("name",))
    assert [(row["name"], row["ms"]) for row in _stored(file)] == [("a, b", "4"), ("c", "2"), ("d", "3")]


def test_a_file_with_other_columns_is_refused_and_kept(tmp_path):
    file = tmp_path / "a.csv"
    add_rows(file, [{"name": "a", "ms": 1}], ("name",))
    with pytest.raises(ValueError, match="has the columns"):
        add_rows(file, [{"name": "a", "seconds": 1}], ("name",))
    assert _stored(file) == [{"name": "a", "ms": "1"}]


def test_the_stored_compression_results_have_the_columns_of_the_script():
    row = {"run": "a", "file": "int8", "top1": 0.5, "bytes": 1, "gzip": 1, "milliseconds": 1.0, "deviation": 0.1}
    assert list(_stored(RESULTS / "compression.csv")[0]) == list(compression.csv_row(row, row))
    assert compression.csv_row({**row, "top1": 0.475, "gzip": 0.5}, row)["points"] == "-2.50"


def test_the_stored_runs_on_cifar10_are_recognised_by_the_script():
    path = RESULTS / "cifar10.csv"
    rows = _stored(path)
    assert all(cifar10.is_stored(path, {name: row[name] for name in cifar10.KEY}) for row in rows)
    assert not cifar10.is_stored(path, {**rows[0], "seed": 99})
    assert {row["change"] for row in rows} <= set(cifar10.CHANGES)
