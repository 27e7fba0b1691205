"""The status block between processes, and the metrics made of it."""

from __future__ import annotations

import multiprocessing
import os
import stat
import threading

import pytest

from shaper.core.types import (
    Decision,
    PowerLimit,
    PowerState,
    Reason,
    StepLimits,
    StepPrediction,
)
from shaper.engine.decision_log import DecisionLog
from shaper.engine.meter_windows import MeterWindows
from shaper.gpu.sampler import SensorReport
from shaper.ipc.control_file import sweep_control_files
from shaper.ipc.engine_record import SchedulerCounters, read_statuses
from shaper.ipc.status_block import (
    StatusWriter,
    block_directory,
    block_paths,
    control_paths,
    read_blocks,
    run_id,
)
from tests.scraping import control, run, scrape, write

__all__ = ["run"]


def decision(reason=Reason.CHUNK_POWER, prefill_tokens=300, seconds=0.01) -> Decision:
    return Decision(
        1.0, reason, StepLimits(prefill_tokens=300), True, 900, 4, prefill_tokens,
        StepPrediction(seconds, 5.0 if seconds else 0.0), 12.0,
    )  # fmt: skip


def test_two_engines_show_side_by_side(run):
    """Each data-parallel rank has its own label, limits and counts."""
    writers = [StatusWriter(run, rank, {}) for rank in (0, 1)]
    try:
        for rank, writer in enumerate(writers):
            counters = SchedulerCounters()
            for _ in range(rank + 1):
                counters.count(decision())
            write(writer, counters=counters, control=control(500.0 + rank))
        values = scrape(run)
        key = (("engine", "1"), ("reason", "chunk_power"))
        assert values["shaper_decisions_total", key] == 2
        limit = (("engine", "0"), ("window_seconds", "0.1"))
        assert values["shaper_power_limit_watts", limit] == 500.0
        assert values["shaper_steps_total", (("engine", "0"),)] == 1
        chunks = (("engine", "1"), ("le", "512"))
        assert values["shaper_prefill_chunk_tokens_bucket", chunks] == 2
        assert values["shaper_prefill_chunk_tokens_sum", (("engine", "1"),)] == 600
    finally:
        for writer in writers:
            writer.close()
    assert scrape(run) == {}


def test_what_is_not_known_is_left_out(run):
    """NaN never reaches Prometheus, and an age is counted from the reading."""
    writer = StatusWriter(run, 0, {})
    try:
        write(writer, sensor=SensorReport(read_errors=3), at_seconds=5.0)
        values = scrape(run)
        assert ("shaper_power_instant_watts", (("engine", "0"),)) not in values
        assert ("shaper_sample_age_seconds", (("engine", "0"),)) not in values
        assert values["shaper_sample_read_errors_total", (("engine", "0"),)] == 3
        write(writer, power=PowerState(5.9, 1, instant_watts=431.0), counters=SchedulerCounters())
        values = scrape(run)
        assert values["shaper_power_instant_watts", (("engine", "0"),)] == 431.0
        assert values["shaper_sample_age_seconds", (("engine", "0"),)] > 0.0
        assert ("shaper_step_measured_watts", (("engine", "0"),)) not in values
    finally:
        writer.close()


def test_a_reader_never_sees_half_an_update(run):
    """Under a writer that never rests, every record read is of one update."""
    writer = StatusWriter(run, 0, {})
    stop = threading.Event()

    def write() -> None:
        value = 0
        while not stop.is_set():
            value = (value + 1) % 256
            writer.write(bytes([value]) * (1000 + value))

    thread = threading.Thread(target=write)
    writer.write(bytes(1000))
    thread.start()
    try:
        seen = [read_blocks(run) for _ in range(2000)]
    finally:
        stop.set()
        thread.join()
        writer.close()
    records = [block.record for blocks in seen for block in blocks]
    assert len(records) > 100
    assert all(set(record) == {len(record) - 1000} for record in records)


def test_a_record_of_another_version_is_left_out(run):
    """It is not believed in part."""
    writers = [StatusWriter(run, rank, {}) for rank in (0, 1)]
    try:
        for writer in writers:
            write(writer, at_seconds=5.0)
        writers[0].write(b'{"at_seconds": "late"}')
        assert [status.info["engine"] for status in read_statuses(run)] == [1]
    finally:
        for writer in writers:
            writer.close()


def test_only_its_user_can_read_a_block(run):
    """Power over time tells what a server does."""
    writer = StatusWriter(run, 0, {})
    try:
        assert stat.S_IMODE(writer.path.stat().st_mode) == 0o600
    finally:
        writer.close()
        writer.close()


def _leave_a_block(run: str) -> None:
    StatusWriter(run, 0, {})
    os._exit(9)


def test_the_block_of_a_killed_engine_is_swept(run):
    """The next engine of this user removes what a killed one left."""
    process = multiprocessing.get_context("spawn").Process(target=_leave_a_block, args=(run,))
    process.start()
    process.join()
    assert len(read_statuses(run)) == 1
    writer = StatusWriter(run + "b", 0, {})
    try:
        assert read_statuses(run) == []
    finally:
        writer.close()


def _die_in_an_update(run: str) -> None:
    writer = StatusWriter(run, 0, {})
    writer._memory[4096] = 1  # the sequence is odd while a record is written
    os._exit(9)


def test_the_block_of_an_engine_killed_in_an_update_is_swept(run):
    """And with it the run's control file, which stays as long as the run has a block."""
    process = multiprocessing.get_context("spawn").Process(target=_die_in_an_update, args=(run,))
    process.start()
    process.join()
    assert read_blocks(run) == []
    control, _ = control_paths(run)
    control.touch(0o600)
    writer = StatusWriter(run + "b", 0, {})
    try:
        assert block_paths(run) == []
        sweep_control_files()
        assert not control.exists()
    finally:
        writer.close()
        control.unlink(missing_ok=True)


def test_the_block_of_an_engine_in_another_container_is_kept(run, monkeypatch):
    """Its process has a number that means nothing here; it lives all the same."""
    first = StatusWriter(run, 0, {})

    def nobody(pid: int, number: int) -> None:
        raise ProcessLookupError

    monkeypatch.setattr(os, "kill", nobody)
    second = StatusWriter(run + "b", 0, {})
    try:
        assert len(read_statuses(run)) == 1
    finally:
        first.close()
        second.close()


def test_a_foreign_file_is_not_a_block(run):
    """A truncated or foreign file is passed over."""
    path = block_directory() / f"vllm-shaper-{os.getuid()}-{run}-0"
    path.write_bytes(b"\xff" * 10_000)
    try:
        assert read_statuses(run) == []
        path.write_bytes(b"")
        assert read_statuses(run) == []
    finally:
        path.unlink()


def test_children_inherit_the_run():
    """The first process chooses, the others find it."""
    environ: dict[str, str] = {}
    assert run_id(environ) == run_id(environ)
    assert len(environ) == 1


def test_headroom_and_pressure_are_metered():
    """From the energy counter over the window; pressure is the share of the room above idle."""
    windows, limits = MeterWindows(100.0), (PowerLimit(500.0, 1.0),)
    headroom = pressure = 0.0
    for tick in range(30):
        state = PowerState(0.1 * tick, 1, instant_watts=777.0, energy_joules=30.0 * tick)
        headroom, pressure = windows.observe(state, limits)
    assert headroom == pytest.approx(200.0)
    assert pressure == pytest.approx(0.5)


def test_a_short_window_uses_the_meters_short_reading():
    """The counter moves too seldom for 100 ms."""
    state = PowerState(1.0, 1, instant_watts=450.0, energy_joules=1.0)
    headroom, _ = MeterWindows(100.0).observe(state, (PowerLimit(500.0, 0.1),))
    assert headroom == pytest.approx(50.0)


def test_headroom_follows_a_budget_that_changes_and_a_window_that_grows():
    """A limit that comes later is judged on what was read before it came."""
    windows, short = MeterWindows(100.0), (PowerLimit(500.0, 1.0),)
    for tick in range(20_000):
        state = PowerState(0.1 * tick, 1, instant_watts=777.0, energy_joules=30.0 * tick)
        windows.observe(state, short)
    assert windows.observe(state, (PowerLimit(350.0, 1.0),))[0] == pytest.approx(50.0)
    assert windows.observe(state, ()) != windows.observe(state, short)
    long = (PowerLimit(320.0, 30.0),)
    for tick in range(20_000, 20_400):
        state = PowerState(0.1 * tick, 1, instant_watts=777.0, energy_joules=30.0 * tick)
        headroom, _ = windows.observe(state, long)
    assert headroom == pytest.approx(20.0)
    assert windows.observe(state, (PowerLimit(100.0, 1.0),)) == (pytest.approx(-200.0), 1.0)  # type: ignore[comparison-overlap]


def test_the_decision_log_is_lines_of_json(tmp_path):
    """Polls repeat nothing; infinity is null."""
    import json

    path = tmp_path / "decisions.jsonl"
    log = DecisionLog(str(path))
    log.add(decision(), 431.0)
    for _ in range(5):
        log.add(decision(Reason.PAUSE, 0, 0.0), None)
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["reason"] for line in lines] == ["chunk_power", "pause"]
    assert lines[0]["predicted_watts"] == 500.0
