"""Refused requests are counted by class and reason, over all API servers of a run."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from shaper.ipc import refused_requests as module
from shaper.ipc.engine_record import read_statuses
from shaper.ipc.refused_requests import KINDS, POWER, THERMAL, UNKNOWN_CLASS, RefusalCounts
from shaper.ipc.refused_requests import refused_requests as read
from shaper.ipc.status_block import StatusWriter, control_paths
from shaper.server.admission import AdmissionGate
from shaper.server.metrics import StatusCollector
from tests.controlled import run
from tests.scraping import write
from tests.server.exchange import DEFER, OPEN, SHED, Exchange, Fixed

__all__ = ["run"]

FLEX: dict[str, Any] = {"service_tier": "flex"}
NONE = dict.fromkeys(KINDS, 0)


def exchange(counts: RefusalCounts, body: dict[str, Any], gate: AdmissionGate) -> int:
    """The status of one request at this gate."""
    request = Exchange(body)
    request.app._gates, request.app._counts = Fixed(gate), counts
    return request.go().status


def test_each_refusal_is_counted_once(run: str) -> None:
    """429 by what the limit is for, 400 for a class that there is not; what passes is not."""
    counts, shed = RefusalCounts(run), AdmissionGate(SHED, 5.0)
    assert read(run) == NONE
    assert [exchange(counts, FLEX, shed) for _ in range(3)] == [429] * 3
    assert exchange(counts, FLEX, AdmissionGate(SHED, 5.0, thermal=True)) == 429
    wrong = {"vllm_xargs": {"shaper_class": "felx"}}
    assert exchange(counts, wrong, AdmissionGate(OPEN, None)) == 400
    for body, state in (({}, SHED), (FLEX, DEFER), (FLEX, OPEN)):
        assert exchange(counts, body, AdmissionGate(state, None)) == 200
    assert read(run) == {POWER: 3, THERMAL: 1, UNKNOWN_CLASS: 1}


def count(run: str, times: int) -> None:
    counts = RefusalCounts(run)
    for _ in range(times):
        counts.count(POWER)


def test_a_scrape_shows_the_sum_over_all_api_servers(run: str) -> None:
    """And what engines refused at the bound of the wait, in one family; zeros from the start."""
    writers = [StatusWriter(run, rank, {}) for rank in (0, 1)]

    def scrape() -> dict[tuple[str, str], float]:
        registry = CollectorRegistry()
        registry.register(StatusCollector(lambda: read_statuses(run), lambda: read(run)))
        return {
            (sample.labels["work_class"], sample.labels["reason"]): sample.value
            for family in text_string_to_metric_families(generate_latest(registry).decode())
            for sample in family.samples
            if sample.name == "shaper_requests_refused_total"
        }

    try:
        overdue = ("flex", "wait_exceeded")
        assert scrape() == NONE | {overdue: 0}
        for times in (2, 5):
            server = multiprocessing.get_context("spawn").Process(target=count, args=(run, times))
            server.start()
            server.join()
            assert server.exitcode == 0
        from shaper.ipc.flex import FlexQueue

        for writer in writers:
            write(writer, flex=FlexQueue(refused=4))
        assert scrape() == NONE | {POWER: 7, overdue: 8}
    finally:
        for writer in writers:
            writer.close()


def test_what_can_not_be_counted_is_refused_all_the_same(
    run: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """No space, or no directory: said once."""
    monkeypatch.setattr(module, "_stem", lambda run: str(tmp_path / "missing" / "file"))
    counts = RefusalCounts(run)
    assert [exchange(counts, FLEX, AdmissionGate(SHED, 5.0)) for _ in range(2)] == [429, 429]
    assert len([r for r in caplog.records if "not counted" in r.message]) == 1


def test_a_file_that_is_cut_short_counts_for_nothing(run: str) -> None:
    """One that a server is just making."""
    count(run, 3)
    first = control_paths(run)[0]
    first.with_name(f"{first.name}.refused-1").write_bytes(b"\x01")
    assert read(run) == NONE | {POWER: 3}
