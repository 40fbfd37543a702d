"""A pytest plugin for gpu.py: each outcome becomes a row at once, and no test begins too late."""

from __future__ import annotations

import os

import pytest
import record

TOO_LATE = "the time was up"


def pytest_collection_finish() -> None:
    record.start()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if record.time_is_up():
        pytest.skip(TOO_LATE)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.passed):
        return  # xdist's main process reports all of them
    why = ""
    if report.skipped:
        why = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if TOO_LATE in why:
            return record.row("left out", what=report.nodeid)
    elif report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        why = str(crash.message if crash else report.longrepr).partition("\n")[0][:300]
    record.row("test", test=report.nodeid, outcome=report.outcome, why=why, seconds=round(report.duration, 3))
