"""Controllers that share a budget pass a waiting prompt over a bounded number of times."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from shaper.core.controller import Controller
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
from shaper.fleet import GroupLedger, memory_groups

IDLE_WATTS = 140.0
MAX_PAUSE_SECONDS = 0.3
POLL_SECONDS = 0.001


class Model:
    """8 ms and 450 W for decodes, 40 us a prompt token at 700 W."""

    gap_watts = IDLE_WATTS

    def predict(self, batch: StepBatch, **state: float | None) -> StepPrediction:
        """Seconds and joules."""
        base = 0.008 if batch.decode_tokens else 0.0
        own = 40e-6 * batch.prefill_tokens
        return StepPrediction(base + own, base * 450.0 + own * 700.0)


@dataclass
class Engine:
    """One step at a time; its prompts come by chance, its decodes never end."""

    control: Controller
    decodes: int
    appetite: float
    longest_tokens: int
    left_tokens: int = 0
    busy_until_seconds: float | None = None
    waiting_since_seconds: float | None = None
    passed_over: Counter[int] = field(default_factory=Counter)

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
            self.busy_until_seconds = now + self.control.predict(batch).seconds
        self.left_tokens -= batch.prefill_tokens
        if batch.prefill_tokens or not self.left_tokens:
            self.waiting_since_seconds = None
        elif self.waiting_since_seconds is None:
            self.waiting_since_seconds = now
            self.passed_over.clear()
        return batch.prefill_tokens


def _engine(group: GroupLedger, itl: float | None, shape: tuple[int, float, int]) -> Engine:
    control = Controller(
        Model(),
        WindowedPlanner(),
        PowerBudget(),
        0.0,
        targets=LatencyTargets(itl),
        max_pause_seconds=MAX_PAUSE_SECONDS,
        group=group,
    )
    return Engine(control, *shape)


SHAPES = st.tuples(
    st.sampled_from([0, 4]), st.sampled_from([0.01, 0.1, 1.0]), st.sampled_from([100, 500, 4000])
)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    shapes=st.lists(SHAPES, min_size=2, max_size=4),
    watts=st.floats(160.0, 500.0),
    itl=st.sampled_from([None, 0.05, 0.1]),
)
def test_a_waiting_prompt_is_passed_over_a_bounded_number_of_times(seed, shapes, watts, itl):
    """Whatever the others want, and however their polls fall: a count, for each of them."""
    count, chance = len(shapes), random.Random(seed)
    rest = {"rest_watts": IDLE_WATTS, "rest_after_seconds": 1.0}
    limits = (PowerLimit(count * watts, 0.1),)
    groups = memory_groups(limits, count, idle_watts=IDLE_WATTS, **rest)
    engines = [_engine(group, itl, shape) for group, shape in zip(groups, shapes, strict=True)]
    chunks = 0
    for tick in range(1, 1200):
        now = tick * POLL_SECONDS
        for index in chance.sample(range(count), count):
            if not engines[index].poll(now, chance):
                continue
            chunks += 1
            for other in engines:
                since = other.waiting_since_seconds
                if other is engines[index] or since is None:
                    continue
                other.passed_over[index] += 1
                most = 1 + int((now - since) / MAX_PAUSE_SECONDS)
                assert other.passed_over[index] <= most
    assert chunks
