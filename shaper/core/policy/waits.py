"""Pauses: for how long decodes may wait, and when a refused step is asked about again.

Law. A step that an engine's own windows refuse fits no earlier than `Headroom.wait_seconds` says,
unless work arrives, leaves or returns, which ends a pause anyway, or the prediction learns,
for which a pause is looked at again after some 20 ms (`engine/runtime.py`). In a group headroom
also comes back when another engine takes back what it had committed: it is asked for all the
time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from shaper.core.policy import Plan, PlanInput
from shaper.core.types import NOTHING, Reason, StepPrediction

# A step takes longer than predicted where the clock sags under way.
LATE_RATIO = 1.03
# A held engine is asked again after a millisecond, and is then launched with nothing
# queued before it.
_POLL_SECONDS = 0.003
# A look at all engines of a group costs some tens of microseconds: not at every poll.
_GROUP_POLL_SECONDS = 0.0015


def again_seconds(
    view: PlanInput,
    refused: Iterable[StepPrediction | None] = (),
    until_seconds: float = math.inf,
) -> float | None:
    """When to ask again; None: at the next poll.

    Args:
        view: of the step that is not launched.
        refused: the smallest steps that would be launched if they fitted; None for one
            that waits for something else than headroom. In a group they are not used.
        until_seconds: when something else may be launched.
    """
    if view.group is not None:
        return view.now_seconds + _GROUP_POLL_SECONDS
    headroom, idle_watts = view.headroom, view.idle_watts
    waits = [0.0 if step is None else headroom.wait_seconds(step, idle_watts) for step in refused]
    wait_seconds = min(waits, default=0.0)
    return min(view.now_seconds + wait_seconds, until_seconds) if wait_seconds else None


def may_wait(view: PlanInput, seconds: float) -> bool:
    """Whether decodes may wait another poll and still come `seconds` after the last ones."""
    return view.decodes is not None and waited_until(view, seconds) > view.now_seconds


def waited_until(view: PlanInput, seconds: float) -> float:
    """The last moment to wait a poll more if decodes shall come `seconds` after the last ones."""
    step = 0.0 if view.decodes is None else view.decodes.seconds * LATE_RATIO
    return view.now_seconds + seconds - view.since_decode_seconds - step - _POLL_SECONDS


def wait(view: PlanInput, reason: Reason, seconds: float) -> Plan:
    """A pause of the decodes, who are alone."""
    cadence = seconds if reason is Reason.DECODE_PACING else None
    return Plan(NOTHING, reason, cadence, waited_until(view, seconds))
