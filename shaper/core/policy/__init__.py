"""Policies: each computes a step's limits and enforces nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from shaper.core.ledger.headroom import Headroom
from shaper.core.ledger.shared import GroupView
from shaper.core.types import (
    NO_TARGETS,
    EngineLoad,
    LatencyTargets,
    PowerState,
    Reason,
    StepBatch,
    StepLimits,
    StepPrediction,
)

Predictor = Callable[[StepBatch], StepPrediction]


class PlanInput(NamedTuple):
    """What a policy sees of one step."""

    load: EngineLoad
    headroom: Headroom
    predict: Predictor
    now_seconds: float = 0.0
    state: PowerState | None = None
    """What the sensors last said; None without any."""
    targets: LatencyTargets = NO_TARGETS
    decodes: StepPrediction | None = None
    """The step of all ready decodes alone; None where none is ready."""
    decode_deadline_seconds: float = 1.0
    """Longest time between two decode steps: the ITL target, if there is one."""
    since_decode_seconds: float = 0.0
    """From the end of the last step with decodes to the start of this one."""
    prefill_overdue: bool = False
    """Prompts have waited so long that decodes must wait for them."""
    held_seconds: float = 0.0
    """How long prompts have not got all that they want."""
    idle_watts: float = 0.0
    """Power between steps."""
    prefill_watts: float = 0.0
    """Mean power above idle that prompts took in the last seconds."""
    burst_joules: float = 0.0
    """What prompts that come together mostly take, above idle power."""
    group: GroupView | None = None
    """What the engines that share a budget leave this one; None: it shares none."""

    @property
    def itl_target_seconds(self) -> float | None:
        """The ITL target, or None."""
        return self.targets.itl_seconds

    @property
    def spend_slack(self) -> bool:
        """Use the ITL target up for fewer, larger decode steps, also where the budget is loose."""
        return self.targets.spend_slack


class Plan(NamedTuple):
    """A policy's answer."""

    limits: StepLimits
    reason: Reason
    cadence_seconds: float | None = None
    """Time between decode steps that the policy aims at, where it spaces them."""
    until_seconds: float | None = None
    """A pause that goes on until then, unless work arrives or leaves; None: ask each time."""


class Policy(Protocol):
    """One method: the limits of the next step."""

    def plan(self, view: PlanInput) -> Plan:
        """The limits of the next step, and why."""
        ...
