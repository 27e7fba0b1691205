"""The budget in closed loop: vLLM's scheduler, the shaper and an emulated GPU."""

from __future__ import annotations

import random

import numpy as np
import pytest

from shaper.core.types import PowerLimit, Reason
from tests.engine.harness import gaps, random_traffic, worst_ratio

# A cadence of the meter's own: what the driver says is a window late, never exact.
TOLERANCE_RATIO = 0.01


@pytest.fixture(scope="module")
def free(make_rig):
    """True power of the same requests without a shaper."""
    unshaped = make_rig(None)
    unshaped.run(random_traffic(11, count=60))
    return unshaped.engine.gpus.take_segments()


@pytest.mark.parametrize(
    ("limits", "itl"),
    [
        ((PowerLimit(560.0, 0.1),), 0.05),
        ((PowerLimit(520.0, 0.1), PowerLimit(480.0, 1.0)), None),
        ((PowerLimit(420.0, 0.1),), 0.05),
        ((PowerLimit(600.0, 0.05), PowerLimit(450.0, 3.0)), None),
    ],
    ids=["one", "two", "below-decode", "short-and-long"],
)
def test_no_window_is_exceeded(make_rig, free, limits, itl):
    """With a model that knows the GPU, no window of any limit is over by more than 1%."""
    rig = make_rig(limits, itl_target_seconds=itl)
    rig.run(random_traffic(11, count=60))
    power = rig.engine.gpus.take_segments()
    forced = [d for d in rig.log.decisions if d.reason is Reason.FORCED_OVER_BUDGET]
    assert not forced
    for limit in limits:
        assert worst_ratio(free, limit) > 1.0  # it has to work for it
        assert worst_ratio(power, limit) <= 1 + TOLERANCE_RATIO
    records = rig.engine.requests.values()
    assert all(record.finished_seconds is not None for record in records)


def test_a_busy_host_does_not_break_the_budget(make_rig):
    """Ends of steps that are seen up to 4 ms late, at random, cost no window."""
    late, limit = random.Random(3), PowerLimit(560.0, 0.1)
    rig = make_rig((limit,), host_late_seconds=lambda: late.uniform(0.0, 0.004))
    rig.run(random_traffic(11, count=60))
    assert rig.shaper.counters.forced == 0
    assert worst_ratio(rig.engine.gpus.take_segments(), limit) <= 1 + TOLERANCE_RATIO


def test_itl_target_bounds_the_chunk(make_rig):
    """With a target of 30 ms and no budget, no token waits longer than that behind a prompt."""
    rig = make_rig((), itl_target_seconds=0.03)
    rig.run(random_traffic(1))
    assert max(gaps(rig.engine)) <= 0.03 * 1.02
    assert any(d.reason is Reason.CHUNK_ITL for d in rig.log.decisions)


def test_an_itl_target_below_a_decode_step_starves_no_prompt(make_rig):
    """A target that can't be kept costs some time to first token, not seconds a piece."""
    rig, plain = make_rig((), itl_target_seconds=0.004), make_rig(None)
    rig.run(random_traffic(3, count=20))
    plain.run(random_traffic(3, count=20))

    def slowest(each) -> float:
        records = each.engine.requests.values()
        return float(max(r.token_seconds[0] - r.arrival_seconds for r in records))

    assert slowest(rig) <= 20 * slowest(plain)
    assert rig.shaper.counters.forced == 0


def test_a_budget_below_the_floor_serves_on_and_says_so(make_rig):
    """No step fits 160 W; every request still finishes, over the budget, and is counted."""
    rig = make_rig((PowerLimit(160.0, 0.1),), max_pause_seconds=0.2)
    rig.run(random_traffic(3, count=4), seconds=400.0)
    assert all(r.finished_seconds is not None for r in rig.engine.requests.values())
    assert rig.shaper.counters.forced > 0


def joules_per_token(rig) -> float:
    segments = rig.engine.gpus.take_segments()
    end = max(record.finished_seconds for record in rig.engine.requests.values())
    seconds = np.clip(segments[:, 1], None, end) - np.clip(segments[:, 0], None, end)
    tokens = sum(len(record.token_seconds) for record in rig.engine.requests.values())
    return float((seconds * segments[:, 2]).sum()) / tokens


def test_slack_saves_joules_inside_the_itl_target(make_rig):
    """With an ITL target of 50 ms and no budget: fewer joules a token, and no token late."""
    traffic = random_traffic(5, count=80, rate=4.0)
    plain, slack = make_rig(None), make_rig((), itl_target_seconds=0.05, spend_slack=True)
    plain.run(traffic)
    slack.run(traffic)
    assert joules_per_token(slack) <= 0.82 * joules_per_token(plain)
    assert all(r.finished_seconds is not None for r in slack.engine.requests.values())
    assert max(gaps(slack.engine)) <= 0.05 * 1.03
    assert {d.reason for d in slack.log.decisions} >= {Reason.ITL_SLACK, Reason.UNCONSTRAINED}
    assert slack.shaper.counters.forced == 0


def dense_burst(seed: int, count: int) -> list[tuple[float, list[int], int]]:
    """Prompts of 800 to 1,800 tokens, 50 a second, whose decodes alone would fill a tight limit."""
    rng = random.Random(seed)
    traffic, now = [], 0.0
    for _ in range(count):
        now += rng.expovariate(50.0)
        prompt = [rng.randrange(256) for _ in range(rng.randint(800, 1800))]
        traffic.append((now, prompt, 100))
    return traffic


@pytest.mark.parametrize(("window_seconds", "seed"), [(0.1, 1), (0.2, 3)])
def test_decodes_make_way_under_a_tight_limit(make_rig, window_seconds, seed):
    """A few watts less cost as much time: no chunk is forced where an empty window holds one."""
    seconds = {}
    for watts in (240.0, 270.0):
        limit = PowerLimit(watts, window_seconds)
        rig = make_rig((limit,))
        rig.run(dense_burst(seed, 48), seconds=60.0)
        records = rig.engine.requests.values()
        assert all(record.finished_seconds is not None for record in records)
        assert rig.shaper.counters.forced == 0
        seconds[watts] = rig.engine.now_seconds
        assert worst_ratio(rig.engine.gpus.take_segments(), limit) <= 1 + TOLERANCE_RATIO
    assert seconds[240.0] <= 1.5 * seconds[270.0]
