"""The process that `shaper serve` is to its user: it watches the one that serves, and ends it.

vLLM's own stop has holes: a SIGTERM during a start may be swallowed, a stream that gets
no tokens keeps the API server for ever, and a server that is killed leaves its engines behind. So
the command forks before anything is loaded. The child serves; the parent holds a few
megabytes, waits for signals, and sees to it that no process of the tree outlives the stop:

    first SIGTERM, SIGINT, SIGHUP  passed on; the server drains for its drain time
    it does not end in time        every process of the tree is killed, and that is said
    a second signal                the same, at once
    the server is killed           its engines are asked to end, then killed
    this process is killed         the kernel kills the server (PR_SET_PDEATHSIG), and its
                                   engines notice (`orphan.py`)

Signals are blocked here and taken with `sigtimedwait`, so that no handler of Python's runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from shaper.ipc.processes import descendants

DRAIN_SECONDS = 60
"""For requests in flight at a stop, where the user gave no `--shutdown-timeout`."""
END_SECONDS = 15.0
"""For a server to end its processes, once it has drained."""
START_END_SECONDS = 10.0
"""For one that is starting: there is nothing to drain."""
LEFTOVER_SECONDS = 5.0
"""For processes that a server left behind."""
# Wrappers that pass Ctrl-C on to a process that has it from the terminal already.
_SAME_STOP_SECONDS = 1.0
_POLL_SECONDS = 0.05
_CONNECT_SECONDS = 1.0
_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36
_report_pipe: int | None = None


@dataclass(frozen=True, slots=True)
class Terms:
    """What the serving process reports to its watcher, once it knows."""

    drain_seconds: float
    host: str | None
    port: int | None
    """Where it will listen; None where it won't (a headless rank)."""
    uds: str | None = None


def report_serving(terms: Terms) -> None:
    """From here on the process is to serve. Without a watcher nothing happens."""
    global _report_pipe
    if _report_pipe is not None:
        descriptor, _report_pipe = _report_pipe, None
        with contextlib.suppress(OSError):
            os.write(descriptor, json.dumps(asdict(terms)).encode())
        os.close(descriptor)


def supervised(run: Callable[[], int]) -> int:
    """Run in a child process, and watch it to its end.

    Args:
        run: serves, in the child, and returns an exit code.

    Returns:
        In the child what `run` returns. In the parent the exit code of the command: the
        child's, 1 where a server ended by itself, 128 and the signal's number where a
        stop had to kill it.
    """
    if not sys.platform.startswith("linux"):
        return run()
    stops = {
        number
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        if signal.getsignal(number) != signal.SIG_IGN  # under nohup, or in the background
    }
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*stops, signal.SIGCHLD})
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    _prctl(_SET_CHILD_SUBREAPER, 1)
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        global _report_pipe
        os.close(reader)
        _report_pipe = writer
        _prctl(_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return run()
    os.close(writer)
    return _Watcher(child, reader, stops).run()


def _prctl(option: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


class _Watcher:
    def __init__(self, child: int, reader: int, stops: set[signal.Signals]) -> None:
        self._child, self._reader, self._stops = child, reader, stops
        self._status: int | None = None
        self._terms: Terms | None = None
        self._asked: tuple[int, float] | None = None
        """The signal of the first stop, and when."""
        self._deadline_seconds: float | None = None
        self._killed = False

    def run(self) -> int:
        while not self._reap():
            now = time.monotonic()
            left = None if self._deadline_seconds is None else self._deadline_seconds - now
            if left is not None and left <= 0.0:
                self._kill("did not end in time")
                continue
            # An hour: sigtimedwait knows no "for ever".
            found = signal.sigtimedwait({*self._stops, signal.SIGCHLD}, left or 3600.0)
            if found is not None and found.si_signo != signal.SIGCHLD:
                self._stop(found.si_signo)
        self._end_leftovers()
        return self._code()

    def _reap(self) -> bool:
        """Whether the child has ended. Orphans of its are ours to reap, too."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return self._status is not None
            if pid == self._child:
                self._status = os.waitstatus_to_exitcode(status)
            if pid == 0:
                return self._status is not None

    def _stop(self, number: int) -> None:
        now = time.monotonic()
        if self._asked is None:
            self._asked = number, now
            self._deadline_seconds = now + self._patience_seconds()
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child, signal.SIGTERM)
        elif now - self._asked[1] > _SAME_STOP_SECONDS:
            self._kill("got a second signal")

    def _patience_seconds(self) -> float:
        self._read_terms()
        if self._terms is None or not _listens(self._terms):
            return START_END_SECONDS
        return self._terms.drain_seconds + END_SECONDS

    def _read_terms(self) -> None:
        if self._terms is None and select.select([self._reader], [], [], 0.0)[0]:
            with contextlib.suppress(ValueError, TypeError):
                self._terms = Terms(**json.loads(os.read(self._reader, 4096)))

    def _kill(self, why: str) -> None:
        if self._killed:
            time.sleep(_POLL_SECONDS)  # it is dying: the kernel may take its time
        else:
            _say(f"{why}: its {len(descendants(os.getpid()))} process(es) are killed")
        self._killed = True
        self._deadline_seconds = time.monotonic() + _POLL_SECONDS
        _kill_all()

    def _end_leftovers(self) -> None:
        """Processes that the server did not end: those of one that was killed."""
        for pid in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + (0.0 if self._killed else LEFTOVER_SECONDS)
        while descendants(os.getpid()):
            self._reap()
            if time.monotonic() >= deadline:
                _kill_all()
            time.sleep(_POLL_SECONDS)
        self._reap()

    def _code(self) -> int:
        code = self._status or 0
        code = 128 - code if code < 0 else code
        if self._asked is not None:
            return 128 + self._asked[0] if code else 0
        self._read_terms()
        if code == 0 and self._terms is not None:
            _say("the server ended by itself, without a request to stop: see its log")
            return 1
        return code


def _say(text: str) -> None:
    print(f"shaper serve: {text}", file=sys.stderr, flush=True)


def _listens(terms: Terms) -> bool:
    """Whether the server takes connections: until then it is starting."""
    if terms.port is None and terms.uds is None:
        return True
    unix = terms.uds is not None
    host = terms.host or "127.0.0.1"
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    try:
        if not unix:
            socket.create_connection((host, terms.port), _CONNECT_SECONDS).close()
            return True
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(_CONNECT_SECONDS)
            probe.connect(str(terms.uds))
        return True
    except OSError:
        return False


def _kill_all() -> None:
    """All below this process; whoever is forked meanwhile is found at the next call."""
    for pid in descendants(os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
