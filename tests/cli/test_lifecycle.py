"""The process that watches a server: whatever happens, it ends, and nothing is left of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shaper.cli import lifecycle
from shaper.ipc.processes import lives

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux's process table")

# A server of two processes: each leaves its number in a file. `{act}` is what it does.
SERVER = """
import os, signal, socket, subprocess, sys, time
from shaper.cli import lifecycle
from shaper.ipc.processes import lives
lifecycle.START_END_SECONDS, lifecycle.END_SECONDS, lifecycle.LEFTOVER_SECONDS = 0.5, 0.5, 0.5
lifecycle._SAME_STOP_SECONDS = 0.2
def deaf(*_): pass
def serve():
    engine = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", engine])
    listener = socket.create_server(("127.0.0.1", 0))
    {act}
    open("pids.tmp", "w").write(f"{{os.getpid()}} {{child.pid}}")
    os.rename("pids.tmp", "pids")
    {then}
sys.exit(lifecycle.supervised(serve))
"""
TELL = "lifecycle.report_serving(lifecycle.Terms({drain}, '127.0.0.1', listener.getsockname()[1]))"
WAIT = "time.sleep(60); return 0"
DEAF = "signal.signal(signal.SIGTERM, deaf)"


class Command:
    """`shaper serve`, more or less."""

    def __init__(self, folder: Path, act: str, then: str) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER.format(act=act, then=then)],
            cwd=folder,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(lifecycle.__file__).parents[2])},
        )
        until((folder / "pids").exists)
        self.server, self.engine = map(int, (folder / "pids").read_text().split())

    def ended(self) -> tuple[int, str]:
        """Its exit code and what it said; nothing of it is left."""
        _, said = self.process.communicate(timeout=30)
        until(lambda: not (lives(self.server) or lives(self.engine)))
        return self.process.returncode, said


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    made: list[Command] = []

    def begin(act: str = "pass", then: str = WAIT) -> Command:
        made.append(Command(tmp_path, act, then))
        return made[-1]

    yield begin
    for command in made:
        for pid in (command.process.pid, command.server, command.engine):
            if lives(pid):
                os.kill(pid, signal.SIGKILL)
        command.process.wait()
        if command.process.stderr is not None:
            command.process.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stop_ends_the_server_and_what_it_leaves(start, number):
    """The engine here ignores every request to end."""
    command = start()
    command.process.send_signal(number)
    code, _ = command.ended()
    assert code == 128 + number


def test_a_server_that_swallows_a_stop_while_it_starts_is_killed(start):
    """And that is said in a line."""
    command = start(DEAF)
    command.process.send_signal(signal.SIGTERM)
    code, said = command.ended()
    assert code == 143
    assert said == "shaper serve: did not end in time: its 2 process(es) are killed\n"


def test_one_that_serves_has_its_drain(start):
    """And ends with its own code."""
    drained = "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1.0), os._exit(0)))"
    command = start(f"{drained}; {TELL.format(drain=10)}")
    begin = time.monotonic()
    command.process.send_signal(signal.SIGTERM)
    code, said = command.ended()
    assert (code, said) == (0, "")
    assert time.monotonic() - begin >= 1.0


def test_a_drain_that_does_not_end_is_ended(start):
    """After its time and a little more."""
    command = start(f"{DEAF}; {TELL.format(drain=1)}")
    begin = time.monotonic()
    command.process.send_signal(signal.SIGTERM)
    code, _ = command.ended()
    assert code == 143
    assert time.monotonic() - begin >= 1.5


def test_a_second_signal_ends_at_once(start):
    """One that comes with the first is the same stop: wrappers pass Ctrl-C on."""
    command = start(f"{DEAF}; {TELL.format(drain=600)}")
    command.process.send_signal(signal.SIGINT)
    command.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert command.process.poll() is None
    command.process.send_signal(signal.SIGTERM)
    code, said = command.ended()
    assert code == 130
    assert "second signal" in said


@pytest.mark.parametrize("victim", ["server", "engine and server", "command"])
def test_whoever_is_killed_nothing_is_left(start, victim):
    """Engines of a killed server are ended; the kernel ends the server of a killed command."""
    command = start(TELL.format(drain=600))
    if victim == "command":
        command.process.kill()
        command.process.wait()
        until(lambda: not lives(command.server))
        assert lives(command.engine)  # it has to notice by itself: `orphan.py`
        return
    if victim != "server":
        os.kill(command.engine, signal.SIGSTOP)
    os.kill(command.server, signal.SIGKILL)
    code, _ = command.ended()
    assert code == 137


def test_a_server_that_ends_by_itself_has_failed(start):
    """vLLM ends with code 0 after its engine has died, and would not be started again."""
    command = start(TELL.format(drain=1), "child.kill(); return 0")
    code, said = command.ended()
    assert code == 1
    assert "by itself" in said


def test_codes_pass(start):
    """Of a start that was refused, before anything serves."""
    command = start(then="child.kill(); return 2")
    assert command.ended() == (2, "")


def test_ignored_signals_stay_ignored(tmp_path):
    """Under nohup a hang-up ends nothing."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        command = Command(tmp_path, "pass", WAIT)
    finally:
        signal.signal(signal.SIGHUP, before)
    command.process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert command.process.poll() is None
    command.process.send_signal(signal.SIGTERM)
    assert command.ended()[0] == 143
