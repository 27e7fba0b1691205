"""The null policy: whatever the engine wants. The baseline of every comparison."""

from __future__ import annotations

from shaper.core.policy import Plan, PlanInput
from shaper.core.types import UNLIMITED, Reason


class FixedPolicy:
    """Never limits anything."""

    def plan(self, view: PlanInput) -> Plan:
        """Unlimited, whatever the view."""
        return Plan(UNLIMITED, Reason.OFF)
