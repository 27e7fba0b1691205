"""The guard's promises: bounded waits and sane limits, whatever the policy says."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shaper.core.guard import Guard
from shaper.core.policy import Plan
from shaper.core.types import (
    NO_TARGETS,
    NOTHING,
    EngineLoad,
    LatencyTargets,
    PrefillDemand,
    Reason,
    StepLimits,
)
from tests import strategies

PAUSE = Plan(NOTHING, Reason.PAUSE)
BOTH = EngineLoad(4, 4, 400, prefills=(PrefillDemand(3000, 0),))


def drive(policy_plan, load, seconds: float, bound: float) -> list[tuple[float, str]]:
    """Polls a guard each millisecond; returns when decodes and prompts ran."""
    guard, ran = Guard(bound), []
    for tick in range(int(seconds * 1000)):
        now = tick / 1000
        plan = guard.check(policy_plan, load, now)
        if plan.limits.run:
            batch = load.batch(plan.limits.prefill_tokens)
            if plan.limits.decode_requests != 0 and batch.decode_tokens:
                ran.append((now, "decode"))
            if batch.prefill_tokens:
                ran.append((now, "prefill"))
            guard.launched(batch)
    return ran


@pytest.mark.parametrize("bound", [0.05, 1.0])
def test_a_policy_that_only_pauses_starves_nobody(bound):
    """Decodes run at least every bound, prompts every two."""
    ran = drive(PAUSE, BOTH, 10 * bound, bound)
    for kind, most in (("decode", bound), ("prefill", 2 * bound)):
        times = [0.0] + [now for now, what in ran if what == kind] + [10 * bound]
        gaps = [b - a for a, b in pairwise(times)]
        assert max(gaps) <= most + 0.002


def test_decode_only_for_ever_still_gives_prompts_their_turn():
    """A prompt that decodes crowd out runs within twice the bound; a plan within the promises
    passes unchanged."""
    ran = drive(Plan(StepLimits(prefill_tokens=0), Reason.DECODE_ONLY), BOTH, 3.0, 1.0)
    assert any(what == "prefill" for _, what in ran)
    plan = Plan(StepLimits(prefill_tokens=256), Reason.CHUNK_POWER)
    assert Guard(1.0).check(plan, BOTH, 0.0) == plan


def test_a_forced_chunk_grows_until_it_moves_the_prompt():
    """A prompt that small chunks can't advance gets larger ones, then all it wants."""
    guard, sizes = Guard(0.01), []
    for tick in range(400):
        plan = guard.check(PAUSE, EngineLoad(prefills=BOTH.prefills), tick / 1000)
        if plan.reason is Reason.FORCED_OVER_BUDGET:
            sizes.append(plan.limits.prefill_tokens)  # and the engine makes nothing of it
    assert sizes[:3] == [512, 1024, 2048]
    assert sizes[-1] is None


@given(strategies.loads(), st.integers(-10, 10**6), st.integers(-10, 10**6))
def test_limits_are_clamped(load, prefill, decodes):
    """No negative and no impossible limit passes."""
    plan = Guard(1.0).check(Plan(StepLimits(True, prefill, decodes), Reason.CHUNK_POWER), load, 0.0)
    assert plan.limits.prefill_tokens is not None
    assert 0 <= plan.limits.prefill_tokens <= load.token_budget
    kept = plan.limits.decode_requests
    assert kept is None or 0 <= kept < load.decode_requests


@pytest.mark.parametrize(
    ("load", "targets", "due"),
    [
        (EngineLoad(4, 4, 400), NO_TARGETS, 1.0),
        (EngineLoad(4, 4, 400), LatencyTargets(itl_seconds=0.05), 0.05),
        (EngineLoad(prefills=BOTH.prefills), NO_TARGETS, 1.0),
        (EngineLoad(prefills=BOTH.prefills), LatencyTargets(ttft_seconds=0.5), 0.25),
    ],
)
def test_a_pause_ends_when_a_promise_is_due(load, targets, due):
    """Decodes' bound, prompts' turn, and the turn that a TTFT target brings forward."""
    guard, long = Guard(1.0, targets), PAUSE._replace(until_seconds=60.0)
    assert guard.check(long, load, 0.0).until_seconds == pytest.approx(due)
    assert guard.check(long, load, due / 2).until_seconds == pytest.approx(due)
    assert guard.prefill_overdue(load, due - 1e-6) is False
    after = guard.check(long, load, due)
    assert guard.prefill_overdue(load, due) or after.reason is Reason.FORCED_OVER_BUDGET


def test_a_pause_that_ends_before_any_promise_is_due_keeps_its_date():
    """And one that is asked about at every poll has none."""
    guard = Guard(1.0)
    assert guard.check(PAUSE._replace(until_seconds=0.02), BOTH, 0.0).until_seconds == 0.02
    assert guard.check(PAUSE, BOTH, 0.01).until_seconds is None
