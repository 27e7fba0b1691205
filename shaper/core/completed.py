"""The clock that steps are planned at and ran at, and the entry of steps that are back.

Law. A reading tells of the clock now and then; whatever holds it down (a brake, heat, a power
cap, a lock, a rest) may let go at any moment in between, with no reason shown. So while the
last reading is below the free clock, that which the GPU climbs to when nothing holds it,

    planned     seconds at the measured clock, at the power of the free one
    in flight   seconds and joules at the free clock: the next step may start that early
    back        power of the free clock, until a reading after its end; then that of the highest
                clock read around it

and a step is learned from only if the clock hardly moved around it. A GPU that is idle shows a
clock that it will not run the next step at: that step is planned at the free clock, and its
time may be that of any clock in between.
"""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

from shaper.core.in_flight import InFlightStep, Unsure
from shaper.core.learn.estimator import Estimator
from shaper.core.ledger.ledger import Ledger
from shaper.core.ledger.window import Run
from shaper.core.model.predictor import Predictor
from shaper.core.types import ClockEventReasons, PowerState, StepBatch, StepPrediction

# A busy host sees a step's end some milliseconds late. Entered as seen, a window would
# miss that much of it at full power: 3 ms at 700 W are 3% of a limit over 100 ms.
HOST_LATE_SECONDS = 0.005
# A clock that sags under way makes a step of 40 ms 1.4 ms longer, at full power.
OWN_LATE_RATIO = 0.05
# Between two readings of a power cap at work the clock moves by less: a step is then known at
# the middle to about 1%. A GPU that wakes moves by more.
_STEADY_RATIO = 1.05
# A shorter pause is no rest: the host's own time between two steps.
_PAUSE_SECONDS = 0.01
# Beyond so many steps, or so long without a reading, the free clock is what counts.
_MOST_WAITING, _LONGEST_SECONDS = 12, 0.25


class SeenClock:
    """The newest reading. Stateful fields: all.

    Args:
        free_hertz: the SM clock that nothing holds down; infinity where it is not known.
    """

    def __init__(self, free_hertz: float = math.inf) -> None:
        self.free_hertz = free_hertz
        self.read_hertz: float | None = None
        self.read_seconds = -math.inf
        self.idle = False
        self.low = False
        """The clock may climb at any moment."""
        self.hertz: float | None = None
        """What steps are predicted at; None: the highest, as nothing else is known."""
        self.rest_hertz = math.inf
        """The lowest clock that was read of an idle GPU."""

    def observe(self, state: PowerState) -> None:
        """Take a state."""
        self.read_hertz, self.read_seconds = state.sm_clock_hertz, state.sampled_seconds
        self.idle = ClockEventReasons.GPU_IDLE in state.clock_event_reasons
        self.low = self.read_hertz is not None and self.read_hertz < self.free_hertz
        self.hertz = None if self.idle else self.read_hertz
        if self.idle and self.low and self.read_hertz is not None:
            self.rest_hertz = min(self.rest_hertz, self.read_hertz)

    def woke(self) -> None:
        """Work comes after a pause: if this GPU's clock falls at rest, it may have since the
        last reading."""
        if self.rest_hertz < self.free_hertz:
            self.read_hertz, self.hertz, self.idle, self.low = self.rest_hertz, None, True, True


class _Completed(NamedTuple):
    """A step that is back and not entered."""

    flight: InFlightStep
    start_seconds: float
    end_seconds: float
    measured_seconds: float | None
    joules: float
    """As planned, or at the free clock."""


class CompletedSteps:
    """Predicts steps at the clock that was read, and enters those that are back.

    Args:
        model: predicts steps.
        estimator: corrects predictions, and learns from steps that are entered.
        ledger: where they are entered.
        idle_watts: power between steps.
        free_hertz: see `SeenClock`.

    Stateful fields: the clock, the temperature, the steps that wait for a reading.
    """

    def __init__(
        self,
        model: Predictor,
        estimator: Estimator,
        ledger: Ledger,
        idle_watts: float,
        free_hertz: float,
    ) -> None:
        self._model, self._estimator, self._ledger = model, estimator, ledger
        self._idle_watts = idle_watts
        self.clock = SeenClock(free_hertz)
        self._celsius: float | None = None
        self._waiting: deque[_Completed] = deque()

    def observe(self, state: PowerState, in_flight: list[Unsure]) -> None:
        """Take a state: what it says of the clock holds for steps around it.

        Args:
            state: newer than the last one.
            in_flight: of the steps that are not back.
        """
        self.clock.observe(state)
        self._celsius = state.temperature_celsius
        for unsure in (*in_flight, *(each.flight.unsure for each in self._waiting)):
            if unsure is not None:
                _see(unsure, self.clock)

    def predict(self, batch: StepBatch) -> tuple[StepPrediction, StepPrediction]:
        """A step as the model says at the measured clock, and as it is planned."""
        clock = self.clock
        free_watts = 0.0
        if clock.low and not clock.idle:
            free_watts = self._at(batch, self._free_hertz).watts
        raw = self._raw(batch, clock.hertz)
        step = self._estimator.correct(batch, raw)
        if free_watts > step.watts:
            step = StepPrediction(step.seconds, step.seconds * free_watts)
        return raw, step

    def unsure(self, batch: StepBatch, idle_seconds: float) -> Unsure | None:
        """What may come of a step that is launched now; None where its clock is known.

        Args:
            batch: what it computes.
            idle_seconds: how long nothing has run.
        """
        clock = self.clock
        if idle_seconds > _PAUSE_SECONDS:
            clock.woke()
        if not clock.low or clock.read_hertz is None:
            return None
        free = self._at(batch, self._free_hertz)
        slowest = self._at(batch, clock.read_hertz).seconds
        return Unsure(free, slowest, clock.read_hertz, 0.0 if clock.idle else clock.read_hertz)

    def add(
        self, flight: InFlightStep, start_seconds: float, now_seconds: float, measured: float | None
    ) -> float | None:
        """A step is back; returns when it is taken to have ended, None if before it began.

        A step that is back later than predicted was slow, or the host was late to see
        its end; the next step then started before. A small part of the step's own length
        is taken for its own, at its power, and all of it up to the slowest clock that was
        read; then up to `HOST_LATE_SECONDS` for the host's, since a slow GPU soon shows in the
        gain on step seconds.

        Args:
            flight: the step.
            start_seconds: when it started.
            now_seconds: now.
            measured: its length; None where that is not the device's own.
        """
        step, unsure = flight.prediction, flight.unsure
        predicted_end = start_seconds + step.seconds
        late = now_seconds - predicted_end
        own_late = _own_late(late, step.seconds, unsure)
        end = min(now_seconds, predicted_end + max(own_late, late - HOST_LATE_SECONDS))
        if end <= start_seconds:
            return None
        joules = self._joules(end - start_seconds, unsure.free if unsure else step, unsure)
        self._waiting.append(_Completed(flight, start_seconds, end, measured, joules))
        return end

    @property
    def end_seconds(self) -> float:
        """When the last step that is back ended."""
        return self._waiting[-1].end_seconds if self._waiting else self._ledger.end_seconds

    @property
    def runs(self) -> list[Run]:
        """Steps that are back and not entered, as `(start, end, joules)`."""
        return [(each.start_seconds, each.end_seconds, each.joules) for each in self._waiting]

    def enter(self, now_seconds: float) -> bool:
        """Enter what is known by now; whether there was anything."""
        entered = False
        while self._waiting:
            done = self._waiting[0]
            unsure = done.flight.unsure
            read_after_end = unsure is None or self.clock.read_seconds >= done.end_seconds
            overdue = now_seconds - done.end_seconds > _LONGEST_SECONDS
            if not (read_after_end or overdue or len(self._waiting) > _MOST_WAITING):
                break
            self._waiting.popleft()
            self._enter(done, read_after_end)
            entered = True
        return entered

    def _enter(self, done: _Completed, read_after_end: bool) -> None:
        flight, unsure, joules = done.flight, done.flight.unsure, done.joules
        raw: StepPrediction | None = flight.raw
        if unsure is not None:
            if read_after_end and unsure.highest_hertz < self._free_hertz:
                joules = self._joules_at_read_clock(done, unsure)
            steady = read_after_end and unsure.highest_hertz <= _STEADY_RATIO * unsure.lowest_hertz
            middle = (unsure.lowest_hertz + min(unsure.highest_hertz, self._free_hertz)) / 2.0
            raw = self._raw(flight.batch, middle) if steady else None
        begin, end = done.start_seconds, done.end_seconds
        if raw is None:
            self._estimator.skip_run(begin, end)
        else:
            self._estimator.observe_run(flight.batch, raw, begin, end, done.measured_seconds)
        self._ledger.spend(begin, end, joules)

    def _joules_at_read_clock(self, done: _Completed, unsure: Unsure) -> float:
        """Joules at the highest clock that was read; a step that was quicker refutes it."""
        seconds = done.end_seconds - done.start_seconds
        step = self._at(done.flight.batch, unsure.highest_hertz)
        if seconds < step.seconds * (1.0 - OWN_LATE_RATIO):
            return done.joules
        return min(done.joules, self._joules(seconds, step, unsure))

    def _joules(self, seconds: float, step: StepPrediction, unsure: Unsure | None) -> float:
        """Of a step that took so long: early, or late beyond its own, the work is the same and
        the rest of the time idle."""
        late = seconds - step.seconds
        own_late = _own_late(late, step.seconds, unsure)
        return step.joules + own_late * step.watts + (late - own_late) * self._idle_watts

    @property
    def _free_hertz(self) -> float:
        return self.clock.free_hertz

    def _raw(self, batch: StepBatch, hertz: float | None) -> StepPrediction:
        if hertz == math.inf:
            hertz = None
        return self._model.predict(batch, sm_clock_hertz=hertz, temperature_celsius=self._celsius)

    def _at(self, batch: StepBatch, hertz: float) -> StepPrediction:
        return self._estimator.correct(batch, self._raw(batch, hertz))


def _see(unsure: Unsure, clock: SeenClock) -> None:
    """A reading while the step ran, or the first one after its end."""
    if clock.idle or clock.read_hertz is None:
        # The GPU is idle again: how high its clock was is unknown.
        unsure.highest_hertz = math.inf
        return
    unsure.lowest_hertz = min(unsure.lowest_hertz, clock.read_hertz)
    unsure.highest_hertz = max(unsure.highest_hertz, clock.read_hertz)


def _own_late(late: float, seconds: float, unsure: Unsure | None) -> float:
    """How much of a lateness is the step's own."""
    slowest = seconds if unsure is None else max(seconds, unsure.slowest_seconds)
    return min(max(late, 0.0), slowest - seconds + OWN_LATE_RATIO * slowest)
