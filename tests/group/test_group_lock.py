"""The lock of claims: had at once, given up in time, moved on from who is stopped."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from shaper.group.lock import GATE, LATE_SECONDS, STUCK_SECONDS, WAIT_SECONDS, ByteLocks, ClaimLock

# The child does nothing that needs the threads of the parent.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


class Clock:
    """Moves on by a little each time it is asked."""

    def __init__(self) -> None:
        self.now = 100.0
        self.asked = 0

    def __call__(self) -> float:
        self.asked += 1
        self.now += 2e-5
        return self.now


class Place:
    """A file, and gates to its lock."""

    def __init__(self, path: Path) -> None:
        self.path, self.clock = path, Clock()
        path.touch()
        self.shared = np.zeros(1, GATE)

    def gate(self) -> ClaimLock:
        return ClaimLock(ByteLocks(os.open(self.path, os.O_RDWR)), self.shared, self.clock)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "lock")


def test_one_at_a_time_and_nobody_waits_longer_than_said(place):
    """Who can't have it gives up after 200 microseconds."""
    one, two = place.gate(), place.gate()
    assert one.enter()
    assert not two.enter()
    assert WAIT_SECONDS <= two.waited_seconds < WAIT_SECONDS + 3e-5
    two.leave()
    assert not two.enter()
    one.leave()
    assert two.enter()
    two.leave()
    assert int(place.shared["turns"][0]) == 2


def test_whoever_holds_it_for_a_second_is_left_behind(place):
    """Others share another lock; the one that comes back is late, and then one of them."""
    stopped, one, two = place.gate(), place.gate(), place.gate()
    assert stopped.enter()
    assert not one.enter()
    place.clock.now += STUCK_SECONDS / 2
    assert not one.enter()
    assert int(place.shared["epoch"][0]) == 0
    place.clock.now += STUCK_SECONDS
    assert not one.enter()
    assert int(place.shared["epoch"][0]) == 1
    assert one.enter()
    assert not two.enter()
    one.leave()
    assert two.enter()
    two.leave()
    assert stopped.late()
    stopped.leave()
    assert stopped.enter()
    assert not stopped.late()


def test_a_busy_lock_is_not_a_stuck_one(place):
    """It is held whenever one asks, but not by the same turn."""
    one, two = place.gate(), place.gate()
    for _ in range(20):
        assert one.enter()
        assert not two.enter()
        one.leave()
        place.clock.now += STUCK_SECONDS / 5
    assert int(place.shared["epoch"][0]) == 0


def test_all_stopped_one_after_the_other_leave_nobody_a_lock_until_one_goes_on(place):
    """Four holders that are stopped: the fifth waits its 200 microseconds at each claim."""
    stopped = []
    for _ in range(4):
        gate = place.gate()
        while not gate.enter():
            place.clock.now += STUCK_SECONDS
        stopped.append(gate)
    last = place.gate()
    for _ in range(5):
        assert not last.enter()
        place.clock.now += STUCK_SECONDS
    stopped[1].leave()
    while not last.enter():
        place.clock.now += STUCK_SECONDS
    assert not last.late()


def test_a_claim_that_was_stopped_on_the_way_is_late(place):
    """Whether it had the lock or not."""
    one, two = place.gate(), place.gate()
    assert one.enter()
    assert not one.late()
    assert not two.enter()
    assert not two.late()
    place.clock.now += WAIT_SECONDS + LATE_SECONDS
    assert one.late()
    assert two.late()


def test_the_kernel_frees_what_a_dead_holder_held(place):
    """Killed in the middle, it holds nobody up."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        gate = place.gate()
        os.write(told, bytes([gate.enter()]))
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.read(ready, 1) == b"\x01"
    os.waitpid(child, 0)
    assert place.gate().enter()
