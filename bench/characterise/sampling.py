"""Reads the meter at a steady pace while the main thread runs steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from shaper.core.types import GpuSample
from shaper.errors import GpuError
from shaper.gpu.reader import GpuReader


class MeterThread:
    """Samples until it is stopped. A failed read is counted and leaves a hole.

    Args:
        reader: read from this thread only while it runs; not closed here.
        interval_seconds: from read to read; a read that takes longer skips the next.
    """

    def __init__(
        self,
        reader: GpuReader,
        interval_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._reader = reader
        self._interval_seconds = interval_seconds
        self._clock = clock
        self._samples: list[GpuSample] = []
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="characterise-meter", daemon=True)
        self.errors = 0
        self.last_error = ""

    def start(self) -> None:
        """Start to sample."""
        self._thread.start()

    def take(self) -> list[GpuSample]:
        """The samples since the last take."""
        with self._lock:
            samples, self._samples = self._samples, []
        return samples

    def stop(self) -> None:
        """Stop to sample. May be called twice."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5.0)

    def _run(self) -> None:
        due = self._clock()
        while not self._stopping.is_set():
            self._read()
            due += self._interval_seconds
            now = self._clock()
            if due < now:
                due = now + self._interval_seconds - (now - due) % self._interval_seconds
            self._stopping.wait(due - now)

    def _read(self) -> None:
        try:
            found = self._reader.read()
        except GpuError as error:
            self.errors += 1
            self.last_error = str(error)
            return
        with self._lock:
            self._samples.extend(found)
