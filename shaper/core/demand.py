"""The demand on the engine and how far it is held back, averaged for readers at any interval.

Laws, with `tau` the time constant and `dt` the time since the last call:

    held    += (1 - exp(-dt / 1 s)) * (holds - held)      share of time in which work was held
    prefill  = prefill * exp(-dt / 5 s) + joules / 5 s    watts that prompts took of late
    burst    = mean + deviation of the joules that prompts want when they come, of the
               last twenty arrivals or so

Nothing here integrates a backlog, so there is nothing to unwind when the load falls.
"""

from __future__ import annotations

import math

from shaper.core.learn.estimator import Estimator
from shaper.core.policy import Plan
from shaper.core.supervise.status import EngineDemand
from shaper.core.types import EngineLoad, Reason, StepBatch, StepPrediction

# The share of time that work was held back is a mean over about a second.
_HELD_SECONDS = 1.0
# Long enough to average over prompts that come one by one, short enough to follow a burst.
_PREFILL_SECONDS = 5.0
_BURST_WEIGHT = 0.05
_HOLDING = frozenset(
    {Reason.CHUNK_POWER, Reason.DECODE_ONLY, Reason.PAUSE, Reason.PREFILL_OVERDUE}
    | {Reason.DECODE_PACING, Reason.PARTIAL_DECODE, Reason.FORCED_OVER_BUDGET}
)


class DemandMeter:
    """Written by the thread that schedules; `publish` may be called from another.

    Args:
        idle_watts: power between steps.
        start_seconds: now.
    """

    def __init__(self, idle_watts: float, start_seconds: float) -> None:
        self._idle_watts = idle_watts
        self._load = EngineLoad()
        self._planned_seconds = self._prefill_seconds = start_seconds
        self._held_ratio = 0.0
        self._prefill_watts = 0.0
        self._decodes: StepPrediction | None = None
        self._infeasible = False
        self._held_since: float | None = None
        self._waiting_since: float | None = None
        self._burst_joules = self._burst_squares = 0.0
        self.wanted_joules = 0.0
        """Above idle power, of the step with prompts that was wanted last."""
        self._had_prompts = False

    def planned(
        self,
        load: EngineLoad,
        plan: Plan,
        now_seconds: float,
        decodes: StepPrediction | None,
        least_watts: float,
        sustained_watts: float,
    ) -> None:
        """A step was planned.

        Args:
            load: what the engine would run.
            plan: what it may run.
            now_seconds: now.
            decodes: its decodes alone.
            least_watts: what must be drawn whatever is decided.
            sustained_watts: what the budget allows for long.
        """
        elapsed = max(0.0, now_seconds - self._planned_seconds)
        holds = 1.0 if plan.reason in _HOLDING else 0.0
        if elapsed < 0.1 * _HELD_SECONDS:
            share = elapsed / _HELD_SECONDS
        else:
            # The engine was idle, or in a long step.
            share = 1.0 - math.exp(-elapsed / _HELD_SECONDS)
        self._held_ratio += share * (holds - self._held_ratio)
        self._planned_seconds = now_seconds
        self._load, self._decodes = load, decodes
        self._infeasible = least_watts > sustained_watts
        if not load.prefills or plan.reason is Reason.UNCONSTRAINED:
            self._held_since = None
        elif self._held_since is None:
            self._held_since = now_seconds
        if not load.prefills:
            self._waiting_since = None
        elif self._waiting_since is None:
            self._waiting_since = now_seconds

    def wants(
        self, prefill_tokens: int, whole: StepPrediction | None, decodes: StepPrediction | None
    ) -> None:
        """What the engine would run if nothing held it back."""
        arrived = prefill_tokens > 0 and not self._had_prompts
        self._had_prompts = prefill_tokens > 0
        if whole is None:
            return
        self.wanted_joules = self._above_idle(whole)
        if not arrived:
            return
        joules = self.wanted_joules - self._above_idle(decodes)
        self._burst_joules += _BURST_WEIGHT * (joules - self._burst_joules)
        self._burst_squares += _BURST_WEIGHT * (joules * joules - self._burst_squares)

    def _above_idle(self, step: StepPrediction | None) -> float:
        return 0.0 if step is None else step.joules_above(self._idle_watts)

    @property
    def burst_joules(self) -> float:
        """Joules above idle that prompts which come together mostly take."""
        mean = self._burst_joules
        return mean + math.sqrt(max(0.0, self._burst_squares - mean * mean))

    def launched(self, batch: StepBatch, prediction: StepPrediction, now_seconds: float) -> None:
        """A step was launched."""
        if batch.prefill_tokens:
            self._waiting_since = None
            # What the chunk adds to the decodes that run in the same step.
            own = self._above_idle(prediction)
            own -= self._above_idle(self._decodes if batch.decode_tokens else None)
            self._prefill_watts = self.prefill_watts(now_seconds)
            self._prefill_watts += max(0.0, own) / _PREFILL_SECONDS
            self._prefill_seconds = now_seconds

    def prefill_watts(self, now_seconds: float) -> float:
        """Mean power above idle that prompts took of late."""
        if not self._prefill_watts:
            return 0.0
        elapsed = max(0.0, now_seconds - self._prefill_seconds)
        return self._prefill_watts * math.exp(-elapsed / _PREFILL_SECONDS)

    @property
    def waiting_since_seconds(self) -> float | None:
        """Since when prompts wait and none of them has run; None: none waits."""
        return self._waiting_since

    def held_seconds(self, now_seconds: float) -> float:
        """How long prompts have not got all that they want."""
        since = self._held_since
        return 0.0 if since is None else max(0.0, now_seconds - since)

    def publish(self, estimator: Estimator, margin_ratio: float, plan: Plan) -> EngineDemand:
        """Everything in one value."""
        load, decodes = self._load, self._decodes
        now = self._planned_seconds
        wanted = self._idle_watts + self.prefill_watts(now)
        if decodes is not None:
            wanted += decodes.watts - self._idle_watts
        backlog = sum(each.remaining_tokens for each in load.prefills)
        arrival = load.oldest_arrival_seconds
        return EngineDemand(
            at_seconds=now,
            busy=bool(load.decode_requests or load.prefills),
            running_requests=load.running_requests,
            waiting_requests=load.waiting_requests,
            backlog_tokens=backlog,
            oldest_wait_seconds=0.0 if arrival is None else max(0.0, now - arrival),
            held_ratio=self._held_ratio,
            wanted_watts=wanted,
            seconds_gain_ratio=estimator.seconds_gain_ratio,
            joules_gain_ratio=estimator.joules_gain_ratio,
            margin_ratio=margin_ratio,
            disagreement_ratio=estimator.disagreement_ratio,
            disagrees=estimator.disagrees,
            infeasible=self._infeasible,
            running_cap=plan.limits.running_requests,
            cadence_seconds=plan.cadence_seconds,
        )
