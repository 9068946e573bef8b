"""What the docs say of sizes is what the code has."""

import re
from pathlib import Path

import pytest
from test_model import PARAMETERS

from cvt_keras import VARIANTS, macs

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize("name", VARIANTS)
def test_the_table_of_sizes(name):
    row = re.compile(rf"\| `{name}` \| (\d+)x\d+ \| (\d+) \| ([\d,]+) \| ([\d,.]+) M \|")
    side, num_classes, parameters, cost = row.search((DOCS / "network.md").read_text()).groups()
    assert int(parameters.replace(",", "")) == PARAMETERS[name][0 if num_classes == "1000" else 1]
    expected = macs(name, (int(side), int(side), 3), int(num_classes)) / 1e6
    assert cost == f"{expected:,.1f}"
