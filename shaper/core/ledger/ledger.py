"""The ledger of one engine's power: joules that were spent, and joules promised.

Law. A limit `(watts, window)` holds when for every time `t` the energy of
`[t - window, t]` is at most `watts * window`. Energy over time is kept as a
piecewise-linear curve `C(t)` whose corners are the starts and ends of steps,
so the question "may a step of this length start then, and at how many watts"
has an exact answer (`core/ledger/headroom.py`).

After the step the curve goes on at the *floor*: what the engine will draw
whatever is decided next (idle power, and the decodes that must go on). A step
that would leave the floor no headroom until the window has moved past it does not
fit, so that a window is never spent early and the decodes starved late.

A limit that is lowered counts the energy of before at no more than the new
limit, by one factor for all of it: a long window would else stop service until the
past has left it. A past that keeps the new limit counts as it was, so that changes
which change little forgive nothing.

The ramp limit is one more window of 100 ms, whose watts are the lowest mean of
100 ms about a second ago, plus what may be added in a second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from shaper.core.ledger.curve import Array, EnergyCurve
from shaper.core.ledger.headroom import UNBOUNDED, Headroom, WindowHeadroom
from shaper.core.ledger.window import Ramp, Run, Window
from shaper.core.types import PowerBudget
from shaper.errors import LedgerError

# The longest window that a budget may have is 60 s.
_HISTORY_SECONDS = 65.0


class Ledger:
    """Energy of the past and of steps in flight, against the budget.

    Args:
        budget: may be empty; then everything fits.
        idle_watts: what the engine's GPUs draw between steps, all together.
        start_seconds: the ledger's first moment.
        rest_watts: what they draw when nothing ran for `rest_after_seconds`; by default the same.
        rest_after_seconds: see `rest_watts`.
        full: take every window as used up at the start, because it is unknown what ran
            before; by default idle is assumed.
    """

    def __init__(
        self,
        budget: PowerBudget,
        idle_watts: float,
        start_seconds: float,
        *,
        rest_watts: float | None = None,
        rest_after_seconds: float = math.inf,
        full: bool = False,
    ) -> None:
        self._idle_watts = idle_watts
        self._rest_watts = idle_watts if rest_watts is None else rest_watts
        self._rest_after_seconds = rest_after_seconds
        self.end_seconds = start_seconds
        """The time up to which energy is entered."""
        self._busy_end_seconds = start_seconds
        past_watts = max((x.watts for x in budget.limits), default=idle_watts)
        self._history = EnergyCurve(start_seconds - _HISTORY_SECONDS, _HISTORY_SECONDS)
        self._history.append(
            start_seconds, (past_watts if full else self._rest_watts) * _HISTORY_SECONDS
        )
        self._windows: tuple[Window, ...] = ()
        self.budget = PowerBudget()
        self.set_budget(budget)

    def set_budget(self, budget: PowerBudget, in_flight: Sequence[Run] = ()) -> None:
        """Put another budget in force.

        Args:
            budget: the new one.
            in_flight: runs launched and not yet over, as for `ask`. Neither they nor what was
                entered could be chosen by the new budget; they count at no more than its watts.
        """
        windows: list[Window] = [
            Window(limit.watts, limit.window_seconds) for limit in budget.limits
        ]
        if budget.ramp_watts_per_second is not None:
            windows.append(Ramp(budget.ramp_watts_per_second))
        count = self._history.count
        times, joules = self._history.times[:count], self._history.joules[:count]
        for window in windows:
            first = int(times.searchsorted(self.end_seconds - window.keep_seconds, "right")) - 1
            window.begin(times[max(0, first) :], joules[max(0, first) :], in_flight)
        self._windows = tuple(windows)
        self._lowest_watts = min((x.watts for x in budget.limits), default=math.inf)
        windows_seconds = (x.window_seconds for x in budget.limits)
        self.longest_window_seconds = max(windows_seconds, default=0.0)
        self.budget = budget

    def spend(self, start_seconds: float, end_seconds: float, joules: float) -> None:
        """Enter a run that is over; the time since the last entry was idle.

        A run that starts before the last entry's end is moved to it: the device
        runs one step at a time. Time that runs backwards is ignored.
        """
        if not (math.isfinite(joules) and math.isfinite(end_seconds)):
            raise LedgerError(f"a run of {joules} J until {end_seconds} s can't be entered")
        if start_seconds > self.end_seconds:
            for run in self._idle(self.end_seconds, start_seconds, self._busy_end_seconds):
                self._enter(*run)
        start_seconds = self.end_seconds
        if end_seconds > start_seconds:
            self._enter(start_seconds, end_seconds, max(0.0, joules))
            self._busy_end_seconds = end_seconds

    def _enter(self, start_seconds: float, end_seconds: float, joules: float) -> None:
        self._history.append(end_seconds, joules)
        for window in self._windows:
            window.enter(start_seconds, end_seconds, joules)
        self.end_seconds = end_seconds

    def _idle(self, begin: float, end: float, busy_end: float) -> list[Run]:
        """The idle time `[begin, end]` after a run that ended at `busy_end`."""
        if end <= begin:
            return []
        change = busy_end + self._rest_after_seconds
        if change >= end:
            return [(begin, end, self._idle_watts * (end - begin))]
        if change <= begin:
            return [(begin, end, self._rest_watts * (end - begin))]
        return [
            (begin, change, self._idle_watts * (change - begin)),
            (change, end, self._rest_watts * (end - change)),
        ]

    def joules_between(self, start_seconds: float, end_seconds: float) -> float:
        """Energy entered for `[start, end]`; idle after the last entry.

        Raises:
            LedgerError: `start_seconds` is older than what is kept.
        """
        begin = max(start_seconds, self.end_seconds)
        idle = self._idle(begin, end_seconds, self._busy_end_seconds)
        return self._history.between(start_seconds, end_seconds) + sum(run[2] for run in idle)

    def ask(
        self,
        start_seconds: float,
        floor_watts: float,
        in_flight: Sequence[Run] = (),
        margin_ratio: float = 0.0,
    ) -> Headroom:
        """What a step that starts at `start_seconds` may draw.

        A step queued behind others starts when they end. Ending later than predicted they
        leave the same joules in a longer time, so the predicted start is the one to ask about.

        Args:
            start_seconds: when it would start.
            floor_watts: power after it. A floor above a limit is taken as
                90% of that limit: the step is then bounded by what the past leaves.
            in_flight: runs launched and not yet over, as `(start, end, joules)` in
                their order; the last one ends at or before `start_seconds`.
            margin_ratio: part of each limit that is kept free, at most 0.2.
        """
        if not self._windows:
            return UNBOUNDED
        runs = self._until(start_seconds, in_flight)
        kept = 1.0 - margin_ratio
        parts = [WindowHeadroom(window, runs, floor_watts, kept) for window in self._windows]
        return Headroom(tuple(parts), self._lowest_watts * kept)

    def _until(self, until_seconds: float, in_flight: Sequence[Run]) -> list[Run]:
        """Runs in flight and idle time, without gaps, from the last entry's end."""
        runs: list[Run] = []
        time, busy_end = self.end_seconds, self._busy_end_seconds
        for begin, end, joules in in_flight:
            if begin > time:
                runs += self._idle(time, begin, busy_end)
                time = begin
            if end > time:
                runs.append((time, end, joules))
                time = busy_end = end
        return runs + self._idle(time, until_seconds, busy_end) if until_seconds > time else runs

    def corners(self, since_seconds: float, in_flight: Sequence[Run] = ()) -> tuple[Array, Array]:
        """Times and joules since some zero, from `since_seconds` or before to the last run's end.

        Args:
            since_seconds: within the last minute.
            in_flight: see `ask`.
        """
        history = self._history
        first = int(history.times[: history.count].searchsorted(since_seconds, "right")) - 1
        times = history.times[max(0, first) : history.count].tolist()
        joules = history.joules[max(0, first) : history.count].tolist()
        total = joules[-1]
        for _, end, spent in self._until(self.end_seconds, in_flight):
            total += spent
            times.append(end)
            joules.append(total)
        return np.array(times), np.array(joules)
