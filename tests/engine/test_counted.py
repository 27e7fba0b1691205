"""What vLLM runs is what the shaper counted and planned: prompts by the hundred, prompts that
find most of themselves in the prefix cache, and prompts that come back after a preemption."""

from __future__ import annotations

import random
from typing import Any

import pytest

from shaper.core.types import EngineLoad, PowerLimit, Reason, StepBatch, StepLimits
from shaper.engine import load as loads
from shaper.engine import runtime
from shaper.engine.waiting import Waiting
from tests.engine.harness import Attacked, attacked, worst_ratio

LIMIT = PowerLimit(450.0, 0.1)
LOOSE = (PowerLimit(5000.0, 0.1), PowerLimit(4000.0, 1.0))
# A margin of nothing: the emulated GPU does what the model says.
HELD = 1.005
Traffic = list[tuple[float, list[int], int]]


def text(seed: int, tokens: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(tokens)]


def bursts(count: int = 400) -> Traffic:
    """Short prompts, all at once, and again a second later."""
    return [
        (second, text(1000 * second + each, 30), 1) for second in (0, 1) for each in range(count)
    ]


def shared(count: int = 12, new: int = 600) -> Traffic:
    """A long prompt, and later some that share it and bring a little of their own."""
    prefix = text(1, 30_000)
    traffic: Traffic = [(0.0, prefix, 4)]
    return traffic + [(4.0, prefix + text(2 + each, new), 4) for each in range(count)]


class Compared:
    """Each step as it was planned against what vLLM made of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.other: list[tuple[StepBatch, StepBatch]] = []
        self.same = 0
        launched = loads.launched_batch

        def compared(
            scheduler: Any,
            output: Any,
            previous: Any,
            load: EngineLoad | None,
            limits: StepLimits | None,
            tally: Any,
        ) -> StepBatch:
            planned = loads._expected(load, limits)
            if planned is not None and output.total_num_scheduled_tokens:
                ran = loads._launched(scheduler, output, previous, None)
                if ran._replace(returned_requests=planned.returned_requests) == planned:
                    self.same += 1
                else:
                    self.other.append((planned, ran))
            return launched(scheduler, output, previous, load, limits, tally)

        monkeypatch.setattr(runtime, "launched_batch", compared)


def served(traffic: Traffic, **settings: Any) -> Attacked:
    world = attacked((LIMIT,), **settings)
    world.serve(traffic, 40.0)
    assert all(each.finished_seconds is not None for each in world.engine.requests.values())
    assert world.shaper.counters.errors == 0
    return world


@pytest.mark.parametrize("traffic", [bursts(), shared()], ids=["short-prompts", "shared-prefix"])
def test_what_was_counted_is_what_runs(traffic, monkeypatch):
    """No window is over the limit, nothing is forced, and each step is the one that was planned."""
    compared = Compared(monkeypatch)
    world = served(traffic)
    assert worst_ratio(world.engine.gpus.take_segments(), LIMIT) <= HELD
    assert not any(decision.reason is Reason.FORCED_OVER_BUDGET for decision in world.log.decisions)
    assert not compared.other
    assert compared.same > 10


@pytest.mark.parametrize(("asynchronous", "kv_blocks"), [(True, 50_000), (False, 1500)])
def test_each_step_is_the_planned_one(monkeypatch, asynchronous, kv_blocks):
    """Prompts share prefixes of many lengths while blocks come and go, and some are preempted."""
    compared = Compared(monkeypatch)
    rng = random.Random(7)
    prefixes = [text(each, rng.randint(200, 6000)) for each in range(6)]
    traffic: Traffic = []
    for index in range(120):
        prefix = rng.choice(prefixes)
        part = prefix[: rng.randint(0, len(prefix))]
        prompt = part + text(100 + index, rng.randint(1, 400))
        traffic.append((0.05 * index, prompt, rng.randint(1, 60)))
    world = served(traffic, asynchronous=asynchronous, kv_blocks=kv_blocks)
    assert worst_ratio(world.engine.gpus.take_segments(), LIMIT) <= 1.01
    steps = compared.same + len(compared.other)
    assert compared.same > 300
    # A preemption, or no room in the KV cache, comes while vLLM schedules.
    assert len(compared.other) <= (0 if kv_blocks == 50_000 else 0.02 * steps)


@pytest.mark.parametrize(
    ("traffic", "asynchronous"),
    [(bursts(), False), (shared(), True)],
    ids=["short-prompts", "shared-prefix"],
)
def test_under_loose_limits_nothing_changes(make_rig, traffic, asynchronous):
    """All 400 prompts enter when vLLM's own scheduler would let them in."""
    theirs, ours = (make_rig(each, asynchronous=asynchronous) for each in (None, LOOSE))
    for rig in (theirs, ours):
        rig.run(traffic)
    assert ours.outputs == theirs.outputs
    assert ours.shaper.counters.errors == 0


def test_a_long_queue_that_can_not_enter_hides_nobody(make_rig):
    """Behind 300 sessions that wait for their next part, a prompt is counted and served."""
    from vllm.v1.request import RequestStatus

    from shaper.simulate.engine import new_request

    rig = make_rig((LIMIT,))
    config = rig.engine.scheduler.vllm_config
    for index in range(300):
        request = new_request(f"session{index}", [1] * 20, 1, config)
        rig.engine.add(request)
        request.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
        request.structured_output_request = None
    rig.engine.add(new_request("after", [2] * 3000, 1, config))
    rig.engine.run_until(2.0)
    assert rig.engine.requests["after"].finished_seconds is not None
    assert worst_ratio(rig.engine.gpus.take_segments(), LIMIT) <= HELD


def cache_state(scheduler: Any) -> tuple[Any, ...]:
    manager = scheduler.kv_cache_manager
    pool, stats = manager.block_pool, manager.prefix_cache_stats
    blocks = [(block.block_hash, block.ref_cnt) for block in pool.blocks]
    free = [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]
    return blocks, free, (stats.requests, stats.queries, stats.hits), pool.take_events()


def test_looking_moves_nothing(make_rig):
    """Neither blocks, their order, hit statistics nor KV events; a request that may not read
    the cache finds nothing in it, and the last token is always computed."""
    from vllm.v1.metrics.stats import PrefixCacheStats

    from shaper.simulate.engine import new_request

    rig = make_rig(LOOSE)
    scheduler = rig.engine.scheduler
    manager = scheduler.kv_cache_manager
    manager.log_stats, manager.prefix_cache_stats = True, PrefixCacheStats()
    manager.enable_kv_cache_events = manager.block_pool.enable_kv_cache_events = True
    rig.run([(0.0, text(1, 1600), 2)])
    config = scheduler.vllm_config
    whole = new_request("whole", text(1, 1600), 1, config)
    longer = new_request("longer", text(1, 1600) + [7] * 40, 1, config)
    unread = new_request("unread", text(1, 1600), 1, config)
    unread.skip_reading_prefix_cache = True
    for request in (whole, longer, unread):
        request.kv_cache_report_mode = "full"
    manager.block_pool.take_events()
    before = cache_state(scheduler)
    for _ in range(3):
        waiting = Waiting(scheduler)
        waiting.begin()
        found = [waiting.demand(each) for each in (whole, longer, unread)]
        assert found == [(16, 1584), (40, 1600), (1600, 0)]
    assert cache_state(scheduler) == before


def test_what_is_found_follows_the_cache(make_rig):
    """It grows with what is computed and shrinks with what is lost, at every step."""
    from shaper.engine.compat_prompts import cached_tokens
    from shaper.simulate.engine import new_request

    rig = make_rig(LOOSE, kv_blocks=700)
    scheduler = rig.engine.scheduler
    config = scheduler.vllm_config
    waiting = Waiting(scheduler)
    requests = [new_request(f"w{n}", text(1, 3000 + 40 * n), 1, config) for n in range(4)]
    traffic = [(0.2 * n, text(1 + n % 5, 1500 + 300 * (n % 7)), 30) for n in range(40)]
    seen = set()
    for index, (arrival, prompt, tokens) in enumerate(traffic):
        rig.engine.add(new_request(f"r{index}", prompt, tokens, config))
        while rig.engine.now_seconds < arrival + 0.2 and rig.engine.busy:
            rig.engine.step()
            waiting.begin()
            for request in requests:
                found = waiting.demand(request)
                assert found is not None
                truth = cached_tokens(scheduler.kv_cache_manager.coordinator, request)
                assert found.computed_tokens == truth
                seen.add(truth)
    assert len(seen) > 10


@pytest.mark.parametrize("kv_blocks", [50_000, 900], ids=["ample", "evicting"])
def test_a_kept_reading_of_the_queue_is_a_fresh_one(make_rig, kv_blocks):
    """While prompts come, leave, are aborted and share what is cached, what was kept of the last
    reading is what a reader that knows nothing finds; and much of it is kept."""
    from vllm.v1.request import RequestStatus

    from shaper.simulate.engine import new_request

    rig = make_rig((PowerLimit(300.0, 0.1),), kv_blocks=kv_blocks)
    scheduler = rig.engine.scheduler
    config, waiting = scheduler.vllm_config, Waiting(scheduler)
    rng = random.Random(11)
    prefixes = [text(each, 4000) for each in range(3)]
    kept = 0
    for index in range(400):
        if rng.random() < 0.5:
            prompt = rng.choice(prefixes)[: rng.randint(1, 4000)] + text(50 + index, 50)
            rig.engine.add(new_request(f"r{index}", prompt, rng.randint(1, 40), config))
        if rng.random() < 0.1 and scheduler.waiting:
            scheduler.finish_requests(
                rng.choice(list(scheduler.waiting)).request_id, RequestStatus.FINISHED_ABORTED
            )
        waiting.asks = rng.random() < 0.95
        fresh = Waiting(scheduler)
        fresh.asks = waiting.asks
        kept += len(waiting.begin())
        read, anew = (loads.engine_load(scheduler, set(), None, each) for each in (waiting, fresh))
        assert read == anew
        rig.engine.step()
    assert kept > 2000
