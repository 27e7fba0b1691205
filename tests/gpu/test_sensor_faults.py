"""Each way in which a sensor fails, at the sampler: found within a bound, and back without a jump.

What tells the controller is the age of the last state: nothing is published that is not
believed. A controller takes a state of more than a second for lost.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from shaper.core.supervise.supervisor import SENSOR_LOST_SECONDS
from shaper.core.types import GpuIdentity, GpuSample, PowerState
from shaper.errors import GpuLostError
from shaper.gpu.sampler import Sampler
from tests.gpu.clocks import HandClock

TICK_SECONDS = 0.02
GPUS = 4
Samples = tuple[GpuSample, ...]
Fault = Callable[[Samples], Samples]


@dataclass
class Gpus:
    """Four GPUs at 350 to 450 W each, meters that refresh every 100 ms, and a fault."""

    clock: HandClock
    fault: Fault | None = None
    joules: float = 0.0
    _shown: Samples = ()
    _chance: random.Random = field(default_factory=lambda: random.Random(7))

    @property
    def gpus(self) -> tuple[GpuIdentity, ...]:
        return tuple(GpuIdentity(i, "fake", f"GPU-{i}", 700.0) for i in range(GPUS))

    def read(self) -> Samples:
        now = self.clock()
        watts = 400.0 + 50.0 * math.sin(now) + self._chance.uniform(-3.0, 3.0)
        if not self._shown or now - self._shown[0].read_seconds >= 0.0999:
            elapsed = now - self._shown[0].read_seconds if self._shown else 0.0
            self.joules += watts * elapsed
            self._shown = tuple(
                GpuSample(
                    now,
                    index,
                    instant_watts=watts + index,
                    average_watts=watts + index,
                    energy_joules=5e6 + self.joules,
                    enforced_limit_watts=700.0,
                )
                for index in range(GPUS)
            )
        samples = tuple(replace(sample, read_seconds=now) for sample in self._shown)
        return samples if self.fault is None else self.fault(samples)

    def close(self) -> None:
        """Nothing is held."""


class Bench:
    """A sampler over them, ticked by hand."""

    def __init__(self) -> None:
        self.clock = HandClock(100.0)
        self.gpus = Gpus(self.clock)
        self.states: list[PowerState] = []
        self.sampler = Sampler(self.gpus, self.clock, on_state=self.states.append)

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / TICK_SECONDS)):
            self.clock.advance(TICK_SECONDS)
            self.sampler.tick()

    @property
    def age_seconds(self) -> float:
        assert self.sampler.latest is not None
        return self.sampler.latest.age_seconds(self.clock())

    @property
    def energy_joules(self) -> float:
        assert self.sampler.latest is not None
        assert self.sampler.latest.energy_joules is not None
        return self.sampler.latest.energy_joules


def raises(samples: Samples) -> Samples:
    raise GpuLostError("gone")


def all_of(**values: float | None) -> Fault:
    """All four say this."""
    return lambda samples: tuple(replace(s, **values) for s in samples)  # type: ignore[arg-type]


def one_of(**values: float | None) -> Fault:
    """One of the four says this."""
    return lambda samples: (replace(samples[0], **values), *samples[1:])  # type: ignore[arg-type]


def scaled(factor: float) -> Fault:
    """Watts in another unit."""
    return lambda samples: tuple(
        replace(
            s,
            instant_watts=None if s.instant_watts is None else s.instant_watts * factor,
            average_watts=None if s.average_watts is None else s.average_watts * factor,
        )
        for s in samples
    )


def stuck() -> Fault:
    """Every value stays as it is; the reads themselves go on."""
    kept: list[Samples] = []

    def fault(samples: Samples) -> Samples:
        kept.append(samples)
        return tuple(replace(s, read_seconds=samples[0].read_seconds) for s in kept[0])

    return fault


def stale() -> Fault:
    """A driver that hands out its last answer, time and all."""
    kept: list[Samples] = []

    def fault(samples: Samples) -> Samples:
        kept.append(samples)
        return kept[0]

    return fault


def frozen_watts() -> Fault:
    """The counter goes on, the watts stay at a level that the load has left."""
    return all_of(instant_watts=90.0, average_watts=90.0)


BLINDING: dict[str, Callable[[], Fault]] = {
    "lost": lambda: raises,
    "stuck": stuck,
    "stale": stale,
    "frozen watts": frozen_watts,
    "nan": lambda: all_of(instant_watts=math.nan, average_watts=math.nan),
    "infinite": lambda: all_of(instant_watts=math.inf, average_watts=math.inf),
    "negative": lambda: all_of(instant_watts=-400.0, average_watts=-400.0),
    "1000 times": lambda: scaled(1000.0),
    "a thousandth": lambda: scaled(0.001),
    "nothing": lambda: all_of(instant_watts=None, average_watts=None),
    "one of four nan": lambda: one_of(instant_watts=math.nan, average_watts=math.nan),
    "one of four missing": lambda: lambda samples: samples[1:],
    "one of four twice": lambda: lambda samples: (*samples, samples[0]),
}


@pytest.mark.parametrize("name", BLINDING)
def test_a_fault_that_blinds_shows_as_age_within_two_seconds(name: str) -> None:
    """Found within two seconds of its start, for as long as it lasts, and over at once."""
    bench = Bench()
    bench.run(10.0)
    before, rejected = bench.energy_joules, bench.sampler.rejected_readings
    assert rejected == 0
    bench.gpus.fault = BLINDING[name]()
    bench.run(2.0 + TICK_SECONDS)
    assert bench.age_seconds > SENSOR_LOST_SECONDS - TICK_SECONDS
    bench.run(20.0)
    assert bench.age_seconds > 20.0
    bench.gpus.fault = None
    bench.run(0.3)
    assert bench.age_seconds < 0.1
    # The counter went on: what was spent meanwhile is there, once, and none of it twice.
    spent = bench.energy_joules - before
    assert spent == pytest.approx(GPUS * 400.0 * 22.3, rel=0.1)
    watts = [s.instant_watts for s in bench.states if s.instant_watts is not None]
    assert max(watts) < GPUS * 460.0
    energies = [s.energy_joules for s in bench.states if s.energy_joules is not None]
    assert energies == sorted(energies)


@pytest.mark.parametrize("offset", [-5e6, -4e6, 3e6, 1e9])
def test_a_counter_that_is_reset_or_jumps_costs_no_more_than_what_lay_between(
    offset: float,
) -> None:
    """A driver that was reloaded, a counter that leaps: power is still seen, energy goes on."""
    bench = Bench()
    bench.run(10.0)
    before = bench.energy_joules
    bench.gpus.fault = lambda samples: tuple(
        replace(s, energy_joules=(s.energy_joules or 0.0) + offset) for s in samples
    )
    bench.run(5.0)
    assert bench.age_seconds < 0.1
    assert bench.energy_joules - before == pytest.approx(GPUS * 400.0 * 5.0, rel=0.15)
    bench.gpus.fault = None
    bench.run(5.0)
    assert bench.energy_joules - before == pytest.approx(GPUS * 400.0 * 10.0, rel=0.15)


@pytest.mark.parametrize("factor", [1000.0, 0.001])
def test_a_counter_in_another_unit_is_no_energy(factor: float) -> None:
    """Joules for millijoules: never believed, or so low that the watts tell against it."""
    bench = Bench()
    bench.gpus.fault = lambda samples: tuple(
        replace(s, energy_joules=(s.energy_joules or 0.0) * factor) for s in samples
    )
    bench.run(10.0)
    energies = [s.energy_joules for s in bench.states if s.energy_joules is not None]
    assert all(joules < GPUS * 500.0 * 10.0 for joules in energies)
    assert bench.age_seconds < 0.1


def test_a_sampler_that_stalls_for_half_a_minute_is_an_old_state_and_then_a_new_one() -> None:
    """The thread was not scheduled, or a driver call hung: no catching up, no jump."""
    bench = Bench()
    bench.run(10.0)
    before, count = bench.energy_joules, len(bench.states)
    bench.clock.advance(30.0)
    assert bench.age_seconds == pytest.approx(30.0, abs=0.1)
    bench.run(0.3)
    assert bench.age_seconds < 0.1
    assert len(bench.states) - count == 15
    assert bench.energy_joules - before == pytest.approx(GPUS * 400.0 * 30.3, rel=0.15)


def test_a_fault_that_flickers_never_shows_a_level_that_no_gpu_drew() -> None:
    """Every third read is nonsense of another kind."""
    bench = Bench()
    kinds = [make() for name, make in BLINDING.items() if name not in ("stuck", "stale")]
    turn = [0]

    def flicker(samples: Samples) -> Samples:
        turn[0] += 1
        return samples if turn[0] % 3 else kinds[turn[0] // 3 % len(kinds)](samples)

    bench.run(5.0)
    bench.gpus.fault = flicker
    bench.run(20.0)
    assert bench.age_seconds < 0.1
    published = [s.instant_watts for s in bench.states if s.instant_watts is not None]
    odd = [watts for watts in published if not GPUS * 340.0 < watts < GPUS * 460.0]
    # Watts frozen at 90 for one read can't be told from a pause of the engine.
    assert set(odd) <= {4 * 90.0}
