"""What one engine works out from the rows: the margin in common."""

from __future__ import annotations

import pytest

from shaper.core.group import EngineShare
from shaper.core.types import PowerLimit
from shaper.fleet import GroupLedger, memory_groups

NOW = 1.0


def groups(count: int) -> list[GroupLedger]:
    rest = {"rest_watts": 100.0, "rest_after_seconds": 3.0}
    return memory_groups((PowerLimit(4000.0, 0.1),), count, idle_watts=100.0, **rest)


def share(**more: float) -> EngineShare:
    return EngineShare(100.0, decode_joules=2.0, decode_seconds=0.01, **more)


def test_what_is_kept_free_is_the_mean_margin_and_the_same_for_all():
    """Whoever knows its GPUs least well sees the same room as the others."""
    asked = (0.01, 0.0, 0.11)
    handles = groups(3)
    for handle, margin in zip(handles, asked, strict=True):
        handle.tell(share(margin_ratio=margin), NOW)
    for handle, margin in zip(handles, asked, strict=True):
        (part,) = handle.look(NOW, NOW, share(margin_ratio=margin)).parts
        assert part.allowed_watts == pytest.approx(4000.0 * (1.0 - 0.04))


def test_an_engine_that_says_nothing_keeps_nothing_free():
    """What it asked for last was for work that it no longer has."""
    one, two = groups(2)
    one.tell(share(margin_ratio=0.1), NOW - 0.06)
    (part,) = two.look(NOW, NOW, share(margin_ratio=0.02)).parts
    assert part.allowed_watts == pytest.approx(4000.0 * 0.98)
