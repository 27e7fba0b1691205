"""Whether a GPU's energy counter and its power reading tell of the same power.

Law. The average reading at a time is a mean of the power of the last second or so, so its
integral over some seconds lies between the least and the most that the counter counted over
spans of the same length that end up to `_MOST_LAG_SECONDS` earlier:

    sure ratio     integral of the reading / most counted, where that is above 1;
                   integral of the reading / least counted, where that is below 1; else 1

A meter whose window lags, under a load that comes and goes, is never blamed for it; steady
power shows an error within seconds, power that swings within longer spans. The instant reading
sees a quarter of the time and aliases with steps that come at its own pace: it is not compared,
nor is an average that jumps as only an instant reading can (GA100's is one).
"""

from __future__ import annotations

from shaper.core.types import GpuSample
from shaper.gpu.energy_history import EnergyHistory

# Above this the two are said to differ.
APART_RATIO = 0.1
# Spans that are compared: short ones see steady power at once, long ones see through swings.
_SPANS_SECONDS = (2.0, 4.0, 8.0, 16.0, 32.0)
# A second's window, refreshes of 100 ms, and slower ones that were seen.
_MOST_LAG_SECONDS, _LAG_STEP_SECONDS = 1.3, 0.1
# A counter may be ahead of the reading by a refresh.
_LEAD_SECONDS = 0.1
# Over a longer hole in the readings nothing is compared.
_HOLE_SECONDS = 0.5
# Between two comparisons.
_PACE_SECONDS = 0.25
# What two readings of one meter may differ by.
_SLACK_RATIO = 0.03
# How far a mean of a second moves in no time and in a second, as parts of the enforced limit.
_JUMP_RATIO, _JUMP_PER_SECOND, _UNKNOWN_LIMIT_WATTS = 0.2, 1.2, 400.0
# The two are close again for this long before that is believed.
_CLEAR_SECONDS = 10.0
# Joules that are too few to compare: a refresh of a GPU at work.
_LEAST_WATTS = 20.0


class EnergyCheck:
    """Compares the two of one GPU. Stateful fields: half a minute of both, and what was found."""

    def __init__(self) -> None:
        self._read, self._counted = EnergyHistory(), EnergyHistory()
        """The integral of the reading, and the moves of the counter."""
        self._last_watts: float | None = None
        self._due_seconds = 0.0
        self._seen_seconds = 0.0
        self.ratio = 1.0
        """The reading over the counter, as far as it is sure; 1 where they may agree."""

    def observe(self, sample: GpuSample) -> None:
        """Take a screened sample, in the order of time."""
        now, watts, joules = sample.read_seconds, sample.average_watts, sample.energy_joules
        before, read_joules = self._read.last if self._read else (None, 0.0)
        if before is not None and now <= before:
            return
        last, self._last_watts = self._last_watts, watts
        hole = before is not None and now - before > _HOLE_SECONDS
        jump = False
        if watts is not None and last is not None and before is not None:
            limit = sample.enforced_limit_watts or _UNKNOWN_LIMIT_WATTS
            most = limit * (_JUMP_RATIO + _JUMP_PER_SECOND * (now - before))
            jump = abs(watts - last) > most
        if watts is None or joules is None or last is None or hole or jump:
            self._read.clear()
            self._counted.clear()
            if watts is not None and joules is not None:
                self._begin(now, joules)
            return
        if before is None:
            self._begin(now, joules)
            return
        self._read.add(now, read_joules + last * (now - before))
        if joules > self._counted.last[1]:
            # It moved since the reading before this one.
            self._counted.add((now + before) / 2.0, joules)
        if now >= self._due_seconds:
            self._due_seconds = now + _PACE_SECONDS
            self._compare(now)
            self._trim(now)

    def _begin(self, now: float, joules: float) -> None:
        self._read.add(now, 0.0)
        self._counted.add(now, joules)

    def _compare(self, now: float) -> None:
        end = min(now, self._counted.last[0])
        found = 1.0
        for span in _SPANS_SECONDS:
            begin = end - span
            if begin - _MOST_LAG_SECONDS < self._counted.first_seconds:
                break
            if begin < self._read.first_seconds:
                break
            read = self._read.joules_between(begin, end)
            lags = range(-round(_LEAD_SECONDS / _LAG_STEP_SECONDS), _lag_steps())
            counted = [
                self._counted.joules_between(begin - lag, end - lag)
                for lag in (step * _LAG_STEP_SECONDS for step in lags)
            ]
            if min(counted) < _LEAST_WATTS * span:
                continue
            above, below = read / max(counted), read / min(counted)
            if above > 1.0 + _SLACK_RATIO:
                found = max(found, above)
            elif below < 1.0 - _SLACK_RATIO and found <= 1.0:
                found = min(found, below)
        self._take(found, now)

    def _take(self, found: float, now: float) -> None:
        """What is sure now; one that is less sure than before counts when it stays so."""
        as_sure = abs(found - 1.0) >= abs(self.ratio - 1.0) - _SLACK_RATIO
        if as_sure or now - self._seen_seconds > _CLEAR_SECONDS:
            self.ratio, self._seen_seconds = found, now

    def _trim(self, now: float) -> None:
        oldest = now - _SPANS_SECONDS[-1] - 2.0 * _MOST_LAG_SECONDS
        self._read.trim(oldest)
        self._counted.trim(oldest)


def _lag_steps() -> int:
    return round(_MOST_LAG_SECONDS / _LAG_STEP_SECONDS) + 1
