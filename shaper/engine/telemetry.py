"""What one engine tells the world: its section of the status block, and its log.

Runs on the sampler's thread, so that numbers stay fresh while the engine is idle
and no I/O happens where steps are scheduled.
"""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from shaper.core.types import Decision, GpuIdentity, GpuSample, PowerLimit, PowerState, Reason
from shaper.gpu.reader import GpuReader
from shaper.metrics import NAN, SchedulerCounters
from shaper.recording import RecordedStep, RecordingWriter
from shaper.status import StatusWriter

logger = logging.getLogger(__name__)

# The counter moves about every 100 ms and is read every 20: over a shorter span the
# reading's time is too coarse, and the meter's own short window says more.
_COUNTER_SECONDS = 0.5
# Polls of a held engine repeat these a thousand times a second; the first says it all.
_REPEATED = frozenset({Reason.PAUSE, Reason.TURN, Reason.IDLE})
# A log that nobody drains must not eat the memory: a minute of steps.
_MAX_PENDING = 10_000


class MeterWindows:
    """Mean metered power over each limit's window, from the energy counter."""

    def __init__(self, limits: Sequence[PowerLimit], idle_watts: float) -> None:
        self._limits = tuple(limits)
        self._idle_watts = idle_watts
        self._longest = max((limit.window_seconds for limit in limits), default=0.0)
        self._readings: deque[tuple[float, float]] = deque()

    def observe(self, state: PowerState) -> tuple[float, float]:
        """`(headroom in watts, pressure ratio)` after this reading; NaN without limits."""
        energy = state.energy_joules
        if not self._limits or energy is None:
            return NAN, NAN
        if self._readings and energy < self._readings[-1][1]:
            self._readings.clear()  # the counter was reset
        # Only where it moved: between two moves the time is known, not the energy.
        if not self._readings or energy > self._readings[-1][1]:
            self._readings.append((state.sampled_seconds, energy))
        oldest = state.sampled_seconds - self._longest - 1.0
        while len(self._readings) > 2 and self._readings[1][0] < oldest:
            self._readings.popleft()
        headroom, pressure = math.inf, 0.0
        for limit in self._limits:
            watts = self._mean_watts(limit.window_seconds, state)
            headroom = min(headroom, limit.watts - watts)
            share = (watts - self._idle_watts) / (limit.watts - self._idle_watts)
            pressure = max(pressure, min(1.0, max(0.0, share)))
        return headroom, pressure

    def _mean_watts(self, window_seconds: float, state: PowerState) -> float:
        now, energy = self._readings[-1]
        if window_seconds >= _COUNTER_SECONDS:
            for then, before in reversed(self._readings):
                if now - then >= window_seconds:
                    return (energy - before) / (now - then)
        return state.instant_watts or state.average_watts or 0.0


class DecisionLog:
    """Appends decisions to a file as JSON lines. `add` from one thread, `drain` from another."""

    def __init__(self, path: str | None) -> None:
        self._pending: deque[tuple[Decision, float | None]] = deque(maxlen=_MAX_PENDING)
        self._file: TextIO | None = Path(path).open("a") if path else None  # noqa: SIM115
        self._last: Reason | None = None

    def add(self, decision: Decision, meter_watts: float | None) -> None:
        """Remember a decision for the next `drain`."""
        if self._file is None:
            return
        if decision.reason in _REPEATED and decision.reason is self._last:
            return
        self._last = decision.reason
        self._pending.append((decision, meter_watts))

    def drain(self) -> None:
        """Write what is pending. A full disk costs the log, not the engine."""
        if self._file is None:
            return
        try:
            while self._pending:
                self._file.write(_line(*self._pending.popleft()))
            self._file.flush()
        except OSError as error:
            logger.error("the decision log ends here: %s", error)
            self._file = None

    def close(self) -> None:
        """Write what is pending and let go of the file."""
        self.drain()
        if self._file is not None:
            self._file.close()
            self._file = None


def _line(decision: Decision, meter_watts: float | None) -> str:
    limits, headroom = decision.limits, decision.headroom_watts
    return (
        json.dumps(
            {
                "t": round(decision.at_seconds, 6),
                "reason": decision.reason.value,
                "applied": decision.applied,
                "run": limits.run,
                "limit_prefill_tokens": limits.prefill_tokens,
                "limit_decode_requests": limits.decode_requests,
                "wanted_prefill_tokens": decision.wanted_prefill_tokens,
                "decodes": decision.decode_requests,
                "prefill_tokens": decision.prefill_tokens,
                "predicted_seconds": round(decision.predicted.seconds, 6),
                "predicted_joules": round(decision.predicted.joules, 4),
                "predicted_watts": round(decision.predicted.watts, 1),
                "headroom_watts": round(headroom, 1) if math.isfinite(headroom) else None,
                "meter_watts": meter_watts,
            }
        )
        + "\n"
    )


class Recorder:
    """Collects steps and samples for a recording, and writes them on the sampler's thread."""

    def __init__(self, writer: RecordingWriter) -> None:
        self._writer: RecordingWriter | None = writer
        self._steps: deque[RecordedStep] = deque(maxlen=_MAX_PENDING)
        self._samples: list[GpuSample] = []

    def add_step(self, step: RecordedStep) -> None:
        """Called by the scheduler's thread."""
        self._steps.append(step)

    def tap(self, reader: GpuReader) -> GpuReader:
        """The same reader; what it reads is recorded."""
        return _Tap(reader, self._samples.extend)

    def drain(self) -> None:
        """Write what is pending. A full disk costs the recording, not the engine."""
        if self._writer is None:
            return
        steps = [self._steps.popleft() for _ in range(len(self._steps))]
        samples, self._samples[:] = list(self._samples), ()
        try:
            self._writer.write(steps, samples)
        except OSError as error:
            logger.error("the recording ends here: %s", error)
            self._writer = None

    def close(self) -> None:
        """Write what is pending and finish the file."""
        self.drain()
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class _Tap:
    def __init__(self, reader: GpuReader, sink: Callable[[tuple[GpuSample, ...]], object]) -> None:
        self._reader, self._sink = reader, sink

    @property
    def gpus(self) -> tuple[GpuIdentity, ...]:
        return self._reader.gpus

    def read(self) -> tuple[GpuSample, ...]:
        samples = self._reader.read()
        self._sink(samples)
        return samples

    def close(self) -> None:
        self._reader.close()


class Telemetry:
    """The sampler's `on_tick`: writes the status block, the log and the recording.

    `counters` is the scheduler thread's; it is read here while that thread counts, so
    two numbers of one scrape may be a step apart.
    """

    def __init__(
        self,
        status: StatusWriter,
        windows: MeterWindows,
        log: DecisionLog,
        recorder: Recorder | None = None,
    ) -> None:
        self._status, self._windows, self._log = status, windows, log
        self._recorder = recorder
        self.counters = SchedulerCounters()
        self._first_joules: float | None = None
        self._last: PowerState | None = None
        self._derived = (NAN, NAN)

    def tick(
        self, now_seconds: float, state: PowerState | None, errors: int, rejected: int
    ) -> None:
        """Write everything once."""
        if state is not None and state is not self._last:
            self._derived = self._windows.observe(state)
            self._last = state
        self._status.write("sampler", self._values(now_seconds, state, errors, rejected))
        self._status.write("scheduler", self.counters.values())
        self._log.drain()
        if self._recorder is not None:
            self._recorder.drain()

    def _values(
        self, now_seconds: float, state: PowerState | None, errors: int, rejected: int
    ) -> list[float]:
        if state is None:
            return [NAN] * 9 + [errors, rejected, NAN, now_seconds]
        energy = state.energy_joules
        if energy is not None and self._first_joules is None:
            self._first_joules = energy
        since = NAN if energy is None else energy - (self._first_joules or 0.0)
        return [
            *(_or_nan(state.instant_watts), _or_nan(state.average_watts), since),
            *(_or_nan(state.enforced_limit_watts), _or_nan(state.sm_clock_hertz)),
            *(_or_nan(state.temperature_celsius), float(state.clock_event_reasons)),
            *self._derived,
            *(errors, rejected, state.sampled_seconds, now_seconds),
        ]


def _or_nan(value: float | None) -> float:
    return NAN if value is None else value
