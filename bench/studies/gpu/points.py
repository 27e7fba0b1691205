"""One measured point: what ran between two times, and what the meter said of it."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shaper.core.types import GpuSample
from shaper.recording.format import RecordedStep

_SETTING_WORDS = {"on_seconds": "waves of {:g} s", "cadence_seconds": "every {:g} s"}


@dataclass(frozen=True, slots=True)
class Point:
    """Means over one stretch of one load. None where nothing could say."""

    stage: str
    settings: Mapping[str, float]
    when: str
    """`cold`, `hot`, or what ran where there are no settings."""
    seconds: float
    steps: int = 0
    tokens: int = 0
    mean_context_tokens: float | None = None
    """Of a decode, with its own token; of a chunk, before it."""
    step_seconds: float | None = None
    """Median, from launch (or the predecessor's end) to the output."""
    busy_ratio: float = 0.0
    """Share of the time in which a step ran."""
    watts: float | None = None
    """From the energy counter between its first and last change inside the stretch."""
    step_joules: float | None = None
    """Mean joules per step, the gaps between steps included."""
    tokens_per_joule: float | None = None
    instant_watts: float | None = None
    average_watts: float | None = None
    sm_clock_hertz: float | None = None
    lowest_sm_clock_hertz: float | None = None
    temperature_celsius: float | None = None
    clock_event_reasons: int = 0

    def label(self) -> str:
        """The settings in words."""
        parts = [
            _SETTING_WORDS.get(name, name.removesuffix("_tokens") + " {:g}").format(value)
            for name, value in self.settings.items()
        ]
        return ", ".join([*parts, *filter(None, [self.when])])


def changes(series: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """(seconds, value) where a reading changed: half way between the two samples around it."""
    return [
        ((before + after) / 2.0, value)
        for (before, old), (after, value) in itertools.pairwise(series)
        if value != old
    ]


def series(samples: Sequence[GpuSample], name: str) -> list[tuple[float, float]]:
    """(seconds, value) of one reading, where it was read."""
    return [(s.read_seconds, v) for s in samples if (v := getattr(s, name)) is not None]


def make_point(
    stage: str,
    settings: Mapping[str, float],
    span: tuple[float, float],
    steps: Sequence[RecordedStep],
    samples: Sequence[GpuSample],
    when: str = "",
) -> Point:
    """Sums up what happened in `span` (start and end, in seconds of the monotonic clock)."""
    start, end = span
    inside = [s for s in samples if start <= s.read_seconds <= end]
    ran = [s for s in steps if s.start_seconds >= start - 1e-3 and s.end_seconds <= end + 1e-3]
    lengths = [s.end_seconds - s.start_seconds for s in ran]
    tokens = sum(s.batch.tokens for s in ran)
    moved = changes(series(inside, "energy_joules"))
    watts = joules = None
    if len(moved) >= 2:
        watts = (moved[-1][1] - moved[0][1]) / (moved[-1][0] - moved[0][0])
        joules = watts * (end - start)
    clocks = [hertz for _, hertz in series(inside, "sm_clock_hertz")]
    return Point(
        stage=stage,
        settings=settings,
        when=when,
        seconds=end - start,
        steps=len(ran),
        tokens=tokens,
        mean_context_tokens=_mean_context(ran),
        step_seconds=float(np.median(lengths)) if lengths else None,
        busy_ratio=min(1.0, sum(lengths) / (end - start)) if end > start else 0.0,
        watts=watts,
        step_joules=joules / len(ran) if joules and ran else None,
        tokens_per_joule=tokens / joules if joules and tokens else None,
        instant_watts=_mean(series(inside, "instant_watts")),
        average_watts=_mean(series(inside, "average_watts")),
        sm_clock_hertz=_mean(series(inside, "sm_clock_hertz")),
        lowest_sm_clock_hertz=min(clocks, default=None),
        temperature_celsius=_mean(series(inside, "temperature_celsius")),
        clock_event_reasons=functools.reduce(
            operator.or_, (int(s.clock_event_reasons) for s in inside), 0
        ),
    )


@dataclass(frozen=True, slots=True)
class BetweenSteps:
    """A line through the cadence points of one batch: watts = gap + excess * steps/s."""

    when: str
    """`cold`, or `hot` after the heaviest load."""
    batch: int
    temperature_celsius: float | None
    gap_watts: float
    """What the GPU draws between steps."""
    error_watts: float | None
    """Standard error of that; None with two points."""
    step_excess_joules: float
    """What a step takes above the gap level."""


def between_steps(points: Sequence[Point]) -> list[BetweenSteps]:
    """The power between steps, cold and hot and per batch, from the cadence points."""
    groups: dict[tuple[str, int], list[Point]] = {}
    for point in points:
        if "cadence_seconds" in point.settings and point.watts is not None:
            key = point.when, int(point.settings["batch"])
            groups.setdefault(key, []).append(point)
    found = []
    for (when, batch), rows in groups.items():
        rates = np.array([p.steps / p.seconds for p in rows])
        watts = np.array([p.watts for p in rows], dtype=np.float64)
        matrix = np.column_stack([np.ones_like(rates), rates])
        if np.linalg.matrix_rank(matrix) < 2:
            continue
        (gap, excess), *_ = np.linalg.lstsq(matrix, watts, rcond=None)
        error = None
        if len(rows) > 2:
            rest = watts - matrix @ np.array([gap, excess])
            spread = float(rest @ rest) / (len(rows) - 2)
            error = float(np.sqrt(spread * np.linalg.inv(matrix.T @ matrix)[0, 0]))
        known = [(0.0, c) for p in rows if (c := p.temperature_celsius) is not None]
        found.append(BetweenSteps(when, batch, _mean(known), float(gap), error, float(excess)))
    return found


def _mean_context(steps: Sequence[RecordedStep]) -> float | None:
    decodes = sum(s.batch.decode_requests for s in steps)
    if decodes:
        return sum(s.batch.decode_context_tokens for s in steps) / decodes
    chunks = sum(s.batch.prefill_requests for s in steps)
    if not chunks:
        return None
    before = sum(s.batch.prefill_context_tokens - s.batch.prefill_tokens for s in steps)
    return before / chunks


def _mean(series: Sequence[tuple[float, float]]) -> float | None:
    return sum(value for _, value in series) / len(series) if series else None
