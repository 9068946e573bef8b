"""Programs that some tests need and pip does not bring."""

import importlib.util
import os

import pytest


def require(found, install):
    """Skips the test where a program is missing; under `CVT_REQUIRE_ALL=1`, as in CI, fails it.

    Args:
        found: whether it is there, or its path or `None`.
        install: what to do about it: "apt-get install chromium".

    Returns:
        `found`.
    """
    if not found:
        said = f"to run this test: {install}"
        pytest.fail(said) if os.environ.get("CVT_REQUIRE_ALL") == "1" else pytest.skip(said)
    return found


def require_browser():
    """`require`, of what the page runs by -> benchmarks.browser, which has it."""
    require(importlib.util.find_spec("playwright"), "pip install -r requirements-dev.txt")
    from benchmarks import browser

    lines = browser.missing()
    require(not lines, " && ".join(lines))
    return browser
