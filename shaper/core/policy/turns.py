"""Whose turn it is among engines that share a budget.

Laws. Late decodes come first: while another engine's decodes are past the slowest cadence
of decode steps, and are due before this engine's own, it holds everything back, for
`DEFER_SECONDS` at most: who is still late then waits for something that others can't give.
Prompts take turns: while another engine's prompts have waited for longer than this
engine's (since the last chunk of each), its own wait, until they have waited for their
bound. And while anybody's prompts wait, all decodes go at their slowest cadence, which
leaves the prompts the room.

So turns are counted, too: whoever ran a chunk has waited for the shorter time and comes after
who waits still. While prompts wait for `t` seconds, with `b` the longest pause, each other
engine runs at most `1 + floor(t / b)` steps with prompts before them: one that it had waited
for, and one each time that its own have waited for the bound. Those waits end at `2 b`
(`core/guard.py`): three of each other engine at most, and one more of those who decided at
the same moment.
"""

from __future__ import annotations

from shaper.core.policy import PlanInput
from shaper.core.policy.sustained import slowest_seconds

DEFER_SECONDS = 0.05


def others_held_seconds(view: PlanInput) -> float:
    """For how long the prompts of another engine have been held back, at the most."""
    return 0.0 if view.group is None else view.group.others_held_seconds


def others_prompts_first(view: PlanInput) -> bool:
    """Whether the prompts of another engine come before this one's."""
    return others_held_seconds(view) > view.waiting_seconds and not view.turn


def others_decodes_first(view: PlanInput) -> bool:
    """Whether the decodes of another engine are late, and later than this one's."""
    if view.group is None or view.turn:
        return False
    now, due = view.now_seconds, view.group.others_due_seconds
    if not now - DEFER_SECONDS <= due < now:
        return False
    if view.decodes is None:
        return True
    slowest = slowest_seconds(view.targets, view.decodes)
    return due < now - view.since_decode_seconds + slowest - view.decodes.seconds
