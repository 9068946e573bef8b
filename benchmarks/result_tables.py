"""Writes CSV files of docs/results."""

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
    rows = [{name: str(value) for name, value in row.items()} for row in rows]
    new = {tuple(row[name] for name in key): row for row in rows}
    kept = [new.pop(tuple(row[name] for name in key), row) for row in _stored(path, rows)]
    write_rows(path, kept + list(new.values()))


def write_rows(path, rows):
    """Writes a CSV file of the rows, which are dicts with the same keys. Raises a ValueError if it has other columns."""
    _stored(path, rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _stored(path, rows):
    """Returns the rows of the file, which must have the columns of `rows`."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        stored = list(reader)
    columns = list(rows[0])
    if reader.fieldnames != columns:
        raise ValueError(f"{path} has the columns {reader.fieldnames}, not {columns}. Choose another file")
    return stored
