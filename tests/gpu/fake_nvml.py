"""A driver at the border of `pynvml`: the functions that `shaper.gpu.nvml` calls.

Constants and error classes are the real binding's; only calls are faked.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml


@dataclass
class FakeGpu:
    """What one GPU would report, in the vendor's units. None is 'not supported'."""

    uuid: str
    name: str = "NVIDIA H200"
    architecture: int = pynvml.NVML_DEVICE_ARCH_HOPPER
    instant_milliwatts: int | None = 512_345
    average_milliwatts: int | None = 480_000
    usage_milliwatts: int | None = 470_000
    energy_millijoules: int | None = 1_234_567
    limit_milliwatts: int | None = 700_000
    sm_megahertz: int | None = 1_980
    memory_megahertz: int | None = 3_201
    celsius: int | None = 61
    reasons: int | None = 0x4
    mig_mode: int | None = 0
    max_sm_megahertz: int | None = None
    threshold_celsius: int | None = None
    sw_thermal_nanoseconds: int | None = None
    hw_thermal_nanoseconds: int | None = None
    brake_nanoseconds: int | None = None
    lost: bool = False


@dataclass
class FakeNvml:
    """Stands where the `pynvml` module stands in `shaper.gpu.nvml`."""

    devices: list[FakeGpu]
    init_error: int | None = None
    field_error: int | None = None
    """What it answers to a field that it doesn't know; None: not supported."""
    hidden: frozenset[str] = frozenset()
    """Functions that this driver does not have."""
    open_count: int = 0
    calls: list[str] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        if name in _GETTERS:
            return lambda handle, *arguments: self._get(name, handle, *arguments)
        return getattr(pynvml, name)

    def nvmlInit(self) -> None:  # noqa: N802, the driver's name
        if self.init_error is not None:
            raise pynvml.NVMLError(self.init_error)
        self.open_count += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open_count -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.devices)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:  # noqa: N802
        return self.devices[index]

    def nvmlDeviceGetIndex(self, handle: FakeGpu) -> int:  # noqa: N802
        return next(i for i, device in enumerate(self.devices) if device is handle)

    def nvmlDeviceGetUUID(self, handle: FakeGpu) -> str:  # noqa: N802
        return handle.uuid

    def nvmlDeviceGetName(self, handle: FakeGpu) -> str:  # noqa: N802
        return handle.name

    def nvmlDeviceGetFieldValues(  # noqa: N802
        self, handle: FakeGpu, fields: list[tuple[int, int]]
    ) -> list[SimpleNamespace]:
        self._alive("nvmlDeviceGetFieldValues", handle)
        return [self._field_value(handle, *pair) for pair in fields]

    def _field_value(self, handle: FakeGpu, number: int, scope: int) -> SimpleNamespace:
        assert scope == pynvml.NVML_POWER_SCOPE_GPU
        names = pynvml
        value = {
            names.NVML_FI_DEV_POWER_INSTANT: handle.instant_milliwatts,
            names.NVML_FI_DEV_POWER_AVERAGE: handle.average_milliwatts,
            names.NVML_FI_DEV_CLOCKS_EVENT_REASON_SW_THERM_SLOWDOWN: handle.sw_thermal_nanoseconds,
            names.NVML_FI_DEV_CLOCKS_EVENT_REASON_HW_THERM_SLOWDOWN: handle.hw_thermal_nanoseconds,
            names.NVML_FI_DEV_CLOCKS_EVENT_REASON_HW_POWER_BRAKE_SLOWDOWN: handle.brake_nanoseconds,
        }[number]
        missing = pynvml.NVML_ERROR_NOT_SUPPORTED if self.field_error is None else self.field_error
        status = missing if value is None else pynvml.NVML_SUCCESS
        held = SimpleNamespace(uiVal=value or 0, ullVal=value or 0)
        return SimpleNamespace(nvmlReturn=status, value=held)

    def _alive(self, name: str, handle: FakeGpu) -> None:
        self.calls.append(name)
        if name in self.hidden:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        if handle.lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    def _get(self, name: str, handle: FakeGpu, *arguments: int) -> Any:
        self._alive(name, handle)
        attribute = _GETTERS[name]
        if name == "nvmlDeviceGetClockInfo":
            (kind,) = arguments
            attribute = "sm_megahertz" if kind == pynvml.NVML_CLOCK_SM else "memory_megahertz"
        value = getattr(handle, attribute)
        if value is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [value, value] if name == "nvmlDeviceGetMigMode" else value


_GETTERS = {
    "nvmlDeviceGetArchitecture": "architecture",
    "nvmlDeviceGetClockInfo": "",
    "nvmlDeviceGetCurrentClocksEventReasons": "reasons",
    "nvmlDeviceGetCurrentClocksThrottleReasons": "reasons",
    "nvmlDeviceGetEnforcedPowerLimit": "limit_milliwatts",
    "nvmlDeviceGetMaxClockInfo": "max_sm_megahertz",
    "nvmlDeviceGetMigMode": "mig_mode",
    "nvmlDeviceGetPowerUsage": "usage_milliwatts",
    "nvmlDeviceGetTemperature": "celsius",
    "nvmlDeviceGetTemperatureThreshold": "threshold_celsius",
    "nvmlDeviceGetTemperatureV": "celsius",
    "nvmlDeviceGetTotalEnergyConsumption": "energy_millijoules",
}
