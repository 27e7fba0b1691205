"""What measurement adds to the model: gains on step seconds and on joules, and their error.

Law. A step's seconds are the model's, times a gain by the step's size (`learn/seconds.py`).
Its joules are those between steps for as long as it takes, plus the model's joules above
them, times a gain by the step's kind (`learn/joules.py`). Seconds are learned from every
step's output; joules from the energy counter, span by span between its moves, against
what ran in that time (`learn/spans.py`). The meter is the truth: limits hold in metered
watts, so the meter's own error is learned as gain.

The margin has two parts. The doubt is what the filter does not know about the present mix
of work. The lean is by how much the meter has shown more than was predicted over the last
two seconds: it is kept free at once, and fades as the gains follow. Where the last seconds
still differ by more than both explain, the estimator disagrees with the meter: the gains are
at their bounds, or something changes faster than they follow.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from shaper.core.learn.joules import IDLE, JouleGains
from shaper.core.learn.seconds import StepSeconds
from shaper.core.learn.spans import KINDS, Edge, EdgeWork, WorkCurve, edge_work, kind_of
from shaper.core.types import ClockEventReasons, PowerState, StepBatch, StepPrediction

# A margin above this says that the model is of no use; the bounds on gains say it too.
MAX_MARGIN_RATIO = 0.15
# Of the margin, what doubt alone may ask for, in standard deviations, less a part that
# the budget's tolerance covers.
_DOUBT_DEVIATIONS, _DOUBT_FREE_RATIO, _MAX_DOUBT_RATIO = 3.0, 0.0, 0.05
# How long a difference is looked at: errors of the counter's dating average out over two
# seconds to half a percent.
_LEAN_SECONDS, _DISAGREE_SECONDS, _MIX_SECONDS = 2.0, 3.0, 3.0
# Disagreement is said above this, or three deviations, and taken back at half of it.
_DISAGREE_RATIO, _DISAGREE_DEVIATIONS = 0.03, 3.0
# A span of less has too little in it for its edges; one of more says nothing about now.
_MIN_SPAN_SECONDS, _MAX_SPAN_SECONDS = 0.045, 2.0
# A bracket is not dated better than the sampler's own jitter.
_MIN_BRACKET_SECONDS = 0.005
# A gain this near to 1 is noise: what 100 ms moves dated to 20 ms leave of it, or so many
# deviations of what the filter knows. Beyond, it counts in full from a half more on.
_BAND_RATIO, _BAND_DEVIATIONS = 0.008, 1.5
_LOW_BAND_RATIO = 0.0
# Clocks that moved by this much change what a profile is wrong about.
_CLOCK_MOVED_RATIO, _CLOCK_KEPT_RATIO, _CLOCK_DOUBT_RATIO = 0.05, 0.3, 0.1
# A mere context draws this much less than the time between steps, at least.
_REST_SAVES_RATIO = 0.1
# Moves that wait for the runs behind them: a long step hides a few.
_EDGES_KEPT = 8
_EDGES_PER_CALL = 2


def _outside(gain: float, band: float) -> float:
    """A gain that is 1 within `band` of 1, itself beyond 1.5 bands, and without a jump."""
    if gain < 1.0:
        # Taken for less than it is, a step breaks the budget; for more, it waits a little.
        band = max(band, _LOW_BAND_RATIO)
    off = abs(gain - 1.0)
    return 1.0 + math.copysign(min(off, max(0.0, 3.0 * (off - band))), gain - 1.0)


class _Compared:
    """Metered and predicted joules with exponential weights in time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.metered = self.predicted = self.lasting = 0.0

    def add(self, seconds: float, metered: float, predicted: float) -> None:
        keep = math.exp(-seconds / self._seconds)
        self.metered = self.metered * keep + metered
        self.predicted = self.predicted * keep + predicted
        self.lasting = self.lasting * keep + seconds

    @property
    def ratio(self) -> float:
        """By how much the meter showed more, over what was predicted."""
        return self.metered / self.predicted - 1.0 if self.predicted > 0 else 0.0


class Estimator:
    """Corrects predictions of one engine and knows how wrong they may be.

    Args:
        idle_watts: power between steps, all GPUs; 0 where it is not known apart.

    All calls come from one thread. Costs: `correct` one or two microseconds, `observe_run`
    a few, a counter move about a hundred, ten times a second.
    """

    def __init__(self, idle_watts: float = 0.0) -> None:
        self._idle_watts = idle_watts
        self._seconds = StepSeconds()
        self._joules = JouleGains()
        self._curve = WorkCurve()
        self._edges: deque[Edge] = deque(maxlen=_EDGES_KEPT)
        self._from: Edge | None = None
        self._reading: tuple[float, float] | None = None
        self._clock_hertz: float | None = None
        self._lean = _Compared(_LEAN_SECONDS)
        self._long = _Compared(_DISAGREE_SECONDS)
        self._mix = [0.0] * (KINDS + 1)
        self._kind_gains = [1.0] * KINDS
        self._idle_gain = 1.0
        self._untouched = True
        self.margin_ratio = 0.0
        """Part of every limit to keep free, for what is known of the error in joules."""
        self.joules_gain_ratio = 1.0
        """Corrected over predicted joules above idle of the last seconds' mix of work."""
        self.disagreement_ratio = 0.0
        """By how much the meter showed more than was predicted over the last seconds."""
        self.disagrees = False
        """Whether that is more than the known errors explain."""

    @property
    def seconds_gain_ratio(self) -> float:
        """Measured over predicted seconds of the last steps."""
        return self._seconds.gain_ratio

    @property
    def lag_seconds(self) -> float:
        """How late the counter is found to be."""
        return self._joules.lag_seconds

    def idle_watts(self, base_watts: float) -> float:
        """Power between steps, corrected."""
        return base_watts * self._idle_gain

    def correct(self, batch: StepBatch, raw: StepPrediction) -> StepPrediction:
        """The model's prediction of a step with all gains applied."""
        if self._untouched and self._seconds.untouched:
            return raw
        seconds = raw.seconds * self._seconds.gain(batch)
        idle = self._idle_watts
        base = min(raw.joules, idle * raw.seconds)
        first, part = kind_of(batch)
        gains = self._kind_gains
        gain = gains[first] + part * (gains[first + 1] - gains[first])
        joules = (raw.joules - base) * gain + self._idle_gain * idle * seconds
        return StepPrediction(seconds, joules)

    def observe_run(
        self,
        batch: StepBatch,
        raw: StepPrediction,
        start_seconds: float,
        end_seconds: float,
        measured_seconds: float | None,
    ) -> None:
        """A step is back.

        Args:
            batch: what it computed.
            raw: what the model said, before correction.
            start_seconds: when the device began it, as far as is known.
            end_seconds: when the device had done it.
            measured_seconds: its time, where that is the device's own.
        """
        if measured_seconds is not None:
            self._seconds.observe(batch, raw.seconds, measured_seconds)
        above = raw.joules - min(raw.joules, self._idle_watts * raw.seconds)
        self._curve.append(start_seconds, end_seconds, kind_of(batch), above)
        for _ in range(_EDGES_PER_CALL):
            known = self._curve.end_seconds
            if (
                not self._edges
                or self._edges[0].high_seconds - self._joules.lag_seconds > known
            ):
                return
            self._take(self._edges.popleft())

    def observe_power(self, state: PowerState) -> None:
        """A new reading of the sampler; one without an energy counter teaches no joules."""
        self._follow_clock(state)
        energy, now = state.energy_joules, state.sampled_seconds
        if energy is None or not math.isfinite(energy):
            return
        reading, self._reading = self._reading, (now, energy)
        if (
            reading is None
            or energy < reading[1]
            or now - reading[0] > _MAX_SPAN_SECONDS
        ):
            self._edges.clear()
            self._from = None  # the counter was reset, or the sampler was away
            return
        if energy > reading[1]:
            low = min(reading[0], now - _MIN_BRACKET_SECONDS)
            self._edges.append(Edge(low, now, energy))

    def _follow_clock(self, state: PowerState) -> None:
        clock = state.sm_clock_hertz
        if clock is None or ClockEventReasons.GPU_IDLE in state.clock_event_reasons:
            return
        if self._clock_hertz is None:
            self._clock_hertz = clock
        elif abs(clock - self._clock_hertz) > _CLOCK_MOVED_RATIO * self._clock_hertz:
            self._clock_hertz = clock
            self._seconds.forget(_CLOCK_KEPT_RATIO)
            self._joules.doubt(_CLOCK_DOUBT_RATIO)

    def _take(self, edge: Edge) -> None:
        """The runs until a move of the counter are known: learn from the span before it."""
        lag = self._joules.lag_seconds
        before = self._from
        if (
            before is not None
            and edge.high_seconds - before.high_seconds < _MIN_SPAN_SECONDS
        ):
            return
        oldest = self._curve.start_seconds + lag
        self._from = edge if edge.low_seconds >= oldest else None
        if self._from is None:
            return
        new = edge_work(self._curve, edge, lag)
        watts, variance = self._edge(new)
        if (
            before is None
            or before.low_seconds < oldest
            or edge.high_seconds - before.high_seconds > _MAX_SPAN_SECONDS
        ):
            self._joules.begin(variance)
            return
        old = edge_work(self._curve, before, lag)
        seconds = new.seconds - old.seconds
        work = self._work(old.mean, new.mean, seconds)
        metered = edge.energy_joules - before.energy_joules
        predicted = self._joules.predicted(work)
        self._lean.add(seconds, metered, predicted)
        if new.mean[KINDS] > old.mean[KINDS]:
            # What a GPU draws at rest is not known: the span says nothing about steps.
            self._joules.begin(variance)
            self._publish(math.sqrt(2.0 * variance))
            return
        self._long.add(seconds, metered, predicted)
        self._joules.observe(
            work, seconds, metered, watts - self._edge(old)[0], variance
        )
        keep = math.exp(-seconds / _MIX_SECONDS)
        self._mix = [
            value * keep + part for value, part in zip(self._mix, work, strict=True)
        ]
        self._publish(math.sqrt(2.0 * variance))

    def _work(
        self, old: Sequence[float], new: Sequence[float], seconds: float
    ) -> list[float]:
        """What ran between two edges: predicted joules by gain."""
        work = [b - a for a, b in zip(old, new, strict=True)]
        rest = min(work.pop(), seconds)
        return [*work, self._idle_watts * (seconds - _REST_SAVES_RATIO * rest)]

    def _edge(self, work: EdgeWork) -> tuple[float, float]:
        """Watts around an edge, and the variance of the joules until it."""
        inside = self._joules.predicted(
            self._work(list(work.low), list(work.high), work.width_seconds)
        )
        return inside / work.width_seconds, inside * inside / 12.0

    def _publish(self, edges_joules: float) -> None:
        """Gains without grain, and the margin that goes with them."""
        error = self._joules.error_ratio(self._mix)
        band = max(_BAND_RATIO, _BAND_DEVIATIONS * error)
        gains = [_outside(gain, band) for gain in self._joules.gains]
        self._kind_gains, self._idle_gain = gains[:KINDS], gains[IDLE]
        self._untouched = all(gain == 1.0 for gain in gains[: IDLE + 1])
        raw = math.fsum(self._mix[:KINDS])
        work = math.fsum(
            g * w for g, w in zip(self._kind_gains, self._mix[:KINDS], strict=True)
        )
        self.joules_gain_ratio = work / raw if raw > 0 else 1.0
        doubt = min(
            max(_DOUBT_DEVIATIONS * error - _DOUBT_FREE_RATIO, 0.0), _MAX_DOUBT_RATIO
        )
        self.margin_ratio = min(doubt + max(0.0, self._lean.ratio), MAX_MARGIN_RATIO)
        self.disagreement_ratio = self._long.ratio
        explained = math.hypot(
            error, edges_joules / max(self._long.predicted, edges_joules)
        )
        bound = max(_DISAGREE_RATIO, _DISAGREE_DEVIATIONS * explained)
        if self.disagrees:
            bound *= 0.5
        self.disagrees = (
            self._long.lasting > 0.5 * _DISAGREE_SECONDS
            and abs(self._long.ratio) > bound
        )
