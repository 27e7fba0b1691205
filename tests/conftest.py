"""Markers that need a decision at run time, and what the run's header says."""

from __future__ import annotations

import logging
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED_DATA = REPOSITORY.parent / "shared" / "data"

_skipped_shared: list[str] = []

# HYPOTHESIS_SCALE=20 draws twenty times as many examples; on a busy machine one may take long.
SCALE = float(os.environ.get("HYPOTHESIS_SCALE", "1"))
settings.register_profile("house", max_examples=max(1, round(60 * SCALE)), deadline=None)
settings.load_profile("house")

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
    if SHARED_DATA.is_dir():
        return
    reason = "../shared/data is missing: the published measurements are not part of this repository"
    for item in items:
        if item.get_closest_marker("needs_shared"):
            item.add_marker(pytest.mark.skip(reason=reason))


class _Groups(LoadScopeScheduling):  # type: ignore[misc]
    """What runs side by side: a file's tests share their fixtures, and no two servers the machine.

    xdist's own groups are not seen by pytest 9.1.
    """

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.split("::")[0]
        return "engines" if _starts_engines(path) else path


@cache
def _starts_engines(path: str) -> bool:
    source = (REPOSITORY / path).read_text()
    return "mark.e2e" in source or "mark.cpu_engine" in source


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _Groups:
    return _Groups(config, log)


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
