"""What limits an engine's power now, and whether anybody keeps it, by its status block.

The one answer for all who ask from outside the engine: admission, state and metrics.
"""

from __future__ import annotations

import math
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


def constraints_of(status: Status) -> Constraints:
    """What limits this engine. A section that was not written yet says nothing."""
    control = EngineControl.from_values(status.values.get("control", ()))
    group = GroupStatus.from_values(status.values.get("group", ()))
    standing = status.values.get("standing", ())
    heat_watts = standing[_HEAT_INDEX] if len(standing) > _HEAT_INDEX else math.nan
    return Constraints(
        PowerBudget() if control is None else control.budget,
        () if math.isnan(heat_watts) else (PowerLimit(heat_watts, LIMIT_WINDOW_SECONDS),),
        () if group is None else group.limits,
    )


def unkept(status: Status) -> UnkeptReason | None:
    """Why nobody keeps the limits of an operator on this engine; None: they are kept, or
    there are none now."""
    control = EngineControl.from_values(status.values.get("control", ()))
    asked = constraints_of(status).asked
    if control is None:
        # An engine that can't even be watched writes its reason, and nothing else.
        asked = bool(status.info.get("limits_power"))
    if not asked:
        return None
    if status.info.get("passes_through"):
        return "passes_through"
    if control is not None and control.mode != "on":
        return control.mode
    return "policy" if status.info.get("policy") == "fixed" else None
