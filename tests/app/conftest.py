"""UNIQUE_ASR_REQUIRE_PAGE_TESTS=1, as .ci/run sets it: a test of the page that is skipped fails."""

import os

import pytest

REQUIRED = bool(os.environ.get("UNIQUE_ASR_REQUIRE_PAGE_TESTS"))


def fail_if_skipped(report):
    """Turn the report of a skipped test, or of a file whose imports are missing, into a failure."""
    if REQUIRED and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"the tests of the page are required here: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    return fail_if_skipped((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return fail_if_skipped((yield))
