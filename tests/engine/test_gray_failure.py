"""Sick and hot GPUs in closed loop: vLLM's scheduler, the shaper, its supervisor, emulated GPUs."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from shaper.core.model.power_model import StepModel
from shaper.core.supervise.status import Cause
from shaper.core.types import ClockEventReasons, StepPrediction
from tests.engine.conftest import Rig
from tests.engine.harness import GPU

TOP_HERTZ = 1.98e9
THERMAL = ClockEventReasons.SW_THERMAL_SLOWDOWN


def serve(
    rig: Rig,
    seconds: float,
    rate: float,
    tokens: tuple[int, int],
    at: dict[float, Any] | None = None,
) -> list[str]:
    """Steady arrivals for a while, and what happens at some times; the lines for the log."""
    from shaper.simulate.engine import new_request

    engine, rng, events = rig.engine, random.Random(5), sorted((at or {}).items())
    lines: list[str] = []
    if rig.shaper is not None:
        take = rig.shaper.set_extra_limits

        def note(limits: Any) -> None:
            # Each tick of the supervisor ends with this, and its lines stand in the shaper.
            lines.extend(rig.shaper.standing.announcements)
            take(limits)

        rig.shaper.set_extra_limits = note
    index, due = 0, 0.0
    while due < seconds:
        while events and events[0][0] <= due:
            events.pop(0)[1]()
        engine.run_until(due)
        prompt = [rng.randrange(256) for _ in range(tokens[0])]
        engine.add(new_request(f"r{index}", prompt, tokens[1], engine.scheduler.vllm_config))
        index, due = index + 1, due + 1.0 / rate
    engine.run_until(seconds)
    return lines


def tokens_per_second(rig: Rig) -> float:
    made = sum(len(record.token_seconds) for record in rig.engine.requests.values())
    return float(made / rig.engine.now_seconds)


def itl_seconds(rig: Rig, start: float, end: float) -> list[float]:
    """Gaps between tokens that came between two times."""
    return sorted(
        later - earlier
        for record in rig.engine.requests.values()
        for earlier, later in zip(record.token_seconds, record.token_seconds[1:], strict=False)
        if start <= later < end
    )


class Slow:
    """A step model whose steps take `factor` times what they should, power as it was."""

    def __init__(self, model: StepModel) -> None:
        self._model, self.factor = model, 1.0
        self.profile, self.gpu_count, self.gap_watts = (
            *(model.profile, model.gpu_count),
            model.gap_watts,
        )

    def predict(self, batch: Any, **state: Any) -> StepPrediction:
        found = self._model.predict(batch, **state)
        return StepPrediction(found.seconds * self.factor, found.joules * self.factor)


@pytest.fixture
def slow(make_rig: Callable[..., Rig]) -> Slow:
    from shaper.emulator.kv_cache import true_model
    from shaper.gpu.profiles import load_profile

    config = make_rig(None).engine.scheduler.vllm_config
    return Slow(true_model(config, load_profile(GPU)))


def test_a_hot_inlet_slows_the_unshaped_gpu_down_and_never_the_shaped_one(make_rig):
    """An inlet of 48 degrees and more load than it bears: without the shaper the GPU slows
    itself down for much of the time; with it never, at 7% fewer tokens at the most."""
    unshaped = make_rig(None, ambient_celsius=48.0)
    serve(unshaped, 40.0, 3.0, (3000, 200))
    shaped = make_rig((), supervise=True, ambient_celsius=48.0)
    lines = serve(shaped, 40.0, 3.0, (3000, 200))
    assert unshaped.engine.gpus.reason_seconds()[THERMAL] > 10.0
    assert THERMAL not in shaped.engine.gpus.reason_seconds()
    assert shaped.shaper.counters.errors == 0
    assert [line for line in lines if line.startswith("heat: a power limit")]
    assert tokens_per_second(shaped) > 0.93 * tokens_per_second(unshaped)


def test_a_cool_engine_is_left_alone(make_rig):
    """The same load at 20 degrees: the supervisor limits, degrades and says nothing."""
    shaped = make_rig((), supervise=True, ambient_celsius=20.0)
    lines = serve(shaped, 30.0, 2.0, (2000, 200))
    standing = shaped.shaper.standing
    assert (lines, standing.limits, standing.degradations) == ([], (), ())


def test_a_clock_that_sags_is_named_and_the_planner_follows(make_rig):
    """A third of the clock goes without a reason: degraded within six seconds; predictions and
    the ITL target hold all the same; its return is announced."""
    rig = make_rig((), supervise=True, itl_target_seconds=0.03, ambient_celsius=20.0)
    gpus, seen = rig.engine.gpus, []

    def look() -> None:
        seen.append([each.cause for each in rig.shaper.standing.degradations])

    lines = serve(
        rig,
        50.0,
        4.0,
        (2000, 150),
        {
            20.0: lambda: gpus.set_clock_ceiling(0.65 * TOP_HERTZ),
            26.0: look,
            34.0: lambda: gpus.set_clock_ceiling(None),
            49.0: look,
        },
    )
    assert seen == [[Cause.CLOCK], []]
    assert [line.split(":")[0] for line in lines] == ["degraded", "recovered"]
    sagging = itl_seconds(rig, 22.0, 34.0)
    assert sagging[int(0.99 * len(sagging))] < 0.03 * 1.05
    healthy = itl_seconds(rig, 12.0, 20.0)
    assert sum(sagging) / len(sagging) > 1.05 * sum(healthy) / len(healthy)


def test_a_gpu_that_is_slow_at_a_good_clock_is_the_throughputs(make_rig, slow):
    """Steps of 1.35 times the time at the full clock: `throughput` and not `clock`; over
    when they are what they were."""
    rig = make_rig((), supervise=True, itl_target_seconds=0.05, plant=slow, ambient_celsius=20.0)
    seen = []

    def look() -> None:
        seen.append([each.cause for each in rig.shaper.standing.degradations])

    lines = serve(
        rig,
        85.0,
        2.0,
        (500, 150),
        {
            45.0: lambda: setattr(slow, "factor", 1.35),
            58.0: look,
            60.0: lambda: setattr(slow, "factor", 1.0),
            84.0: look,
        },
    )
    assert seen == [[Cause.THROUGHPUT], []]
    # That the meter and the model are apart for a while is said too.
    words = [line.split(":")[0] for line in lines if "model disagree" not in line]
    assert [word for word in words if word in ("degraded", "recovered")] == [
        "degraded",
        "recovered",
    ]


def test_a_power_brake_is_named_and_power_capping_is_not(make_rig):
    """The brake within two seconds; a hardware cap that the load runs into, never."""
    rig = make_rig((), supervise=True, ambient_celsius=20.0)
    gpus, seen = rig.engine.gpus, []
    gpus.set_power_cap(450.0)

    def look() -> None:
        seen.append([each.cause for each in rig.shaper.standing.degradations])

    serve(
        rig,
        30.0,
        6.0,
        (3000, 100),
        {25.0: look, 25.1: lambda: gpus.set_power_brake(True), 27.5: look},
    )
    assert gpus.reason_seconds()[ClockEventReasons.SW_POWER_CAP] > 5.0
    assert seen == [[], [Cause.BRAKE]]
