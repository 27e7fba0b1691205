"""The control loop of one engine: policy, then guard, then one `Decision`.

For each step the engine calls, in this order and from one thread:

    plan(load, now)        -> StepLimits    before it schedules
    launched(batch, now)   -> Decision      when it has scheduled
    finished(now)                           when the step's output is back

`observe(state)` may be called from the same thread at any time. There is no
clock and no I/O here: the live engine, virtual time and tests run this same object.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from shaper.core.estimator import Estimator
from shaper.core.guard import Guard
from shaper.core.ledger import Ledger, Room
from shaper.core.policy import Plan, PlanInput, Policy
from shaper.core.types import (
    UNLIMITED,
    ClockEventReasons,
    Decision,
    EngineLoad,
    PowerLimit,
    PowerState,
    Reason,
    StepBatch,
    StepLimits,
    StepPrediction,
)
from shaper.errors import LedgerError

# The sampler reads every 20 ms and meters refresh every 100 ms: a state this old
# means that the sensor is gone.
STALE_SECONDS = 1.0
# What a blind controller keeps free on top: about the mean error of the H100 and B200
# profiles on published serving power (`python -m bench.fidelity`).
BLIND_MARGIN_RATIO = 0.05


# A busy host sees a step's end some milliseconds late. Entered as seen, a window would
# miss that much of it at full power: 3 ms at 700 W are 3% of a limit over 100 ms.
HOST_LATE_SECONDS = 0.005


class StepPredictor(Protocol):
    """The part of `power_model.StepModel` that the controller needs."""

    @property
    def gap_watts(self) -> float:
        """Power between steps, all GPUs of the engine."""
        ...

    def predict(
        self,
        batch: StepBatch,
        *,
        sm_clock_hertz: float | None = None,
        temperature_celsius: float | None = None,
    ) -> StepPrediction:
        """Seconds and joules of a step, all GPUs of the engine."""
        ...


@dataclass(slots=True)
class _Flight:
    """A step that was launched and is not back."""

    launched_seconds: float
    queued: bool
    """It was launched behind another one, so it starts when that one ends."""
    decodes: bool
    raw_seconds: float
    prediction: StepPrediction


class Controller:
    """Decides each step of one engine.

    Args:
        model: predicts steps.
        policy: plans them.
        limits: the budget; empty means that nothing is ever limited.
        start_seconds: now.
        itl_target_seconds: bound on a step that decodes wait behind, or None.
        spend_slack: let decodes wait up to the ITL target, for fewer and larger steps.
        max_pause_seconds: longest time that work is held back.
        margin_ratio: part of each limit that is kept free.
        shadow: decide and record, but apply nothing.
    """

    def __init__(
        self,
        model: StepPredictor,
        policy: Policy,
        limits: Sequence[PowerLimit],
        start_seconds: float,
        *,
        itl_target_seconds: float | None = None,
        spend_slack: bool = False,
        max_pause_seconds: float = 1.0,
        margin_ratio: float = 0.0,
        shadow: bool = False,
    ) -> None:
        self._model = model
        self._policy = policy
        self._shadow = shadow
        self._itl_target_seconds = itl_target_seconds
        self._spend_slack = spend_slack
        self._margin_ratio = margin_ratio
        self._idle_watts = model.gap_watts
        self._ledger = Ledger(limits, self._idle_watts, start_seconds)
        self._guard = Guard(max_pause_seconds)
        self.estimator = Estimator()
        self._flights: deque[_Flight] = deque()
        self._returned_seconds = -math.inf
        self._queues = False
        self._decode_end_seconds = -math.inf
        self._busy_seconds = 0.0
        self._state: PowerState | None = None
        self._clock_hertz: float | None = None
        self._celsius: float | None = None
        self._predictions: dict[StepBatch, tuple[StepPrediction, StepPrediction]] = {}
        self._room = Room(())
        self._plan = Plan(UNLIMITED, Reason.IDLE)
        self._wanted_prefill_tokens = 0

    @property
    def ledger(self) -> Ledger:
        """The energy spent so far."""
        return self._ledger

    @property
    def idle_watts(self) -> float:
        """Power between steps, all GPUs of the engine."""
        return self._idle_watts

    def observe(self, state: PowerState) -> None:
        """Take the sampler's newest state; an old one again is no news."""
        if self._state is not None and state.sampled_seconds <= self._state.sampled_seconds:
            return
        self._state = state
        idle = ClockEventReasons.GPU_IDLE in state.clock_event_reasons
        # An idle GPU shows a clock that it will not run the next step at.
        self._clock_hertz = None if idle else state.sm_clock_hertz
        self._celsius = state.temperature_celsius
        # A span that began before the ledger did teaches nothing; the next one is whole.
        with contextlib.suppress(LedgerError):
            self.estimator.observe_power(state, self._joules_between, self._busy_seconds)

    def _joules_between(self, start_seconds: float, end_seconds: float) -> float:
        """Entered joules, and those of steps in flight as far as they lie inside."""
        entered = self._ledger.joules_between(start_seconds, end_seconds)
        for begin, end, joules in self._in_flight(end_seconds):
            inside = max(0.0, min(end, end_seconds) - max(begin, start_seconds))
            if inside:
                entered += inside * (joules / (end - begin) - self._idle_watts)
        return entered

    def predict(self, batch: StepBatch) -> StepPrediction:
        """A step at the present clock and temperature, corrected by what was measured."""
        return self._predict(batch)[1]

    def _predict(self, batch: StepBatch) -> tuple[StepPrediction, StepPrediction]:
        """As the model says, and corrected. A plan asks about some steps several times."""
        found = self._predictions.get(batch)
        if found is None:
            raw = self._model.predict(
                batch, sm_clock_hertz=self._clock_hertz, temperature_celsius=self._celsius
            )
            found = self._predictions[batch] = (raw, self.estimator.correct(raw))
        return found

    def plan(self, load: EngineLoad, now_seconds: float) -> StepLimits:
        """The limits that the engine shall apply to its next step."""
        self._predictions.clear()
        self._wanted_prefill_tokens = sum(demand.remaining_tokens for demand in load.prefills)
        if not self._ledger.limits and self._itl_target_seconds is None:
            self._plan = Plan(UNLIMITED, Reason.OFF)
            return UNLIMITED
        in_flight = self._in_flight(now_seconds)
        start = max(now_seconds, in_flight[-1][1]) if in_flight else now_seconds
        self._room = self._ledger.ask(
            start, self._floor_watts(load), in_flight, self._margin(now_seconds)
        )
        view = PlanInput(
            load=load,
            room=self._room,
            predict=self.predict,
            itl_target_seconds=self._itl_target_seconds,
            since_decode_seconds=start - self._last_decode_end(in_flight),
            spend_slack=self._spend_slack,
            turn=self._guard.turn(now_seconds),
        )
        self._plan = self._guard.check(self._policy.plan(view), load, now_seconds)
        return UNLIMITED if self._shadow else self._plan.limits

    def _last_decode_end(self, in_flight: list[tuple[float, float, float]]) -> float:
        ends = [
            end
            for flight, (_, end, _) in zip(self._flights, in_flight, strict=True)
            if flight.decodes
        ]
        return ends[-1] if ends else self._decode_end_seconds

    def _floor_watts(self, load: EngineLoad) -> float:
        """What the decodes draw when they go on alone: at every step, or at their ITL target."""
        if not load.decode_requests or not self._ledger.limits:
            return self._idle_watts
        decodes = self.predict(load.batch(0))
        cadence = max(decodes.seconds, self._itl_target_seconds or 0.0)
        return self._idle_watts + (decodes.joules - self._idle_watts * decodes.seconds) / cadence

    def _margin(self, now_seconds: float) -> float:
        state = self._state
        blind = state is None or state.age_seconds(now_seconds) > STALE_SECONDS
        return self._margin_ratio + (BLIND_MARGIN_RATIO if blind else 0.0)

    def _in_flight(self, now_seconds: float) -> list[tuple[float, float, float]]:
        """Launched steps as `(start, end, joules)`; one that is overdue ends now."""
        runs: list[tuple[float, float, float]] = []
        free = self._ledger.end_seconds
        for index, flight in enumerate(self._flights):
            start = max(free, flight.launched_seconds)
            end = start + flight.prediction.seconds
            if index == 0:
                end = max(end, now_seconds)
            runs.append((start, end, flight.prediction.joules))
            free = end
        return runs

    def launched(self, batch: StepBatch, now_seconds: float) -> Decision:
        """Enter a step that the engine scheduled; one without tokens is only recorded."""
        prediction = StepPrediction(0.0, 0.0)
        headroom = math.inf
        if batch.tokens:
            raw, prediction = self._predict(batch)
            queued = bool(self._flights)
            self._queues = self._queues or queued
            decodes = batch.decode_tokens > 0
            flight = _Flight(now_seconds, queued, decodes, raw.seconds, prediction)
            self._flights.append(flight)
            self._guard.launched(batch)
            headroom = self._room.max_watts(prediction.seconds) - prediction.watts
        return Decision(
            at_seconds=now_seconds,
            reason=self._plan.reason,
            limits=self._plan.limits,
            applied=not self._shadow,
            wanted_prefill_tokens=self._wanted_prefill_tokens,
            decode_requests=batch.decode_requests,
            prefill_tokens=batch.prefill_tokens,
            predicted=prediction,
            headroom_watts=headroom,
        )

    def finished(self, now_seconds: float) -> None:
        """The oldest launched step is back: what was promised becomes what was spent.

        A step that is back later than predicted was slow, or the host was late to see
        its end; the next step then started before. Up to `HOST_LATE_SECONDS` it is taken
        for the host's, since a slow GPU soon shows in the gain on step seconds.
        """
        if not self._flights:
            return
        flight = self._flights.popleft()
        seen = now_seconds - max(self._returned_seconds, flight.launched_seconds)
        self._returned_seconds = now_seconds
        # Only a queued step's time is free of the host's, if this engine queues steps.
        if flight.queued or not self._queues:
            self.estimator.observe_step(flight.raw_seconds, seen)
        start = max(self._ledger.end_seconds, flight.launched_seconds)
        predicted_end = start + flight.prediction.seconds
        end = min(now_seconds, max(predicted_end, now_seconds - HOST_LATE_SECONDS))
        if end <= start:
            return
        # The work is the same however long it took; the rest of the time is idle power.
        joules = flight.prediction.joules + (end - predicted_end) * self._idle_watts
        self._ledger.spend(start, end, joules)
        if flight.decodes:
            self._decode_end_seconds = end
        self._busy_seconds += end - start
