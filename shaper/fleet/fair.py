"""Who comes first, and at which pace: what each engine works out from the rows alone.

Laws. With `L` a limit less the margin, sums over the group's engines that were heard of
lately, `extra` the joules above idle of an engine's decode step, and `burst` the most that
the prompts of one of them take when they come together:

    spare    = the least of  L - sum(idle) - sum(prompts' watts)
               and, for every window,  L - sum(idle) - burst / window
    cadence  = sum(extra) / spare
    sustained watts of an engine = L - what the others draw at that cadence

An engine's prompts come after those of another that have been held for longer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shaper.core.types import PowerLimit
from shaper.fleet.rows import HEARD_SECONDS

Table = npt.NDArray[np.void]


def heard(table: Table, now_seconds: float) -> npt.NDArray[np.bool_]:
    """[rows] whether what the engine says of itself still counts."""
    since = np.maximum(table["entered_seconds"], table["end_seconds"])
    found: npt.NDArray[np.bool_] = since + HEARD_SECONDS >= now_seconds
    return found


def pace(
    table: Table, own: int, limits: Sequence[PowerLimit], kept_ratio: float, now_seconds: float
) -> tuple[float, float]:
    """The cadence in seconds that the group's limits leave, and this engine's sustained watts.

    Args:
        table: [rows] of the engines in the group.
        own: this engine's place in it.
        limits: of the group.
        kept_ratio: part of each limit that is in use.
        now_seconds: now.
    """
    fresh = heard(table, now_seconds)
    lowest = min(limit.watts for limit in limits) * kept_ratio
    idle = table["idle_watts"]
    extra = np.where(fresh, table["decode_joules"], 0.0)
    prefill = np.where(fresh, table["prefill_watts"], 0.0)
    burst = float(table["burst_joules"][fresh].max(initial=0.0))
    spare = min(
        lowest - float(prefill.sum()),
        min(x.watts * kept_ratio - burst / x.window_seconds for x in limits),
    ) - float(idle.sum())
    cadence = float(extra.sum()) / spare if spare > 0 else math.inf
    slowest = np.maximum(table["decode_seconds"], max(cadence, 1e-3))
    draws = idle + prefill + extra / slowest
    others = float(draws.sum() - draws[own])
    fair = lowest * float(idle[own]) / max(float(idle.sum()), 1e-9)
    return cadence, max(fair, lowest - others)


def others_held_seconds(table: Table, own: int, now_seconds: float) -> float:
    """For how long the prompts of another engine have been held back, at the most."""
    since = np.where(heard(table, now_seconds), table["waiting_since_seconds"], math.nan)
    since[own] = math.nan
    return max(0.0, now_seconds - float(np.nanmin(since, initial=now_seconds)))


def others_due_seconds(table: Table, own: int, now_seconds: float) -> float:
    """When the decodes of another engine should run at the latest; infinity without any."""
    due = np.where(heard(table, now_seconds), table["decodes_due_seconds"], math.nan)
    due[own] = math.nan
    return float(np.nanmin(due, initial=math.inf))
