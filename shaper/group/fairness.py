"""Who comes first, and at which pace: what each engine works out from the rows alone.

Laws. With sums over the group's engines that were heard of lately, `idle` and `margin` of
each, `extra` the joules above idle of an engine's decode step, `burst` the most that the
prompts of one of them take when they come together, and `L` a limit less what is kept free:

    kept     = limit * sum(margin * idle) / sum(idle)
    spare    = the least of  L - sum(idle) - sum(prompts' watts)
               and, for every window,  L - sum(idle) - burst / window
    cadence  = sum(extra) / spare
    sustained watts of an engine = L - what the others draw at that cadence

The margin is one for all: an engine that keeps more free than the others would never find headroom
in windows that these fill. It is a mean, since an engine's error is no more than its part of the
sum.

What comes before an engine's step (`core/policy/turns.py` has the order), in joules above idle:

    late     = sum(extra)  of others whose decodes are late, and due before its own
    ahead    = late + sum(wanted step)  of others whose prompts have waited for longer
    waiting  = late + sum(wanted step)  of all others whose prompts wait
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shaper.core.ledger.shared import EngineShare
from shaper.core.types import PowerLimit
from shaper.group.reservations import HEARD_SECONDS

Table = npt.NDArray[np.void]

# No cadence is faster: an engine without decodes has none.
_FASTEST_SECONDS = 1e-3
# Decodes that are still late then wait for something that others can't give.
DEFER_SECONDS = 0.05


class Terms(NamedTuple):
    """What one engine works out."""

    kept_ratio: float
    """Part of each limit that is in use: 1 less the mean of the engines' margins."""
    sustained_watts: float
    cadence_seconds: float
    others_held_seconds: float
    """For how long the prompts of another engine have been held back, at the most."""
    late_joules: float
    ahead_joules: float
    waiting_joules: float
    """These three: see `GroupView`."""


def fair_terms(
    table: Table,
    own: int,
    share: EngineShare,
    limits: Sequence[PowerLimit],
    now_seconds: float,
) -> Terms:
    """The pace that the group's limits leave, and which engine's work comes first.

    Args:
        table: [rows] of the engines in the group.
        own: this engine's place in it.
        share: what this engine says of itself now.
        limits: of the group.
        now_seconds: now.
    """
    # In plain Python: for the few engines of a host that takes a quarter of numpy's time.
    column = {name: table[name].tolist() for name in _COLUMNS}
    idle_watts, oldest = column["idle_watts"], now_seconds - HEARD_SECONDS
    spoke = zip(column["entered_seconds"], column["end_seconds"], strict=True)
    heard = [row for row, (said, end) in enumerate(spoke) if said >= oldest or end >= oldest]
    joules, seconds = column["decode_joules"], column["decode_seconds"]
    prompts, bursts = column["prefill_watts"], column["burst_joules"]
    waiting_since, decodes_due = column["waiting_since_seconds"], column["decodes_due_seconds"]
    wanted, margins = column["waiting_joules"], column["margin_ratio"]
    extra = prefill = burst = late = ahead = waiting = 0.0
    weight, margin = idle_watts[own], idle_watts[own] * share.margin_ratio
    since, due = share.waiting_since_seconds, share.decodes_due_seconds
    since = now_seconds if since is None else since
    due = now_seconds if due is None else min(due, now_seconds)
    latest, earliest = now_seconds - DEFER_SECONDS, math.inf
    for row in heard:
        extra += joules[row]
        prefill += prompts[row]
        if bursts[row] > burst:
            burst = bursts[row]
        if row != own:
            weight += idle_watts[row]
            margin += idle_watts[row] * margins[row]
            if waiting_since[row] < earliest:  # NaN is not
                earliest = waiting_since[row]
            decodes = joules[row] if latest <= decodes_due[row] < due else 0.0
            wants = decodes if decodes > wanted[row] else wanted[row]
            late += decodes
            ahead += wants if waiting_since[row] < since else decodes
            waiting += wants
    held, idle = max(0.0, now_seconds - earliest), sum(idle_watts)
    kept_ratio = 1.0 - margin / max(weight, 1e-9)
    lowest = min(limit.watts for limit in limits) * kept_ratio
    least = min(limit.watts * kept_ratio - burst / limit.window_seconds for limit in limits)
    spare = min(lowest - prefill, least) - idle
    cadence = extra / spare if spare > 0 else math.inf
    pace = max(cadence, _FASTEST_SECONDS)
    others = idle - idle_watts[own]
    for row in heard:
        if row != own:
            others += prompts[row]
            others += joules[row] / (seconds[row] if seconds[row] > pace else pace)
    fair = lowest * idle_watts[own] / max(idle, 1e-9)
    return Terms(kept_ratio, max(fair, lowest - others), cadence, held, late, ahead, waiting)


_COLUMNS = (
    *("entered_seconds", "end_seconds", "idle_watts", "decode_joules", "decode_seconds"),
    *("prefill_watts", "burst_joules", "waiting_since_seconds", "waiting_joules"),
    *("decodes_due_seconds", "margin_ratio"),
)
