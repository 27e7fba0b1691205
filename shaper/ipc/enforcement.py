"""What limits an engine's power now, and whether the engine keeps it, by its status block.

This is the one answer outside the engine: admission, control routes, state and metrics use it.
Inside the engine `Constraints.budgeted` is the same question.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from shaper.core.budget import Constraints
from shaper.core.types import PowerBudget
from shaper.ipc.control_file import EngineControl
from shaper.ipc.engine_record import Status

UnkeptReason = Literal["passes_through", "off", "shadow", "policy"]
UNKEPT_REASONS: tuple[UnkeptReason, ...] = get_args(UnkeptReason)
"""Why a limit is not kept: the engine can't be shaped; its mode is off, or shadow; or its
policy goes by no limit."""


@dataclass(frozen=True, slots=True)
class Enforcement:
    """What limits one engine, and whether the engine keeps it."""

    control: EngineControl | None
    """None: the engine has written none yet, or can't even be watched."""
    constraints: Constraints
    unkept: UnkeptReason | None
    """Why an operator's limits are not kept; None: they are kept, or there are none now."""

    @property
    def shapes(self) -> bool:
        """Whether the engine is to shape its work by a limit now."""
        on = self.control is not None and self.control.mode == "on"
        return on and self.constraints.budgeted


def enforcement_of(status: Status) -> Enforcement:
    """By the engine's record. A part that was not written yet says nothing."""
    record = status.record
    control = record.control
    constraints = Constraints(
        PowerBudget() if control is None else control.budget,
        () if record.standing is None else record.standing.limits,
        () if record.group is None else record.group.limits,
    )
    # An engine that can't even be watched writes its reason, and nothing else.
    asked = constraints.asked if control is not None else bool(status.info.get("limits_power"))
    unkept: UnkeptReason | None = None
    if asked and status.info.get("passes_through"):
        unkept = "passes_through"
    elif asked and control is not None and control.mode != "on":
        unkept = control.mode
    elif asked and status.info.get("policy") == "fixed":
        unkept = "policy"
    return Enforcement(control, constraints, unkept)
