"""Energy over time: the moves of a counter, or a running integral of power.

Between two moves of a counter the time is known and the energy is not, so only moves are kept.
"""

from __future__ import annotations

from bisect import bisect_right


class EnergyHistory:
    """Joules at rising times. Stateful fields: both; what is old is dropped by `trim`."""

    __slots__ = ("_joules", "_times")

    def __init__(self) -> None:
        self._times: list[float] = []
        self._joules: list[float] = []

    def __bool__(self) -> bool:
        return bool(self._times)

    @property
    def first_seconds(self) -> float:
        """Of the oldest entry that is kept."""
        return self._times[0]

    @property
    def last(self) -> tuple[float, float]:
        """Seconds and joules of the newest entry."""
        return self._times[-1], self._joules[-1]

    def clear(self) -> None:
        """Begin anew: the counter was reset, or its readings broke off."""
        self._times.clear()
        self._joules.clear()

    def add(self, at_seconds: float, joules: float) -> None:
        """Append an entry; times rise."""
        self._times.append(at_seconds)
        self._joules.append(joules)

    def move(self, at_seconds: float, joules: float) -> bool:
        """Append what a counter says, if it has moved; true if so. One that falls was reset."""
        if self._joules and joules < self._joules[-1]:
            self.clear()
        if self._joules and joules == self._joules[-1]:
            return False
        self.add(at_seconds, joules)
        return True

    def joules_at(self, at_seconds: float) -> float:
        """On the line through the entries; beyond their ends the last value."""
        times, joules = self._times, self._joules
        index = bisect_right(times, at_seconds)
        if index == 0:
            return joules[0]
        if index == len(times):
            return joules[-1]
        before, after = times[index - 1], times[index]
        share = (at_seconds - before) / (after - before)
        return joules[index - 1] + share * (joules[index] - joules[index - 1])

    def joules_between(self, begin_seconds: float, end_seconds: float) -> float:
        """Of the time between these two, interpolated."""
        return self.joules_at(end_seconds) - self.joules_at(begin_seconds)

    def mean_watts(self, window_seconds: float) -> float | None:
        """From the last entry at or before the window's begin to the newest; None: no such entry.

        The window ends at the newest entry. Nothing is interpolated, so it may be longer.
        """
        now, joules = self.last
        index = bisect_right(self._times, now - window_seconds) - 1
        if index < 0:
            return None
        return (joules - self._joules[index]) / (now - self._times[index])

    def trim(self, oldest_seconds: float, slack: int = 0) -> None:
        """Drop what is older but for one entry, where a window may start; not before `slack`
        entries are to be dropped, since each time the rest is moved."""
        first = bisect_right(self._times, oldest_seconds) - 1
        if first > slack:
            del self._times[:first], self._joules[:first]
