"""When nothing binds, vLLM schedules exactly as it would alone."""

from __future__ import annotations

import pytest

from shaper.core.types import PowerLimit, Reason

LOOSE = (PowerLimit(5000.0, 0.1), PowerLimit(4000.0, 1.0))
TIGHT = (PowerLimit(420.0, 0.1),)


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("limits", [(), LOOSE], ids=["no-limit", "loose-limits"])
def test_outputs_equal_vllms(make_rig, random_traffic, seed, asynchronous, limits):
    """Every SchedulerOutput of random traffic equals that of vLLM's own scheduler."""
    kv = {"asynchronous": asynchronous, "kv_blocks": 2500}
    theirs, ours = make_rig(None, **kv), make_rig(limits, **kv)
    theirs.run(random_traffic(seed))
    ours.run(random_traffic(seed))
    assert len(theirs.outputs) > 200
    assert ours.outputs == theirs.outputs
    assert ours.shaper.counters.errors == 0
    assert ours.shaper.counters.held == 0


def test_shadow_applies_nothing_and_still_decides(make_rig, random_traffic):
    """Under a tight budget a shadow leaves every output alone, and records what it would do."""
    theirs, ours = make_rig(None), make_rig(TIGHT, shadow=True)
    theirs.run(random_traffic(4))
    ours.run(random_traffic(4))
    assert ours.outputs == theirs.outputs
    reasons = {decision.reason for decision in ours.log.decisions}
    assert Reason.CHUNK_POWER in reasons or Reason.DECODE_ONLY in reasons
    assert not any(decision.applied for decision in ours.log.decisions)


def test_a_budget_that_binds_does_change_the_outputs(make_rig, random_traffic):
    """The comparison above is able to fail."""
    theirs, ours = make_rig(None), make_rig(TIGHT)
    theirs.run(random_traffic(4))
    ours.run(random_traffic(4))
    assert ours.outputs != theirs.outputs


def test_the_same_seed_gives_the_same_decisions(make_rig, random_traffic):
    """Nothing in a decision depends on the wall clock or on chance."""
    first, second = make_rig(TIGHT), make_rig(TIGHT)
    first.run(random_traffic(5))
    second.run(random_traffic(5))
    assert first.log.decisions == second.log.decisions
