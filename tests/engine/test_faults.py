"""Faults, over the whole engine in virtual time: the budget holds, requests end, no jump.

Every window is judged on the emulated GPUs' true power, whatever their meters say.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest

from shaper.core.controller import STALE_SECONDS
from shaper.core.learn.margin import BLIND_MARGIN_RATIO
from shaper.core.types import PowerBudget, PowerLimit, Reason
from shaper.engine.compat import admission_cap
from shaper.engine.runtime import RETRY_SECONDS
from tests.engine.attack import SEAMS, SENSOR_FAULTS, Sabotage
from tests.engine.harness import Attacked, attacked, sliding, worst_ratio

# The two reach over each other's windows; traffic below asks for more than both.
LIMITS = (PowerLimit(500.0, 0.1), PowerLimit(470.0, 2.0))
TOLERANCE = 1.01
FAULT_SECONDS, WORKS_SECONDS, END_SECONDS = 4.0, 12.0, 18.0
# A stuck counter is believed for 2 s; then readings are missing, which is known after
# `STALE_SECONDS`; then the margin grows over a second.
BLIND_WITHIN_SECONDS = 2.0 + STALE_SECONDS + 1.0 + 0.2
TICK_SECONDS = 0.05


def traffic(rate: float, seconds: float, seed: int = 5) -> list[tuple[float, list[int], int]]:
    """Prompts of some hundred tokens, more than the limits serve at once."""
    rng, now = random.Random(seed), 0.0
    made = []
    while now < seconds:
        now += rng.expovariate(rate)
        prompt = [rng.randrange(256) for _ in range(rng.randint(50, 1500))]
        made.append((now, prompt, rng.randint(5, 60)))
    return made


def serve(world: Attacked, arrivals: list[tuple[float, list[int], int]], events: dict[float, Any],
          until: float, look: Any = lambda: None) -> None:  # fmt: skip
    """Serve arrivals and call events in the order of their times, looking at each tick."""
    todo = sorted(
        [(at, order, lambda p=p, n=n: world.add(f"r{len(world.engine.requests)}", p, n))
         for order, (at, p, n) in enumerate(arrivals)]
        + [(at, -1 - order, call) for order, (at, call) in enumerate(events.items())]
        + [(tick * TICK_SECONDS, 10**6 + tick, look)
           for tick in range(1, int(until / TICK_SECONDS))],
        key=lambda each: each[:2],
    )  # fmt: skip
    for at, _, call in todo:
        if at >= until:
            break
        world.engine.run_until(at)
        call()
    world.engine.run_until(until)


def drain(world: Attacked, seconds: float = 60.0) -> None:
    """All that is left is served, within a time."""
    end = world.engine.now_seconds + seconds
    while world.engine.busy and world.engine.now_seconds < end:
        world.engine.step()
    unfinished = [n for n, r in world.engine.requests.items() if r.finished_seconds is None]
    assert not unfinished


@pytest.mark.parametrize("fault", [*SENSOR_FAULTS, "stalled"])
def test_a_sensor_that_fails(fault):
    """The margin is there within 4.2 s, comes and goes without a jump, and no window
    is over before, while or after; what a broken sensor said is not learned."""
    world = attacked(LIMITS)
    seen: list[tuple[float, float, float]] = []

    def look() -> None:
        demand = world.shaper.demand
        seen.append((world.engine.now_seconds, demand.margin_ratio, demand.joules_gain_ratio))

    def set_fault(name: str | None) -> None:
        world.sampler.stalled = name == "stalled"
        world.reader.fault = None if name == "stalled" else name

    serve(
        world,
        traffic(9.0, END_SECONDS),
        {FAULT_SECONDS: lambda: set_fault(fault), WORKS_SECONDS: lambda: set_fault(None)},
        END_SECONDS,
        look,
    )
    segments = world.engine.gpus.take_segments()
    for limit in LIMITS:
        assert worst_ratio(segments, limit) <= TOLERANCE
    assert world.shaper.counters.errors == 0
    times, margins, gains = (np.array(column) for column in zip(*seen, strict=True))
    blind = (times > FAULT_SECONDS + BLIND_WITHIN_SECONDS) & (times < WORKS_SECONDS)
    if fault != "reset":
        assert margins[blind].min() >= BLIND_MARGIN_RATIO
    # No jump: what is kept free moves by less than 1% of a limit from one tick to the next.
    assert np.abs(np.diff(margins)).max() <= 0.01
    assert np.abs(gains - 1.0).max() <= 0.05
    # And back: the margin of a world in which nothing happened.
    assert margins[-1] <= margins[times < FAULT_SECONDS][-1] + 0.01
    drain(world)


def test_a_sensor_that_never_was():
    """With no reading ever, the margin is there from the first step, and the budget holds."""
    world = attacked(LIMITS)
    world.reader.fault = "lost"
    serve(world, traffic(9.0, 5.0), {}, 5.0)
    assert world.shaper.demand.margin_ratio >= BLIND_MARGIN_RATIO
    segments = world.engine.gpus.take_segments()
    for limit in LIMITS:
        assert worst_ratio(segments, limit) <= TOLERANCE * (1 - BLIND_MARGIN_RATIO)
    drain(world)


@pytest.mark.parametrize("fault", ["lost", "stuck", "nan", "reset"])
def test_one_gpu_of_four(fault):
    """One sick meter of four makes the engine's sum unknown, not smaller: the budget of all
    four holds, and the margin is that of a lost sensor."""
    limits = (PowerLimit(2000.0, 0.1), PowerLimit(1900.0, 2.0))
    world = attacked(limits, gpus=4)
    world.reader.gpu_index = 2
    margins: list[tuple[float, float]] = []
    serve(
        world,
        traffic(30.0, 7.5),
        {2.0: lambda: setattr(world.reader, "fault", fault)},
        7.5,
        lambda: margins.append((world.engine.now_seconds, world.shaper.demand.margin_ratio)),
    )
    segments = world.engine.gpus.take_segments()
    for limit in limits:
        assert worst_ratio(segments, limit) <= TOLERANCE
    if fault != "reset":
        blind = [margin for at, margin in margins if at > 2.0 + BLIND_WITHIN_SECONDS]
        assert min(blind) >= BLIND_MARGIN_RATIO
    assert world.shaper.counters.errors == 0


# Not what raises only where there is something of its kind to do, and the runtime is not asked.
RAISED = [seam for seam in SEAMS if "deferral" not in seam]
# Each raises once, and a new controller takes over; one of each part goes on raising.
ALWAYS = (
    "Controller.plan",
    "Guard.check",
    "Ledger.spend",
    "Levers.apply",
    "engine_load",
    "Log.add",
)
ONCE_OR_ALWAYS = [
    *((seam, 1) for seam in RAISED),
    *((seam, 10**9) for seam in RAISED if seam.endswith(ALWAYS)),
]


@pytest.mark.parametrize(("seam", "times"), ONCE_OR_ALWAYS)
def test_a_seam_that_raises(seam, times):
    """vLLM goes on under the fallback cap; every request ends; no window is over, under the cap,
    when a new controller takes over, and after."""
    world, sabotage = attacked(LIMITS), Sabotage()

    def break_it() -> None:
        sabotage.arm(seam, times)
        if seam.endswith("set_budget"):
            world.shaper.set_budget(PowerBudget((*LIMITS, PowerLimit(490.0, 0.5))))

    try:
        serve(world, traffic(9.0, 6.5), {1.0: break_it}, 6.5)
        errors = world.shaper.counters.errors
        sabotage.disarm()
        drain(world)
    finally:
        sabotage.remove()
    assert 1 <= errors <= sabotage.raised
    world.engine.run_until(world.engine.now_seconds + 2.0)
    segments = world.engine.gpus.take_segments()
    for limit in LIMITS:
        assert worst_ratio(segments, limit) <= TOLERANCE, limit
    scheduler = world.engine.scheduler
    assert (scheduler.max_num_scheduled_tokens, admission_cap(scheduler)) == (8192, 1024)


def test_a_new_controller_does_not_take_the_past_for_idle():
    """What ran under the fallback cap counts: the first windows of a new controller are not over,
    and its first step does not start as if the engine had rested."""
    world, sabotage = attacked(LIMITS), Sabotage()
    seam = "shaper.core.policy.windowed:WindowedPlanner.plan"
    try:
        serve(world, traffic(12.0, 8.5), {1.5: lambda: sabotage.arm(seam)}, 8.5)
    finally:
        sabotage.remove()
    reasons = [(d.at_seconds, d.reason) for d in world.log.decisions]
    back = next(
        at
        for (_, before), (at, reason) in itertools.pairwise(reasons)
        if before is Reason.FALLBACK_CAP and reason is not Reason.FALLBACK_CAP
    )
    assert 1.5 + RETRY_SECONDS <= back <= 1.5 + RETRY_SECONDS + 0.2
    segments = world.engine.gpus.take_segments()
    for limit in LIMITS:
        ends, means = sliding(segments, limit.window_seconds)
        around = (ends > back - limit.window_seconds) & (ends < back + limit.window_seconds)
        assert means[around].max() <= TOLERANCE * limit.watts


@pytest.mark.parametrize(
    "budget",
    [
        PowerBudget((PowerLimit(500.0, 0.1),)),
        PowerBudget((PowerLimit(400.0, 0.05), PowerLimit(350.0, 10.0))),
        PowerBudget((PowerLimit(600.0, 0.02),)),
        PowerBudget((), ramp_watts_per_second=200.0),
    ],
    ids=["one", "tight", "short", "ramp-only"],
)
def test_never_unlimited_while_a_budget_is_configured(budget):
    """Whichever call fails, for as long as it fails, each step is under a cap."""
    world, sabotage = attacked((), max_pause_seconds=0.5), Sabotage()
    world.shaper.set_budget(budget)
    serve(world, traffic(6.0, 2.0), {}, 2.0)
    start = world.engine.now_seconds
    try:
        sabotage.arm("shaper.engine.runtime:engine_load", 10**9)
        serve(world, [(a + start, p, n) for a, p, n in traffic(6.0, 4.0, 6)], {}, start + 4.0)
    finally:
        sabotage.remove()
    first = start + 2.0
    sizes = [sum(tokens.values()) for at, tokens in world.outputs if at > start]
    assert sizes
    assert max(sizes) <= 1280
    segments = world.engine.gpus.take_segments()
    for limit in budget.limits:
        assert worst_ratio(segments, limit, first) <= TOLERANCE
