"""Writes the CSV files of docs/results, for all benchmarks alike."""

import csv


def add_rows(path, rows, key):
    """Adds rows to a CSV file, and replaces those that agree with a new row in the columns `key`.

    Args:
        path: the file, which need not exist.
        rows: dicts with the same keys, the columns.
        key: the names of the columns that tell rows apart.

    Raises:
        ValueError: if the file has other columns.
    """
    columns = list(rows[0])
    rows = [{name: str(value) for name, value in row.items()} for row in rows]
    stored = []
    if path.exists():
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            stored = list(reader)
        if reader.fieldnames != columns:
            raise ValueError(f"{path} has the columns {reader.fieldnames}, not {columns}. Choose another file")
    new = {tuple(row[name] for name in key): row for row in rows}
    result = [new.pop(tuple(row[name] for name in key), row) for row in stored] + list(new.values())
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(result)
