"""Markers that need a decision at run time, and what the run's header says."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED_DATA = REPOSITORY.parent / "shared" / "data"

_skipped_shared: list[str] = []

# A logger that somebody has set up keeps its own level, whatever vLLM's is in this process.
logging.getLogger("shaper").addHandler(logging.NullHandler())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-shared",
        action="store_true",
        help="fail the run when a test marked needs_shared was skipped",
    )


def pytest_report_header() -> str:
    state = "present" if SHARED_DATA.is_dir() else "missing, tests marked needs_shared are skipped"
    return f"../shared/data: {state}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # What runs side by side: a file's tests share their fixtures, and no two servers the machine.
    engines = {
        item.path
        for item in items
        if item.get_closest_marker("e2e") or item.get_closest_marker("cpu_engine")
    }
    for item in items:
        group = "engines" if item.path in engines else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
    if SHARED_DATA.is_dir():
        return
    reason = "../shared/data is missing: the published measurements are not part of this repository"
    for item in items:
        if item.get_closest_marker("needs_shared"):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and "needs_shared" in report.keywords:
        _skipped_shared.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--require-shared") and _skipped_shared:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if config.getoption("--require-shared") and _skipped_shared:
        terminalreporter.section("needs_shared tests were skipped, and --require-shared was given")
        for node_id in _skipped_shared:
            terminalreporter.line(node_id)


@pytest.fixture
def shared_data() -> Path:
    """The folder of published measurements; use it with the `needs_shared` marker."""
    return SHARED_DATA
