"""Locks that the kernel frees when their holder ends, and one with a bounded wait.

A lock is one byte of a file, held by an open file description (`F_OFD_SETLK` of fcntl(2)):
two descriptions exclude each other, also within a process, and whatever ends the holder,
SIGKILL included, frees what it held.

The claim lock is one of a few bytes, chosen by an epoch that all members share. A holder that
is stopped keeps its byte. A member that has found the same acquisition of the same epoch held
for `STUCK_SECONDS` moves the epoch on to a byte that is free. The stopped holder finds the epoch
changed when it continues.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import weakref
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

# struct flock: type, whence, start, length, pid.
_FLOCK = struct.Struct("hhqqi4x")
# Beyond the end of the file: these bytes hold no data.
_BASE = 1 << 40
MEMBERSHIP = 0
"""The byte under which members join, leave and are removed."""
_CLAIMS = 1
_CLAIM_BYTES = 4
ALIVE = _CLAIMS + _CLAIM_BYTES
"""The first of the bytes that members hold while they live, in the order of their rows."""

WAIT_SECONDS = 200e-6
"""Longest wait for the lock of claims: a claim under it takes some 50 us."""
STUCK_SECONDS = 1.0
LATE_SECONDS = 0.05
"""A claim that took longer was stopped in between: a busy host delays some 10 ms."""

GATE = np.dtype([("epoch", np.int64), ("turns", np.int64)])
"""What the members share of the lock of claims: which byte, and how often it was taken."""


def _flock(kind: int, byte: int, count: int = 1) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, _BASE + byte, count, 0)


_TAKE = [_flock(fcntl.F_WRLCK, byte) for byte in range(256)]
_GIVE = [_flock(fcntl.F_UNLCK, byte) for byte in range(256)]


class ByteLocks:
    """Locks on bytes of a file, by one open file description.

    Args:
        descriptor: of the file, open to write and not shared; owned from now on.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._finalizer = weakref.finalize(self, os.close, descriptor)

    def take(self, byte: int) -> bool:
        """Hold a byte, unless another description does."""
        try:
            fcntl.fcntl(self.descriptor, fcntl.F_OFD_SETLK, _TAKE[byte])
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True

    def give(self, byte: int) -> None:
        """Free a byte."""
        fcntl.fcntl(self.descriptor, fcntl.F_OFD_SETLK, _GIVE[byte])

    def held(self, byte: int, count: int = 1) -> bool:
        """Whether another description holds one of these bytes; 0: any from the first on."""
        asked = _flock(fcntl.F_WRLCK, byte, count)
        found = _FLOCK.unpack(fcntl.fcntl(self.descriptor, fcntl.F_OFD_GETLK, asked))
        return bool(found[0] != fcntl.F_UNLCK)

    def free(self) -> None:
        """Free all bytes. The description stays open while another thread may use it."""
        fcntl.fcntl(self.descriptor, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, 0, 0))

    def close(self) -> None:
        """Close the description; with its last copy all its bytes are free. Twice is fine."""
        self._finalizer()


class ClaimLock:
    """One member's way to the lock of claims. One thread only.

    Args:
        locks: of a description of this thread's own.
        shared: [1] of `GATE`.
        clock: monotonic seconds.
    """

    def __init__(
        self, locks: ByteLocks, shared: npt.NDArray[np.void], clock: Callable[[], float]
    ) -> None:
        self._locks, self._shared, self._clock = locks, shared, clock
        self._epoch = 0
        self._begun_seconds = 0.0
        self._stuck: tuple[int, int] | None = None
        self._stuck_since_seconds = 0.0
        self.held = False
        self.waited_seconds = 0.0
        """How long the last `enter` took."""

    def enter(self) -> bool:
        """Try for `WAIT_SECONDS`; whether the lock is held."""
        self._begun_seconds = now = self._clock()
        while not self._try():
            now = self._clock()
            if now - self._begun_seconds >= WAIT_SECONDS:
                self._missed(now)
                break
            os.sched_yield()
        self.waited_seconds = now - self._begun_seconds
        return self.held

    def _try(self) -> bool:
        values = self._shared[0]
        self._epoch = epoch = int(values["epoch"])
        byte = _CLAIMS + epoch % _CLAIM_BYTES
        if not self._locks.take(byte):
            return False
        if int(values["epoch"]) != epoch:
            self._locks.give(byte)
            return False
        values["turns"] += 1
        self._stuck = None
        self.held = True
        return True

    def _missed(self, now_seconds: float) -> None:
        """Move the epoch on when the same turn has been held for too long."""
        values = self._shared[0]
        turn = int(values["epoch"]), int(values["turns"])
        if turn != self._stuck:
            self._stuck, self._stuck_since_seconds = turn, now_seconds
        elif now_seconds - self._stuck_since_seconds >= STUCK_SECONDS:
            for epoch in range(turn[0] + 1, turn[0] + _CLAIM_BYTES):
                byte = _CLAIMS + epoch % _CLAIM_BYTES
                if self._locks.take(byte):
                    if int(values["epoch"]) == turn[0]:
                        values["epoch"] = epoch
                    self._locks.give(byte)
                    return

    def late(self) -> bool:
        """Whether this member was stopped since `enter`, or its lock is the one no longer."""
        stopped = self._clock() - self._begun_seconds > WAIT_SECONDS + LATE_SECONDS
        return stopped or (self.held and int(self._shared[0]["epoch"]) != self._epoch)

    def leave(self) -> None:
        """Free the lock, if it is held."""
        if self.held:
            self.held = False
            self._locks.give(_CLAIMS + self._epoch % _CLAIM_BYTES)
