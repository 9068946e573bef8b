"""Programs that some tests need and that pip does not install."""

import importlib.util
import os

import pytest


def require(program, install):
    """Skips the test if a program is missing. With `CVT_REQUIRE_ALL=1`, as in CI, fails it instead.

    Args:
        program: the path of the program or `None`, or whether it is installed.
        install: the command that installs it: "apt-get install chromium".

    Returns:
        `program`.
    """
    if not program:
        reason = f"to run this test: {install}"
        pytest.fail(reason) if os.environ.get("CVT_REQUIRE_ALL") == "1" else pytest.skip(reason)
    return program


def require_browser():
    """Skips or fails the test, like `require`, if there is no browser. Returns the module `benchmarks.browser`."""
    require(importlib.util.find_spec("playwright"), "pip install -r requirements-dev.txt")
    from benchmarks import browser

    commands = browser.missing()
    require(not commands, " && ".join(commands))
    return browser
