"""The meter stage: square waves of load, and what the readings make of them.

The load is prefill chunks, which draw the most and last some milliseconds each. Every
reading is compared with a model of itself: the mean, over a window that ends a delay
before the reading, of a power that is one level while steps run and another while
none do. The window and delay that leave the smallest error are the meter's.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.characterise.points import make_point
from bench.characterise.stages import Session
from shaper.core.types import ClockEventReasons, GpuSample
from shaper.emulator.host import sleep_until
from shaper.recording.format import RecordedStep

FloatArray = npt.NDArray[np.float64]
READINGS = ("instant_watts", "average_watts")
_WINDOWS_SECONDS: tuple[float, ...] = tuple(np.geomspace(0.005, 2.0, 60).tolist())
_DELAYS_SECONDS: tuple[float, ...] = tuple(0.005 * count for count in range(41))
_FEWEST_CHANGES = 12
# Rest over load of a wave. With 1 a wave of 50 ms would keep step with a meter that is
# refreshed every 100 ms, and show it one phase of the wave only.
_REST_RATIO = 1.13


@dataclass(frozen=True, slots=True)
class MeterFinding:
    """What the waves show of one reading. None where they show nothing."""

    reading: str
    refresh_seconds: float | None
    """Median time between two changes; no finer than the samples."""
    window_seconds: float | None = None
    delay_seconds: float | None = None
    load_watts: float | None = None
    rest_watts: float | None = None
    error_watts: float | None = None
    """Root mean square of what the best window does not explain."""


def meter(session: Session) -> None:
    """Runs the waves, then a long load from rest; infers the meter's windows from both."""
    plan = session.plan
    steps: list[RecordedStep] = []
    samples: list[GpuSample] = []
    period_ratio = 1.0 + _REST_RATIO
    context = min(plan.contexts_tokens)
    chunk = plan.wave_chunk_tokens
    for on in plan.wave_seconds:
        cycles = max(2, round(plan.wave_total_seconds / (period_ratio * on)))
        if not session.has_time("meter", f"waves of {on:g} s", period_ratio * on * cycles + 2.0):
            continue
        count = int(cycles * on * _rate(steps)) + cycles
        session.runner.start_chunks(context, chunk, count)
        sleep_until(time.monotonic() + plan.settle_seconds)
        ran, read = _wave(session, on, cycles)
        steps += ran
        samples += read
    session.findings["meter"] = [
        asdict(finding)
        for finding in infer_meter(session.steps, samples, plan.sample_interval_seconds)
    ]
    session.findings["power_cap"] = _cap(session, context)
    session.runner.clear()


def _rate(steps: Sequence[RecordedStep]) -> float:
    """Steps a second while steps run; with a margin, since what is left over is dropped."""
    if not steps:
        return 200.0
    return 1.3 / float(np.median([s.end_seconds - s.start_seconds for s in steps]))


def _wave(
    session: Session, on_seconds: float, cycles: int
) -> tuple[list[RecordedStep], list[GpuSample]]:
    def run() -> None:
        begin = time.monotonic()
        period = (1.0 + _REST_RATIO) * on_seconds
        for cycle in range(cycles):
            rise = begin + period * cycle
            sleep_until(rise)
            while time.monotonic() < rise + on_seconds and session.runner.step():
                pass
            session.runner.drain()
        sleep_until(begin + period * cycles)

    _, steps, samples = session.measure("meter", {"on_seconds": on_seconds}, run)
    return steps, samples


def _cap(session: Session, context: int) -> dict[str, Any]:
    """A load that draws the most, from rest: how the power cap acts on it."""
    plan = session.plan
    seconds = plan.seconds_per_point
    if not session.has_time("meter", "the power cap", 2 * seconds + 2.0):
        return {}
    count = max(4, int(2 * seconds * 50_000 / plan.cap_chunk_tokens))
    session.runner.start_chunks(context, plan.cap_chunk_tokens, count)
    session.collect()
    time.sleep(min(1.0, seconds))
    start = time.monotonic()
    while time.monotonic() < start + seconds and session.runner.step():
        pass
    session.runner.drain()
    end = time.monotonic()
    steps, samples = session.collect()
    settings = {"chunk_tokens": plan.cap_chunk_tokens, "context_tokens": context}
    session.points.append(make_point("meter", settings, (start, end), steps, samples))
    return describe_cap([s for s in samples if s.read_seconds >= start], start)


def describe_cap(samples: Sequence[GpuSample], start_seconds: float) -> dict[str, Any]:
    """When the cap set in, and where power and clock went."""
    limits = [s.enforced_limit_watts for s in samples if s.enforced_limit_watts]
    capped = [s for s in samples if s.clock_event_reasons & ClockEventReasons.SW_POWER_CAP]
    instant = [s.instant_watts for s in samples if s.instant_watts is not None]
    clocks = [s.sm_clock_hertz for s in samples if s.sm_clock_hertz is not None]
    late = clocks[len(clocks) // 2 :]
    found: dict[str, Any] = {
        "enforced_limit_watts": limits[-1] if limits else None,
        "capped_ratio": len(capped) / len(samples) if samples else None,
        "first_capped_seconds": capped[0].read_seconds - start_seconds if capped else None,
        "highest_instant_watts": max(instant) if instant else None,
        "first_sm_clock_hertz": clocks[0] if clocks else None,
        "lowest_sm_clock_hertz": min(clocks) if clocks else None,
        "settled_sm_clock_hertz": float(np.mean(late)) if late else None,
    }
    return found


def infer_meter(
    steps: Sequence[RecordedStep], samples: Sequence[GpuSample], interval_seconds: float
) -> list[MeterFinding]:
    """Refresh, window and delay of each reading of the first GPU.

    Args:
        steps: that made the waves, in order.
        samples: read meanwhile, in order.
        interval_seconds: between samples; no delay shorter than that can be told.
    """
    first = [s for s in samples if s.gpu_index == samples[0].gpu_index]
    energies = [(s.read_seconds, s.energy_joules) for s in first if s.energy_joules is not None]
    found = [MeterFinding("energy_joules", _refresh([t for t, _ in _changes(energies)]))]
    for name in READINGS:
        series = [(s.read_seconds, getattr(s, name)) for s in first if getattr(s, name) is not None]
        changes = _changes(series)
        refresh = _refresh([t for t, _ in changes])
        if len(changes) < _FEWEST_CHANGES or not steps:
            found.append(MeterFinding(name, refresh))
            continue
        found.append(_best_window(name, refresh, changes, steps, interval_seconds))
    return found


def _changes(series: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """(when, value) of each change: half way between the two samples around it."""
    return [
        ((before + after) / 2.0, value)
        for (before, old), (after, value) in itertools.pairwise(series)
        if value != old
    ]


def _refresh(times: Sequence[float]) -> float | None:
    return float(np.median(np.diff(times))) if len(times) >= 3 else None


def _best_window(
    name: str,
    refresh: float | None,
    changes: Sequence[tuple[float, float]],
    steps: Sequence[RecordedStep],
    interval_seconds: float,
) -> MeterFinding:
    at = np.array([t for t, _ in changes])
    watts = np.array([w for _, w in changes])
    best: tuple[float, float, float, FloatArray] | None = None
    longest_delay = max(interval_seconds, refresh or 0.0)
    for window in _WINDOWS_SECONDS:
        for delay in _DELAYS_SECONDS:
            if delay > longest_delay:
                break
            busy = _busy_seconds(steps, at - delay) - _busy_seconds(steps, at - delay - window)
            matrix = np.column_stack([np.ones_like(busy), busy / window])
            level = np.linalg.lstsq(matrix, watts, rcond=None)[0]
            if level[1] <= 0.0:
                continue  # a load that draws less than rest: the window is not that
            error = float(np.sqrt(np.mean((matrix @ level - watts) ** 2)))
            if best is None or error < best[0]:
                best = (error, window, delay, level)
    if best is None:
        return MeterFinding(name, refresh)
    error, window, delay, level = best
    return MeterFinding(
        reading=name,
        refresh_seconds=refresh,
        window_seconds=window,
        delay_seconds=delay,
        load_watts=float(level[0] + level[1]),
        rest_watts=float(level[0]),
        error_watts=error,
    )


def _busy_seconds(steps: Sequence[RecordedStep], at: FloatArray) -> FloatArray:
    """Seconds in which a step ran, from the beginning until each of these times."""
    edges = np.array([[s.start_seconds, s.end_seconds] for s in steps]).ravel()
    edges = np.maximum.accumulate(edges)
    lengths = edges[1::2] - edges[0::2]
    totals = np.empty_like(edges)
    totals[1::2] = np.cumsum(lengths)
    totals[0::2] = totals[1::2] - lengths
    found: FloatArray = np.interp(at, edges, totals)
    return found
