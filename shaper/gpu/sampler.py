"""The one thread that touches the driver.

Each tick: read, screen, sum up, publish; then `on_tick`, which controls; then what is only
shown. Publishing is one assignment of an immutable value to `latest`, so the scheduler reads
it with no lock and never waits for the driver. Nothing is published when a read fails or when
it says nothing about power: the last state then ages, and its age is how the controller learns
of it. Each part fails alone, and is counted (`parts.py`).

A second thread watches the first. Where a read does not return, it says once which call
hangs, and goes on with the ticks, so that the engine is supervised and controlled all the
same; it gives the ticks back when the call returns.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from shaper.core.types import GpuSample, PowerState
from shaper.errors import GpuError, GpuLostError
from shaper.gpu.energy import EnergyMeter
from shaper.gpu.parts import Parts
from shaper.gpu.reader import GpuReader, TellsWhatItDoes
from shaper.gpu.summary import summarise
from shaper.gpu.validation import SampleValidator

_log = logging.getLogger(__name__)

# A driver call that hangs must not hang the engine's shutdown with it.
_JOIN_SECONDS = 2.0
# A read takes milliseconds. After a second a state is no longer trusted, and a reason helps.
_HANG_SECONDS = 1.0
# How soon a read that hangs is seen. The watch costs a wake-up each time.
_WATCH_SECONDS = 0.5
# What keeps coming and going is said at this pace, and counted otherwise.
_SAY_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class SensorReport:
    """How the sensor fares. Counts are since the start."""

    hanging_call: str = ""
    """The driver's call that does not return; empty: none hangs."""
    hanging_seconds: float = 0.0
    reconnects: int = 0
    """Times that a lost driver or GPU was found again."""
    limit_changes: int = 0
    """Times that the enforced limit of a GPU changed."""
    read_errors: int = 0
    """Reads that raised, or came without one of the GPUs."""
    rejected_readings: int = 0
    """Single values that were not plausible and were taken as missing."""
    energy_integrated: bool = False
    """Energy of at least one GPU is summed up from its power."""
    read_over_counted_ratio: float = 1.0
    """Power reading over energy counter, as far as it is sure, where they are furthest apart."""
    meter_disagrees: bool = False
    """They are further apart than is believed of one meter."""


class Sampler:
    """Reads the GPUs of one engine at a steady pace and publishes what they say.

    Args:
        reader: read, and closed at the end, from this sampler's thread only.
        clock: seconds of the monotonic clock.
        interval_seconds: between two reads. Meters refresh every 20 to 100 ms; 20 ms
            finds a fresh value soon after it appears.
        on_samples: called in the sampler's thread with each reading, as it was read.
        on_state: called in the sampler's thread with each published state.
        on_tick: called in the sampler's thread with the time of each tick, also when
            the read failed; keeps metrics fresh while the engine is idle. Called by the
            watching thread while a read hangs, never by both at once.
        parts: counts what fails here; None: counts of the sampler's own.

    `latest` is None until the first good read. `energy_joules` in it counts from
    that read.
    """

    def __init__(
        self,
        reader: GpuReader,
        clock: Callable[[], float] = time.monotonic,
        interval_seconds: float = 0.02,
        on_samples: Callable[[tuple[GpuSample, ...]], object] | None = None,
        on_state: Callable[[PowerState], None] | None = None,
        on_tick: Callable[[float], None] | None = None,
        parts: Parts | None = None,
    ) -> None:
        if interval_seconds <= 0:
            raise ValueError(f"interval_seconds must be above 0, not {interval_seconds}")
        self._reader = reader
        self._told_by = reader if isinstance(reader, TellsWhatItDoes) else None
        self._clock = clock
        self._interval_seconds = interval_seconds
        self._on_samples, self._on_state = on_samples, on_state
        self.on_tick = on_tick
        # A sum over the GPUs that still answer would be too low.
        self._gpu_count = len(reader.gpus)
        self._screen = SampleValidator()
        self._energy = EnergyMeter()
        self.parts = Parts() if parts is None else parts
        self._limits: dict[int, float] = {}
        self._limit_changes = 0
        self._logged: set[str] = set()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._watcher: threading.Thread | None = None
        # Whoever holds it ticks: the sampler, or the watcher while a read hangs.
        self._ticking = threading.Lock()
        self._reading_since: float | None = None
        self._told_seconds = -math.inf
        self._silent_since: float | None = None
        self._said_back_seconds = -math.inf
        self._said_integrated = self._said_apart = False
        self._abandoned = False
        self.latest: PowerState | None = None
        self.read_errors = 0
        """Reads that raised, or came without one of the GPUs."""

    @property
    def callback_errors(self) -> int:
        """Failures of all parts together; reads that raised a `GpuError` are none."""
        return sum(self.parts.errors.values())

    @property
    def rejected_readings(self) -> int:
        """Single values that were not plausible and were taken as missing."""
        return self._screen.rejected_readings

    def report(self, now_seconds: float) -> SensorReport:
        """How the sensor fares. Call from `on_tick`."""
        since = self._reading_since
        seconds = 0.0 if since is None else max(0.0, now_seconds - since)
        hangs = seconds >= _HANG_SECONDS
        return SensorReport(
            hanging_call=self._doing() if hangs else "",
            hanging_seconds=seconds if hangs else 0.0,
            reconnects=0 if self._told_by is None else self._told_by.reconnects,
            limit_changes=self._limit_changes,
            energy_integrated=self._energy.integrated,
            read_over_counted_ratio=self._energy.read_over_counted_ratio,
            meter_disagrees=self._energy.apart,
            read_errors=self.read_errors,
            rejected_readings=self.rejected_readings,
        )

    def start(self) -> None:
        """Start the threads. A second call changes nothing.

        Raises:
            RuntimeError: the sampler was stopped.
        """
        if self._stopping.is_set():
            raise RuntimeError("a stopped sampler cannot be started again")
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="shaper-sampler", daemon=True)
            self._thread.start()
            self._watcher = threading.Thread(
                target=self._watch, name="shaper-sampler-watch", daemon=True
            )
            self._watcher.start()

    def stop(self) -> None:
        """End the threads and close the reader; waits 2 s at most, and for no call that is
        known to hang: its thread is left behind. May be called twice."""
        stopped = self._stopping.is_set()
        self._stopping.set()
        if self._thread is None:
            if not stopped:
                self._close()
            return
        since = self._reading_since
        hangs = since is not None and self._clock() - since >= _HANG_SECONDS
        self._thread.join(0.0 if hangs else _JOIN_SECONDS)
        # What it still brings, nobody waits for.
        self._abandoned = True
        if self._watcher is not None:
            self._watcher.join(_JOIN_SECONDS)

    def tick(self) -> None:
        """Read once and publish. What the thread does at each interval."""
        now_seconds = self._clock()
        self._reading_since = now_seconds
        samples = self._read()
        # Not before the lock: the watcher may be in the middle of a tick.
        with self._ticking:
            self._reading_since = None
            if self._abandoned:
                return
            screened = None
            if samples is not None:
                screened = self.parts.run("reading", self._publish, samples)
            # The watcher may have ticked meanwhile, and time does not go back.
            self._tell(max(now_seconds, self._told_seconds))
            if screened:
                self.parts.run("limit_changes", self._note_limits, screened)

    def _tell(self, now_seconds: float) -> None:
        self._told_seconds = now_seconds
        if self.on_tick is not None:
            self.parts.run("tick", self.on_tick, now_seconds)

    def _read(self) -> tuple[GpuSample, ...] | None:
        """One reading of all GPUs; None where it failed."""
        begin = self._clock()
        try:
            samples = self._reader.read()
            if self._on_samples is not None:
                self.parts.run("recording", self._on_samples, samples)
            if len(samples) != self._gpu_count:
                raise GpuLostError(f"{len(samples)} of {self._gpu_count} GPUs answered")
        except GpuError as error:
            self.read_errors += 1
            self._log_once(error)
        except Exception as error:
            # This thread must outlive a mistake in a reader.
            self.read_errors += 1
            self.parts.failed("reader", error)
        else:
            self._note_back(begin)
            return samples
        if self._silent_since is None:
            self._silent_since = begin
        return None

    def _note_back(self, begin_seconds: float) -> None:
        """A read has come back: say so if there was none for long."""
        now = self._clock()
        since = begin_seconds if self._silent_since is None else self._silent_since
        self._silent_since = None
        if now - since >= _HANG_SECONDS and now - self._said_back_seconds >= _SAY_SECONDS:
            self._said_back_seconds = now
            _log.warning("GPU sampling: the GPUs answer again, after %.1f s", now - since)

    def _publish(self, samples: tuple[GpuSample, ...]) -> tuple[GpuSample, ...]:
        """Publish what is believed of a reading; returns that, GPU by GPU. No GPU, no state."""
        if not samples:
            return ()
        screened = self._screen.pass_on(samples)
        samples = self._energy.fill(screened)
        if self._energy.integrated and not self._said_integrated:
            self._said_integrated = True
            _log.warning("GPU sampling: no energy counter answers: energy is summed up from power")
        self._say_apart()
        state = summarise(samples, self._energy.integrated, self._energy.raised_ratio)
        if state.instant_watts is not None or state.average_watts is not None:
            self.latest = state
            if self._on_state is not None:
                self.parts.run("states", self._on_state, state)
        return screened

    def _say_apart(self) -> None:
        """Once when the counter and the power reading part, once when they agree again."""
        if self._energy.apart == self._said_apart:
            return
        self._said_apart = self._energy.apart
        if self._said_apart:
            _log.warning(
                "GPU sampling: a GPU's power reading says %.2f times what its energy counter "
                "counts; limits hold by the higher of the two",
                self._energy.read_over_counted_ratio,
            )
        else:
            _log.warning("GPU sampling: energy counter and power reading agree again")

    def _note_limits(self, samples: tuple[GpuSample, ...]) -> None:
        for sample in samples:
            limit = sample.enforced_limit_watts
            if limit is None:
                continue
            if self._limits.setdefault(sample.gpu_index, limit) != limit:
                self._limits[sample.gpu_index] = limit
                self._limit_changes += 1

    def _log_once(self, error: GpuError) -> None:
        kind = type(error).__name__
        if kind not in self._logged:
            self._logged.add(kind)
            _log.warning("GPU sampling: %s: %s (said once; later ones are counted)", kind, error)

    def _run(self) -> None:
        due_seconds = self._clock()
        while not self._stopping.is_set():
            self.parts.run("tick", self.tick)
            # A tick that took longer than its interval is not made up for.
            due_seconds = max(due_seconds + self._interval_seconds, self._clock())
            self._stopping.wait(due_seconds - self._clock())
        self._close()

    def _doing(self) -> str:
        said = "" if self._told_by is None else self._told_by.doing
        return said or "a read of the GPUs"

    def _watch(self) -> None:
        """Tick in the place of the sampler while a read of it hangs."""
        hangs, said_seconds = False, -math.inf
        while not self._stopping.wait(self._interval_seconds if hangs else _WATCH_SECONDS):
            with self._ticking:
                since, now = self._reading_since, self._clock()
                hangs = since is not None and now - since >= _HANG_SECONDS
                if since is None or not hangs:
                    continue
                if since > said_seconds + _SAY_SECONDS:
                    said_seconds = since
                    self.parts.run("sensor_report", self._say_that_it_hangs, now - since)
                self._tell(now)

    def _say_that_it_hangs(self, seconds: float) -> None:
        _log.warning(
            "GPU sampling: %s has not returned for %.1f s; the state ages meanwhile",
            self._doing(),
            seconds,
        )

    def _close(self) -> None:
        try:
            self._reader.close()
        except GpuError as error:
            self._log_once(error)
        except Exception as error:
            self.parts.failed("reader", error)
