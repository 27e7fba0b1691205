"""The load of a pause is not read at every poll: what is planned with is never old."""

from __future__ import annotations

import random
from typing import Any

import pytest

from shaper.core.types import PowerLimit
from shaper.engine.load import engine_load
from tests.engine.harness import random_traffic

BINDING = (PowerLimit(420.0, 0.1),)


class Watched:
    """Compares the load of every plan with one that is read anew from every request."""

    def __init__(self, shaper: Any) -> None:
        self.polls = self.plans = self.read = 0
        controller = shaper._controller
        plan, decide, scheduler = controller.plan, shaper._decide, shaper._scheduler
        last: list[Any] = [None]

        def compared(load: Any, now_seconds: float) -> Any:
            assert load == engine_load(scheduler, shaper._previous)
            self.plans += 1
            self.read += load is not last[0]
            last[0] = load
            return plan(load, now_seconds)

        def counted() -> Any:
            self.polls += 1
            return decide()

        controller.plan, shaper._decide = compared, counted


def replace_one(engine: Any, name: str, prompt: list[int], rng: random.Random) -> None:
    """Abort a request and add another between two polls: as many run and wait as before."""
    from vllm.v1.request import RequestStatus

    from shaper.simulate.engine import new_request

    scheduler = engine.scheduler
    if scheduler.requests:
        waiting = [request.request_id for request in scheduler.waiting]
        gone = rng.choice(waiting or list(scheduler.requests))
        scheduler.finish_requests(gone, RequestStatus.FINISHED_ABORTED)
    engine.add(new_request(name, prompt, rng.randint(1, 60), scheduler.vllm_config))


@pytest.mark.parametrize(
    ("settings", "asynchronous", "seed"),
    [({}, True, 0), ({"kv_blocks": 900}, False, 1), ({"itl_target_seconds": 0.1}, True, 2)],
)
def test_plans_see_the_load_as_it_is(make_rig, settings, asynchronous, seed):
    """Whatever arrives, is aborted, is preempted or returns; and many polls read nothing."""
    rig = make_rig(BINDING, asynchronous=asynchronous, **settings)
    watched, rng = Watched(rig.shaper), random.Random(seed)
    traffic = random_traffic(seed, count=80, rate=30.0)
    rig.run(traffic[:40], seconds=0.2)
    for index, (_, prompt, _) in enumerate(traffic[40:]):
        rig.engine.run_until(rig.engine.now_seconds + rng.uniform(0.0, 0.03))
        replace_one(rig.engine, f"late{index}", prompt, rng)
    rig.engine.run_until(rig.engine.now_seconds + 30.0)
    assert not rig.engine.busy
    assert rig.shaper.counters.errors == 0
    assert watched.read < 0.95 * watched.polls


def test_a_refusal_stands_until_it_may_fit(make_rig):
    """Most polls of a held engine decide nothing anew."""
    rig = make_rig((PowerLimit(350.0, 0.1),))
    watched = Watched(rig.shaper)
    rig.run([(0.0, [1] * 6000, 40) for _ in range(4)], seconds=3.0)
    assert not rig.engine.busy
    assert watched.polls > 10 * rig.engine.steps
    assert watched.plans < watched.polls / 2
    assert rig.shaper.counters.errors == 0
