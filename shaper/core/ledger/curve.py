"""Energy over time as a piecewise-linear curve with a bounded number of corners."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shaper.errors import LedgerError

Array = npt.NDArray[np.float64]

# Runs that are asked about beyond the curve's end: a pipeline has a few, with gaps between.
_SPARE_CORNERS = 64


class EnergyCurve:
    """Joules since some zero at the corners; straight lines between them.

    Args:
        start_seconds: the first corner, at 0 J.
        keep_seconds: how far back from its end the curve is kept.
        spacing_seconds: corners nearer than this to the one before the last are merged.
    """

    def __init__(
        self, start_seconds: float, keep_seconds: float, spacing_seconds: float = 0.0
    ) -> None:
        self.times = np.zeros(4 * _SPARE_CORNERS)
        self.joules = np.zeros(4 * _SPARE_CORNERS)
        self.times[0] = start_seconds
        self.count = 1
        self.merged_joules = 0.0
        """How far the curve lies above the true one at most, where corners were left out."""
        self._left_out: list[tuple[float, float]] = []
        self._keep_seconds = keep_seconds
        self._spacing_seconds = spacing_seconds
        self.end_seconds = start_seconds
        """The last corner's time."""
        # Of the last corner and the one before, as floats: numpy's scalars are slow.
        self.end_joules = 0.0
        """The last corner's joules."""
        self._before_seconds = start_seconds

    def append(self, end_seconds: float, joules: float) -> None:
        """Go on to `end_seconds`, later than the present end, with `joules` spent until then."""
        count = self.count
        if count > 2 and end_seconds - self._before_seconds <= self._spacing_seconds:
            count -= 1
            total = self.end_joules + joules
            self._leave_out(count, end_seconds, total)
        else:
            if count + _SPARE_CORNERS >= len(self.times):
                self._compact()
                count = self.count
            total = self.end_joules + joules
            self._left_out.clear()
            self._before_seconds = self.end_seconds
        self.times[count] = end_seconds
        self.joules[count] = total
        self.end_seconds, self.end_joules = end_seconds, total
        self.count = count + 1

    def _leave_out(self, index: int, end_seconds: float, total_joules: float) -> None:
        """Let the line from the corner before `index` to the new end pass over `index`."""
        self._left_out.append((self.end_seconds, self.end_joules))
        time, joules = float(self.times[index - 1]), float(self.joules[index - 1])
        slope = (total_joules - joules) / (end_seconds - time)
        for left_seconds, left_joules in self._left_out:
            above = joules + slope * (left_seconds - time) - left_joules
            self.merged_joules = max(self.merged_joules, above)

    def begin(self, times: Array, joules: Array) -> None:
        """Replace everything by these corners, merged to the spacing."""
        self.merged_joules = 0.0
        self._left_out.clear()
        if self._spacing_seconds and len(times) > 2:
            grid = np.arange(times[0], times[-1], self._spacing_seconds)
            # Without the last corner: rounding may let the grid end just behind it.
            chosen = times[:-1].searchsorted(grid)
            chosen = np.unique(np.concatenate((chosen, (len(times) - 1,))))
            above = np.interp(times, times[chosen], joules[chosen]) - joules
            self.merged_joules = float(above.max())
            times, joules = times[chosen], joules[chosen]
        size = 4 * _SPARE_CORNERS + 2 * len(times)
        self.times, self.joules, self.count = np.zeros(size), np.zeros(size), len(times)
        self.times[: self.count], self.joules[: self.count] = times, joules
        self._know_end()

    def _know_end(self) -> None:
        last = self.count - 1
        self.end_seconds, self.end_joules = float(self.times[last]), float(self.joules[last])
        self._before_seconds = float(self.times[max(0, last - 1)])

    def _compact(self) -> None:
        oldest = self.end_seconds - self._keep_seconds
        first = int(self.times[: self.count].searchsorted(oldest, side="right")) - 1
        first = max(0, first)
        kept = self.count - first
        size = len(self.times) * (2 if kept > len(self.times) // 2 else 1)
        times, joules = np.zeros(size), np.zeros(size)
        times[:kept] = self.times[first : self.count]
        # Start from zero again, so that years of joules cost no precision.
        joules[:kept] = self.joules[first : self.count] - self.joules[first]
        self.times, self.joules, self.count = times, joules, kept
        self._know_end()

    def between(self, start_seconds: float, end_seconds: float) -> float:
        """Joules of `[start, end]`; nothing is added after the last corner.

        Raises:
            LedgerError: `start_seconds` is older than what is kept.
        """
        times, joules = self.times[: self.count], self.joules[: self.count]
        if start_seconds < times[0]:
            raise LedgerError(
                f"the ledger begins at {times[0]:.3f} s and was asked about {start_seconds:.3f} s"
            )
        low, high = np.interp((start_seconds, end_seconds), times, joules)
        return float(high - low)
