import pytest
from tools import require


@pytest.mark.parametrize("flag, outcome", [("", pytest.skip), ("0", pytest.skip), ("1", pytest.fail)])
def test_a_missing_program_skips_or_fails_the_test(flag, outcome, monkeypatch):
    monkeypatch.setenv("CVT_REQUIRE_ALL", flag)
    for program in (None, False):
        with pytest.raises(outcome.Exception, match=r"^to run this test: apt-get install chromium$"):
            require(program, "apt-get install chromium")


def test_an_installed_program_is_returned(monkeypatch):
    monkeypatch.setenv("CVT_REQUIRE_ALL", "1")
    assert require("/usr/bin/chromium", "apt-get install chromium") == "/usr/bin/chromium"
