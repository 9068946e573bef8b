import pytest
from tools import require


@pytest.mark.parametrize("flag, outcome", [("", pytest.skip), ("0", pytest.skip), ("1", pytest.fail)])
def test_what_is_missing_skips_the_test_or_fails_it(flag, outcome, monkeypatch):
    monkeypatch.setenv("CVT_REQUIRE_ALL", flag)
    for found in (None, False):
        with pytest.raises(outcome.Exception, match=r"^to run this test: apt-get install chromium$"):
            require(found, "apt-get install chromium")


def test_what_is_there_is_given(monkeypatch):
    monkeypatch.setenv("CVT_REQUIRE_ALL", "1")
    assert require("/usr/bin/chromium", "apt-get install chromium") == "/usr/bin/chromium"
