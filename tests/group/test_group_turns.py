"""Whoever waits gets a turn within a bounded number of those of others."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from shaper.core.ledger.shared import EngineShare, Step
from shaper.core.types import PowerLimit, StepPrediction
from shaper.group import GroupLedger, memory_groups
from tests.group.group_judge import Device, Drawn
from tests.strategies import examples

IDLE_WATTS, CHUNK_WATTS, CHUNK_SECONDS = 100.0, 700.0, 0.03
CHUNK_JOULES = (CHUNK_WATTS - IDLE_WATTS) * CHUNK_SECONDS


class Engine:
    """Prompts come by chance; a chunk runs where it fits beside those that have waited longer."""

    def __init__(self, group: GroupLedger) -> None:
        self.group = group
        self.device = Device(Drawn(IDLE_WATTS, IDLE_WATTS, 1.0, 0.0, 0.0))
        self.waiting_since: float | None = None
        self.busy_until = 0.0
        self.turns_of_others = 0
        self.most_turns_of_others = 0
        self.chunks = 0

    def poll(self, now: float, chance: random.Random, appetite: float) -> bool:
        """Whether a chunk was launched."""
        if self.device.flying and self.busy_until <= now:
            self.device.finish(now)
            self.group.commit(self.device.committed(), EngineShare(IDLE_WATTS), now)
        if self.device.flying:
            return False
        if self.waiting_since is None and chance.random() < appetite:
            self.waiting_since, self.turns_of_others = now, 0
        share = EngineShare(
            IDLE_WATTS, waiting_since_seconds=self.waiting_since, waiting_joules=CHUNK_JOULES
        )
        view = self.group.query(now, now, share)
        if self.waiting_since is None:
            self.group.publish(share, now)
            return False
        run = now, now + CHUNK_SECONDS, CHUNK_WATTS
        step = Step(now, StepPrediction(CHUNK_SECONDS, CHUNK_WATTS * CHUNK_SECONDS))
        beside = CHUNK_WATTS + view.ahead_joules / CHUNK_SECONDS
        fits = all(part.fits(CHUNK_SECONDS, beside) for part in view.parts)
        if not fits or not self.group.reserve(self.device.committed([run]), share, now, step):
            self.group.publish(share, now)
            return False
        self.device.launch(run)
        self.busy_until, self.waiting_since = run[1], None
        self.most_turns_of_others = max(self.most_turns_of_others, self.turns_of_others)
        self.chunks += 1
        return True


@examples(8)
@given(
    seed=st.integers(0, 2**32),
    appetites=st.lists(st.sampled_from([0.01, 0.1, 1.0]), min_size=2, max_size=5),
    room_for=st.floats(1.1, 2.5),
)
def test_nobody_waits_for_more_than_one_turn_of_each_other(seed, appetites, room_for):
    """However greedy they are, and however their questions fall."""
    count = len(appetites)
    watts = count * IDLE_WATTS + room_for * (CHUNK_WATTS - IDLE_WATTS) * CHUNK_SECONDS / 0.1
    limits = (PowerLimit(watts, 0.1),)
    rest = {"rest_watts": IDLE_WATTS, "rest_after_seconds": 1.0}
    groups = memory_groups(limits, count, idle_watts=IDLE_WATTS, **rest)
    engines, chance = [Engine(group) for group in groups], random.Random(seed)
    now = 0.0
    for _ in range(400):
        now += 0.001
        order = list(zip(engines, appetites, strict=True))
        chance.shuffle(order)
        for engine, appetite in order:
            if engine.poll(now, chance, appetite):
                for other in engines:
                    other.turns_of_others += other is not engine
    assert sum(engine.chunks for engine in engines) > 0
    for engine in engines:
        # Those that began to wait in the same millisecond have one turn each more.
        assert engine.most_turns_of_others <= 2 * (count - 1)
