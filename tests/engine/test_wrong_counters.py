"""Energy counters that count less or more than their GPU draws, in closed loop: limits hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from shaper.core.learn.margin import UNCOUNTED_MARGIN_RATIO
from shaper.core.types import GpuSample, PowerLimit
from shaper.gpu.reader import GpuReader
from tests.engine.harness import Attacked, attacked, worst_ratio
from tests.engine.test_faults import serve, traffic

LIMIT = PowerLimit(450.0, 0.1)
SECONDS = 10.0
Bend = Callable[[GpuSample], GpuSample]


class _Bent:
    """Meters of which every sample is bent."""

    def __init__(self, inner: GpuReader, bend: Bend) -> None:
        self._inner, self._bend, self.gpus = inner, bend, inner.gpus

    def read(self) -> tuple[GpuSample, ...]:
        return tuple(self._bend(sample) for sample in self._inner.read())

    def close(self) -> None:
        self._inner.close()


def counts(ratio: float, since_seconds: float = 0.0) -> Bend:
    """A counter that is right until a time, and then moves by a part of what it should."""
    begun: dict[int, float] = {}

    def bend(sample: GpuSample) -> GpuSample:
        joules = sample.energy_joules or 0.0
        if sample.read_seconds <= since_seconds:
            begun[sample.gpu_index] = joules
            return sample
        begin = begun.get(sample.gpu_index, 0.0)
        return dataclasses.replace(sample, energy_joules=begin + (joules - begin) * ratio)

    return bend


def without(sample: GpuSample) -> GpuSample:
    """No counter."""
    return dataclasses.replace(sample, energy_joules=None)


def served(bend: Bend, rate: float = 20.0) -> tuple[Attacked, float]:
    """The engine after a while, and its worst window."""
    world = attacked((LIMIT,))
    world.reader.inner = _Bent(world.reader.inner, bend)
    serve(world, traffic(rate, SECONDS), {}, SECONDS)
    assert world.shaper.counters.errors == 0
    return world, worst_ratio(world.engine.gpus.take_segments(), LIMIT)


@pytest.mark.parametrize(("ratio", "since_seconds"), [(0.57, 3.0), (0.75, 0.0)])
def test_a_counter_that_counts_less(ratio, since_seconds, caplog) -> None:
    """No window is over, from the first second on or from when it began to; it is said."""
    world, worst = served(counts(ratio, since_seconds))
    assert worst <= 1.01
    report = world.sampler.inner.report(SECONDS)
    assert report.meter_disagrees
    assert report.read_over_counted_ratio == pytest.approx(1.0 / ratio, rel=0.05)
    assert [r for r in caplog.records if "what its energy counter" in r.getMessage()]


def test_a_counter_that_counts_more() -> None:
    """The higher of the two holds the limit, and why there is less throughput is said."""
    world, worst = served(counts(1.5))
    assert worst <= 1.0
    assert world.sampler.inner.report(SECONDS).meter_disagrees


def test_a_healthy_meter_is_believed() -> None:
    """Nothing is said, and nothing is kept free."""
    world, worst = served(lambda sample: sample, rate=9.0)
    assert worst <= 1.005
    report = world.sampler.inner.report(SECONDS)
    assert not report.meter_disagrees
    assert report.read_over_counted_ratio == 1.0
    assert world.shaper.demand.margin_ratio < 0.005


def test_without_a_counter_more_is_kept_free() -> None:
    """By itself, and the windows hold."""
    world, worst = served(without)
    assert worst <= 1.0
    assert world.shaper.demand.margin_ratio >= UNCOUNTED_MARGIN_RATIO
