"""Real processes over real shared memory: killed, stopped and started, no window goes over."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shaper.doctor.groups import group_findings
from shaper.errors import FleetError
from shaper.group import HostGroup, check_group, join_group
from shaper.ipc.processes import descendants, lives
from tests.group import group_member
from tests.group.group_judge import Drawn, excess_joules
from tests.group.group_member import (
    IDLE_WATTS,
    LIMITS,
    MOST_WATTS,
    NAME,
    REST_AFTER_SECONDS,
    REST_WATTS,
)

PATIENCE_SECONDS = 60.0
# Two steps of 30 ms may be committed when somebody joins.
AHEAD_SECONDS = 0.07


class Process:
    """A member in a process of its own."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.log = folder / f"member-{seed}.log"
        script = Path(group_member.__file__)
        self.process = subprocess.Popen(
            [sys.executable, script, folder / "groups", self.log, str(seed)]
        )

    def lines(self, word: str) -> list[list[float]]:
        """Numbers of the log's lines of one kind."""
        if not self.log.exists():
            return []
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [line[1:] for line in lines if line[0] == word]

    def publish(self, number: int) -> None:
        self.process.send_signal(number)

    @property
    def stopped(self) -> bool:
        stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] == "T"

    def drawn(self) -> Drawn:
        """What it ran, by its log."""
        [[joined]] = self.lines("joined")
        found = Drawn(IDLE_WATTS, REST_WATTS, REST_AFTER_SECONDS, joined, joined + AHEAD_SECONDS)
        cuts = {(start, end): cut for start, end, cut in self.lines("cut")}
        found.runs = [
            (start, cuts.get((start, end), end), watts) for start, end, watts in self.lines("run")
        ]
        found.until_seconds = max(end for _, end, _ in found.runs)
        return found


def until(true: Callable[[], bool]) -> None:
    """Wait for something that must come."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Group:
    """Members that run, and a handle that watches them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.members: list[Process] = []
        self.watcher: HostGroup = join_group(
            NAME,
            LIMITS,
            idle_watts=1.0,
            rest_watts=1.0,
            rest_after_seconds=1.0,
            label="watcher",
            directory=folder / "groups",
        )

    def start(self) -> Process:
        self.members.append(Process(self.folder, len(self.members)))
        return self.members[-1]

    def states(self) -> list[str]:
        """Of the members' rows, by their labels."""
        now = time.monotonic()
        self.watcher.tick(now)
        engines = self.watcher.snapshot(now).engines
        return [x.state for x in sorted(engines, key=lambda x: x.label) if x.label != "watcher"]

    def go_on(self, *members: Process, runs: int = 30) -> None:
        """Wait until each has run so many more steps."""
        before = [len(member.lines("run")) for member in members]
        until(
            lambda: all(
                len(member.lines("run")) >= count + runs
                for member, count in zip(members, before, strict=True)
            )
        )

    def end(self) -> None:
        for member in self.members:
            if member.process.poll() is None:
                member.publish(signal.SIGCONT)
                member.publish(signal.SIGTERM)
        for member in self.members:
            member.process.wait(PATIENCE_SECONDS)
        self.watcher.leave()

    def check(self) -> None:
        """No window of any limit holds more than the grid's rounding above it."""
        drawn = [member.drawn() for member in self.members]
        last = max(each.until_seconds for each in drawn)
        fullest = -1.0
        for limit in LIMITS:
            bins = 0.001 if limit.window_seconds <= 0.5 else 0.004
            rounding = len(drawn) * (MOST_WATTS - REST_WATTS) * bins / 2
            excess = excess_joules(drawn, limit, last)
            assert excess <= rounding
            fullest = max(fullest, excess / (limit.watts * limit.window_seconds))
        # The test would show nothing if all limits were far away.
        assert fullest >= -0.25


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Group]:
    made = Group(tmp_path)
    try:
        yield made
    finally:
        for member in made.members:
            if member.process.poll() is None:
                member.process.kill()
                member.process.wait()
        made.watcher.leave()


def test_one_killed_in_the_middle_of_a_claim_holds_nobody_up(group):
    """Holding the lock: its share comes back when its energy has left the windows."""
    first, *others = group.start(), group.start(), group.start()
    group.go_on(*group.members)
    [share] = [x.watts for x in group.watcher.static_limits if x.window_seconds == 0.1]
    first.publish(signal.SIGUSR1)
    until(lambda: first.process.poll() is not None)
    assert first.process.returncode == -signal.SIGKILL
    assert first.lines("inside")
    assert group.states() == ["gone", "alive", "alive"]
    group.go_on(*others)
    until(lambda: group.states() == ["alive", "alive"])
    assert group.watcher.static_limits[0].watts > share
    group.start()
    group.go_on(*group.members[1:])
    group.end()
    group.check()
    assert not list((group.folder / "groups").iterdir())


def test_one_stopped_with_the_lock_delays_nobody(group):
    """Others go on with their static share, then with a new lock; it revalidates."""
    first, *others = group.start(), group.start(), group.start()
    group.go_on(*group.members)
    first.publish(signal.SIGUSR2)
    until(lambda: first.stopped)
    refused, runs = len(first.lines("refused")), len(first.lines("run"))
    group.go_on(*others, runs=10)
    until(lambda: group.states() == ["stalled", "alive", "alive"])
    until(lambda: group.watcher.snapshot(time.monotonic()).epoch_changes > 0)
    group.go_on(*others)
    assert sum(x.static_steps for x in group.watcher.snapshot(time.monotonic()).engines) > 0
    first.publish(signal.SIGCONT)
    until(lambda: len(first.lines("refused")) > refused)
    assert (
        len(first.lines("run")) == runs
        or first.lines("run")[runs][0] > first.lines("inside")[0][0] + 1.0
    )
    group.go_on(first)
    until(lambda: group.states() == ["alive"] * 3)
    group.end()
    group.check()


def test_whoever_is_stopped_or_killed_at_whatever_moment(group):
    """Signals at random, and members that come for those that go."""
    chance = random.Random(1)
    living = [group.start() for _ in range(3)]
    group.go_on(*living, runs=10)
    for _ in range(12):
        member = chance.choice(living)
        deed = chance.random()
        if deed < 0.5:
            member.publish(chance.choice((signal.SIGSTOP, signal.SIGUSR2)))
            until(lambda: member.stopped)  # noqa: B023
            time.sleep(chance.uniform(0.0, 0.3))
            member.publish(signal.SIGCONT)
        elif deed < 0.7:
            member.publish(chance.choice((signal.SIGKILL, signal.SIGUSR1)))
            until(lambda: member.process.poll() is not None)  # noqa: B023
            living.remove(member)
            living.append(group.start())
            group.go_on(living[-1], runs=5)
        else:
            time.sleep(chance.uniform(0.0, 0.2))
    for member in living:
        member.publish(signal.SIGCONT)
    group.go_on(*living, runs=10)
    group.end()
    group.check()


def test_a_stopped_engine_whose_server_is_gone_is_named(tmp_path):
    """It can't end itself, and keeps its place: doctor, status and the next start say whose
    process it is and what to do. One that only hangs is named as well."""
    script = (
        "import multiprocessing, os, sys, time\n"
        "from tests.group.group_member import Member\n"
        "from pathlib import Path\n"
        "def engine(*given): Member(*given).live()\n"
        "if __name__ == '__main__':\n"
        "    given = Path(sys.argv[1]), Path(sys.argv[2]), 0\n"
        "    process = multiprocessing.get_context('spawn').Process(target=engine, args=given)\n"
        "    process.start()\n"
        "    process.join()\n"
    )
    server = tmp_path / "server.py"
    server.write_text(script)
    log, folder = tmp_path / "member.log", tmp_path / "groups"
    root = str(Path(group_member.__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, server, folder, log], env=os.environ | {"PYTHONPATH": root}
    )
    until(lambda: log.exists() and "joined" in log.read_text())
    [engine] = descendants(process.pid)[-1:]
    try:
        # Two engines of 600 W idle do not fit beside one of 100 W.
        terms = {"idle_watts": 900.0, "directory": folder}
        os.kill(engine, signal.SIGSTOP)
        until(lambda: "1 stalled" in group_findings(folder)[0].found)
        with pytest.raises(FleetError, match=rf"process {engine} \(member 0\) has said nothing"):
            check_group(NAME, LIMITS, **terms)
        process.kill()
        process.wait()
        until(lambda: "1 orphaned" in group_findings(folder)[0].found)
        [found] = group_findings(folder)
        assert found.advice is not None
        assert f"process {engine}" in found.advice
        assert "kill -9" in found.advice
        with pytest.raises(FleetError, match=f"process {engine} .*server is gone.*kill -9"):
            check_group(NAME, LIMITS, **terms)
    finally:
        os.kill(engine, signal.SIGKILL)
        until(lambda: not lives(engine))
        process.kill()
        process.wait()
    check_group(NAME, LIMITS, **terms | {"idle_watts": 800.0})
