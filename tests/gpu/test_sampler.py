"""What the sampler publishes, and what it does when the driver misbehaves."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Sequence

import pytest

from shaper.core.types import ClockEventReasons, GpuIdentity, GpuSample, PowerState
from shaper.errors import GpuError, GpuLostError, GpuPermissionError
from shaper.gpu.sampler import Sampler
from shaper.gpu.summary import summarise
from tests.gpu.clocks import HandClock

Script = Sequence[GpuSample | Exception]


class ScriptedReader:
    """One GPU that returns, or raises, what it is told, in order."""

    def __init__(self, script: Script) -> None:
        self._script = iter(script)
        self.closed_by: list[str] = []
        self.on_read: Callable[[], None] = lambda: None

    @property
    def gpus(self) -> tuple[GpuIdentity, ...]:
        return (GpuIdentity(0, "scripted", "GPU-0"),)

    def read(self) -> tuple[GpuSample, ...]:
        self.on_read()
        step = next(self._script)
        if isinstance(step, Exception):
            raise step
        return (step,)

    def close(self) -> None:
        self.closed_by.append(threading.current_thread().name)


def sample(at_seconds: float, watts: float | None = 400.0) -> GpuSample:
    return GpuSample(at_seconds, 0, instant_watts=watts, energy_joules=400.0 * at_seconds)


def test_a_state_is_sums_lowest_clock_highest_heat_and_all_reasons() -> None:
    """Golden: two GPUs taken together."""
    samples = (
        GpuSample(5.0, 0, 500.0, 480.0, 1e4, 700.0, 1.98e9, 3e9, 60.0, ClockEventReasons(4)),
        GpuSample(5.1, 1, 300.0, 280.0, 2e4, 600.0, 1.5e9, 3e9, 75.0, ClockEventReasons(0x20)),
    )
    state = summarise(samples)
    assert state == PowerState(
        sampled_seconds=5.0,
        gpu_count=2,
        instant_watts=800.0,
        average_watts=760.0,
        energy_joules=3e4,
        enforced_limit_watts=1300.0,
        sm_clock_hertz=1.5e9,
        temperature_celsius=75.0,
        clock_event_reasons=ClockEventReasons.SW_POWER_CAP | ClockEventReasons.SW_THERMAL_SLOWDOWN,
        gpus=samples,
    )


def test_a_sum_with_a_gpu_missing_is_missing() -> None:
    """Half of the power would be taken for all of it."""
    state = summarise([GpuSample(0.0, 0, 500.0, sm_clock_hertz=1e9), GpuSample(0.0, 1)])
    assert (state.instant_watts, state.sm_clock_hertz, state.gpu_count) == (None, 1e9, 2)


def test_no_samples_are_no_state() -> None:
    """An engine without GPUs is a mistake of the caller."""
    with pytest.raises(ValueError, match="no samples"):
        summarise([])


def test_each_good_read_is_published() -> None:
    """`latest` and the callback see the same object."""
    states: list[PowerState] = []
    reader = ScriptedReader([sample(1.0), sample(1.02, 420.0)])
    sampler = Sampler(reader, HandClock(), on_state=states.append)
    assert sampler.latest is None
    sampler.tick()
    sampler.tick()
    assert [state.instant_watts for state in states] == [400.0, 420.0]
    assert sampler.latest is states[1]


def test_a_failed_read_keeps_the_old_state_which_ages() -> None:
    """The controller learns of the loss from the age."""
    clock = HandClock(7.0)
    sampler = Sampler(ScriptedReader([sample(7.0), GpuLostError("gone"), sample(9.0)]), clock)
    sampler.tick()
    before = sampler.latest
    clock.advance(1.5)
    sampler.tick()
    assert sampler.latest is before
    assert before is not None
    assert before.age_seconds(clock()) == 1.5
    assert sampler.read_errors == 1
    sampler.tick()
    assert sampler.latest is not before


def test_each_kind_of_error_is_logged_once_and_all_are_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A sensor that is gone for an hour does not fill the disk."""
    script: Script = [*[GpuLostError("gone")] * 5, *[GpuPermissionError("no")] * 5, sample(1.0)]
    sampler = Sampler(ScriptedReader(script), HandClock())
    with caplog.at_level(logging.WARNING):
        for _ in script:
            sampler.tick()
    assert sampler.read_errors == 10
    assert [r.message.split(":")[1].strip() for r in caplog.records] == [
        "GpuLostError",
        "GpuPermissionError",
    ]
    assert sampler.latest is not None


@pytest.mark.parametrize("watts", [math.nan, -1.0, 0.4, 4e5, None])
def test_a_read_that_says_nothing_about_power_is_not_published(watts: float | None) -> None:
    """There is one sign of a lost sensor, the age, and this is one of its causes."""
    sampler = Sampler(ScriptedReader([sample(1.0), sample(1.02, watts)]), HandClock())
    sampler.tick()
    before = sampler.latest
    sampler.tick()
    assert sampler.latest is before
    assert sampler.rejected_readings == (watts is not None)
    assert sampler.read_errors == 0


def test_on_tick_comes_also_when_reads_fail() -> None:
    """Metrics stay fresh whatever the driver does."""
    clock = HandClock(3.0)
    ticks: list[float] = []
    sampler = Sampler(ScriptedReader([GpuError("x"), sample(4.0)]), clock, on_tick=ticks.append)
    sampler.tick()
    clock.advance(1.0)
    sampler.tick()
    assert ticks == [3.0, 4.0]


def test_a_callback_that_raises_costs_neither_the_state_nor_the_next_tick(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The sampler's thread outlives a mistake elsewhere, counts it and says so once a part."""

    def broken(_: object) -> None:
        raise ZeroDivisionError("a mistake")

    reader = ScriptedReader([sample(1.0), sample(2.0)])
    sampler = Sampler(reader, HandClock(), on_state=broken, on_tick=broken)
    sampler.tick()
    sampler.tick()
    assert sampler.latest is not None
    assert sampler.latest.sampled_seconds == 2.0
    assert sampler.callback_errors == 4
    assert (sampler.parts.errors["states"], sampler.parts.errors["tick"]) == (2, 2)
    assert [record.message.split(" failed")[0] for record in caplog.records] == [
        "the shaper's states",
        "the shaper's tick",
    ]
    assert caplog.records[0].exc_info is not None


def test_the_thread_reads_until_stopped_and_closes_the_reader() -> None:
    """Only the sampler's own thread touches the driver, from first read to close."""
    names: set[str] = set()
    enough = threading.Event()
    reader = ScriptedReader([sample(0.02 * i) for i in range(1000)])
    reader.on_read = lambda: names.add(threading.current_thread().name)
    seen: list[float] = []

    def on_tick(now_seconds: float) -> None:
        seen.append(now_seconds)
        if len(seen) == 3:
            enough.set()

    sampler = Sampler(reader, interval_seconds=0.001, on_tick=on_tick)
    sampler.start()
    sampler.start()
    assert enough.wait(60)
    sampler.stop()
    sampler.stop()
    assert names == {"shaper-sampler"}
    assert reader.closed_by == ["shaper-sampler"]
    assert seen == sorted(seen)
    with pytest.raises(RuntimeError, match="stopped"):
        sampler.start()


def test_no_thread_before_start_and_stop_still_closes() -> None:
    """A constructor starts nothing; an engine that fails early leaves nothing open."""
    before = threading.active_count()
    reader = ScriptedReader([])
    sampler = Sampler(reader, HandClock())
    assert threading.active_count() == before
    sampler.stop()
    sampler.stop()
    assert len(reader.closed_by) == 1


def test_an_interval_of_nothing_is_refused() -> None:
    """A thread that never waits would take a core from vLLM."""
    with pytest.raises(ValueError, match="interval_seconds"):
        Sampler(ScriptedReader([]), HandClock(), interval_seconds=0.0)
