"""What one limit leaves for a step: its window over the energy curve, and the answer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from shaper.core.ledger.curve import Array
from shaper.core.ledger.window import Run, Window
from shaper.core.types import StepPrediction

# A floor above a limit is taken as this part of it: a chunk needs some headroom, or prompts
# would wait for ever.
MOST_FLOOR_RATIO = 0.9
_INSTANT_SECONDS = 1e-6


class WindowPart:
    """One window's answer for steps that start at one given time.

    With the step at `p` watts for `s` seconds, a window that ends `x` after its start
    holds what others spend in it, `p * min(x, s)` of the step and `floor * max(0, x - s)`
    after it. With `headroom(x) = watts * window` less what others spend, at every `x` up to
    the window

        x < s:   p <= headroom(x) / x
        x >= s:  p <= floor + (headroom(x) - floor * x) / s

    Both sides are linear between corners of `headroom`, so the least of each is at a
    corner or at `s`; running minima from the left and from the right answer for any
    step by one bisection.

    Args:
        window_seconds: the window.
        allowed_watts: what it may hold on the mean.
        floor_watts: power after the step; above the limit it is taken as 90% of it.
        x: [corners] seconds after the step's start, from 0 to the window.
        headroom: [corners] joules.
    """

    __slots__ = (
        *("_found", "_left", "_others_watts", "_quick_watts", "_right", "_headroom"),
        *("_span", "_x", "allowed_watts", "floor_watts"),
    )

    def __init__(
        self,
        window_seconds: float,
        allowed_watts: float,
        floor_watts: float,
        x: Array | None = None,
        headroom: Array | None = None,
    ) -> None:
        self._span = window_seconds
        self.allowed_watts = allowed_watts
        self.floor_watts = floor_watts
        # What others draw whatever happens: an empty window does not leave it.
        self._others_watts = 0.0
        self._quick_watts = -math.inf
        self._found: dict[float, float] = {}
        self._x: Array | None = None
        if x is not None and headroom is not None:
            self._put(x, headroom)

    def _put(self, x: Array, headroom: Array) -> None:
        """Take the corners, and find the running minima."""
        self.floor_watts = min(self.floor_watts, MOST_FLOOR_RATIO * self.allowed_watts)
        self._x, self._headroom = x, headroom
        # Without the first corner, which binds nothing.
        self._left = np.minimum.accumulate(headroom[1:] / x[1:])
        # From the last corner to the first.
        self._right = np.minimum.accumulate((headroom - self.floor_watts * x)[::-1])

    def _solve(self) -> None:
        """Find the corners, where they weren't given."""
        raise NotImplementedError

    def fits(self, seconds: float, watts: float) -> bool:
        """Whether a step of this length and mean power fits."""
        return watts <= self._quick_watts or watts <= self.max_watts(seconds)

    def headroom_watts(self, seconds: float, watts: float) -> float:
        """How far it stays below what fits, or at least so far."""
        if watts <= self._quick_watts:
            return self._quick_watts - watts
        return self.max_watts(seconds) - watts

    def max_watts(self, seconds: float) -> float:
        """The highest mean power at which a step of this length fits."""
        found = self._found.get(seconds)
        if found is not None:
            return found  # a step that fits is launched, and asked about again
        if self._x is None:
            self._solve()
        x, headroom = self._x, self._headroom
        assert x is not None
        index = int(x.searchsorted(seconds))
        # `item` gives Python's floats: sums of numpy's scalars take several times as long.
        lowest = self._left.item(index - 2) if index > 1 else math.inf
        if seconds <= self._span:
            before, after = x.item(index - 1), x.item(index)
            low, high = headroom.item(index - 1), headroom.item(index)
            own = low + (seconds - before) / (after - before) * (high - low)
            floor = self.floor_watts
            spare = min(own - floor * seconds, self._right.item(-1 - index))
            lowest = min(lowest, floor + spare / seconds)
        self._found[seconds] = lowest
        return lowest

    def wait_seconds(self, seconds: float, watts: float, idle_watts: float) -> float:
        """For how long a step that does not fit still won't, if nothing else changes.

        If it starts `d` later, with idle power until then, a window that ends at `x > d` needs

            x < d + s:   p * x - headroom(x) <= (p - idle) * d
            x >= d + s:  (p - floor) * s <= headroom(x) - floor * x + (floor - idle) * d

        The first asks for `d` of at most `x`, the second for a longer one than any before it.

        Args:
            seconds, watts: the step.
            idle_watts: this engine's power until it starts.

        Returns:
            Seconds from the start that was asked about; 0 where nothing is known.
        """
        if watts <= idle_watts or self.fits(seconds, watts):
            return 0.0
        waited = self._wait_after(seconds, watts, idle_watts) if seconds < self._span else 0.0
        return self._wait_within(seconds, watts, idle_watts, waited)

    def _wait_within(self, seconds: float, watts: float, idle_watts: float, waited: float) -> float:
        """What windows that end within the step ask for, if it has waited so long already."""
        x, headroom = self._x, self._headroom
        assert x is not None
        asked = np.minimum((watts * x - headroom) / (watts - idle_watts), x)
        most = np.maximum.accumulate(asked)
        while True:
            longer = most.item(int(x.searchsorted(waited + seconds, "right")) - 1)
            if not longer > waited:  # also where it is no number
                return waited
            waited = longer

    def _wait_after(self, seconds: float, watts: float, idle_watts: float) -> float:
        """What windows that hold the whole step ask for."""
        x, headroom, floor = self._x, self._headroom, self.floor_watts
        assert x is not None
        rise, need = max(0.0, floor - idle_watts), (watts - floor) * seconds
        first = int(x.searchsorted(seconds))
        ends = x[first:] - seconds
        least = self._right[: len(ends)][::-1] + rise * ends
        index = int(least.searchsorted(need))
        if index == len(ends):
            return self._span - seconds
        low, high = x.item(first + index - 1), x.item(first + index)
        begun = headroom.item(first + index - 1) - floor * low + rise * (low - seconds)
        slope = (headroom.item(first + index) - floor * high + rise * (high - seconds) - begun) / (
            high - low
        )
        earliest = low + (need - begun) / slope if slope > 0.0 else low
        return max(0.0, min(earliest, high) - seconds)

    def empty_watts(self, seconds: float, floor_watts: float | None = None) -> float:
        """The same if nothing had run before; by default with this part's floor after it."""
        allowed = self._left_watts()
        if seconds >= self._span:
            return allowed
        floor = self.floor_watts if floor_watts is None else floor_watts
        floor = min(floor, MOST_FLOOR_RATIO * self.allowed_watts)
        return floor + (allowed - floor) * self._span / seconds

    def _left_watts(self) -> float:
        """Of what the window may hold, what others leave this engine."""
        if self._x is None:
            self._solve()
        return self.allowed_watts - self._others_watts

    def lower_floor(self, watts: float) -> None:
        """Take no more than this for the floor."""
        if watts >= self.floor_watts:
            return
        self.floor_watts = watts
        if self._x is not None:
            self._found.clear()
            self._put(self._x, self._headroom)

    def make_way(self, step: StepPrediction, idle_watts: float) -> float:
        """Lower the floor, to idle power at most, until an empty window would hold two such
        steps: headroom for one is there before the last of what ran has left the window.

        Returns:
            The window's seconds; 0 where nothing had to be lowered.
        """
        seconds, joules = 2.0 * step.seconds, 2.0 * step.joules
        if step.seconds >= self._span:
            return 0.0
        floor = idle_watts
        if seconds < self._span:
            spare = self._left_watts() * self._span - joules
            floor = max(idle_watts, spare / (self._span - seconds))
        if floor >= self.floor_watts:
            return 0.0
        self.lower_floor(floor)
        return self._span

    def paced_watts(self, burst_joules: float) -> float:
        """The limit less a burst once a window; without end where the limit is a ramp."""
        return self.allowed_watts - burst_joules / self._span


class WindowHeadroom(WindowPart):
    """The same for one engine's own limit: others are its own runs of before."""

    __slots__ = ("_kept_ratio", "_runs", "_start_seconds", "_window")

    def __init__(
        self, window: Window, runs: Sequence[Run], floor_watts: float, kept_ratio: float
    ) -> None:
        super().__init__(window.window_seconds, window.watts * kept_ratio, floor_watts)
        self._window, self._runs, self._kept_ratio = window, runs, kept_ratio
        start = self._start_seconds = runs[-1][1] if runs else window.curve.end_seconds
        # No power above the limit since a window ago: anything up to the limit fits.
        if window.hot_seconds > start - window.window_seconds:
            return
        allowed = self.allowed_watts
        for begin, end, joules in runs:
            if joules > allowed * (end - begin):
                return
        self._quick_watts = allowed

    def wait_seconds(self, seconds: float, watts: float, idle_watts: float) -> float:
        """As for any part; of a ramp, whose limit moves with time, nothing is known."""
        return super().wait_seconds(seconds, watts, idle_watts) if self._window.watts else 0.0

    def paced_watts(self, burst_joules: float) -> float:
        """The limit less a burst once a window; without end where the limit is a ramp."""
        return super().paced_watts(burst_joules) if self._window.watts else math.inf

    def _solve(self) -> None:
        window, curve = self._window, self._window.curve
        count, total = curve.count, curve.end_joules
        times, joules = curve.times, curve.joules
        for begin, end, spent in self._runs:
            total += window.counted(begin, spent)
            times[count], joules[count] = end, total
            count += 1
        times, joules = times[:count], joules[:count]
        span, start = self._span, self._start_seconds
        allowed = window.allowed_watts(times, joules) * self._kept_ratio
        self.allowed_watts = allowed
        budget = allowed * span - total - curve.merged_joules
        # From just before the window's first moment: x[0] is 0 or before, and no corner. A
        # corner within the first microsecond is no more than rounding, and divides by it.
        first = int(times.searchsorted(start - span + _INSTANT_SECONDS, "right")) - 1
        x = times[first:] + (span - start)
        headroom = joules[first:] + budget
        early = x.item(0)
        if early != 0.0:
            begun = headroom.item(0)
            headroom[0] = begun + (headroom.item(1) - begun) * (-early / (x.item(1) - early))
            x[0] = 0.0
        x[-1] = span
        self._put(x, headroom)


class Headroom:
    """What every limit leaves for a step that starts at one given time."""

    __slots__ = ("_parts", "sustained_watts")

    def __init__(self, parts: tuple[WindowPart, ...], sustained_watts: float = math.inf) -> None:
        self._parts = parts
        self.sustained_watts = sustained_watts
        """What the engine may draw for long: the lowest limit, less the margin."""

    def beside(self, parts: tuple[WindowPart, ...], sustained_watts: float) -> Headroom:
        """This headroom, with other limits that must hold as well."""
        return Headroom(self._parts + parts, min(self.sustained_watts, sustained_watts))

    @property
    def bounded(self) -> bool:
        """Whether there is any limit."""
        return bool(self._parts)

    def fits(self, prediction: StepPrediction) -> bool:
        """Whether a step as predicted fits every window it touches."""
        seconds, watts = prediction.seconds, prediction.watts
        for part in self._parts:  # noqa: SIM110 - a generator costs more than the question
            if not part.fits(seconds, watts):
                return False
        return True

    def headroom_watts(self, prediction: StepPrediction) -> float:
        """How far below what fits a step stays, at least; infinity without limits."""
        seconds, watts = prediction.seconds, prediction.watts
        least = math.inf
        for part in self._parts:
            least = min(least, part.headroom_watts(seconds, watts))
        return least

    def max_watts(self, seconds: float) -> float:
        """The highest mean power at which a step of this length fits.

        Args:
            seconds: the step's length, above 0.

        Returns:
            Watts; below 0 when a step of no watts at all would still leave a window
            too full, infinity without limits.
        """
        return min((part.max_watts(seconds) for part in self._parts), default=math.inf)

    def wait_seconds(self, prediction: StepPrediction, idle_watts: float) -> float:
        """For how long a step that does not fit still won't, if nothing else changes.

        Args:
            prediction: of the step.
            idle_watts: this engine's power until it starts.

        Returns:
            Seconds from the start that was asked about; 0 where nothing is known.
        """
        seconds, watts = prediction.seconds, prediction.watts
        waits = [part.wait_seconds(seconds, watts, idle_watts) for part in self._parts]
        return max(waits, default=0.0)

    def empty_watts(self, seconds: float, floor_watts: float | None = None) -> float:
        """The same if nothing had run before: what no pause makes more of.

        Args:
            seconds: the step's length.
            floor_watts: power after it; None: as each window takes it.
        """
        parts = self._parts
        return min((part.empty_watts(seconds, floor_watts) for part in parts), default=math.inf)

    def make_way(self, step: StepPrediction, idle_watts: float) -> float:
        """Lower what goes on after a step so far that each window, if empty, would hold this one.

        Args:
            step: one that is to run now and then, at whatever pace of the decodes.
            idle_watts: this engine's power between steps; no floor goes below.

        Returns:
            The longest window of those where that was necessary; 0 without any.
        """
        return max((part.make_way(step, idle_watts) for part in self._parts), default=0.0)

    def paced_watts(self, burst_joules: float) -> float:
        """Power that leaves every window headroom for a burst; infinity without limits."""
        return min((part.paced_watts(burst_joules) for part in self._parts), default=math.inf)


UNBOUNDED = Headroom(())
