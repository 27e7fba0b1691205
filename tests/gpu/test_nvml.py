"""The driver's values, units and errors as they come out of `NvmlReader`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import pynvml
import pytest

from shaper.core.types import ClockEventReasons, GpuIdentity, GpuSample
from shaper.errors import (
    GpuError,
    GpuLostError,
    GpuPermissionError,
    GpuUnavailableError,
)
from shaper.gpu import nvml_driver
from shaper.gpu.nvml import NvmlReader
from tests.gpu.clocks import HandClock
from tests.gpu.fake_nvml import FakeGpu, FakeNvml

Install = Callable[[FakeNvml], FakeNvml]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    def put(fake: FakeNvml) -> FakeNvml:
        monkeypatch.setattr(nvml_driver, "pynvml", fake)
        return fake

    return put


def read_one(clock: HandClock | None = None) -> GpuSample:
    (sample,) = NvmlReader([0], clock or HandClock()).read()
    return sample


def test_every_field_in_si_units(install: Install) -> None:
    """Milliwatts, millijoules and megahertz become watts, joules and hertz."""
    install(FakeNvml([FakeGpu("GPU-a")]))
    sample = read_one(HandClock(42.0))
    assert sample.clock_event_reasons is ClockEventReasons.SW_POWER_CAP
    values = asdict(sample) | {"clock_event_reasons": 0}
    assert values == pytest.approx(
        {
            "read_seconds": 42.0,
            "gpu_index": 0,
            "instant_watts": 512.345,
            "average_watts": 480.0,
            "energy_joules": 1234.567,
            "enforced_limit_watts": 700.0,
            "sm_clock_hertz": 1.98e9,
            "memory_clock_hertz": 3.201e9,
            "temperature_celsius": 61.0,
            "clock_event_reasons": 0,
            "thermal_throttle_seconds": None,
            "brake_throttle_seconds": None,
            "power_cap_throttle_seconds": None,
            "memory_temperature_celsius": None,
            "slowdown_margin_celsius": None,
        }
    )


def test_slowdown_counters_and_a_boards_own_limits(install: Install) -> None:
    """Nanoseconds become seconds, software's and hardware's heat together; both are None where
    the driver has neither."""
    gpu = FakeGpu("GPU-a", sw_thermal_nanoseconds=1_500_000_000, hw_thermal_nanoseconds=250_000_000)
    gpu.brake_nanoseconds, gpu.max_sm_megahertz, gpu.threshold_celsius = 2_000_000, 1_755, 87
    install(FakeNvml([gpu]))
    sample = read_one(HandClock())
    assert sample.thermal_throttle_seconds == pytest.approx(1.75)
    assert sample.brake_throttle_seconds == pytest.approx(0.002)
    identity = NvmlReader([0], HandClock()).gpus[0]
    assert (identity.max_sm_clock_hertz, identity.slowdown_celsius) == (1.755e9, 87.0)


@pytest.mark.parametrize(
    "code", [pynvml.NVML_ERROR_INVALID_ARGUMENT, pynvml.NVML_ERROR_UNKNOWN], ids=str
)
def test_a_counter_that_a_driver_answers_with_an_error_costs_only_itself(
    install: Install, code: int
) -> None:
    """What is nice to have must not lose the sensor."""
    install(FakeNvml([FakeGpu("GPU-a")], field_error=code))
    sample = read_one(HandClock())
    assert sample.thermal_throttle_seconds is None
    assert sample.instant_watts == pytest.approx(512.345)


def test_identity_and_order_follow_the_selectors(install: Install) -> None:
    """Samples come in the order asked for, and carry the driver's index."""
    install(FakeNvml([FakeGpu("GPU-a"), FakeGpu("GPU-b"), FakeGpu("GPU-c", name="B")]))
    reader = NvmlReader([2, "gpu-A"], HandClock())
    assert reader.gpus[0] == GpuIdentity(2, "B", "GPU-c", enforced_limit_watts=700.0)
    assert [gpu.uuid for gpu in reader.gpus] == ["GPU-c", "GPU-a"]
    assert [sample.gpu_index for sample in reader.read()] == [2, 0]


@pytest.mark.parametrize(
    ("attribute", "field"),
    [
        ("energy_millijoules", "energy_joules"),
        ("limit_milliwatts", "enforced_limit_watts"),
        ("sm_megahertz", "sm_clock_hertz"),
        ("memory_megahertz", "memory_clock_hertz"),
        ("celsius", "temperature_celsius"),
    ],
)
def test_an_unsupported_field_is_none(install: Install, attribute: str, field: str) -> None:
    """One thing that a GPU cannot report does not cost the others."""
    gpu = FakeGpu("GPU-a")
    setattr(gpu, attribute, None)
    install(FakeNvml([gpu]))
    sample = read_one()
    assert getattr(sample, field) is None
    assert sample.instant_watts == pytest.approx(512.345)


def test_what_is_unsupported_is_not_asked_again(install: Install) -> None:
    """The first refusal is remembered for each way of reading a field."""
    fake = install(FakeNvml([FakeGpu("GPU-a", energy_millijoules=None, reasons=None)]))
    clock = HandClock()
    reader = NvmlReader([0], clock)
    reader.read()
    fake.calls.clear()
    clock.advance(5.0)
    reader.read()
    assert "nvmlDeviceGetClockInfo" in fake.calls
    assert not [c for c in fake.calls if "Energy" in c or "Reasons" in c]


def test_old_drivers_are_asked_by_the_old_names(install: Install) -> None:
    """A function that the driver lacks gives way to its predecessor."""
    hidden = {"nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetTemperatureV"}
    install(FakeNvml([FakeGpu("GPU-a", reasons=0x88)], hidden=frozenset(hidden)))
    sample = read_one()
    assert sample.temperature_celsius == 61.0
    assert sample.clock_event_reasons == (
        ClockEventReasons.HW_SLOWDOWN | ClockEventReasons.HW_POWER_BRAKE_SLOWDOWN
    )


@pytest.mark.parametrize(
    ("name", "architecture", "instant", "average"),
    [
        ("NVIDIA L40S", pynvml.NVML_DEVICE_ARCH_ADA, None, 470.0),
        ("NVIDIA A100-SXM4-80GB", pynvml.NVML_DEVICE_ARCH_AMPERE, 470.0, None),
        ("Tesla V100", pynvml.NVML_DEVICE_ARCH_VOLTA, 470.0, None),
    ],
)
def test_the_fallback_reading_goes_where_its_window_belongs(
    install: Install, name: str, architecture: int, instant: float | None, average: float | None
) -> None:
    """Without the power fields, the usage is a mean on newer GPUs and instant on older."""
    gpu = FakeGpu("GPU-a", name, architecture, instant_milliwatts=None, average_milliwatts=None)
    install(FakeNvml([gpu]))
    sample = read_one()
    assert (sample.instant_watts, sample.average_watts) == (instant, average)


def test_slow_fields_are_asked_once_a_second(install: Install) -> None:
    """The limit may change while running, but not at the sampler's pace."""
    fake = install(FakeNvml([FakeGpu("GPU-a")]))
    clock = HandClock()
    reader = NvmlReader([0], clock)
    reader.read()
    fake.devices[0].limit_milliwatts = 500_000
    clock.advance(0.02)
    assert reader.read()[0].enforced_limit_watts == pytest.approx(700.0)
    clock.advance(1.0)
    assert reader.read()[0].enforced_limit_watts == pytest.approx(500.0)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, GpuUnavailableError),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, GpuUnavailableError),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, GpuUnavailableError),
        (pynvml.NVML_ERROR_NO_PERMISSION, GpuPermissionError),
        (pynvml.NVML_ERROR_GPU_IS_LOST, GpuLostError),
        (pynvml.NVML_ERROR_UNKNOWN, GpuError),
    ],
)
def test_the_drivers_codes_become_the_projects_errors(
    install: Install, code: int, kind: type[GpuError]
) -> None:
    """The driver's own words stay in the message and its error as the cause."""
    install(FakeNvml([], init_error=code))
    with pytest.raises(kind, match=str(pynvml.NVMLError(code))) as raised:
        NvmlReader([0])
    assert type(raised.value) is kind
    assert isinstance(raised.value.__cause__, pynvml.NVMLError)


def test_a_gpu_that_falls_off_the_bus(install: Install) -> None:
    """The error names the GPU, and closing still works."""
    fake = install(FakeNvml([FakeGpu("GPU-a"), FakeGpu("GPU-b")]))
    reader = NvmlReader([0, 1], HandClock())
    fake.devices[1].lost = True
    with pytest.raises(GpuLostError, match="GPU 1"):
        reader.read()
    reader.close()
    assert fake.open_count == 0


@pytest.mark.parametrize("selectors", [[1], ["GPU-z"], ["GPU-"], [0, 9]])
def test_a_gpu_that_is_not_there_lets_go_of_the_driver(
    install: Install, selectors: list[int | str]
) -> None:
    """A failed constructor leaves no reference on the driver behind."""
    gpus = [FakeGpu("GPU-a")] if isinstance(selectors[0], int) else [FakeGpu("GPU-a")] * 2
    fake = install(FakeNvml(gpus))
    with pytest.raises(GpuUnavailableError, match="GPU"):
        NvmlReader(selectors)
    assert fake.open_count == 0


def test_mig_mode_is_refused_and_its_absence_is_not(install: Install) -> None:
    """A GPU without the feature answers 'not supported', which is fine."""
    fake = install(FakeNvml([FakeGpu("GPU-a", mig_mode=1), FakeGpu("GPU-b", mig_mode=None)]))
    with pytest.raises(GpuUnavailableError, match="MIG mode"):
        NvmlReader([0])
    assert fake.open_count == 0
    assert NvmlReader([1]).gpus[0].uuid == "GPU-b"
