"""A GPU or a driver that goes away and comes back."""

from __future__ import annotations

import itertools
import logging

import pytest

from shaper.errors import GpuError, GpuLostError, GpuUnavailableError
from shaper.gpu.nvml import LAST_RETRY_SECONDS, NvmlReader, host_gpus
from shaper.gpu.sampler import Sampler
from tests.gpu.clocks import HandClock
from tests.gpu.fake_faults import Fault
from tests.gpu.fake_nvml import FakeGpu, FakeNvml

TICK_SECONDS = 0.02


def running(fake: FakeNvml, clock: HandClock, selectors: list[int | str]) -> NvmlReader:
    fake.clock = clock
    fake.__post_init__()
    reader = NvmlReader(selectors, clock, fake)
    reader.read()
    return reader


@pytest.mark.parametrize("kind", ["lost", "unloaded"])
def test_it_is_found_again_and_the_sampler_goes_on(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Ten seconds without: the state ages, then it is fresh; said once, counted, no jump."""
    clock = HandClock(100.0)
    recording = "tests/gpu/data/h200_load.csv"
    fake = FakeNvml([FakeGpu("GPU-a", recording=recording), FakeGpu("GPU-b", counts=True)])
    reader = running(fake, clock, [0, 1])
    fake.faults = [Fault(kind, gpu=1, from_seconds=5.0, until_seconds=15.0)]
    sampler = Sampler(reader, clock)
    energies: list[float] = []
    ages: list[float] = []
    with caplog.at_level(logging.WARNING):
        for _ in range(round(50.0 / TICK_SECONDS)):
            clock.advance(TICK_SECONDS)
            sampler.tick()
            assert sampler.latest is not None
            ages.append(sampler.latest.age_seconds(clock()))
            if sampler.latest.energy_joules is not None:
                energies.append(sampler.latest.energy_joules)
    assert 9.0 < max(ages) < 10.0 + 16.0
    assert ages[-1] == 0.0
    assert energies == sorted(energies)
    report = sampler.report(clock())
    assert report.reconnects == 1
    # Each kind of error once, and once that it is over.
    assert len(caplog.records) <= 3
    assert "the GPUs answer again, after 1" in caplog.records[-1].message
    # Opened a handful of times, not at each of the 500 ticks without it.
    assert fake.calls.count("nvmlInit") < 8


def test_the_pause_between_tries_doubles_up_to_half_a_minute() -> None:
    """A driver that stays away is asked for every 30 s, and not more often."""
    clock = HandClock(0.0)
    fake = FakeNvml([FakeGpu("GPU-a")])
    reader = running(fake, clock, [0])
    fake.faults = [Fault("unloaded")]
    tries: list[float] = []
    for tick in range(200 * 10):
        clock.now_seconds = tick / 10.0
        before = fake.calls.count("nvmlInit")
        with pytest.raises(GpuError):
            reader.read()
        if fake.calls.count("nvmlInit") > before:
            tries.append(clock())
    pauses = [after - before for before, after in itertools.pairwise(tries)]
    assert pauses[:4] == pytest.approx([2.0, 4.0, 8.0, 16.0], abs=0.2)
    assert pauses[-1] == pytest.approx(LAST_RETRY_SECONDS, abs=0.2)


def test_gpus_that_come_back_in_another_order_keep_their_place() -> None:
    """Found by UUID, and stamped with the index that they had."""
    clock = HandClock(0.0)
    first, second = FakeGpu("GPU-a"), FakeGpu("GPU-b", instant_milliwatts=100_000)
    fake = FakeNvml([first, second])
    reader = running(fake, clock, [1])
    fake.faults = [Fault("unloaded")]
    with pytest.raises(GpuLostError):
        reader.read()
    fake.faults, fake.devices = [], [second, first]
    clock.advance(1.1)
    (sample,) = reader.read()
    assert (sample.gpu_index, sample.instant_watts) == (1, 100.0)
    assert reader.reconnects == 1


def test_another_gpu_in_its_place_is_not_taken_for_it() -> None:
    """A board that was swapped is a GPU that is gone."""
    clock = HandClock(0.0)
    fake = FakeNvml([FakeGpu("GPU-a")])
    reader = running(fake, clock, [0])
    fake.faults = [Fault("unloaded")]
    with pytest.raises(GpuLostError):
        reader.read()
    fake.faults, fake.devices = [], [FakeGpu("GPU-z")]
    clock.advance(1.1)
    with pytest.raises(GpuUnavailableError, match="GPU-a"):
        reader.read()
    assert (reader.reconnects, fake.open_count) == (0, 0)


@pytest.mark.parametrize("code", ["GPU_IS_LOST", "NO_PERMISSION", "UNKNOWN"])
def test_a_neighbour_that_does_not_answer_costs_nothing(code: str) -> None:
    """Another engine's GPU fell off the bus, or belongs to another container."""
    clock = HandClock(0.0)
    fault = Fault("code", "nvmlDeviceGetHandleByIndex", gpu=0, code=code)
    fake = FakeNvml([FakeGpu("GPU-a"), FakeGpu("GPU-b")], faults=[fault])
    reader = running(fake, clock, ["GPU-b"])
    assert [gpu.uuid for gpu in host_gpus(fake)] == ["GPU-b"]
    fake.faults = [Fault("unloaded")]
    with pytest.raises(GpuLostError):
        reader.read()
    fake.faults = [fault]
    clock.advance(1.1)
    assert reader.read()[0].gpu_index == 1
    with pytest.raises(GpuUnavailableError, match=r"'GPU-a' is the beginning of no GPU.*GPU 0: "):
        NvmlReader(["GPU-a"], clock, fake)


def test_a_reader_that_was_closed_stays_closed() -> None:
    """Nothing opens the driver again behind an engine that has ended."""
    fake = FakeNvml([FakeGpu("GPU-a")])
    reader = running(fake, HandClock(0.0), [0])
    reader.close()
    reader.close()
    with pytest.raises(GpuUnavailableError, match="closed"):
        reader.read()
    assert fake.open_count == 0
