"""The ledger of one engine's power: joules that were spent, and joules promised.

Law. A limit `(watts, window)` holds when for every time `t` the energy of
`[t - window, t]` is at most `watts * window`. Energy over time is kept as a
piecewise-linear curve `C(t)` whose corners are the starts and ends of steps,
so the question "may a step of this length start then, and at how many watts"
has an exact answer: the left side of

    C(t) - C(t - window) <= watts * window

is piecewise linear in `t`, hence greatest at a corner of `C(t)` or of
`C(t - window)`, and at each corner it is linear in the step's watts.

After the step the curve goes on at the *floor*: what the engine will draw
whatever is decided next (idle power, and the decodes that must go on). A step
that would leave the floor no room until the window has moved past it does not
fit, so that a window is never spent early and the decodes starved late.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shaper.core.types import PowerLimit
from shaper.errors import LedgerError

Array = npt.NDArray[np.float64]

# A step of 5 ms makes two corners; 4096 corners are 10 s of steps before the
# first compaction. The arrays grow when a window needs more.
_INITIAL_CORNERS = 4096


class Ledger:
    """Energy of the past and of steps in flight, against the limits.

    Args:
        limits: may be empty; then everything fits.
        idle_watts: what the engine's GPUs draw between steps, all together.
        start_seconds: the ledger's first moment; before it, idle is assumed.
    """

    def __init__(
        self, limits: Sequence[PowerLimit], idle_watts: float, start_seconds: float
    ) -> None:
        self._limits = tuple(limits)
        self._idle_watts = idle_watts
        self._longest_seconds = max((x.window_seconds for x in limits), default=1.0)
        self._times = np.zeros(_INITIAL_CORNERS)
        self._joules = np.zeros(_INITIAL_CORNERS)
        history = self._keep_seconds
        self._times[0] = start_seconds - history
        self._times[1] = start_seconds
        self._joules[1] = idle_watts * history
        self._count = 2

    @property
    def limits(self) -> tuple[PowerLimit, ...]:
        """The limits in force."""
        return self._limits

    @property
    def end_seconds(self) -> float:
        """The time up to which energy is entered."""
        return float(self._times[self._count - 1])

    @property
    def _keep_seconds(self) -> float:
        # Energy-counter deltas are compared over a few seconds of the past.
        return self._longest_seconds + 5.0

    def spend(self, start_seconds: float, end_seconds: float, joules: float) -> None:
        """Enter a run that is over; the time since the last entry was idle.

        A run that starts before the last entry's end is moved to it: the device
        runs one step at a time. Time that runs backwards is ignored.
        """
        if not (math.isfinite(joules) and math.isfinite(end_seconds)):
            raise LedgerError(f"a run of {joules} J until {end_seconds} s can't be entered")
        start_seconds = max(start_seconds, self.end_seconds)
        if start_seconds > self.end_seconds:
            self._append(start_seconds, self._idle_watts * (start_seconds - self.end_seconds))
        if end_seconds > start_seconds:
            self._append(end_seconds, max(0.0, joules))

    def _append(self, time_seconds: float, joules: float) -> None:
        if self._count == len(self._times):
            self._compact()
        self._times[self._count] = time_seconds
        self._joules[self._count] = self._joules[self._count - 1] + joules
        self._count += 1

    def _compact(self) -> None:
        oldest = self.end_seconds - self._keep_seconds
        first = int(np.searchsorted(self._times[: self._count], oldest, side="right")) - 1
        first = max(0, first)
        kept = self._count - first
        size = len(self._times) * (2 if kept > len(self._times) // 2 else 1)
        times, joules = np.zeros(size), np.zeros(size)
        times[:kept] = self._times[first : self._count]
        # Start from zero again, so that years of joules cost no precision.
        joules[:kept] = self._joules[first : self._count] - self._joules[first]
        self._times, self._joules, self._count = times, joules, kept

    def joules_between(self, start_seconds: float, end_seconds: float) -> float:
        """Energy entered for `[start, end]`; idle after the last entry.

        Raises:
            LedgerError: `start_seconds` is older than what is kept.
        """
        times, joules = self._times[: self._count], self._joules[: self._count]
        if start_seconds < times[0]:
            raise LedgerError(
                f"the ledger begins at {times[0]:.3f} s and was asked about {start_seconds:.3f} s"
            )
        low, high = np.interp((start_seconds, end_seconds), times, joules)
        idle_seconds = max(0.0, end_seconds - max(start_seconds, self.end_seconds))
        return float(high - low) + idle_seconds * self._idle_watts

    def ask(
        self,
        start_seconds: float,
        floor_watts: float,
        in_flight: Sequence[tuple[float, float, float]] = (),
        margin_ratio: float = 0.0,
    ) -> Room:
        """What a step that starts at `start_seconds` may draw.

        Args:
            start_seconds: when it would start.
            floor_watts: power after it. A floor above a limit is taken as
                90% of that limit: the step is then bounded by what the past leaves.
            in_flight: runs launched and not yet over, as `(start, end, joules)` in
                their order; the last one ends at or before `start_seconds`.
            margin_ratio: part of each limit that is kept free.
        """
        if not self._limits:
            return Room(())
        times, joules = self._known(start_seconds, in_flight)
        # 90%: see Args. A chunk needs some room, or prompts would wait for ever.
        parts = (
            _LimitRoom(
                times, joules, limit.window_seconds, allowed, min(floor_watts, 0.9 * allowed)
            )
            for limit in self._limits
            for allowed in (limit.watts * (1.0 - margin_ratio),)
        )
        return Room(tuple(parts))

    def _known(
        self, start_seconds: float, in_flight: Sequence[tuple[float, float, float]]
    ) -> tuple[Array, Array]:
        """The curve's corners up to `start_seconds`, from just before the longest window."""
        known = self._times[: self._count]
        oldest = start_seconds - self._longest_seconds
        first = max(0, int(known.searchsorted(oldest, side="right")) - 1)
        time, total = float(known[-1]), float(self._joules[self._count - 1])
        more: list[tuple[float, float]] = []
        for begin, end, step_joules in in_flight:
            if begin > time:
                total += self._idle_watts * (begin - time)
                time = begin
                more.append((time, total))
            if end > time:
                total += step_joules
                time = end
                more.append((time, total))
        if start_seconds > time:
            more.append((start_seconds, total + self._idle_watts * (start_seconds - time)))
        corners = np.empty((2, self._count - first + len(more)))
        corners[0, : self._count - first] = known[first:]
        corners[1, : self._count - first] = self._joules[first : self._count]
        if more:
            corners[:, self._count - first :] = np.array(more).T
        return corners[0], corners[1]


class _LimitRoom:
    """One limit's answer for steps that start at `times[-1]`.

    With the step at `p` watts, a window that ends `x` after the step's start
    holds `C(start) - C(start + x - window)` from the past, `p * min(x, seconds)`
    of the step and `floor * (x - seconds)` after it. That must stay within
    `limit * window` at each corner `x`.
    """

    def __init__(
        self,
        times: Array,
        joules: Array,
        window_seconds: float,
        limit_watts: float,
        floor_watts: float,
    ) -> None:
        self._times, self._joules = times, joules
        self._window_seconds, self._floor_watts = window_seconds, floor_watts
        start = times[-1]
        first = int(times.searchsorted(start - window_seconds, side="right"))
        self._after = times[first:] + (window_seconds - start)
        self._budget = limit_watts * window_seconds - joules[-1]
        self._room = joules[first:] + self._budget

    def max_watts(self, seconds: float) -> float:
        after, floor = self._after, self._floor_watts
        room = self._room - floor * np.maximum(after - seconds, 0.0)
        lowest = float((room / np.minimum(after, seconds)).min())
        # The step's own end is a corner too, unless the window is shorter than the step.
        if seconds < self._window_seconds:
            behind = self._times[-1] + seconds - self._window_seconds
            spent = float(np.interp(behind, self._times, self._joules))
            lowest = min(lowest, (self._budget + spent) / seconds)
        return lowest


class Room:
    """What every limit leaves for a step that starts at one given time."""

    def __init__(self, parts: tuple[_LimitRoom, ...]) -> None:
        self._parts = parts
        self._answers: dict[float, float] = {}

    def max_watts(self, seconds: float) -> float:
        """The highest mean power at which a step of this length fits.

        Args:
            seconds: the step's length, above 0.

        Returns:
            Watts; below 0 when a step of no watts at all would still leave a window
            too full, infinity without limits.
        """
        if not self._parts:
            return math.inf
        # The step that is planned is the one that is launched, so it is asked about twice.
        answer = self._answers.get(seconds)
        if answer is None:
            answer = min(part.max_watts(seconds) for part in self._parts)
            self._answers[seconds] = answer
        return answer
