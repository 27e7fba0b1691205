"""Policies: each computes a step's limits and enforces nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from shaper.core.ledger import Room
from shaper.core.types import EngineLoad, Reason, StepBatch, StepLimits, StepPrediction

Predictor = Callable[[StepBatch], StepPrediction]


@dataclass(frozen=True, slots=True)
class PlanInput:
    """What a policy sees of one step."""

    load: EngineLoad
    room: Room
    predict: Predictor
    itl_target_seconds: float | None
    since_decode_seconds: float
    """From the end of the last step with decodes to the start of this one."""
    spend_slack: bool
    """Use the ITL target up for fewer, larger decode steps, also where the budget is loose."""
    turn: bool
    """Prompts have waited so long that decodes shall wait for them."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A policy's answer."""

    limits: StepLimits
    reason: Reason


class Policy(Protocol):
    """One method: the limits of the next step."""

    def plan(self, view: PlanInput) -> Plan:
        """The limits of the next step, and why."""
        ...
