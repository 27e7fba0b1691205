"""Requests that a run's API servers refused, by class and reason, in shared memory.

Each API server counts in a small file of its own, beside the run's control file. Whichever
of them answers a scrape shows the sum over all. The files go with the run.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import struct
from collections.abc import Mapping

from shaper.ipc.status_block import control_paths

logger = logging.getLogger(__name__)

POWER, THERMAL = ("flex", "power_budget"), ("flex", "thermal")
UNKNOWN_CLASS = ("unknown", "unknown_class")
KINDS = (POWER, THERMAL, UNKNOWN_CLASS)
"""Class of work, and why it was refused: the state is shed for a limit of the operator, or for
one against overheating (429); the request names a class that there is not (400)."""
_LAYOUT = struct.Struct(f"<{len(KINDS)}Q")


class RefusalCounts:
    """Counts in one API server; one thread only. A failure costs the count alone.

    Args:
        run: of this server.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._counts = dict.fromkeys(KINDS, 0)
        self._memory: mmap.mmap | None = None
        self._failed = False

    def count(self, kind: tuple[str, str]) -> None:
        """One more."""
        self._counts[kind] += 1
        try:
            if self._memory is None:
                self._memory = self._opened()
            _LAYOUT.pack_into(self._memory, 0, *self._counts.values())
        except OSError as error:
            if not self._failed:
                logger.error("refused requests are not counted on /metrics: %s", error)
            self._failed = True

    def _opened(self) -> mmap.mmap:
        path = f"{_stem(self._run)}{os.getpid()}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(descriptor, _LAYOUT.size)
            return mmap.mmap(descriptor, _LAYOUT.size)
        finally:
            os.close(descriptor)


def _stem(run: str) -> str:
    # Named like the control file, so that it goes when that does.
    return f"{control_paths(run)[0]}.refused-"


def refused_requests(run: str) -> Mapping[tuple[str, str], int]:
    """Sums over the run's API servers, for every kind."""
    sums = dict.fromkeys(KINDS, 0)
    first = control_paths(run)[0]
    for path in first.parent.glob(f"{first.name}.refused-*"):
        with contextlib.suppress(OSError, struct.error):
            for kind, number in zip(KINDS, _LAYOUT.unpack(path.read_bytes()), strict=True):
                sums[kind] += number
    return sums
