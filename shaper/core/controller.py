"""The control loop of one engine: policy, then guard, then one `Decision`.

For each step the engine calls, in this order and from one thread:

    plan(load, now)        -> StepLimits    before it schedules
    launched(batch, now)   -> Decision      when it has scheduled
    finished(now)                           when the step's output is back

`observe(state)` and `set_budget(budget, now)` may be called from the same thread at any
time. There is no clock and no I/O here: the live engine, virtual time and tests run this
same object.
"""

from __future__ import annotations

import math

from shaper.core.completed import HOST_LATE_SECONDS, OWN_LATE_RATIO, CompletedSteps
from shaper.core.demand import DemandMeter
from shaper.core.guard import Guard
from shaper.core.in_flight import InFlightSteps
from shaper.core.learn.estimator import Estimator
from shaper.core.learn.margin import UNCOUNTED_MARGIN_RATIO, Margin
from shaper.core.ledger.headroom import UNBOUNDED
from shaper.core.ledger.ledger import Ledger
from shaper.core.ledger.shared import PowerGroup, Step
from shaper.core.ledger.window import Run
from shaper.core.model.predictor import StepPredictor
from shaper.core.policy import Plan, PlanInput, Policy
from shaper.core.policy.sustained import DEFAULT_DECODE_INTERVAL
from shaper.core.shared_ledger import SharedLedger, planned_batch
from shaper.core.supervise.status import EngineDemand
from shaper.core.types import (
    NO_TARGETS,
    NOTHING,
    UNLIMITED,
    Decision,
    EngineLoad,
    LatencyTargets,
    PowerBudget,
    PowerState,
    Reason,
    StepBatch,
    StepLimits,
    StepPrediction,
)

__all__ = ["HOST_LATE_SECONDS", "OWN_LATE_RATIO", "STALE_SECONDS", "Controller"]

# The sampler reads every 20 ms and meters refresh every 100 ms: a state this old
# means that the sensor is gone.
STALE_SECONDS = 1.0
# Between two steps and two readings few are asked about.
_KEPT_PREDICTIONS = 256
_NO_STEP = StepPrediction(0.0, 0.0)
_OFF = Plan(UNLIMITED, Reason.OFF)


class Controller:
    """Decides each step of one engine.

    Args:
        model: predicts steps.
        policy: plans them.
        budget: what the engine may draw; an empty one never limits anything.
        start_seconds: now.
        targets: what is promised about latency.
        max_pause_seconds: longest time that work is held back.
        margin_ratio: part of each limit that is kept free besides what the estimator asks for.
        shadow: decide and record, but apply nothing.
        rest_watts: power of the GPUs when nothing ran for `rest_after_seconds`; by default
            that between steps.
        rest_after_seconds: see `rest_watts`.
        full: what ran before the start is unknown: every window is taken as used up.
        group: a ledger that this engine shares with others; its limits hold beside the budget.
        free_hertz: the SM clock of GPUs that nothing holds down; infinity: not known.
    """

    def __init__(
        self,
        model: StepPredictor,
        policy: Policy,
        budget: PowerBudget,
        start_seconds: float,
        *,
        targets: LatencyTargets = NO_TARGETS,
        max_pause_seconds: float = 1.0,
        margin_ratio: float = 0.0,
        shadow: bool = False,
        rest_watts: float | None = None,
        rest_after_seconds: float = math.inf,
        full: bool = False,
        group: PowerGroup | None = None,
        free_hertz: float = math.inf,
    ) -> None:
        self._policy = policy
        self.shadow = shadow
        self._targets = targets
        self._promises = group is not None or not targets.empty
        self._margin = Margin(margin_ratio, start_seconds)
        self.idle_watts = model.gap_watts
        """Power between steps, all GPUs of the engine."""
        self._ledger = Ledger(
            budget,
            self.idle_watts,
            start_seconds,
            rest_watts=rest_watts,
            rest_after_seconds=rest_after_seconds,
            full=full,
        )
        self._guard = Guard(max_pause_seconds, targets)
        self._decode_deadline_seconds = targets.itl_seconds or max_pause_seconds
        self.estimator = Estimator(self.idle_watts)
        self._completed = CompletedSteps(
            model, self.estimator, self._ledger, self.idle_watts, free_hertz
        )
        self._demand = DemandMeter(self.idle_watts, start_seconds)
        self._shared = None
        if group is not None:
            self._shared = SharedLedger(group, self._ledger, self._demand, targets, self.idle_watts)
        self._in_flight_steps = InFlightSteps()
        self._returned_seconds = -math.inf
        self._state: PowerState | None = None
        self._predictions: dict[StepBatch, tuple[StepPrediction, StepPrediction]] = {}
        self._headroom = UNBOUNDED
        self._plan = Plan(UNLIMITED, Reason.IDLE)
        self._wanted_prefill_tokens = 0

    @property
    def ledger(self) -> Ledger:
        """The energy spent so far."""
        return self._ledger

    @property
    def limited(self) -> bool:
        """Whether anything is limited: a budget, a group's, or a latency target."""
        return self._promises or not self._ledger.budget.empty

    @property
    def quiet_until_seconds(self) -> float:
        """Until then the last plan holds, a pause, unless work arrives, leaves or returns."""
        until = self._plan.until_seconds
        if until is None or self.shadow or self._plan.limits.run:
            return -math.inf
        return until

    @property
    def demand(self) -> EngineDemand:
        """What there is to do, and how it goes; may be asked from another thread."""
        return self._demand.publish(self.estimator, self._margin.kept_ratio, self._plan)

    def set_budget(self, budget: PowerBudget, now_seconds: float) -> None:
        """Put another budget in force, from the next step on.

        What ran or was launched before counts at no more than the new limits.
        """
        if budget == self._ledger.budget:
            return
        self._ledger.set_budget(budget, self._in_flight(now_seconds))

    def observe(self, state: PowerState) -> None:
        """Take the sampler's newest state; an old one again is no news."""
        if self._state is not None and state.sampled_seconds <= self._state.sampled_seconds:
            return
        self._state = state
        self._completed.observe(state, self._in_flight_steps.unsure)
        self.estimator.observe_power(state)
        self._predictions.clear()

    def predict(self, batch: StepBatch) -> StepPrediction:
        """A step at the present temperature, as it is planned: see `CompletedSteps`."""
        return self._predict(batch)[1]

    def _predict(self, batch: StepBatch) -> tuple[StepPrediction, StepPrediction]:
        """As the model says, and corrected. Plans ask about some steps again and again."""
        found = self._predictions.get(batch)
        if found is None:
            if len(self._predictions) >= _KEPT_PREDICTIONS:
                self._predictions.clear()
            found = self._predictions[batch] = self._completed.predict(batch)
        return found

    def plan(self, load: EngineLoad, now_seconds: float) -> StepLimits:
        """The limits that the engine shall apply to its next step."""
        prefills = load.prefills
        self._enter(now_seconds)
        self._wanted_prefill_tokens = sum([each.remaining_tokens for each in prefills])
        if not self.limited:
            self._plan = _OFF
            self._demand.planned(load, _OFF, now_seconds, None, 0.0, math.inf)
            return UNLIMITED
        in_flight = self._in_flight(now_seconds)
        start = max(now_seconds, in_flight[-1][1]) if in_flight else now_seconds
        decodes = self.predict(load.batch(0)) if load.decode_requests else None
        if prefills:
            whole = load.batch()
            self._demand.wants(whole.prefill_tokens, self.predict(whole), decodes)
        else:
            self._demand.wants(0, None, decodes)
        view = self._decide(load, start, now_seconds, decodes, in_flight)
        least_watts = self._paced_watts(decodes, self._decode_deadline_seconds)
        self._demand.planned(
            load, self._plan, now_seconds, decodes, least_watts, view.headroom.sustained_watts
        )
        return UNLIMITED if self.shadow else self._plan.limits

    def _decide(
        self,
        load: EngineLoad,
        start: float,
        now: float,
        decodes: StepPrediction | None,
        in_flight: list[Run],
    ) -> PlanInput:
        """Find the plan; returns what it was found from."""
        default_interval = 0.0 if decodes is None else DEFAULT_DECODE_INTERVAL * decodes.seconds
        floor_watts = self._paced_watts(decodes, self._targets.itl_seconds or default_interval)
        since = self._in_flight_steps.since_decode(load, start, self._launched_runs(now))
        shared = self._shared
        state, longest = self._state, self._ledger.longest_window_seconds
        blind = state is None or state.age_seconds(now) > STALE_SECONDS
        if shared is not None:
            longest = max(longest, shared.longest_window_seconds)
        asked_ratio = self.estimator.margin_ratio
        if not blind and state is not None and state.energy_integrated:
            asked_ratio += UNCOUNTED_MARGIN_RATIO
        margin_ratio = self._margin.follow(asked_ratio, blind, longest, now)
        if shared is not None:
            run = self._in_flight_steps.holds_prompts
            shared.update_share(load, decodes, floor_watts, start - since, run, margin_ratio, now)

        view = self._plan_once(load, start, now, decodes, in_flight, floor_watts, since)
        if shared is None or self._reserve_step(shared, load, start, now, in_flight):
            return view
        # Others were faster: once more with what they left, and then not at all.
        view = self._plan_once(load, start, now, decodes, in_flight, floor_watts, since)
        if not self._reserve_step(shared, load, start, now, in_flight):
            self._plan = self._guard.check(Plan(NOTHING, Reason.PAUSE), load, start)
            self._reserve_step(shared, load, start, now, in_flight)
        return view

    def _plan_once(
        self,
        load: EngineLoad,
        start: float,
        now: float,
        decodes: StepPrediction | None,
        in_flight: list[Run],
        floor_watts: float,
        since_decode_seconds: float,
    ) -> PlanInput:
        """Plan with what is left now; returns what the policy saw."""
        shared = self._shared
        headroom = self._ledger.ask(start, floor_watts, in_flight, self._margin.kept_ratio)
        group = None
        if shared is not None:
            group = shared.query(start, now)
            headroom = headroom.beside(group.parts, group.sustained_watts)
        self._headroom = headroom
        demand = self._demand
        # By position, in the order of its fields: with names the call takes half as long again.
        view = PlanInput(
            load, headroom, self.predict, now, self._state, self._targets, decodes,
            self._decode_deadline_seconds, since_decode_seconds,
            self._guard.prefill_overdue(load, start),
            demand.held_seconds(now), self.idle_watts, demand.prefill_watts(now),
            demand.burst_joules, group,
        )  # fmt: skip
        # Waits count from when the device is free: behind a step nothing is held back.
        self._plan = self._guard.check(self._policy.plan(view), load, start)
        return view

    def _reserve_step(
        self, shared: SharedLedger, load: EngineLoad, start: float, now: float, in_flight: list[Run]
    ) -> bool:
        """Whether the planned step is entered with the group's, or none is planned."""
        limits = self._plan.limits
        batch = planned_batch(load, limits) if limits.run and not self.shadow else None
        if batch is None or not batch.requests:
            shared.publish(now)
            return True
        step = Step(start, self.predict(batch))
        # What the guard forces runs whether it fits or not, and is counted.
        whatever = self._plan.reason is Reason.FORCED_OVER_BUDGET
        return shared.reserve(in_flight, step, now, whatever=whatever)

    def _paced_watts(self, decodes: StepPrediction | None, cadence_seconds: float) -> float:
        """What the decodes draw when they go on alone, a step each `cadence_seconds` at most."""
        if decodes is None:
            return self.idle_watts
        cadence = max(decodes.seconds, cadence_seconds)
        return self.idle_watts + decodes.joules_above(self.idle_watts) / cadence

    def _in_flight(self, now_seconds: float) -> list[Run]:
        return self._completed.runs + self._launched_runs(now_seconds)

    def _launched_runs(self, now_seconds: float) -> list[Run]:
        return self._in_flight_steps.runs(self._completed.end_seconds, now_seconds)

    def launched(self, batch: StepBatch, now_seconds: float) -> Decision:
        """Enter a step that the engine scheduled; one without tokens is only recorded."""
        prediction, headroom = _NO_STEP, math.inf
        ran = None
        self._guard.launched(batch)
        if batch.decode_tokens or batch.prefill_tokens:
            raw, prediction = self._predict(batch)
            ran = prediction
            idle_seconds = (
                0.0 if self._in_flight_steps else now_seconds - self._completed.end_seconds
            )
            unsure = self._completed.unsure(batch, idle_seconds)
            self._in_flight_steps.launch(now_seconds, batch, raw, prediction, unsure)
            self._demand.launched(batch, prediction, now_seconds)
            headroom = self._headroom.headroom_watts(prediction)
        if self._shared is not None and not self._shared.reserved(ran):
            self._shared.launched(self._in_flight(now_seconds), now_seconds)
        # By position, in the order of its fields.
        return Decision(
            now_seconds,
            self._plan.reason,
            self._plan.limits,
            not self.shadow,
            self._wanted_prefill_tokens,
            batch.decode_requests,
            batch.prefill_tokens,
            prediction,
            headroom,
        )

    def finished(self, now_seconds: float) -> None:
        """The oldest launched step is back: what was promised becomes what was spent."""
        if not self._in_flight_steps:
            return
        flight = self._in_flight_steps.complete()
        self._predictions.clear()  # the estimator learns
        seen = now_seconds - max(self._returned_seconds, flight.launched_seconds)
        self._returned_seconds = now_seconds
        start = max(self._completed.end_seconds, flight.launched_seconds)
        # Only a queued step's time is free of the host's, if this engine queues steps.
        measured = seen if flight.queued or not self._in_flight_steps.queues else None
        end = self._completed.add(flight, start, now_seconds, measured)
        if end is None:
            return
        if flight.batch.decode_tokens:
            self._in_flight_steps.decoded(end)
        self._enter(now_seconds, changed=True)

    def _enter(self, now_seconds: float, *, changed: bool = False) -> None:
        """Enter the steps whose clock is known by now, and tell the group."""
        final = self._ledger.end_seconds
        changed |= self._completed.enter(now_seconds)
        if changed and self._shared is not None:
            self._shared.finished(final, self._in_flight(now_seconds), now_seconds)
