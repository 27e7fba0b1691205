"""One engine's dealings with the group that it shares a budget with."""

from __future__ import annotations

from collections.abc import Sequence

from shaper.core.demand import DemandMeter
from shaper.core.ledger.ledger import Ledger
from shaper.core.ledger.shared import (
    HISTORY_SECONDS,
    Committed,
    EngineShare,
    GroupView,
    PowerGroup,
    Step,
)
from shaper.core.ledger.window import Run
from shaper.core.policy.sustained import slowest_seconds
from shaper.core.types import EngineLoad, LatencyTargets, StepBatch, StepLimits, StepPrediction


class SharedLedger:
    """Publishes, queries, reserves and commits. Stateful fields: the last share, the reservation.

    Args:
        group: this engine's handle.
        ledger: of its own energy.
        demand: of its own work.
        targets: what is promised about latency.
        idle_watts: power between steps.
    """

    def __init__(
        self,
        group: PowerGroup,
        ledger: Ledger,
        demand: DemandMeter,
        targets: LatencyTargets,
        idle_watts: float,
    ) -> None:
        self._group, self._ledger, self._demand = group, ledger, demand
        self._targets, self._idle_watts = targets, idle_watts
        self.longest_window_seconds = max(limit.window_seconds for limit in group.limits)
        self._share = EngineShare(idle_watts)
        self._reserved: StepPrediction | None = None

    def update_share(
        self,
        load: EngineLoad,
        decodes: StepPrediction | None,
        floor_watts: float,
        decoded_seconds: float,
        prompts_run: bool,
        margin_ratio: float,
        now_seconds: float,
    ) -> None:
        """How this engine stands before its next step.

        Args:
            load: what it would run.
            decodes: its decodes alone.
            floor_watts: what it draws whatever is decided.
            decoded_seconds: when its decodes ran last, or were ready first.
            prompts_run: a chunk is in flight: the next one is not what others wait for.
            margin_ratio: part of each limit to keep free for its errors.
            now_seconds: now.
        """
        self._reserved = None
        due = None
        if decodes is not None:
            due = decoded_seconds + slowest_seconds(self._targets, decodes) - decodes.seconds
        waits = bool(load.prefills) and not prompts_run
        self._share = EngineShare(
            floor_watts=floor_watts,
            decode_joules=0.0 if decodes is None else decodes.joules_above(self._idle_watts),
            decode_seconds=0.0 if decodes is None else decodes.seconds,
            prefill_watts=self._demand.prefill_watts(now_seconds),
            burst_joules=self._demand.burst_joules,
            waiting_since_seconds=self._demand.waiting_since_seconds if waits else None,
            waiting_joules=self._demand.wanted_joules if waits else 0.0,
            decodes_due_seconds=due,
            margin_ratio=margin_ratio,
        )

    def query(self, start_seconds: float, now_seconds: float) -> GroupView:
        """What the group leaves for a step that starts then."""
        return self._group.query(start_seconds, now_seconds, self._share)

    def reserve(
        self,
        runs: Sequence[Run],
        step: Step,
        now_seconds: float,
        *,
        whatever: bool,
    ) -> bool:
        """Whether a planned step is entered with the others.

        Args:
            runs: in flight, before it.
            step: the planned one.
            now_seconds: now.
            whatever: enter it whether it fits or not.
        """
        start, planned = step.start_seconds, step.prediction
        runs = [*runs, (start, start + planned.seconds, planned.joules)]
        asked = None if whatever else step
        if not self._group.reserve(self._committed(runs), self._share, now_seconds, asked):
            return False
        self._reserved = planned
        return True

    def publish(self, now_seconds: float) -> None:
        """No step is planned."""
        self._group.publish(self._share, now_seconds)

    def reserved(self, prediction: StepPrediction | None) -> bool:
        """Whether what the engine launched is what was reserved; None: nothing."""
        return prediction is self._reserved or prediction == self._reserved

    def launched(self, runs: Sequence[Run], now_seconds: float) -> None:
        """The engine launched something else than what was reserved, or nothing."""
        self._group.commit(self._committed(runs), self._share, now_seconds)

    def finished(self, final_seconds: float, runs: Sequence[Run], now_seconds: float) -> None:
        """A step is back, and what was entered since `final_seconds` is not what it was."""
        self._group.commit(self._committed(runs, final_seconds), self._share, now_seconds)

    def _committed(self, runs: Sequence[Run], final_seconds: float | None = None) -> Committed:
        final = self._ledger.end_seconds if final_seconds is None else final_seconds
        times, joules = self._ledger.corners(final - HISTORY_SECONDS, runs)
        return Committed(final, times, joules)


def planned_batch(load: EngineLoad, limits: StepLimits) -> StepBatch:
    """The step that the engine will make of these limits."""
    if limits.running_requests is not None:
        load = load.capped(limits.running_requests)
    batch = load.batch(limits.prefill_tokens)
    if limits.decode_requests is None:
        return batch
    share = limits.decode_requests / max(1, load.decode_requests)
    return batch._replace(
        decode_requests=limits.decode_requests,
        decode_tokens=round(batch.decode_tokens * share),
        decode_context_tokens=round(batch.decode_context_tokens * share),
    )
