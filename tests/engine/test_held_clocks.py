"""Clocks that are held down and let go: no window is over when they rise, whatever held them.

Power is judged on the emulated GPUs' true watts; the model is exact, so what is over is the
clock's. Each case sets the clock free while prompts wait.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest

from shaper.core.types import ClockEventReasons, PowerLimit
from tests.engine.harness import GPU, Attacked, attacked, config_of, worst_ratio
from tests.engine.test_faults import drain, serve, traffic

TOP_HERTZ = 1.98e9
LIMITS = (PowerLimit(450.0, 0.1), PowerLimit(430.0, 1.0))
TOLERANCE = 1.01
RATE, SECONDS, HELD_SECONDS = 9.0, 6.5, 2.0

Hold = Callable[[Any], tuple[Callable[[], None], Callable[[], None]]]


def _ceiling(ratio: float, reasons: ClockEventReasons) -> Hold:
    def hold(gpus: Any) -> tuple[Callable[[], None], Callable[[], None]]:
        return (
            lambda: gpus.set_clock_ceiling(ratio * TOP_HERTZ, reasons),
            lambda: gpus.set_clock_ceiling(None),
        )

    return hold


HOLDS: dict[str, Hold] = {
    "power brake": lambda gpus: (
        lambda: gpus.set_power_brake(True),
        lambda: gpus.set_power_brake(False),
    ),
    "enforced limit of 350 W": lambda gpus: (
        lambda: gpus.set_power_cap(350.0),
        lambda: gpus.set_power_cap(700.0),
    ),
    "enforced limit of 250 W": lambda gpus: (
        lambda: gpus.set_power_cap(250.0),
        lambda: gpus.set_power_cap(700.0),
    ),
    "thermal slowdown": _ceiling(0.6, ClockEventReasons.SW_THERMAL_SLOWDOWN),
    "software power cap": _ceiling(0.5, ClockEventReasons.SW_POWER_CAP),
    "locked clocks, without a reason": _ceiling(0.55, ClockEventReasons.NONE),
    "a clock locked near the lowest": _ceiling(0.2, ClockEventReasons.NONE),
}


def _snap(gpus: Any) -> None:
    """Let a clock that is let go be at the top at once, not 300 ms later: nothing is quicker."""
    clocks = gpus._clocks
    clocks.clock_hertz = TOP_HERTZ
    clocks._apply()


def held_and_let_go(hold: Hold, quick: bool) -> tuple[Attacked, list[float]]:
    """Twice held for two seconds and let go for one."""
    world = attacked(LIMITS)
    gpus = world.engine.gpus
    take, let_go = hold(gpus)

    def release() -> None:
        let_go()
        if quick:
            _snap(gpus)

    events: dict[float, Any] = {}
    for begin in (1.0, 4.03):
        events |= {begin: take, begin + HELD_SECONDS: release}
    serve(world, traffic(RATE, SECONDS), events, SECONDS)
    segments = gpus.take_segments()
    return world, [worst_ratio(segments, limit) for limit in LIMITS]


CASES = [*((name, True) for name in HOLDS), ("power brake", False)]


@pytest.mark.parametrize(("name", "quick"), CASES)
def test_a_clock_that_is_let_go(name: str, quick: bool) -> None:
    """Each window holds when the clock rises, and all that was asked for is served."""
    world, worst = held_and_let_go(HOLDS[name], quick)
    assert max(worst) <= TOLERANCE
    assert world.shaper.counters.errors == 0
    assert world.shaper.counters.forced == 0
    drain(world, 120.0)


def resting(rest_hertz: float, climb_seconds: float) -> Any:
    """A GPU whose clock falls at rest; the controller's profile knows nothing of it."""
    from shaper.core.model.power_model import StepModel
    from shaper.engine.work import engine_coefficients
    from shaper.gpu.profiles import load_profile
    from shaper.simulate.true_gpu import TrueGpu

    profile = load_profile(GPU)
    clocks = dataclasses.replace(profile.clocks, rest_hertz=rest_hertz, climb_seconds=climb_seconds)
    coefficients = engine_coefficients(config_of())
    return TrueGpu(StepModel(dataclasses.replace(profile, clocks=clocks), coefficients))


def bursts(seconds: float, every: float) -> list[tuple[float, list[int], int]]:
    """Prompts that come together, and rest until the next ones."""
    rng = random.Random(11)
    return [
        (at, [rng.randrange(256) for _ in range(rng.randint(300, 2500))], rng.randint(2, 12))
        for turn in range(int(seconds / every))
        for at in [0.2 + turn * every + 0.013 * (turn % 7)] * 4
    ]


@pytest.mark.parametrize(
    ("rest_hertz", "climb_seconds", "every"),
    [
        (345e6, 0.05, 0.7),
        (345e6, 0.2, 1.5),
        (345e6, 0.5, 0.7),
        (210e6, 0.1, 1.5),
        (1.2e9, 0.3, 0.7),
    ],
)
def test_a_clock_that_falls_at_rest(rest_hertz: float, climb_seconds: float, every: float) -> None:
    """Steps after a rest keep each window while the clock climbs; nothing is learned of them."""
    world = attacked(LIMITS, plant=resting(rest_hertz, climb_seconds))
    world.serve(bursts(6.0, every), 6.0)
    segments = world.engine.gpus.take_segments()
    assert max(worst_ratio(segments, limit) for limit in LIMITS) <= 1.005
    demand = world.shaper.demand
    assert abs(demand.seconds_gain_ratio - 1.0) <= 0.02
    assert abs(demand.joules_gain_ratio - 1.0) <= 0.02
    assert world.shaper.counters.errors == 0
    assert world.shaper.counters.forced == 0
    drain(world, 20.0)
