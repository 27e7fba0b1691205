"""The group's file: who may join, what is believed, and who cleans up."""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest

from shaper.core.ledger.shared import Committed, EngineShare
from shaper.core.types import PowerLimit
from shaper.errors import FleetError, ShaperError
from shaper.group import check_group
from shaper.group import shared_file as segments
from shaper.group.lock import MEMBERSHIP, ByteLocks
from tests.group.members import LIMITS, join

# The children do nothing that needs the threads of the parent.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def refused(folder: Path, says: str, **changed) -> None:
    with pytest.raises(FleetError) as caught:
        join(folder, **changed)
    assert isinstance(caught.value, ShaperError)
    assert re.search(says, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_this_user_may_look(folder):
    """The directory is 0700 and the file 0600; the last to leave removes the file."""
    one, two = join(folder), join(folder, "two")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "g.group").stat().st_mode & 0o777 == 0o600
    one.leave()
    one.leave()
    assert (folder / "g.group").exists()
    two.leave()
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (0o755, "open to others: .*chmod 700"),
        (0o710, "open to others"),
        ("link", "is no directory"),
    ],
)
def test_a_directory_that_is_not_plainly_ours_is_refused(folder, tmp_path, kind, says):
    """Somebody else could put a file there, and a link may lead anywhere."""
    if kind == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.mkdir()
        folder.chmod(kind)
    refused(folder, says)


@pytest.mark.parametrize("kind", ["link", "pipe", "directory", "readable", "owner"])
def test_a_file_that_is_not_plainly_ours_is_refused(folder, kind, monkeypatch):
    """Neither followed nor waited for, and left as it is."""
    folder.mkdir(mode=0o700)
    path = folder / "g.group"
    if kind == "link":
        (folder / "target").touch(0o600)
        path.symlink_to(folder / "target")
    elif kind == "pipe":
        os.mkfifo(path, 0o600)
    elif kind == "directory":
        path.mkdir()
    else:
        path.touch()
        path.chmod(0o644 if kind == "readable" else 0o600)
    if kind == "owner":
        real = os.fstat

        def of_another(descriptor):
            found = list(real(descriptor))
            found[4] += 1
            return os.stat_result(found)

        monkeypatch.setattr(os, "fstat", of_another)
    refused(folder, r"g\.group .*if no server uses it, rm /")
    assert os.path.lexists(path)


@pytest.mark.parametrize("text", [b"#!/bin/sh\n", b"SHAPERGR", b"\0" * 9 + b"x" * 9000])
def test_a_foreign_file_is_refused_and_kept(folder, text):
    """It may be somebody's."""
    folder.mkdir(mode=0o700)
    path = folder / "g.group"
    path.touch(0o600)
    path.write_bytes(text)
    refused(folder, r"is no group's file: if no server uses it, rm /.*g\.group")
    with pytest.raises(FleetError):
        check_group("g", LIMITS, directory=folder)
    assert path.read_bytes() == text


def test_a_file_that_was_never_begun_is_taken(folder):
    """Whoever made it died before the header was written."""
    folder.mkdir(mode=0o700)
    path = folder / "g.group"
    path.touch(0o600)
    path.write_bytes(bytes(10_000))
    one = join(folder)
    assert one.snapshot(1.0).engines[0].label == "one"
    one.leave()


def damage(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize(
    ("offset", "data", "says"),
    [
        (8, struct.pack("<I", 99), r"another version of the shaper \(layout 99"),
        (12, struct.pack("<I", 8), "another version"),
        (28, struct.pack("<I", 0), "is damaged"),
        (28, struct.pack("<I", 2**31), "is damaged"),
        (72, struct.pack("<d", float("nan")), "is damaged"),
        (80, struct.pack("<d", -1.0), "is damaged"),
        (80, struct.pack("<d", 0.003), "it lives with"),
    ],
)
def test_a_living_group_with_a_damaged_header_is_refused(folder, offset, data, says):
    """Never guessed at; its own engines go on."""
    one = join(folder)
    damage(folder / "g.group", offset, data)
    refused(folder, says)
    one.tick(5.0)
    one.leave()


def test_a_file_that_was_cut_short_is_refused(folder):
    """Whoever maps it would be ended by the first access beyond its end."""
    one = join(folder)
    size = (folder / "g.group").stat().st_size
    os.truncate(folder / "g.group", size // 2)
    refused(folder, "is damaged")
    os.truncate(folder / "g.group", size)
    one.leave()


def test_a_group_that_lives_with_other_limits_is_refused(folder):
    """Both are named; the order of the limits says nothing."""
    one = join(folder)
    refused(
        folder,
        r"lives with 1000 W over 0\.1 s, 900 W over 5 s, and this engine was given 800 W over 1 s",
        limits=(PowerLimit(800.0, 1.0),),
    )
    with pytest.raises(FleetError, match="lives with"):
        check_group("g", LIMITS[:1], directory=folder)
    check_group("g", LIMITS[::-1], directory=folder)
    two = join(folder, "two", limits=LIMITS[::-1])
    assert two.limits == LIMITS
    one.leave()
    two.leave()
    check_group("g", LIMITS[:1], directory=folder)
    assert not list(folder.iterdir())


def test_limits_that_idle_engines_break_are_refused(folder):
    """The floor is named: what all members and the new one draw idle."""
    refused(
        folder,
        r"not above what its 0 engine\(s\) and this one draw idle \(900 W\)",
        idle_watts=900.0,
    )
    assert not list(folder.iterdir())
    groups = [join(folder, str(index), idle_watts=250.0) for index in range(3)]
    refused(
        folder,
        r"3 engine\(s\) and this one draw idle \(1000 W\).*more than 1000 W",
        idle_watts=250.0,
    )
    groups.append(join(folder, idle_watts=149.0))
    for group in groups:
        group.leave()


@pytest.mark.parametrize(
    ("says", "changed"),
    [
        ("is no limit", {"limits": (PowerLimit(0.0, 1.0),)}),
        ("is no limit", {"limits": (PowerLimit(5.0, 61.0),)}),
        ("is no limit", {"limits": (PowerLimit(math.inf, 1.0),)}),
        ("has no limit", {"limits": ()}),
        ("can't join", {"idle_watts": math.nan}),
        ("can't join", {"idle_watts": -1.0}),
        ("can't join", {"rest_watts": math.inf}),
        ("can't join", {"gpu_count": 0}),
    ],
)
def test_what_would_spoil_the_sum_is_refused(folder, says, changed):
    """One number that is none would stop all members; also where no configuration was between."""
    refused(folder, says, **changed)
    with pytest.raises(FleetError, match="letters, digits and dashes"):
        check_group("../../etc", LIMITS, directory=folder)


def test_the_sixty_fifth_engine_is_refused(folder):
    """With a reason, and without harm to the others."""
    limits = (PowerLimit(100_000.0, 0.1),)
    groups = [join(folder, str(i), limits=limits) for i in range(segments.CAPACITY)]
    refused(folder, "has 64 engines already", limits=limits)
    groups.pop().leave()
    refused(folder, "has 64 engines already", limits=limits)
    groups[0].tick(1e9)
    groups.append(join(folder, "late", limits=limits))
    for group in groups:
        group.leave()


def test_no_space_is_said_at_once(folder, monkeypatch):
    """And not by a signal in the middle of the service."""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    refused(folder, r"needs \d+ MB: No space left on device; make room")
    assert not list(folder.iterdir())


def test_a_member_that_hangs_while_it_joins_is_not_waited_for(folder, monkeypatch):
    """Longer than some seconds."""
    monkeypatch.setattr(segments, "_JOIN_SECONDS", 0.05)
    one = join(folder)
    other = ByteLocks(os.open(folder / "g.group", os.O_RDWR))
    assert other.take(MEMBERSHIP)
    refused(folder, "joining or leaving for 0.05 s: is it stopped")
    one.tick(1.0)
    one.leave()
    assert (folder / "g.group").exists()
    other.close()


def die_with_a_run(folder: Path, end_seconds: float) -> None:
    group = join(folder, "dies", clock=lambda: 100.0)
    committed = Committed(100.0, np.array([99.9, 100.0, end_seconds]), np.array([0.0, 10.0, 50.0]))
    group.reserve(committed, EngineShare(100.0), 100.0, None)
    os._exit(0)


def in_a_fork(target, *arguments) -> None:
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    process.join(60)
    assert process.exitcode == 0


def dead(folder: Path, end_seconds: float) -> None:
    in_a_fork(die_with_a_run, folder, end_seconds)


def test_the_file_of_the_dead_is_taken_over_with_what_they_launched(folder):
    """Their energy stays counted until it has left the windows; other limits begin anew."""
    dead(folder, 100.2)
    one = join(folder, clock=lambda: 100.3)
    found = one.snapshot(100.3)
    assert [engine.state for engine in found.engines] == ["gone", "alive"]
    assert found.used_watts[1] * 5.0 >= 40.0
    one.tick(104.0)
    assert len(one.snapshot(104.0).engines) == 2
    one.tick(106.0)
    assert [engine.label for engine in one.snapshot(106.0).engines] == ["one"]
    one.leave()
    dead(folder, 100.2)
    two = join(folder, "two", limits=LIMITS[:1])
    assert [engine.label for engine in two.snapshot(100.3).engines] == ["two"]
    two.leave()


def test_the_file_of_another_boot_is_begun_anew(folder, monkeypatch):
    """Its times are of another clock."""
    dead(folder, 1e9)
    monkeypatch.setattr(segments, "_boot", lambda: b"another".ljust(36))
    one = join(folder)
    assert [engine.label for engine in one.snapshot(100.3).engines] == ["one"]
    one.leave()


def test_a_forked_child_says_nothing_for_its_parent(folder):
    """It holds no lock, and what it does with the handle has no effect."""
    one = join(folder, clock=lambda: 100.0)

    def child() -> None:
        assert not one.reserve(committed, EngineShare(100.0), 100.0, None)
        one.commit(committed, EngineShare(500.0), 100.0)
        one.publish(EngineShare(500.0), 100.0)
        one.reserve_fixed(500.0, 100.0)
        one.tick(200.0)
        one.leave()

    committed = Committed(100.0, np.array([99.9, 100.0, 100.1]), np.array([0.0, 10.0, 50.0]))
    in_a_fork(child)
    two = join(folder, "two")
    [found, _] = two.snapshot(100.0).engines
    assert (found.state, found.floor_watts) == ("alive", 100.0)
    one.leave()
    two.leave()


def test_a_file_removed_under_its_engines_is_reported(folder, caplog):
    """Once, by everyone's log and snapshot: who joins now would not see them."""
    one = join(folder)
    one.tick(1.0)
    assert not one.snapshot(1.0).detached
    (folder / "g.group").unlink()
    with caplog.at_level(logging.ERROR, logger="shaper"):
        one.tick(3.0)
        one.tick(5.0)
    assert one.snapshot(5.0).detached
    assert len(caplog.records) == 1
    two = join(folder, "two")
    one.leave()
    assert (folder / "g.group").exists()
    two.leave()


def test_who_says_nothing_is_stalled_and_who_left_is_gone(folder):
    """Seen by the others within a second."""
    one, two = join(folder, clock=lambda: 10.0), join(folder, "two", clock=lambda: 10.0)
    for now in (10.0, 10.5, 11.2):
        one.tick(now)
    assert [engine.state for engine in one.snapshot(11.2).engines] == ["alive", "stalled"]
    two.publish(EngineShare(100.0, waiting_since_seconds=11.0), 11.2)
    found = one.snapshot(11.2).engines[1]
    assert found.state == "alive"
    assert found.waiting_seconds == pytest.approx(0.2)
    two.leave()
    one.tick(11.3)
    assert one.snapshot(11.3).engines[1].state == "gone"
    one.leave()
