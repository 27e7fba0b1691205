"""Which engine's work comes first among engines that share a budget.

Laws. A step leaves headroom for the work that comes before it, and no more: it runs where the
group's windows hold it and, beside it, what these want:

    first    decodes of others that are late (past the slowest cadence) and due before this
             engine's own, for `DEFER_SECONDS` (`group/fairness.py`): who is still late then waits
             for something that others can't give
    then     prompts of others that have waited for longer than this engine's (since the
             last chunk of each), one step of each; before a step with prompts
    then     prompts of all others; before a step of decodes alone that are not late

Prompts that have waited for their bound (`prefill_overdue`) go first. So as many prompts run at
once as fit, in the order in which they began to wait, and decodes slow down as far as what
waits needs.

So waits are bounded, too. No engine takes the headroom of the prompts that have waited longest:
they run when what ran before has left the window, and then the next. Prompts wait for about one
window for each engine whose prompts come before them, beside what late decodes take. And a
count holds whatever else keeps them: while prompts wait for `t` seconds, with `b` the
longest pause, each other engine runs at most `1 + floor(t / b)` steps with prompts that
leave them no headroom: one that it had waited for, and one each time that its own have waited
for the bound. Those waits end at `2 b` (`core/guard.py`): three of each other engine at most,
and one more of those who decided at the same moment.
"""

from __future__ import annotations

from shaper.core.policy import PlanInput
from shaper.core.types import StepPrediction


def others_held_seconds(view: PlanInput) -> float:
    """For how long the prompts of another engine have been held back, at the most."""
    return 0.0 if view.group is None else view.group.others_held_seconds


def comes_first_joules(view: PlanInput, *, prompts: bool) -> float:
    """What comes before a step of this engine wants of the windows.

    Args:
        view: of this step.
        prompts: it has prompts; else it is one of decodes that don't wait for any.
    """
    group = view.group
    if group is None or view.prefill_overdue:
        return 0.0
    return group.ahead_joules if prompts else group.late_joules


def fits_beside(view: PlanInput, step: StepPrediction, joules: float) -> bool:
    """Whether a step fits, with so many joules of others beside it in the group's windows."""
    if not view.headroom.fits(step):
        return False
    if view.group is None or not joules:
        return True
    seconds, watts = step.seconds, (step.joules + joules) / step.seconds
    return all(part.fits(seconds, watts) for part in view.group.parts)


def crowds_prompts(view: PlanInput) -> bool:
    """Whether a step of decodes alone takes headroom that waiting prompts of others want."""
    group = view.group
    if group is None or view.decodes is None or not group.waiting_joules:
        return False
    return not fits_beside(view, view.decodes, group.waiting_joules)
