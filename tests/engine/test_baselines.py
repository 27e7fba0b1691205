"""The baseline policies in closed loop: what each does to power and tails, and what it doesn't."""

from __future__ import annotations

import pytest

from bench.baselines.latency_chunk import LatencyChunk
from bench.baselines.reactive import ReactiveConcurrency
from bench.baselines.static import StaticCaps
from shaper.core.policy.fixed import FixedPolicy
from shaper.core.types import PowerLimit, Reason
from tests.engine.harness import gaps, random_traffic, worst_ratio

LIMITS = (PowerLimit(500.0, 0.1),)


def peak_watts(rig) -> float:
    """Highest mean of 100 ms."""
    return worst_ratio(rig.engine.gpus.take_segments(), PowerLimit(1.0, 0.1))


@pytest.fixture
def served(make_rig):
    """Serves the same traffic under a policy, to its end."""

    def serve(policy, limits=LIMITS, count=50, rate=8.0, **settings):
        rig = make_rig(limits, policy=policy, **settings)
        rig.run(random_traffic(11, count=count, rate=rate))
        assert all(r.finished_seconds is not None for r in rig.engine.requests.values())
        assert rig.shaper.counters.errors == 0
        return rig

    return serve


def test_the_null_policy_is_vllm(make_rig):
    """Under a budget that would bind: output for output the unshaped engine's."""
    plain, null = make_rig(None), make_rig(LIMITS, policy=FixedPolicy)
    for rig in (plain, null):
        rig.run(random_traffic(11, count=30))
    assert null.outputs == plain.outputs


def test_a_static_chunk_lowers_peaks_and_tails_and_does_not_know_the_limit(served):
    """Smaller chunks draw less and hold decodes up less; yet no cap follows from the budget."""
    free, capped = served(FixedPolicy), served(lambda: StaticCaps(prefill_tokens=256))
    assert max(gaps(capped.engine)) < 0.5 * max(gaps(free.engine))
    peak = peak_watts(capped)
    assert peak < peak_watts(free)
    assert peak > LIMITS[0].watts
    chunks = [d.prefill_tokens for d in capped.log.decisions]
    assert max(chunks) == 256
    assert Reason.CAP in {d.reason for d in capped.log.decisions}


def test_latency_chunks_keep_the_itl_target_and_ignore_the_limit(served):
    """Every gap stays within the target; the power is what it is."""
    chunked = served(LatencyChunk, itl_target_seconds=0.03)
    assert max(gaps(chunked.engine)) <= 0.03 * 1.03
    assert peak_watts(chunked) > 1.1 * LIMITS[0].watts
    assert Reason.CHUNK_ITL in {d.reason for d in chunked.log.decisions}


def test_the_reactive_loop_brings_the_sustained_power_down_and_misses_the_bursts(served):
    """Over a second it comes near its target; over 100 ms the bursts go through."""
    limits = (PowerLimit(480.0, 1.0),)
    free = served(FixedPolicy, limits, count=150, rate=10.0)
    loop = served(ReactiveConcurrency, limits, count=150, rate=10.0)
    capped = [d for d in loop.log.decisions if d.reason is Reason.CAP]
    assert capped
    assert {d.limits.running_requests for d in capped} != {capped[0].limits.running_requests}
    free_rows, rows = free.engine.gpus.take_segments(), loop.engine.gpus.take_segments()

    def mean(rows) -> float:
        span = rows[(rows[:, 0] > 4.0) & (rows[:, 1] < 11.0)]
        seconds = span[:, 1] - span[:, 0]
        return float((seconds * span[:, 2]).sum() / seconds.sum())

    assert mean(rows) < mean(free_rows)
    assert rows[:, 2].max() > 1.2 * limits[0].watts
