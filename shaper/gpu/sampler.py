"""The one thread that touches the driver.

Each tick: read, screen, sum up, publish. Publishing is one assignment of an
immutable value to `latest`, so the scheduler reads it with no lock and never waits
for the driver. Nothing is published when a read fails or when it says nothing about
power: the last state then ages, and its age is how the controller learns of it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from shaper.core.types import ClockEventReasons, GpuSample, PowerState
from shaper.errors import GpuError, GpuLostError
from shaper.gpu.reader import GpuReader
from shaper.gpu.screen import Screen

_log = logging.getLogger(__name__)

# A driver call that hangs must not hang the engine's shutdown with it.
_JOIN_SECONDS = 2.0


def summarise(samples: Sequence[GpuSample]) -> PowerState:
    """The GPUs of one engine as one state.

    A sum is None when one of its GPUs is missing, since a part of it would be too
    low. The state is as old as its oldest sample.

    Raises:
        ValueError: there are no samples.
    """
    if not samples:
        raise ValueError("no samples to summarise")
    reasons = ClockEventReasons.NONE
    for sample in samples:
        reasons |= sample.clock_event_reasons
    return PowerState(
        sampled_seconds=min(sample.read_seconds for sample in samples),
        gpu_count=len(samples),
        instant_watts=_sum(sample.instant_watts for sample in samples),
        average_watts=_sum(sample.average_watts for sample in samples),
        energy_joules=_sum(sample.energy_joules for sample in samples),
        enforced_limit_watts=_sum(sample.enforced_limit_watts for sample in samples),
        sm_clock_hertz=min(_known(sample.sm_clock_hertz for sample in samples), default=None),
        temperature_celsius=max(
            _known(sample.temperature_celsius for sample in samples), default=None
        ),
        clock_event_reasons=reasons,
        gpus=tuple(samples),
    )


def _sum(values: Iterable[float | None]) -> float | None:
    total = 0.0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


class Sampler:
    """Reads the GPUs of one engine at a steady pace and publishes what they say.

    Args:
        reader: read, and closed at the end, from this sampler's thread only.
        clock: seconds of the monotonic clock.
        interval_seconds: between two reads. Meters refresh every 20 to 100 ms; 20 ms
            finds a fresh value soon after it appears.
        on_state: called in the sampler's thread with each published state.
        on_tick: called in the sampler's thread with the time of each tick, also when
            the read failed; keeps metrics fresh while the engine is idle.

    `latest` is None until the first good read. `energy_joules` in it counts from
    that read.
    """

    def __init__(
        self,
        reader: GpuReader,
        clock: Callable[[], float] = time.monotonic,
        interval_seconds: float = 0.02,
        on_state: Callable[[PowerState], None] | None = None,
        on_tick: Callable[[float], None] | None = None,
    ) -> None:
        if interval_seconds <= 0:
            raise ValueError(f"interval_seconds must be above 0, not {interval_seconds}")
        self._reader = reader
        self._clock = clock
        self._interval_seconds = interval_seconds
        self._on_state = on_state
        self._on_tick = on_tick
        # A sum over the GPUs that still answer would be too low.
        self._gpu_count = len(reader.gpus)
        self._screen = Screen()
        self._logged: set[str] = set()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self.latest: PowerState | None = None
        self.read_errors = 0
        """Reads that raised a `GpuError`, or came without one of the GPUs."""
        self.callback_errors = 0
        """Calls of `on_state` and `on_tick`, or reads, that raised anything else."""

    @property
    def rejected_readings(self) -> int:
        """Single values that were not plausible and were taken as missing."""
        return self._screen.rejected_readings

    def start(self) -> None:
        """Start the thread. A second call changes nothing.

        Raises:
            RuntimeError: the sampler was stopped.
        """
        if self._stopping.is_set():
            raise RuntimeError("a stopped sampler cannot be started again")
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="shaper-sampler", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread and close the reader; waits 2 s at most. May be called twice."""
        stopped = self._stopping.is_set()
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(_JOIN_SECONDS)
        elif not stopped:
            self._close()

    def tick(self) -> None:
        """Read once and publish. What the thread does at each interval."""
        now_seconds = self._clock()
        self._guarded(self._read_and_publish)
        if self._on_tick is not None:
            on_tick = self._on_tick
            self._guarded(lambda: on_tick(now_seconds))

    def _read_and_publish(self) -> None:
        try:
            samples = self._reader.read()
        except GpuError as error:
            self.read_errors += 1
            self._log_once(error)
            return
        if len(samples) != self._gpu_count:
            self.read_errors += 1
            self._log_once(
                GpuLostError(f"{len(samples)} of {self._gpu_count} GPUs answered the last read")
            )
            return
        state = summarise(self._screen.pass_on(samples))
        if state.instant_watts is None and state.average_watts is None:
            return
        self.latest = state
        if self._on_state is not None:
            self._on_state(state)

    def _guarded(self, action: Callable[[], None]) -> None:
        """Runs in a thread that must outlive a mistake in a callback or a reader."""
        try:
            action()
        except Exception as error:
            self.callback_errors += 1
            self._log_once(error)

    def _log_once(self, error: Exception) -> None:
        kind = type(error).__name__
        if kind not in self._logged:
            self._logged.add(kind)
            _log.warning(
                "GPU sampling: %s: %s (said once; later ones are counted)",
                kind,
                error,
                exc_info=None if isinstance(error, GpuError) else error,
            )

    def _run(self) -> None:
        due_seconds = self._clock()
        while not self._stopping.is_set():
            self.tick()
            # A tick that took longer than its interval is not made up for.
            due_seconds = max(due_seconds + self._interval_seconds, self._clock())
            self._stopping.wait(due_seconds - self._clock())
        self._close()

    def _close(self) -> None:
        try:
            self._reader.close()
        except GpuError as error:
            self._log_once(error)
