"""What an engine says of its group: through the block, to metrics and to the state route."""

from __future__ import annotations

import os

from hypothesis import given

from shaper.core.types import PowerLimit
from shaper.ipc.engine_record import read_statuses
from shaper.ipc.group_status import MEMBER_STATES, GroupStatus, MemberStatus
from shaper.ipc.status_block import StatusWriter
from tests.scraping import run, scrape, write
from tests.strategies import group_statuses

__all__ = ["run"]


@given(group_statuses)
def test_what_is_written_is_read_back(group):
    """And fits the block with as many limits and members as it may have."""
    run = f"test{os.getpid()}group"
    writer = StatusWriter(run, 0, {})
    try:
        write(writer, group=group)
        (status,) = read_statuses(run)
        assert status.record.group == group
    finally:
        writer.close()


def test_an_engine_in_no_group_shows_none(run):
    """Neither metrics nor a group in the state."""
    writer = StatusWriter(run, 0, {})
    try:
        assert [name for name, _ in scrape(run) if name.startswith("shaper_group")] == []
    finally:
        writer.close()


def test_metrics_name_the_group_its_limits_and_its_engines(run):
    """One series for each window and each state; the oldest wait is that of all members."""
    group = GroupStatus(
        (PowerLimit(4000.0, 0.1), PowerLimit(3800.0, 1.0)),
        (
            MemberStatus(11, "alive", 200.0, 500.0, 0.25),
            MemberStatus(12, "alive", 150.0, 400.0),
            MemberStatus(13, "stalled", 150.0, 150.0, 0.5),
        ),
        committed_watts=1050.0,
        floor_watts=200.0,
        claims_refused=7,
    )
    writer = StatusWriter(run, 0, {"group": "rack-1"})
    try:
        write(writer, group=group)
        values = scrape(run)
        own = (("engine", "0"),)
        limit = (*own, ("group", "rack-1"), ("window_seconds", "0.1"))
        assert values["shaper_group_limit_watts", limit] == 4000.0
        states = {
            state: values["shaper_group_engines", (*own, ("state", state))]
            for state in MEMBER_STATES
        }
        assert states == {"alive": 2.0, "stalled": 1.0, "gone": 0.0, "orphaned": 0.0}
        assert values["shaper_group_committed_watts", own] == 1050.0
        assert values["shaper_group_oldest_wait_seconds", own] == 0.5
        assert values["shaper_group_claims_refused_total", own] == 7.0
        read = read_statuses(run)[0].record.group
        assert read is not None
        assert read == group
    finally:
        writer.close()
