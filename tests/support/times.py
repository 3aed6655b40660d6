"""A pytest plugin that prints how long the tests of each directory took (`-p tests.support.times`)."""

from __future__ import annotations

import collections
import pathlib

import pytest

_seconds: collections.defaultdict[str, float] = collections.defaultdict(float)
_tests: collections.defaultdict[str, set[str]] = collections.defaultdict(set)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up set-up, call and teardown of each test."""
    directory = str(pathlib.PurePosixPath(report.nodeid.split("::")[0]).parent)
    _seconds[directory] += report.duration
    _tests[directory].add(report.nodeid)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table, slowest directory first."""
    terminalreporter.section("time per directory")
    for directory, seconds in sorted(_seconds.items(), key=lambda item: -item[1]):
        terminalreporter.write_line(f"{seconds:8.2f} s {len(_tests[directory]):6d} tests  {directory}")
