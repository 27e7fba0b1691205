"""What measurement adds to the model: gains on step seconds and on joules, and a margin.

Law. A step's seconds are the model's, times a gain by the step's size (`learn/seconds.py`).
Its joules are the model's, times a gain by the step's power (`learn/joules.py`); until the
meter has said so, a step that takes longer than the model says is taken to do so at the same
power, and one that takes less time, to spend the same joules.

Seconds are learned from every step's output; joules from the energy counter, span by span
between its moves (`learn/ticks.py` dates them), against what ran in that time. A span is
long enough that its ends, as well as they are dated, are a fortieth of it. The meter is the
truth: limits hold in metered watts, so the meter's own error is learned as gain.

The margin follows the bias of the meter: what the last second counted above the prediction
is kept free at once, less what the dating of spans explains, and fades as the gains follow; of
what the last three seconds counted above it, all but that dating. It also covers idle power that
the meter shows above the model's, which the ledger enters.
Where the last seconds differ by more than the gains can follow, the estimator disagrees
with the meter.
"""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

from shaper.core.learn.joules import IDLE, MAX_GAIN, MIN_GAIN, POWER_BINS, JouleGains, place
from shaper.core.learn.seconds import StepSeconds
from shaper.core.learn.ticks import CounterTicks, Tick
from shaper.core.types import PowerState, StepBatch, StepPrediction

__all__ = ["MAX_GAIN", "MAX_MODEL_MARGIN_RATIO", "MIN_GAIN", "Estimator"]

# A margin above this says that the model is of no use; the bounds on gains say it too.
MAX_MODEL_MARGIN_RATIO = 0.15
# Without an enforced limit in sight, full power is taken as so many times that between steps:
# from 3.9 (L40S) to 5.2 (H100) on the profiles.
_FULL_OVER_IDLE = 5.0
# A move is bracketed by two readings that are not further apart than a long step.
_BRACKET_SECONDS = 0.15
# Ends of a span are a fortieth of it, as they are dated or, twice that, as they turn out to be.
_SPAN_DEVIATIONS, _FOUND_RATIO = 40.0, 2.0
_LONG_SPAN_SECONDS, _MOST_SPAN_SECONDS = 1.0, 2.0
# A GPU that rests for longer than this draws less than between steps: by a fifth, within 15%
# of it (from 10% on B200 to a third on A100). Of a span that mostly rests nothing is learned.
_REST_SECONDS = 0.05
_REST_SAVES_RATIO, _REST_ERROR_RATIO, _MOST_REST_RATIO = 0.2, 0.15, 0.5
# An unqueued step's time has the host's in it: it counts where that is a small part of it.
_HOST_RATIO = 0.03
_BIAS_SECONDS, _BIAS_FREE_RATIO, _BIAS_DEVIATIONS = 1.0, 0.005, 3.0
# A difference over three seconds that is said when it has lasted, and by half of it to end. A
# busy host that sees steps end late makes one for some seconds; a wrong model makes it for good.
_DISAGREE_SECONDS, _DISAGREE_RATIO, _SAID_AFTER_SECONDS = 3.0, 0.05, 10.0
# Idle and step joules are weighed over a few seconds.
_MIX_SECONDS = 3.0
_MARGIN_GRAIN_RATIO = 0.001
# A counter that is corrected by so much more or less is another counter.
_OTHER_COUNTER_RATIO = 0.03
# Moves that wait for the steps behind them, and the steps of a few spans.
_MOVES_KEPT, _RUNS_KEPT = 64, 2048


class _Run(NamedTuple):
    """A step that is over: when it ran, where its power lies, what the model said of it (no
    joules: nothing of use)."""

    start_seconds: float
    end_seconds: float
    bin_index: int
    part: float
    joules: float

    @property
    def watts(self) -> float:
        return self.joules / (self.end_seconds - self.start_seconds)


class _Mean:
    """Exponential sums in time of metered and of predicted joules."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.metered = self.predicted = self.lasting = 0.0

    def add(self, seconds: float, metered: float, predicted: float) -> None:
        keep = math.exp(-seconds / self._seconds)
        self.metered = self.metered * keep + metered
        self.predicted = self.predicted * keep + predicted
        self.lasting = self.lasting * keep + seconds

    @property
    def excess_ratio(self) -> float:
        """By how much more was metered, over what was predicted."""
        return self.metered / self.predicted - 1.0 if self.predicted > 0.0 else 0.0


class Estimator:
    """Corrects predictions of one engine and knows how far the meter is from them.

    Args:
        idle_watts: power between steps, all GPUs.

    All calls come from one thread. Costs: `correct` one or two microseconds, `observe_run` a few,
    a move of the counter about a hundred, ten times a second.

    Stateful fields: the gains, the runs and counter moves of late, three means.
    """

    def __init__(self, idle_watts: float = 0.0) -> None:
        self._idle_watts = idle_watts
        self._full_watts = _FULL_OVER_IDLE * idle_watts or math.inf
        self._limit_seen = False
        self._seconds = StepSeconds()
        self._joules = JouleGains()
        self._ticks = CounterTicks()
        self._runs: deque[_Run] = deque(maxlen=_RUNS_KEPT)
        self._seen: tuple[float, float] | None = None
        self._start: tuple[Tick, float] | None = None
        self._moves: deque[tuple[Tick, float]] = deque(maxlen=_MOVES_KEPT)
        self._energy_ratio = 1.0
        self._new_means()
        self.joules_gain_ratio = 1.0
        """Corrected over predicted joules of the last seconds' steps; 1 within the grain."""
        self.margin_ratio = 0.0
        """Part of each limit to keep free for what the meter shows beyond the prediction."""
        self.disagreement_ratio = 0.0
        """Metered over corrected watts of the last seconds, minus 1."""
        self._differing_seconds = 0.0
        self.disagrees = False
        """Whether that has been more than the gains can follow, and the meter's noise, for long."""

    @property
    def seconds_gain_ratio(self) -> float:
        """Measured over predicted seconds of the last steps; 1 within the deadband."""
        return self._seconds.gain_ratio

    def correct(self, batch: StepBatch, raw: StepPrediction) -> StepPrediction:
        """A prediction of `batch` with all gains applied."""
        stretch = self._seconds.gain(batch)
        bin_index, part = place(raw.joules / (raw.seconds * self._full_watts))
        gains = self._joules.held
        gain = gains[bin_index] + part * (gains[bin_index + 1] - gains[bin_index])
        if stretch == 1.0 and gain == 1.0:
            return raw
        return StepPrediction(raw.seconds * stretch, raw.joules * max(stretch, 1.0) * gain)

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
            start_seconds, end_seconds: when it ran.
            measured_seconds: its length; None where that is not the device's own.
        """
        if raw.seconds <= 0.0:
            return
        if end_seconds > start_seconds:
            bin_index, part = place(raw.joules / (raw.seconds * self._full_watts))
            joules = raw.joules * max(self._seconds.gain(batch), 1.0)
            self._runs.append(_Run(start_seconds, end_seconds, bin_index, part, joules))
        if measured_seconds is None:
            if self._seconds.noise_seconds > _HOST_RATIO * raw.seconds:
                return
            measured_seconds = end_seconds - start_seconds
        self._seconds.observe(batch, raw.seconds, measured_seconds)

    def skip_run(self, start_seconds: float, end_seconds: float) -> None:
        """A step is back of which nothing can be learned, nor of the energy around it."""
        if end_seconds > start_seconds:
            self._runs.append(_Run(start_seconds, end_seconds, 0, 0.0, 0.0))

    def observe_power(self, state: PowerState) -> None:
        """Learn from the energy counter; a state without one teaches nothing."""
        limit = state.enforced_limit_watts
        if not self._limit_seen and limit is not None and 0.0 < limit < math.inf:
            # The first one counts: a limit that is lowered later does not change the model.
            self._full_watts, self._limit_seen = limit, True
        if abs(state.energy_ratio - self._energy_ratio) > _OTHER_COUNTER_RATIO:
            self._energy_ratio = state.energy_ratio
            self._forget_joules()
        self._joules.refutable = state.average_watts is not None and not state.energy_integrated
        energy, now = state.energy_joules, state.sampled_seconds
        if energy is None or not math.isfinite(energy):
            return
        seen, self._seen = self._seen, (now, energy)
        if seen is None:
            return
        if energy < seen[1] or now - seen[0] > _BRACKET_SECONDS:
            # The counter was reset, or the sampler was away: a new span, from a new phase.
            self._forget_moves()
            return
        if energy > seen[1]:
            self._moves.append((self._ticks.move(seen[0], now), energy))
        # A move is of use once the steps up to it are back.
        while self._moves and self._runs:
            if self._moves[0][0].at_seconds > self._runs[-1].end_seconds:
                return
            self._move(*self._moves.popleft())

    def _forget_moves(self) -> None:
        self._start = None
        self._moves.clear()
        self._ticks.forget()

    def _forget_joules(self) -> None:
        """The counter has been wrong: what it taught is worth nothing."""
        self._forget_moves()
        self._joules = JouleGains(self._joules.held)
        self._new_means()

    def _new_means(self) -> None:
        self._bias = _Mean(_BIAS_SECONDS)
        self._late = _Mean(_DISAGREE_SECONDS)
        self._steps = _Mean(_MIX_SECONDS)
        self._idle_joules = 0.0

    def _move(self, tick: Tick, energy_joules: float) -> None:
        if self._start is None:
            self._start = tick, energy_joules
            return
        begin, before_joules = self._start
        span = tick.at_seconds - begin.at_seconds
        dated = max(begin.deviation_seconds, tick.deviation_seconds)
        dated = max(dated, _FOUND_RATIO * self._joules.noise_seconds)
        if span < min(_LONG_SPAN_SECONDS, _SPAN_DEVIATIONS * dated):
            return
        self._start = tick, energy_joules
        while len(self._runs) > 1 and self._runs[1].start_seconds <= begin.at_seconds:
            self._runs.popleft()
        if span <= _MOST_SPAN_SECONDS and self._runs[0].start_seconds <= begin.at_seconds:
            self._span(begin, tick, energy_joules - before_joules)

    def _span(self, begin: Tick, end: Tick, metered_joules: float) -> None:
        """Learn from what ran between two moves."""
        span = end.at_seconds - begin.at_seconds
        joules = [0.0] * (POWER_BINS + 1)
        # Power at both ends; that between steps where none ran.
        watts = [self._idle_watts, self._idle_watts]
        busy = rest = 0.0
        rest_from = math.inf
        for run in self._runs:
            rest += _inside(rest_from, run.start_seconds, begin, end)
            rest_from = run.end_seconds + _REST_SECONDS
            for index, tick in enumerate((begin, end)):
                if run.start_seconds <= tick.at_seconds < run.end_seconds:
                    watts[index] = run.watts
            inside = _inside(run.start_seconds, run.end_seconds, begin, end)
            if inside and not run.joules:
                return
            busy += inside
            joules[run.bin_index] += run.watts * inside * (1.0 - run.part)
            joules[run.bin_index + 1] += run.watts * inside * run.part
            if run.start_seconds >= end.at_seconds:
                break
        if rest > _MOST_REST_RATIO * span:
            return
        joules[IDLE] = self._idle_watts * (span - busy - _REST_SAVES_RATIO * rest)
        first = begin.deviation_seconds * watts[0]
        last = end.deviation_seconds * watts[1]
        # Of a steady period both ends are early or late together.
        edges = first * first + last * last - 2.0 * end.kept_ratio * first * last
        edges += (_REST_ERROR_RATIO * self._idle_watts * rest) ** 2
        predicted = self._joules.predicted(joules)
        steps = predicted - self._joules.applied[IDLE] * joules[IDLE]
        self._bias.add(span, metered_joules, predicted)
        self._late.add(span, metered_joules, predicted)
        self._steps.add(span, steps, math.fsum(joules[:POWER_BINS]))
        keep = math.exp(-span / _MIX_SECONDS)
        self._idle_joules = self._idle_joules * keep + joules[IDLE]
        self._joules.observe(joules, span, metered_joules, max(edges, 0.0))
        self._publish(span)

    def _publish(self, span_seconds: float) -> None:
        gains = self._joules.applied
        untouched = all(gain == 1.0 for gain in gains[:POWER_BINS])
        self.joules_gain_ratio = 1.0 if untouched else 1.0 + self._steps.excess_ratio
        noise = _BIAS_DEVIATIONS * self._joules.noise_seconds
        margin = max(
            0.0,
            self._bias.excess_ratio - _BIAS_FREE_RATIO - noise / _BIAS_SECONDS,
            self._late.excess_ratio - noise / _DISAGREE_SECONDS,
        )
        if gains[IDLE] > 1.0:
            margin += (gains[IDLE] - 1.0) * self._idle_joules / self._late.predicted
        margin = min(margin, MAX_MODEL_MARGIN_RATIO)
        self.margin_ratio = margin if margin > _MARGIN_GRAIN_RATIO else 0.0
        self.disagreement_ratio = self._late.excess_ratio
        bound = _DISAGREE_RATIO / 2 if self.disagrees else _DISAGREE_RATIO
        known = self._late.lasting > _DISAGREE_SECONDS / 2
        beyond_noise = abs(self.disagreement_ratio) - noise / _DISAGREE_SECONDS
        differs = known and beyond_noise > bound
        self._differing_seconds = self._differing_seconds + span_seconds if differs else 0.0
        self.disagrees = self._differing_seconds > _SAID_AFTER_SECONDS


def _inside(start: float, end: float, begin: Tick, until: Tick) -> float:
    """How much of a time lies between two moves."""
    return max(0.0, min(end, until.at_seconds) - max(start, begin.at_seconds))
