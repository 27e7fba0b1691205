"""What every `GpuReader` keeps: one suite over the driver, plain and recorded, the emulated
GPU and a replay."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from shaper.core.model.power_model import StepModel
from shaper.core.model.work import WorkCoefficients
from shaper.core.types import ClockEventReasons, GpuSample
from shaper.emulator.meter import EmulatedReader
from shaper.emulator.playback import PlaybackReader
from shaper.emulator.shapes import load_shape
from shaper.emulator.silicon import EmulatedGpus
from shaper.gpu import nvml_driver
from shaper.gpu.capabilities import QUANTITIES, describe_gpus
from shaper.gpu.nvml import NvmlReader
from shaper.gpu.profiles import load_profile
from shaper.gpu.reader import GpuReader
from shaper.gpu.replay import ReplayReader
from shaper.gpu.sampler import Sampler
from tests.gpu.clocks import HandClock
from tests.gpu.fake_nvml import FakeGpu, FakeNvml

TICKS = 20
TICK_SECONDS = 0.02


def make_nvml(clock: HandClock, _: Path, monkeypatch: pytest.MonkeyPatch) -> GpuReader:
    monkeypatch.setattr(nvml_driver, "pynvml", FakeNvml([FakeGpu("GPU-a"), FakeGpu("GPU-b")]))
    return NvmlReader([0, 1], clock)


def make_recorded(clock: HandClock, _: Path, __: pytest.MonkeyPatch) -> GpuReader:
    """The driver again, its values from a recording."""
    recording = "tests/gpu/data/h200_load.csv"
    gpus = [FakeGpu(uuid, recording=recording) for uuid in ("GPU-a", "GPU-b")]
    return NvmlReader([0, 1], clock, FakeNvml(gpus, clock=clock))


def make_emulated(clock: HandClock, _: Path, __: pytest.MonkeyPatch) -> GpuReader:
    profile = load_profile("h200-sxm")
    model = StepModel(profile, WorkCoefficients.from_shape(load_shape("llama-3.1-8b"), 2))
    return EmulatedReader(EmulatedGpus(profile, model, start_seconds=clock()), clock)


def recording(clock: HandClock, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recording of the emulated GPUs, taken ahead of the test's own time."""
    recorder = HandClock(clock())
    source = make_emulated(recorder, folder, monkeypatch)
    path = folder / "run.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(GpuSample)])
        writer.writeheader()
        for _ in range(TICKS):
            for sample in source.read():
                row = asdict(sample) | {"clock_event_reasons": int(sample.clock_event_reasons)}
                writer.writerow(row)
            recorder.advance(TICK_SECONDS)
    return path


def make_replay(clock: HandClock, folder: Path, monkeypatch: pytest.MonkeyPatch) -> GpuReader:
    return ReplayReader(recording(clock, folder, monkeypatch), clock)


def make_playback(clock: HandClock, folder: Path, monkeypatch: pytest.MonkeyPatch) -> GpuReader:
    return PlaybackReader(recording(clock, folder, monkeypatch), clock, count=2)


Maker = Callable[[HandClock, Path, pytest.MonkeyPatch], GpuReader]


@pytest.fixture
def clock() -> HandClock:
    return HandClock(1000.0)


@pytest.fixture(
    params=[make_nvml, make_recorded, make_emulated, make_replay, make_playback],
    ids=["nvml", "nvml-recorded", "emulated", "replay", "playback"],
)
def reader(
    request: pytest.FixtureRequest,
    clock: HandClock,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> GpuReader:
    maker: Maker = request.param
    return maker(clock, tmp_path, monkeypatch)


def test_one_sample_per_gpu_in_the_order_of_gpus(reader: GpuReader, clock: HandClock) -> None:
    """The order is the same at every read."""
    order = [gpu.index for gpu in reader.gpus]
    assert len(set(order)) == len(order) == 2
    for _ in range(3):
        assert [sample.gpu_index for sample in reader.read()] == order
        clock.advance(TICK_SECONDS)


def test_gpus_can_be_told_apart_and_have_a_name(reader: GpuReader) -> None:
    """UUIDs are unique."""
    assert len({gpu.uuid for gpu in reader.gpus}) == 2
    assert all(gpu.name for gpu in reader.gpus)


def test_samples_are_stamped_with_the_clock(reader: GpuReader, clock: HandClock) -> None:
    """The age of a state is the difference of two readings of one clock."""
    for _ in range(3):
        assert {sample.read_seconds for sample in reader.read()} == {clock()}
        clock.advance(TICK_SECONDS)


def test_units_are_si(reader: GpuReader) -> None:
    """An idle or busy H200 lies in these ranges in watts, hertz and degrees."""
    for sample in reader.read():
        assert sample.instant_watts is not None
        assert 20 <= sample.instant_watts <= 1000
        assert sample.enforced_limit_watts == 700
        assert sample.sm_clock_hertz is not None
        assert 1e8 <= sample.sm_clock_hertz <= 3e9
        assert sample.temperature_celsius is not None
        assert 10 <= sample.temperature_celsius <= 100
        assert isinstance(sample.clock_event_reasons, ClockEventReasons)


def test_energy_never_goes_backwards(reader: GpuReader, clock: HandClock) -> None:
    """The counter is the truth that the estimator rests on."""
    last = [-1.0, -1.0]
    for _ in range(TICKS):
        now = [sample.energy_joules for sample in reader.read()]
        assert all(new is not None and new >= old for new, old in zip(now, last, strict=True))
        last = [new or 0.0 for new in now]
        clock.advance(TICK_SECONDS)


def test_the_sampler_believes_it(reader: GpuReader, clock: HandClock) -> None:
    """No reading of a sound reader is rejected."""
    sampler = Sampler(reader, clock)
    for _ in range(TICKS):
        sampler.tick()
        clock.advance(TICK_SECONDS)
    assert (sampler.read_errors, sampler.rejected_readings, sampler.callback_errors) == (0, 0, 0)
    assert sampler.latest is not None
    assert sampler.latest.gpu_count == 2
    assert sampler.latest.enforced_limit_watts == 1400


def test_it_can_be_described(reader: GpuReader) -> None:
    """Each quantity of each GPU has a source, or a reason why it has none."""
    described = describe_gpus(reader)
    assert [found.gpu for found in described] == list(reader.gpus)
    for found in described:
        assert tuple(source.quantity for source in found.sources) == QUANTITIES
        assert all(source.how or source.missing for source in found.sources)
        assert found.power_scope == "GPU"
        assert not found.source("energy_joules").missing


def test_close_twice(reader: GpuReader) -> None:
    """Shutting down after a failed start closes a second time."""
    reader.read()
    reader.close()
    reader.close()
