"""The kept counts of running requests against a full count, over vLLM's real scheduler."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from shaper.core.policy import Plan
from shaper.core.types import PowerLimit, Reason, StepBatch, StepLimits
from shaper.engine import running_batch as tallies
from shaper.engine.running_batch import RunningBatch, full_count
from tests.engine.harness import random_traffic

BINDING = (PowerLimit(420.0, 0.1),)


class RandomLimits:
    """A policy that draws every lever now and then."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def plan(self, view: Any) -> Plan:
        draw = self._random.random
        if draw() < 0.5:
            return Plan(StepLimits(), Reason.UNCONSTRAINED)
        decodes = view.load.decode_requests
        limits = StepLimits(
            run=draw() > 0.15,
            prefill_tokens=self._random.choice([None, 0, 64, 300]),
            decode_requests=int(decodes * draw()) if decodes and draw() < 0.3 else None,
            running_requests=self._random.choice([None, None, 3, 20]),
        )
        return Plan(limits, Reason.CHUNK_POWER)


class Watched:
    """Compares every count of one engine with a full one."""

    def __init__(self, scheduler: Any) -> None:
        tally = scheduler.shaper._tally
        self.tally = tally
        self.kept = self.full = 0
        read = tally.read

        def compared(previous: Any) -> Any:
            found = read(previous)
            assert found == full_count(scheduler, previous)
            self.kept += tally._kept
            self.full += not tally._kept
            return found

        tally.read = compared


def abort_some(rig: Any, rng: random.Random) -> None:
    from vllm.v1.request import RequestStatus

    scheduler = rig.engine.scheduler
    names = [name for name in scheduler.requests if rng.random() < 0.02]
    scheduler.finish_requests(names, RequestStatus.FINISHED_ABORTED)


@pytest.mark.parametrize(
    ("settings", "asynchronous", "seed"),
    [
        ({}, True, 0),
        ({"kv_blocks": 900}, False, 1),
        ({"kv_blocks": 900, "v2_runner": True}, True, 2),
        ({"policy": RandomLimits}, False, 0),
        ({"policy": RandomLimits, "kv_blocks": 900}, True, 1),
    ],
    ids=["planner", "little-kv", "v2", "levers", "levers-little-kv"],
)
def test_kept_counts_are_the_full_ones(make_rig, settings, asynchronous, seed):
    """At every step, whatever ends, is preempted, aborted or held, and most are kept."""
    settings = dict(settings)
    rng = random.Random(seed)
    random_policy = settings.get("policy") is RandomLimits
    if random_policy:
        settings["policy"] = lambda: RandomLimits(seed)
    rig = make_rig(BINDING, asynchronous=asynchronous, **settings)
    watched = Watched(rig.engine.scheduler)
    traffic = random_traffic(seed, count=50, rate=30.0)
    rig.run(traffic[:25], seconds=0.2)
    abort_some(rig, rng)
    for index in range(25, 50):
        rig.engine.run_until(rig.engine.now_seconds + 0.05)
        abort_some(rig, rng)
        from shaper.simulate.engine import new_request

        _, prompt, tokens = traffic[index]
        config = rig.engine.scheduler.vllm_config
        rig.engine.add(new_request(f"late{index}", prompt, tokens, config))
    rig.engine.run_until(rig.engine.now_seconds + 60.0)
    assert not rig.engine.busy
    assert rig.shaper.counters.errors == 0
    assert watched.tally.mismatches == 0
    if not random_policy:
        assert watched.kept > 4 * watched.full


def test_what_it_holds_does_not_grow(make_rig):
    """When all requests are gone it keeps nothing of them."""
    rig = make_rig(BINDING)
    rig.run(random_traffic(5, count=40, rate=30.0))
    tally = rig.shaper._tally
    rig.run([(rig.engine.now_seconds, [1] * 40, 3)])
    assert len(tally._members) <= 1
    assert len(tally._offsets) <= 1
    assert sum(len(each) for each in tally._ends.values()) <= 1
    assert not tally._others


class FakeRequest(SimpleNamespace):
    """Compared by identity, as vLLM's are."""

    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__


def fake_request(name: str, **values: Any) -> Any:
    defaults: dict[str, Any] = {
        "request_id": name,
        "next_decode_eligible_step": 0,
        "is_prefill_chunk": False,
        "num_computed_tokens": 100,
        "num_output_placeholders": 0,
        "num_prompt_tokens": 100,
        "num_tokens": 101,
        "num_tokens_with_spec": 5000,
        "max_tokens": 1000,
    }
    return FakeRequest(**(defaults | values))


def fake_scheduler(count: int, **values: Any) -> Any:
    running = [fake_request(f"r{index}") for index in range(count)]
    return SimpleNamespace(
        **(
            {"running": running, "num_spec_tokens": 0, "current_step": 0, "max_model_len": 10_000}
            | values
        )
    )


def run_step(scheduler: Any, tally: RunningBatch, ran: int | None = None) -> Any:
    """Read, then let the first `ran` requests (all by default) run."""
    counts = tally.read({request.request_id for request in scheduler.running})
    scheduler.current_step += 1
    some = scheduler.running[:ran]
    for request in some:
        request.num_computed_tokens += 1
    tally.launched(StepBatch(decode_requests=len(some), decode_tokens=len(some)))
    return counts


def test_a_wrong_count_is_counted_logged_once_and_repaired(counted, monkeypatch, caplog):
    """A request whose tokens change behind its back is found by the next full count."""
    monkeypatch.setattr(tallies, "CHECK_EVERY", 10)
    scheduler, tally = counted
    for wrong in (1, 2):
        scheduler.running[0].num_computed_tokens -= 7
        for _ in range(12):
            counts = run_step(scheduler, tally)
        assert tally.mismatches == wrong
        # Of before the last step.
        assert counts.context_tokens == full_count(scheduler, set()).context_tokens - 4
    assert len(caplog.records) == 1


@pytest.fixture
def counted():
    """A scheduler of four, and a tally that has seen its five steps."""
    scheduler = fake_scheduler(4)
    tally = RunningBatch(scheduler)
    for _ in range(5):
        run_step(scheduler, tally)
    return scheduler, tally


def test_a_step_that_was_not_seen_is_not_trusted(counted):
    """The shaper may have been off, or its controller out, for some steps."""
    scheduler, tally = counted
    scheduler.current_step += 1
    for request in scheduler.running:
        request.num_computed_tokens += 1
    previous = {"r0"}
    assert tally.read(previous) == full_count(scheduler, previous)


def test_empty_steps_that_nobody_asked_about_lose_nothing(counted):
    """A pause with its end known is not looked at again; after it the counts still stand."""
    scheduler, tally = counted
    for _ in range(3):
        run_step(scheduler, tally, ran=0)
        for _ in range(7):
            scheduler.current_step += 1
            tally.launched(StepBatch())
        scheduler.running[0].num_computed_tokens -= 1  # would be seen by a full count
        counts = run_step(scheduler, tally)
        assert counts.context_tokens == full_count(scheduler, set()).context_tokens - 4 + 1
        scheduler.running[0].num_computed_tokens += 1


def test_an_unread_step_with_tokens_is_not_trusted_after_empty_ones(counted):
    """Empty steps before it don't make a step known that nobody has counted."""
    scheduler, tally = counted
    for ran in (0, 4, 0):
        scheduler.current_step += 1
        for request in scheduler.running[:ran]:
            request.num_computed_tokens += 1
        tally.launched(StepBatch(decode_requests=ran, decode_tokens=ran))
    previous = {"r0"}
    assert tally.read(previous) == full_count(scheduler, previous)


def test_a_step_that_vllm_scheduled_otherwise_is_not_trusted(counted):
    """One decode didn't get its token: the next count is a full one."""
    scheduler, tally = counted
    run_step(scheduler, tally, ran=3)
    assert run_step(scheduler, tally).context_tokens == sum(
        request.num_computed_tokens - 1 for request in scheduler.running
    )


@pytest.mark.parametrize(
    "values",
    [{"num_spec_tokens": 3}, {"num_sampled_tokens_per_step": 0}, {"use_pp": True}],
    ids=["drafts", "diffusion", "stages"],
)
def test_where_steps_are_not_regular_nothing_is_kept(values):
    """A step with drafts adds an unknown number of tokens; with stages not all decodes run."""
    scheduler = fake_scheduler(4, **values)
    tally = RunningBatch(scheduler)
    for advance in (3, 1, 4):
        counts = run_step(scheduler, tally)
        assert counts.decodes == 4
        for request in scheduler.running:
            request.num_computed_tokens += advance
        assert tally.prefills is None
