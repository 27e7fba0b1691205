"""Changes of a running server: the control file, the engine that follows it, the routes."""

from __future__ import annotations

import logging
import math
import os
import threading

import pytest

from shaper.config.sources import admin_key
from shaper.core.budget import BudgetTerms, Source
from shaper.core.types import PowerBudget, PowerLimit
from shaper.errors import ConfigError, ControlError
from shaper.ipc.control_file import ControlFile, ControlRecord, EngineControl, sweep_control_files
from shaper.ipc.engine_record import read_statuses
from shaper.ipc.status_block import StatusWriter, control_paths
from shaper.server.control_service import ControlService
from tests.controlled import Walls, engine, record, run, watts
from tests.scraping import write

__all__ = ["run"]

# --- the file and the engine that follows it


def test_an_engine_follows_the_file(run):
    """It acknowledges what it has read, and a second look at the same file is no change."""
    control, file = engine(run), ControlFile(run)
    assert not control.tick(0.02)
    assert (control.state.source, control.state.seen_sequence) == (Source.CONFIGURED, 0)
    file.write(record(run, 1))
    assert control.tick(0.04)
    assert watts(control) == 400.0
    assert (control.state.seen_sequence, control.state.taken_sequence) == (1, 1)
    assert not control.tick(0.06)
    file.write(ControlRecord(run=run, sequence=2))
    assert control.tick(0.08)
    assert (watts(control), control.state.source) == (560.0, Source.CONFIGURED)


def test_an_engine_that_starts_late_finds_what_was_asked_for(run):
    """Also one that was restarted: the change is in force from its first step."""
    ControlFile(run).write(record(run, 7))
    late = engine(run)
    assert watts(late) == 400.0
    assert late.state.seen_sequence == 7


def test_a_change_ends_on_the_monotonic_clock_to_the_tick(run):
    """While the wall clock jumps an hour forth and back; the fallback holds afterwards."""
    fallback = BudgetTerms((PowerLimit(450.0, 1.0),))
    ControlFile(run).write(record(run, 1, end_seconds=10.0, fallback=fallback))
    wall = Walls()
    control = engine(run, wall)
    for tick in range(1, 500):
        wall.seconds += (-1) ** (tick // 50) * 3600.0
        control.tick(tick * 0.02)
        assert watts(control) == 400.0, tick
    assert control.tick(10.0)
    assert (watts(control), control.state.source) == (450.0, Source.FALLBACK)


def test_a_wall_clock_that_is_set_is_noticed_within_a_second(run):
    """`until` is calendar time: it follows the clock to either side."""
    wall = Walls()
    ControlFile(run).write(record(run, 1, end_wall_seconds=wall.seconds + 1800))
    control = engine(run, wall)
    wall.seconds += 3600
    assert not control.tick(0.98)
    assert control.tick(1.0)
    assert watts(control) == 560.0
    wall.seconds -= 3600
    assert control.tick(2.0)
    assert watts(control) == 400.0


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda path, good: path.write_bytes(good[: len(good) // 2]), id="half"),
        pytest.param(lambda path, good: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path, good: path.write_bytes(b"\xff\x00" * 50), id="noise"),
        pytest.param(lambda path, good: path.write_bytes(b"[" * 100_000), id="deep"),
        pytest.param(lambda path, good: path.write_bytes(good + b" " * 300_000), id="long"),
        pytest.param(
            lambda path, good: path.write_bytes(good.replace(b'"run":"test', b'"run":"best')),
            id="of another run",
        ),
        pytest.param(
            lambda path, good: path.write_bytes(good.replace(b'"sequence":2', b'"sequence":1')),
            id="old",
        ),
        pytest.param(
            lambda path, good: path.write_bytes(good.replace(b"300.0", b"-300.0")), id="negative"
        ),
        pytest.param(lambda path, good: path.write_bytes(good.replace(b"300.0", b"NaN")), id="NaN"),
        pytest.param(
            lambda path, good: path.write_bytes(good.replace(b'"watts"', b'"volts"')), id="unknown"
        ),
        pytest.param(
            lambda path, good: (path.write_bytes(good), path.chmod(0o644)), id="open to others"
        ),
        pytest.param(lambda path, good: os.mkfifo(path, 0o600), id="a pipe"),
        pytest.param(lambda path, good: path.mkdir(mode=0o700), id="a directory"),
        pytest.param(lambda path, good: path.symlink_to("/dev/zero"), id="a link"),
    ],
)
def test_what_is_not_to_be_believed_changes_nothing(run, spoil, caplog):
    """It is refused, counted and logged once; the old budget holds, and a good file helps."""
    file = ControlFile(run)
    file.write(record(run, 1))
    control = engine(run)
    file.write(record(run, 2, 300.0))
    good = file.path.read_bytes()
    file.path.unlink()
    old = os.umask(0o077)
    try:
        spoil(file.path, good)
    finally:
        os.umask(old)
    with caplog.at_level(logging.ERROR, logger="shaper"):
        for tick in range(1, 100):
            assert not control.tick(tick * 0.02)
    assert watts(control) == 400.0
    assert control.state.refused == 1
    assert len(caplog.records) == 1
    file.path.rmdir() if file.path.is_dir() and not file.path.is_symlink() else None
    file.write(record(run, 3, 300.0))
    assert control.tick(2.0)
    assert watts(control) == 300.0


def test_a_file_that_goes_changes_nothing(run):
    """What was asked for is cleared by asking, not by a cleaner of temporary files."""
    file = ControlFile(run)
    file.write(record(run, 1))
    control = engine(run)
    file.path.unlink()
    assert not control.tick(5.0)
    assert watts(control) == 400.0


def test_an_engine_refuses_what_its_idle_power_breaks(run):
    """It says that it has seen the change and not followed it."""
    control, file = engine(run), ControlFile(run)
    file.write(record(run, 1, 110.0))
    assert not control.tick(0.02)
    assert (control.state.seen_sequence, control.state.taken_sequence) == (1, 0)
    assert watts(control) == 560.0
    assert control.state.refused == 1


def test_a_reader_never_sees_half_a_file(run):
    """A writer that never rests: every read is one whole record."""
    file, stop = ControlFile(run), threading.Event()
    file.write(record(run, 1))

    def write() -> None:
        sequence = 1
        while not stop.is_set():
            sequence += 1
            file.write(record(run, sequence, 200.0 + sequence % 300))

    thread = threading.Thread(target=write)
    thread.start()
    try:
        seen = [file.read() for _ in range(2000)]
    finally:
        stop.set()
        thread.join()
    for each in seen:
        assert each.budget is not None
        assert each.budget.terms.limits is not None
        assert each.budget.terms.limits[0].watts in (400.0, 200.0 + each.sequence % 300)


def test_only_its_user_can_read_the_file(run):
    """It says who runs what, and engines believe it."""
    file = ControlFile(run)
    with file.locked():
        file.write(record(run, 1))
    assert [path.stat().st_mode & 0o777 for path in control_paths(run)] == [0o600, 0o600]


def test_the_files_of_a_killed_server_are_swept(run):
    """Those of a run with an engine stay, also where this version can't read its block."""
    file = ControlFile(run)
    with file.locked():
        file.write(record(run, 1))
    writer = StatusWriter(run, 0, {})
    try:
        sweep_control_files()
        assert file.read().sequence == 1
        writer.path.write_bytes(b"of another version")
        sweep_control_files()
        assert file.read().sequence == 1
    finally:
        writer.close()
    sweep_control_files()
    assert not any(path.exists() for path in control_paths(run))


def test_what_an_engine_says_survives_the_block(run):
    """There and back, infinity too."""
    said = EngineControl(
        PowerBudget((PowerLimit(640.0, 0.1), PowerLimit(560.0, 1.0)), 200.0),
        *("shadow", Source.FALLBACK, 7, 6, 2, math.inf),
    )
    writer = StatusWriter(run, 0, {})
    try:
        write(writer, control=said)
        (status,) = read_statuses(run)
        assert status.record.control == said
    finally:
        writer.close()


def test_two_servers_changing_at_once_lose_nothing(run):
    """Each change has its own number and what others have asked for is kept."""
    file = ControlFile(run)
    services = [ControlService(file, lambda: []) for _ in range(4)]

    def change(service: ControlService) -> None:
        for _ in range(25):
            service._write("budget", lambda *_: None, "w", "", [])

    threads = [threading.Thread(target=change, args=(service,)) for service in services]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert file.read().sequence == 100


@pytest.mark.parametrize(
    "key", ["", "short", "with space in the key", "ümlaut-ümlaut-ümlaut", "x" * 15]
)
def test_a_key_that_is_no_secret_is_refused(key):
    """Without repeating it."""
    with pytest.raises(ConfigError, match="openssl rand") as caught:
        admin_key({"SHAPER_ADMIN_KEY": key})
    assert not key or key not in str(caught.value)
    assert admin_key({}) is None


def test_a_file_of_another_user_is_not_read(run, monkeypatch):
    """Names in /dev/shm can be taken by anyone."""
    file = ControlFile(run)
    file.write(record(run, 1))
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(ControlError, match="another user"):
        file.read()
