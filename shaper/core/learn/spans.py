"""What ran when, by kind; and the moves of the energy counter, dated.

The counter's value is refreshed about every 100 ms and read every 20 ms: a move that one
reading shows happened after the reading before. So an edge is a bracket of time, not a
time, and the work done until it is the mean over the bracket.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import log2

from shaper.core.types import StepBatch

# The kinds of a step's joules above the power between steps. What a decode costs moves
# from reading weights to reading caches and computing; what a prompt costs, to computing.
DECODE_FEW, DECODE_MANY, PROMPT_SHORT, PROMPT_MIDDLE, PROMPT_LONG = range(5)
KINDS = 5
# Where they pass into each other: decodes of a step, and its tokens, in powers of two.
_DECODES_LOG2, _TOKENS_LOG2 = (3.0, 8.0), (8.0, 12.0)
# A GPU without work falls to the power of a mere context after some time (50 ms on a
# Hopper): what it draws later is learned apart.
_REST_SECONDS = 0.05
_KEEP_SECONDS = 4.0
_TRIM_CORNERS = 512


def kind_of(batch: StepBatch) -> tuple[int, float]:
    """The lower one of two kinds that a step lies between, and how far towards the other."""
    if batch.prefill_tokens:
        size = batch.prefill_tokens + batch.decode_tokens
        power = (log2(size) - 8.0) / 1.5
        if power >= 1.0:
            return PROMPT_MIDDLE, min(power - 1.0, 1.0)
        return PROMPT_SHORT, max(power, 0.0)
    size = batch.decode_tokens
    part = (log2(size) - 3.0) / 5.0 if size else 0.0
    return DECODE_FEW, min(max(part, 0.0), 1.0)


Work = tuple[float, ...]
"""Predicted joules above idle by kind, then seconds at rest; since the curve's start."""


class WorkCurve:
    """Cumulative work at the starts and ends of runs, over the last seconds."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._work: list[Work] = []

    @property
    def end_seconds(self) -> float:
        """The end of the last run; minus infinity before the first."""
        return self._times[-1] if self._times else float("-inf")

    @property
    def start_seconds(self) -> float:
        """Where the kept curve begins."""
        return self._times[0] if self._times else float("inf")

    def append(
        self, start: float, end: float, kind: tuple[int, float], joules: float
    ) -> None:
        """A run of `joules` above idle. One that overlaps the last is cut to what follows it."""
        if not self._times:
            self._times.append(start)
            self._work.append((0.0,) * (KINDS + 1))
        work = self._work[-1]
        rest_start = self._times[-1] + _REST_SECONDS
        if start > self._times[-1]:
            if start > rest_start:
                self._corner(rest_start, work)
                work = (*work[:KINDS], work[KINDS] + start - rest_start)
            self._corner(start, work)
        if end <= self._times[-1]:
            return
        first, part = kind
        values = list(work)
        values[first] += joules * (1.0 - part)
        values[first + 1] += joules * part
        self._corner(end, tuple(values))

    def _corner(self, at: float, work: Work) -> None:
        self._times.append(at)
        self._work.append(work)
        if len(self._times) > _TRIM_CORNERS and len(self._times) % 64 == 0:
            cut = bisect_right(self._times, at - _KEEP_SECONDS) - 1
            if cut > 0:
                del self._times[:cut], self._work[:cut]

    def at(self, seconds: float) -> Work:
        """The work until a time that is kept."""
        index = bisect_right(self._times, seconds)
        if index == 0:
            return self._work[0]
        if index == len(self._times):
            return self._work[-1]
        begin = self._times[index - 1]
        part = (seconds - begin) / (self._times[index] - begin)
        return tuple(
            [
                a + part * (b - a)
                for a, b in zip(self._work[index - 1], self._work[index], strict=True)
            ]
        )


@dataclass(frozen=True, slots=True)
class Edge:
    """A move of the counter: its new value was reached after `low` and by `high`."""

    low_seconds: float
    high_seconds: float
    energy_joules: float


@dataclass(frozen=True, slots=True)
class EdgeWork:
    """The work until an edge: the mean over its bracket, and at both sides of it."""

    seconds: float
    mean: Sequence[float]
    low: Work
    high: Work
    width_seconds: float


def edge_work(curve: WorkCurve, edge: Edge, lag_seconds: float) -> EdgeWork:
    """What had run when the counter took an edge's value, `lag_seconds` before it showed."""
    low, high = edge.low_seconds - lag_seconds, edge.high_seconds - lag_seconds
    quarter = (high - low) / 4.0
    points = [curve.at(low + quarter * index) for index in range(5)]
    # The trapezium rule; a bracket is about as long as a step.
    mean = [
        (a + e) / 8.0 + (b + c + d) / 4.0 for a, b, c, d, e in zip(*points, strict=True)
    ]
    return EdgeWork((low + high) / 2.0, mean, points[0], points[4], high - low)
