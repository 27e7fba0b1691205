"""An exact judge of what engines of a group drew, that knows nothing of rows or bins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from shaper.core.ledger.ledger import Ledger
from shaper.core.ledger.shared import Committed
from shaper.core.types import PowerBudget, PowerLimit

Run = tuple[float, float, float]
"""Start seconds, end seconds, watts."""


@dataclass
class Drawn:
    """What one engine's GPUs really drew."""

    idle_watts: float
    rest_watts: float
    rest_after_seconds: float
    joined_seconds: float
    counted_seconds: float
    """When its idle power begins to count: what others had committed when it joined is over."""
    until_seconds: float = math.inf
    runs: list[Run] = field(default_factory=list)

    def powers(self, end_seconds: float) -> list[Run]:
        """Its power from the beginning to `end_seconds`, piece by piece."""
        end = min(end_seconds, self.until_seconds)
        pieces: list[Run] = []
        free = self.joined_seconds
        for start, stop, watts in [*sorted(self.runs), (end, end, 0.0)]:
            rest = min(free + self.rest_after_seconds, max(start, free))
            for begin, until, quiet in (
                (free, rest, self.idle_watts),
                (rest, start, self.rest_watts),
            ):
                pieces.append((max(begin, self.counted_seconds), until, quiet))
            pieces.append((start, stop, watts))
            free = max(free, stop)
        return [piece for piece in pieces if piece[1] > piece[0]]


def excess_joules(engines: Sequence[Drawn], limit: PowerLimit, end_seconds: float) -> float:
    """By how much the fullest window holds more than the limit; below 0 if none does."""
    pieces = [piece for engine in engines for piece in engine.powers(end_seconds)]
    if not pieces:
        return -limit.watts * limit.window_seconds
    corners = np.unique(np.array([time for start, stop, _ in pieces for time in (start, stop)]))
    total = np.zeros(len(corners))
    for start, stop, watts in pieces:
        total += watts * np.clip(corners - start, 0.0, stop - start)
    ends: npt.NDArray[np.float64] = np.concatenate((corners, corners + limit.window_seconds))
    within = np.interp(ends, corners, total) - np.interp(
        ends - limit.window_seconds, corners, total
    )
    return float(within.max()) - limit.watts * limit.window_seconds


class Device:
    """One engine's own account of runs in flight and over, as a controller keeps it."""

    def __init__(self, drawn: Drawn) -> None:
        self.drawn = drawn
        self.ledger = Ledger(
            PowerBudget(),
            drawn.idle_watts,
            drawn.joined_seconds,
            rest_watts=drawn.rest_watts,
            rest_after_seconds=drawn.rest_after_seconds,
        )
        self.flying: list[Run] = []

    def free_seconds(self, now_seconds: float) -> float:
        """When a step launched now would start."""
        return max(now_seconds, self.flying[-1][1]) if self.flying else now_seconds

    def committed(self, more: Sequence[Run] = ()) -> Committed:
        """Runs over, in flight, and some more."""
        flights = [(a, b, watts * (b - a)) for a, b, watts in (*self.flying, *more)]
        final = self.ledger.end_seconds
        return Committed(final, *self.ledger.corners(final - 0.05, flights))

    def launch(self, run: Run) -> None:
        """A claimed run is on its way, and will be drawn whatever happens to the engine."""
        self.flying.append(run)
        self.drawn.runs.append(run)

    def finish(self, end_seconds: float) -> None:
        """The oldest run ended, at this power, now or before."""
        start, planned, watts = self.flying.pop(0)
        end = min(end_seconds, planned)
        self.drawn.runs.remove((start, planned, watts))
        if end > start:
            self.drawn.runs.append((start, end, watts))
            self.ledger.spend(start, end, watts * (end - start))
