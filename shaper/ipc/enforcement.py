"""What limits an engine's power now, and whether the engine keeps it, by its status block.

This is the one answer outside the engine: admission, control routes, state and metrics use it.
Inside the engine `Constraints.budgeted` is the same question.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from shaper.core.budget import Constraints
from shaper.core.supervise.thermal import LIMIT_WINDOW_SECONDS
from shaper.core.types import PowerBudget, PowerLimit
from shaper.ipc.control_file import EngineControl
from shaper.ipc.group_status import GroupStatus
from shaper.ipc.metric_table import STANDING_METRICS
from shaper.ipc.status_block import Status

UnkeptReason = Literal["passes_through", "off", "shadow", "policy"]
UNKEPT_REASONS: tuple[UnkeptReason, ...] = get_args(UnkeptReason)
"""Why nobody keeps a limit: the engine can't be shaped; its mode is off, or shadow; or its
policy goes by no limit."""
_HEAT_INDEX = [name for name, _ in STANDING_METRICS].index("shaper_thermal_limit_watts")


@dataclass(frozen=True, slots=True)
class Enforcement:
    """What limits one engine, and whether the engine keeps it."""

    control: EngineControl | None
    """None: the engine has written none yet, or can't even be watched."""
    constraints: Constraints
    unkept: UnkeptReason | None
    """Why nobody keeps an operator's limits; None: they are kept, or there are none now."""

    @property
    def shapes(self) -> bool:
        """Whether the engine is to shape its work by a limit now."""
        on = self.control is not None and self.control.mode == "on"
        return on and self.constraints.budgeted


def enforcement_of(status: Status) -> Enforcement:
    """By the engine's block. A section that was not written yet says nothing."""
    control = EngineControl.from_values(status.values.get("control", ()))
    group = GroupStatus.from_values(status.values.get("group", ()))
    standing = status.values.get("standing", ())
    heat_watts = standing[_HEAT_INDEX] if len(standing) > _HEAT_INDEX else math.nan
    constraints = Constraints(
        PowerBudget() if control is None else control.budget,
        () if math.isnan(heat_watts) else (PowerLimit(heat_watts, LIMIT_WINDOW_SECONDS),),
        () if group is None else group.limits,
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
