"""The host's clock: waiting exactly, and telling when the host itself was in the way."""

from __future__ import annotations

import os
import threading
import time

# A sleep wakes 50 to 100 microseconds late on Linux (timer slack); the rest is waited for awake.
_AWAKE_SECONDS = 150e-6


def sleep_until(deadline_seconds: float) -> float:
    """Waits until `time.monotonic()` reaches the deadline.

    Returns:
        Seconds by which a wake-up missed it; 0 where the deadline had passed before the call.
    """
    remaining = deadline_seconds - time.monotonic()
    if remaining <= 0.0:
        return 0.0
    if remaining > _AWAKE_SECONDS:
        time.sleep(remaining - _AWAKE_SECONDS)
    while (now := time.monotonic()) < deadline_seconds:
        pass
    return now - deadline_seconds


class ProcessorWait:
    """How long the calling thread was ready to run and had no processor.

    Linux counts it per thread (`/proc/self/task/TID/schedstat`, second field, in
    nanoseconds); a read costs about 2 microseconds. Waiting on purpose, for a timer or
    a lock, is not in it. Where the file is missing nothing is ever counted.
    """

    def __init__(self) -> None:
        self._file: int | None = None
        self._thread_id: int | None = None
        self._seconds = 0.0

    def take_seconds(self) -> float:
        """Seconds since the last take of this thread; 0 at the first."""
        thread_id = threading.get_native_id()
        if thread_id != self._thread_id:
            self.close()
            self._thread_id = thread_id
            try:
                self._file = os.open(f"/proc/self/task/{thread_id}/schedstat", os.O_RDONLY)
            except OSError:
                self._file = None
            self._seconds = self._read()
            return 0.0
        before, self._seconds = self._seconds, self._read()
        return self._seconds - before

    def close(self) -> None:
        """Lets go of the file. May be called twice."""
        if self._file is not None:
            os.close(self._file)
        self._file = self._thread_id = None

    def _read(self) -> float:
        if self._file is None:
            return 0.0
        fields = os.pread(self._file, 96, 0).split()
        return int(fields[1]) * 1e-9 if len(fields) > 1 else 0.0
