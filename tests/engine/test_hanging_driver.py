"""A driver whose call does not return: steps go on, over the real sampler's threads."""

from __future__ import annotations

import random
import threading

from shaper.core.learn.margin import BLIND_MARGIN_RATIO
from shaper.core.types import PowerLimit
from shaper.gpu.nvml import NvmlReader
from shaper.gpu.sampler import Sampler
from tests.engine.harness import attacked
from tests.gpu.fake_faults import Fault
from tests.gpu.fake_nvml import FakeGpu, FakeNvml

LIMITS = (PowerLimit(500.0, 0.1), PowerLimit(470.0, 2.0))
# Only a failure takes it.
PATIENCE_SECONDS = 60.0


def test_steps_go_on_while_a_call_of_the_driver_hangs():
    """Four seconds of traffic, served to its end inside one call; the margin is that of a blind
    engine; when the call returns, states come again."""
    world = attacked(LIMITS)
    fake, fresh = FakeNvml([FakeGpu("GPU-a", counts=True)]), threading.Event()
    reader = NvmlReader([0], lambda: world.engine.now_seconds, fake)
    sampler = Sampler(reader, interval_seconds=0.001, on_state=lambda _: fresh.set())
    world.shaper._sampler = sampler
    sampler.tick()
    before = sampler.latest
    fresh.clear()
    fake.faults = [Fault("hang", "nvmlDeviceGetFieldValues")]
    # If a step waited for the driver, this would end it, and the call would hang no more.
    rescue = threading.Timer(PATIENCE_SECONDS, fake.released.set)
    rescue.start()
    sampler.start()
    try:
        assert fake.hanging.wait(PATIENCE_SECONDS)
        rng = random.Random(5)
        traffic = [
            (0.2 * index, [rng.randrange(256) for _ in range(rng.randint(50, 900))], 30)
            for index in range(15)
        ]
        world.serve(traffic, 4.0)
        while world.engine.busy:
            world.engine.step()
        assert fake.hanging.is_set()
        assert sampler.latest is before
        assert all(r.finished_seconds is not None for r in world.engine.requests.values())
        assert len(world.outputs) > 100
        assert world.shaper.demand.margin_ratio >= BLIND_MARGIN_RATIO
        assert world.shaper.counters.errors == 0
        fake.faults = []
        fake.released.set()
        assert fresh.wait(PATIENCE_SECONDS)
        after = sampler.latest
        assert before is not None
        assert after is not None
        assert after.sampled_seconds >= 4.0 > before.sampled_seconds
    finally:
        rescue.cancel()
        fake.released.set()
        sampler.stop()
