"""What one engine works out from the rows: who comes before it, and the margin in common."""

from __future__ import annotations

import pytest

from shaper.core.ledger.shared import EngineShare
from shaper.core.types import PowerLimit
from shaper.group import GroupLedger, memory_groups
from shaper.group.fairness import DEFER_SECONDS

NOW = 1.0


def groups(count: int) -> list[GroupLedger]:
    rest = {"rest_watts": 100.0, "rest_after_seconds": 3.0}
    return memory_groups((PowerLimit(4000.0, 0.1),), count, idle_watts=100.0, **rest)


def share(**more: float) -> EngineShare:
    return EngineShare(100.0, decode_joules=2.0, decode_seconds=0.01, **more)


def test_prompts_of_others_come_in_the_order_in_which_they_began_to_wait():
    """Those that wait for longer come before this engine's, all before decodes in time."""
    one, two, three, own = groups(4)
    one.publish(share(waiting_since_seconds=NOW - 0.03, waiting_joules=20.0), NOW)
    two.publish(share(waiting_since_seconds=NOW - 0.01, waiting_joules=30.0), NOW)
    three.publish(share(), NOW)
    mine = share(waiting_since_seconds=NOW - 0.02, waiting_joules=40.0)
    view = own.query(NOW, NOW, mine)
    assert (view.late_joules, view.ahead_joules, view.waiting_joules) == (0.0, 20.0, 50.0)
    # Prompts that have just come are behind all that wait.
    assert own.query(NOW, NOW, share()).ahead_joules == 50.0


def test_decodes_come_first_while_they_are_late_and_due_before_this_engines_own():
    """Neither those that are in time, nor those that are late beyond what others can give."""
    dues = (NOW - 0.02, NOW - 0.01, NOW + 0.01, NOW - DEFER_SECONDS - 0.01)
    *others, own = groups(5)
    for other, due in zip(others, dues, strict=True):
        other.publish(share(decodes_due_seconds=due), NOW)
    assert own.query(NOW, NOW, share(decodes_due_seconds=NOW + 0.02)).late_joules == 4.0
    assert own.query(NOW, NOW, share(decodes_due_seconds=NOW - 0.015)).late_joules == 2.0
    # An engine that is late and has prompts waiting counts once, with the step of both.
    others[0].publish(
        share(decodes_due_seconds=dues[0], waiting_since_seconds=NOW - 0.03, waiting_joules=22.0),
        NOW,
    )
    view = own.query(NOW, NOW, share())
    assert (view.late_joules, view.ahead_joules) == (4.0, 24.0)


def test_what_is_kept_free_is_the_mean_margin_and_the_same_for_all():
    """Whoever knows its GPUs least well sees the same room as the others."""
    asked = (0.01, 0.0, 0.11)
    handles = groups(3)
    for handle, margin in zip(handles, asked, strict=True):
        handle.publish(share(margin_ratio=margin), NOW)
    for handle, margin in zip(handles, asked, strict=True):
        (part,) = handle.query(NOW, NOW, share(margin_ratio=margin)).parts
        assert part.allowed_watts == pytest.approx(4000.0 * (1.0 - 0.04))


def test_an_engine_that_says_nothing_keeps_nothing_free():
    """What it asked for last was for work that it no longer has."""
    one, two = groups(2)
    one.publish(share(margin_ratio=0.1), NOW - 0.06)
    (part,) = two.query(NOW, NOW, share(margin_ratio=0.02)).parts
    assert part.allowed_watts == pytest.approx(4000.0 * 0.98)
