"""A wall clock that jumps an hour while an engine serves: only what is stated in calendar
time follows it, and no window is over on the way."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import pairwise

import numpy as np
import pytest

from shaper.config.budget import TermsConfig
from shaper.config.schedule import ScheduleEntry
from shaper.core.budget import BudgetPlan
from shaper.core.types import PowerLimit, Reason
from shaper.engine.control import BudgetControl
from shaper.ipc.control_file import ControlFile, Follower
from tests.engine.harness import Attacked, attacked, sliding, worst_ratio

DAY, NIGHT = PowerLimit(560.0, 0.1), PowerLimit(430.0, 0.1)
HALF_PAST_NINE = datetime(2026, 3, 2, 21, 30, tzinfo=UTC).timestamp()
HOUR_SECONDS = 3600.0
TICK_SECONDS = 0.02
# A clock that is set is looked at once a second, and the sampler ticks.
NOTICED_SECONDS = 1.0 + TICK_SECONDS
JUMP_SECONDS, BACK_SECONDS, END_SECONDS = 3.0, 7.0, 11.0
TOLERANCE = 1.01


def send(world: Attacked, count: int) -> None:
    """Prompts and decodes that keep the engine at its limit."""
    rng = np.random.default_rng(4)
    for index in range(count):
        prompt = [int(token) for token in rng.integers(0, 256, 900)]
        world.add(f"{world.engine.now_seconds:.3f}-{index}", prompt, 60)


def serve(world: Attacked, look: Callable[[float], None] = lambda now: None) -> None:
    """Two dozen clients in all, and a look at each tick of the sampler."""
    engine, due = world.engine, 0.0
    while engine.now_seconds < END_SECONDS:
        if engine.now_seconds >= due:
            due = engine.now_seconds + TICK_SECONDS
            look(engine.now_seconds)
        send(world, 24 - len(engine.scheduler.requests))
        engine.step()


@pytest.mark.parametrize("hours", [1, -1])
def test_a_clock_that_jumps_an_hour_and_back_moves_the_schedule_and_nothing_else(hours):
    """From day into night or from night into day: each budget holds once the jump was seen."""
    first, other = (DAY, NIGHT) if hours > 0 else (NIGHT, DAY)
    world = attacked((first,))
    offset_seconds = 0.0 if hours > 0 else HOUR_SECONDS

    def wall() -> float:
        now: float = world.engine.now_seconds
        jumped = JUMP_SECONDS <= now < BACK_SECONDS
        return HALF_PAST_NINE + now + offset_seconds + (hours * HOUR_SECONDS if jumped else 0.0)

    entry = ScheduleEntry.model_validate({"daily": "22:00-06:00", "limits": ["430W@100ms"]})
    configured = TermsConfig.model_validate({"limits": ["560W@100ms"]})
    control = BudgetControl(
        BudgetPlan(configured.terms(), (entry.scheduled(),)),
        "on",
        Follower(ControlFile(f"test{uuid.uuid4().hex[:12]}")),
        gpu_count=1,
        idle_watts=115.0,
        now_seconds=0.0,
        wall=wall,
    )
    changes: list[tuple[float, float]] = []

    def look(now: float) -> None:
        if control.tick(now):
            changes.append((now, control.state.budget.limits[0].watts))
            world.shaper.set_budget(control.state.budget)

    serve(world, look)
    (there, _), (back, _) = changes
    assert [watts for _, watts in changes] == [other.watts, first.watts]
    longest = max(later - earlier for earlier, later in pairwise(step_times(world)))
    assert JUMP_SECONDS <= there <= JUMP_SECONDS + NOTICED_SECONDS + longest
    assert BACK_SECONDS <= back <= BACK_SECONDS + NOTICED_SECONDS + longest
    segments = world.engine.gpus.take_segments()
    for limit, begin, end in ((first, 0.0, there), (other, there, back), (first, back, np.inf)):
        # What is in flight runs under the limit of before.
        settled = begin + 2 * longest if begin else 0.0
        ratio = worst_ratio(segments, limit, settled, end)
        assert ratio <= TOLERANCE, (limit, begin)
        # The lower limit binds, so one that was not followed would be seen.
        assert limit is DAY or ratio > 0.9
    assert not any(d.reason is Reason.FORCED_OVER_BUDGET for d in world.log.decisions)
    assert world.shaper.counters.errors == 0


def step_times(world: Attacked) -> list[float]:
    return [at for at, _ in world.outputs]


def test_no_decision_asks_the_wall_clock(monkeypatch):
    """With a clock of the host that jumps an hour at every look: the same steps, the same power."""
    steady, jumping = attacked((DAY,)), attacked((DAY,))
    serve(steady)
    looks = iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: HALF_PAST_NINE + (-1) ** next(looks) * HOUR_SECONDS)
    serve(jumping)
    assert jumping.outputs == steady.outputs
    assert jumping.log.decisions == steady.log.decisions
    _, means = sliding(jumping.engine.gpus.take_segments(), DAY.window_seconds)
    assert means.max() <= DAY.watts * TOLERANCE
