"""Chunks that must end at blocks, and a chunk that was allowed and did not run."""

from __future__ import annotations

import pytest

from shaper.core.chunks import Blocks, PrefillDemand, aligned_chunk, least_chunk
from shaper.core.guard import Guard
from shaper.core.policy import Plan
from shaper.core.types import EngineLoad, Reason, StepBatch, StepLimits

OLD, NEW = Blocks(528, False), Blocks(528, True)


@pytest.mark.parametrize(
    ("blocks", "computed", "left", "chunk", "step", "given"),
    [
        # As `_mamba_block_aligned_split` of vLLM 0.23 and of 0.28 to 0.33 answers.
        (OLD, 0, 3000, 64, 164, 0),
        (NEW, 0, 3000, 64, 164, 64),
        (NEW, 0, 3000, 64, 600, 0),
        (OLD, 0, 3000, 1100, 8192, 1056),
        (NEW, 0, 3000, 1100, 8192, 1056),
        (OLD, 0, 1000, 1000, 8192, 528),
        (NEW, 0, 1000, 1000, 8192, 528),
        (OLD, 528, 472, 100, 8192, 100),
        (NEW, 528, 472, 100, 8192, 0),
        (NEW, 528, 472, 472, 8192, 472),
        (NEW, 64, 3000, 1000, 8192, 464),
        (NEW, 0, 100, 100, 8192, 100),
    ],
)
def test_a_chunk_ends_where_vllm_ends_it(blocks, computed, left, chunk, step, given):
    """At a block, at the prompt's last block, or with the prompt."""
    assert aligned_chunk(PrefillDemand(left, computed), chunk, step, blocks) == given


def test_a_prompt_that_gets_nothing_is_passed_over_if_it_runs_and_stops_others_if_it_waits():
    """As vLLM goes on in its running list and ends with its queue."""
    prefills = (PrefillDemand(3000, 0), PrefillDemand(100, 0))
    for running, tokens in ((1, 100), (0, 0)):
        load = EngineLoad(600, 600, 6000, prefills, running_prefills=running, blocks=NEW)
        assert load.batch(300).prefill_tokens == tokens
    assert least_chunk(prefills, NEW) == 528
    assert least_chunk((PrefillDemand(300, 528),), NEW) == 300
    assert least_chunk(prefills, None) == 1


def guarded(used: bool, cut: bool = True) -> list[Plan]:
    """Plans of five seconds in which a chunk is allowed every 10 ms."""
    guard, load = Guard(1.0), EngineLoad(10, 10, 100, (PrefillDemand(3000, 0),))
    plans = []
    for step in range(500):
        limits = StepLimits(prefill_tokens=64) if cut else StepLimits()
        plans.append(guard.check(Plan(limits, Reason.CHUNK_POWER), load, 0.01 * step))
        guard.launched(StepBatch(10, 10, 100, *((1, 64, 64) if used else ())))
    return plans


def test_a_grant_of_which_nothing_ran_is_no_turn():
    """The prompt gets more tokens when it has waited for its bound, up to no bound at all."""
    assert not any(plan.reason is Reason.FORCED_OVER_BUDGET for plan in guarded(used=True))
    assert not any(
        plan.reason is Reason.FORCED_OVER_BUDGET for plan in guarded(used=False, cut=False)
    )
    plans = guarded(used=False)
    forced = [
        plan.limits.prefill_tokens for plan in plans if plan.reason is Reason.FORCED_OVER_BUDGET
    ]
    assert forced[:5] == [512, 1024, 2048, 4096, None]
    first = next(n for n, plan in enumerate(plans) if plan.reason is Reason.FORCED_OVER_BUDGET)
    assert 200 <= first <= 203
    # What runs with no bound neither is not for the budget to give.
    assert len(forced) == 5
