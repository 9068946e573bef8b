import re
from pathlib import Path

from cvt_keras.export.verify import BOUNDS, QUANTIZED, Bounds

DOCS = Path(__file__).parents[2] / "docs"


def _number(cell):
    """The number in a table's cell, or `None` if it is empty. Percentage points become a fraction of 1."""
    if points := re.fullmatch(r"([\d.]+) points?", cell):
        return float(points[1]) / 100
    return float(cell) if cell else None


def test_the_docs_list_the_bounds():
    page = (DOCS / "guides" / "export.md").read_text()
    [table] = re.findall(r"^\| file \| max\. top-1 drop.*\n((?:\|.*\n)+)", page, re.MULTILINE)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[1:]]
    documented = {name.strip("`").replace("SavedModel", "saved_model"): Bounds(*map(_number, cells)) for name, *cells in rows}
    assert documented == {**BOUNDS, "int8` of a QAT run": QUANTIZED}
