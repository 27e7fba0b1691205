"""Controllers that share a budget keep a waiting prompt from its room a bounded number of times."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from shaper.core.controller import Controller
from shaper.core.ledger.shared import EngineShare, GroupView
from shaper.core.policy.windowed import WindowedPlanner
from shaper.core.types import (
    EngineLoad,
    LatencyTargets,
    PowerBudget,
    PowerLimit,
    PrefillDemand,
    StepBatch,
    StepPrediction,
)
from shaper.group import GroupLedger, memory_groups
from tests.core.test_shared_ledger import Model
from tests.strategies import examples

IDLE_WATTS = 140.0
MAX_PAUSE_SECONDS = 0.3
POLL_SECONDS = 0.001
WINDOW_SECONDS = 0.1


class Watched:
    """A handle of the group that keeps what its engine said and saw last."""

    def __init__(self, group: GroupLedger) -> None:
        self._group = group
        self.share = EngineShare(IDLE_WATTS)
        self.view = GroupView(())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    def query(self, start: float, now: float, share: EngineShare) -> GroupView:
        """See `PowerGroup`."""
        self.share = share
        self.view = self._group.query(start, now, share)
        return self.view

    def leaves_room(self, step: StepPrediction | None) -> bool:
        """Whether a step that was planned fits beside all that has waited for longer."""
        assert step is not None
        watts = (step.joules + self.view.ahead_joules) / step.seconds
        return all(part.fits(step.seconds, watts) for part in self.view.parts)


@dataclass
class Engine:
    """One step at a time; its prompts come by chance, its decodes never end."""

    control: Controller
    group: Watched
    decodes: int
    appetite: float
    longest_tokens: int
    left_tokens: int = 0
    busy_until_seconds: float | None = None
    waiting_since_seconds: float | None = None
    passed_over: Counter[int] = field(default_factory=Counter)
    step: StepPrediction | None = None

    def _load(self) -> EngineLoad:
        prompts = (PrefillDemand(self.left_tokens, 0),) if self.left_tokens else ()
        decodes = self.decodes, self.decodes, 1000 * self.decodes
        return EngineLoad(*decodes, prefills=prompts, running_requests=self.decodes)

    def poll(self, now: float, chance: random.Random) -> int:
        """Prompt tokens that were launched."""
        if self.busy_until_seconds is not None:
            if now < self.busy_until_seconds:
                return 0
            self.control.finished(now)
            self.busy_until_seconds = None
        if not self.left_tokens and chance.random() < self.appetite:
            self.left_tokens = chance.randrange(64, self.longest_tokens)
        load = self._load()
        limits = self.control.plan(load, now)
        batch = load.batch(limits.prefill_tokens) if limits.run else StepBatch()
        if limits.decode_requests is not None:
            batch = StepBatch(limits.decode_requests, limits.decode_requests, 1000)
        self.control.launched(batch, now)
        if batch.requests:
            self.step = self.control.predict(batch)
            self.busy_until_seconds = now + self.step.seconds
        self.left_tokens -= batch.prefill_tokens
        if batch.prefill_tokens or not self.left_tokens:
            self.waiting_since_seconds = None
        elif self.waiting_since_seconds is None:
            self.waiting_since_seconds = now
            self.passed_over.clear()
        return batch.prefill_tokens


def _engines(
    shapes: list[tuple[int, float, int]],
    watts: float,
    itl: float | None = None,
    pause_seconds: float = MAX_PAUSE_SECONDS,
) -> list[Engine]:
    rest = {"rest_watts": IDLE_WATTS, "rest_after_seconds": 1.0}
    limits = (PowerLimit(len(shapes) * watts, WINDOW_SECONDS),)
    engines = []
    for handle, shape in zip(
        memory_groups(limits, len(shapes), idle_watts=IDLE_WATTS, **rest), shapes, strict=True
    ):
        group = Watched(handle)
        control = Controller(
            Model(),
            WindowedPlanner(),
            PowerBudget(),
            0.0,
            targets=LatencyTargets(itl),
            max_pause_seconds=pause_seconds,
            group=group,
        )
        engines.append(Engine(control, group, *shape))
    return engines


def _wanted_before(engines: list[Engine], own: Engine) -> float:
    """What the prompts of others want that had begun to wait before those of `own`."""
    since = own.group.share.waiting_since_seconds
    shares = [other.group.share for other in engines if other is not own]
    return sum(
        share.waiting_joules
        for share in shares
        if share.waiting_since_seconds is not None
        and (since is None or share.waiting_since_seconds < since)
    )


SHAPES = st.tuples(
    st.sampled_from([0, 4]), st.sampled_from([0.01, 0.1, 1.0]), st.sampled_from([100, 500, 4000])
)


@examples(6)
@given(
    seed=st.integers(0, 2**32),
    shapes=st.lists(SHAPES, min_size=2, max_size=4),
    watts=st.floats(160.0, 500.0),
    itl=st.sampled_from([None, 0.05, 0.1]),
)
def test_a_waiting_prompt_is_kept_from_its_room_a_bounded_number_of_times(seed, shapes, watts, itl):
    """Whatever the others want, and however their polls fall: a count, for each of them."""
    count, chance = len(shapes), random.Random(seed)
    engines = _engines(shapes, watts, itl)
    chunks = 0
    for tick in range(1, 1200):
        now = tick * POLL_SECONDS
        for index in chance.sample(range(count), count):
            own = engines[index]
            if not own.poll(now, chance):
                continue
            chunks += 1
            assert own.group.view.ahead_joules >= _wanted_before(engines, own) - 1e-9
            if own.group.leaves_room(own.step):
                continue
            for other in engines:
                since = other.waiting_since_seconds
                if other is own or since is None:
                    continue
                other.passed_over[index] += 1
                most = 1 + int((now - since) / MAX_PAUSE_SECONDS)
                assert other.passed_over[index] <= most
    assert chunks


@examples(5)
@given(
    seed=st.integers(0, 2**32),
    longest=st.lists(st.sampled_from([100, 500, 4000]), min_size=2, max_size=6),
    watts=st.floats(200.0, 500.0),
)
def test_a_prompt_waits_for_a_window_of_each_that_is_before_it_at_most(seed, longest, watts):
    """However greedy the others are: the first in line gets what the window lets go."""
    count, chance = len(longest), random.Random(seed)
    shapes = [(0, chance.choice([0.05, 1.0]), tokens) for tokens in longest]
    engines = _engines(shapes, watts, pause_seconds=100.0)
    waits = []
    for tick in range(1, 2000):
        now = tick * POLL_SECONDS
        for index in chance.sample(range(count), count):
            since = engines[index].waiting_since_seconds
            if engines[index].poll(now, chance) and since is not None:
                waits.append(now - since)
    # A window, a step, and polls; those that wait for the same room come one after the other.
    assert max(waits, default=0.0) <= count * (WINDOW_SECONDS + 0.02)


def test_prompts_of_many_run_side_by_side():
    """With room for four of eight prompts, more than three run at a time."""
    chance, count = random.Random(0), 8
    watts = IDLE_WATTS + 4.0 / count * (700.0 - IDLE_WATTS)
    engines = _engines([(0, 1.0, 1000)] * count, watts)
    busy = 0
    for tick in range(1, 2000):
        now = tick * POLL_SECONDS
        for index in chance.sample(range(count), count):
            engines[index].poll(now, chance)
        busy += sum(each.busy_until_seconds is not None for each in engines)
    assert busy / 2000 > 3.2
