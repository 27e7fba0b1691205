"""A driver at the border of `pynvml`: the functions that `shaper.gpu.nvml_driver` calls.

Constants and error classes are the real binding's; only calls are faked. Its GPUs stand
still, or play a recording (a CSV of the fields of `GpuSample`); faults come by a script
(`fake_faults.py`). Nothing here can set a clock, a limit or a mode.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml

from tests.gpu.fake_faults import Fault
from tests.gpu.fake_player import Player
from tests.gpu.fake_tables import FIELD_NAMES, GETTERS, field_attribute


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
    margin_celsius: int | None = None
    memory_celsius: int | None = None
    power_cap_nanoseconds: int | None = None
    sw_thermal_nanoseconds: int | None = None
    hw_thermal_nanoseconds: int | None = None
    brake_nanoseconds: int | None = None
    default_limit_milliwatts: int | None = 700_000
    limit_range_milliwatts: tuple[int, int] | None = (200_000, 700_000)
    module_instant_milliwatts: int | None = None
    module_average_milliwatts: int | None = None
    module_energy_millijoules: int | None = None
    module_limit_milliwatts: int | None = None
    scoped_energy_millijoules: int | None = None
    lost: bool = False
    processes: tuple[int, ...] | None = None
    """Who computes on it; None: the driver does not say."""
    recording: str | None = None
    """A CSV that drives the values, over and over."""
    counts: bool = False
    """Energy grows with the clock, at the average."""


@dataclass(frozen=True)
class _Handle:
    gpu: int
    generation: int


@dataclass
class FakeNvml:
    """Stands where the `pynvml` module stands in `shaper.gpu.nvml_driver`."""

    devices: list[FakeGpu]
    init_error: int | None = None
    field_error: int | None = None
    """What it answers to a field that it doesn't know; None: not supported."""
    hidden: frozenset[str] = frozenset()
    """Functions that this driver does not have."""
    faults: list[Fault] = field(default_factory=list)
    clock: Callable[[], float] | None = None
    """Drives recordings, counters and faults; None: the monotonic clock."""
    sleep: Callable[[float], None] = time.sleep
    driver_version: str = "575.57.08"
    refuses_batches_with: frozenset[int] = frozenset()
    """Fields for whose sake an old driver refuses a whole call."""
    open_count: int = 0
    calls: list[str] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)
    """Lets calls that hang go on, for good."""
    hanging: threading.Event = field(default_factory=threading.Event)
    """Set while a call hangs, for a test to wait on."""

    def __post_init__(self) -> None:
        self._start_seconds = self._now()
        self._count = 0
        self._dead: dict[int, int] = {}
        self._generation = 0
        self._frozen: dict[tuple[int, str, int], Any] = {}
        self._players = {
            index: Player(gpu.recording) for index, gpu in enumerate(self.devices) if gpu.recording
        }

    def __getattr__(self, name: str) -> Any:
        if name in GETTERS:
            if name in self.hidden:
                raise AttributeError(name)
            return lambda handle, *arguments: self._get(name, handle, *arguments)
        if name.startswith("nvml"):
            raise AttributeError(f"this driver has no {name}")
        return getattr(pynvml, name)

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return self._now() - self._start_seconds

    def nvmlInit(self) -> None:  # noqa: N802, the driver's name
        if self.init_error is not None:
            raise pynvml.NVMLError(self.init_error)
        self._enter("nvmlInit", None)
        if self.open_count == 0:
            self._generation += 1
        self.open_count += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open_count -= 1

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        self._enter("nvmlSystemGetDriverVersion", None)
        return self.driver_version

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        self._enter("nvmlDeviceGetCount", None)
        return len(self.devices)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> _Handle:  # noqa: N802
        self._enter("nvmlDeviceGetHandleByIndex", index)
        return _Handle(index, self._generation)

    def nvmlDeviceGetIndex(self, handle: _Handle) -> int:  # noqa: N802
        return self._alive("nvmlDeviceGetIndex", handle)

    def nvmlDeviceGetUUID(self, handle: _Handle) -> str:  # noqa: N802
        return self.devices[self._alive("nvmlDeviceGetUUID", handle)].uuid

    def nvmlDeviceGetName(self, handle: _Handle) -> str:  # noqa: N802
        return self.devices[self._alive("nvmlDeviceGetName", handle)].name

    def nvmlDeviceGetComputeRunningProcesses(self, handle: _Handle) -> list[Any]:  # noqa: N802
        found = self.devices[self._alive("nvmlDeviceGetComputeRunningProcesses", handle)].processes
        if found is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [SimpleNamespace(pid=pid) for pid in found]

    def nvmlDeviceGetFieldValues(  # noqa: N802
        self, handle: _Handle, fields: list[tuple[int, int]]
    ) -> list[SimpleNamespace]:
        name = "nvmlDeviceGetFieldValues"
        index = self._alive(name, handle)
        if len(fields) > 1 and any(number in self.refuses_batches_with for number, _ in fields):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return [self._field_value(index, number, scope) for number, scope in fields]

    def _field_value(self, index: int, number: int, scope: int) -> SimpleNamespace:
        attribute = field_attribute(number, scope)
        missing = pynvml.NVML_ERROR_NOT_SUPPORTED if self.field_error is None else self.field_error
        value = None if attribute is None else getattr(self.devices[index], attribute)
        status = missing if value is None else pynvml.NVML_SUCCESS
        name = FIELD_NAMES.get(number, "")
        for fault in self._active():
            if fault.kind == "code" and fault.call == name and fault.hits(name, index):
                status = _code(fault)
        if value is not None:
            value = self._disturbed(name, index, value)
        kind = pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG
        held = SimpleNamespace(ullVal=value or 0)
        if isinstance(value, float):
            kind, held = pynvml.NVML_VALUE_TYPE_DOUBLE, SimpleNamespace(dVal=value)
        return SimpleNamespace(fieldId=number, nvmlReturn=status, valueType=kind, value=held)

    def _now(self) -> float:
        return time.monotonic() if self.clock is None else self.clock()

    def _active(self) -> list[Fault]:
        return [fault for fault in self.faults if fault.active(self._count, self.seconds)]

    def _enter(self, name: str, gpu: int | None) -> None:
        """One call of the driver begins: time goes on, and faults strike."""
        self.calls.append(name)
        self._count += 1
        if name in self.hidden:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        for fault in self._active():
            self._mark_unsupported(fault, name, gpu)
        for index, player in self._players.items():
            player.play(self.devices[index], self.seconds)
        for device in self.devices:
            if device.counts:
                device.energy_millijoules = int((device.average_milliwatts or 0) * self.seconds)

    def _mark_unsupported(self, fault: Fault, name: str, gpu: int | None) -> None:
        if fault.kind == "unloaded":
            self._generation += 1
            raise pynvml.NVMLError(
                pynvml.NVML_ERROR_DRIVER_NOT_LOADED
                if name == "nvmlInit"
                else pynvml.NVML_ERROR_UNINITIALIZED
            )
        if not fault.hits(name, gpu):
            return
        if fault.kind == "code":
            raise pynvml.NVMLError(_code(fault))
        if fault.kind == "slow":
            self.sleep(fault.seconds)
        if fault.kind == "hang":
            self.hanging.set()
            while not self.released.wait(0.005 if fault.until_seconds is not None else None):
                if not fault.active(self._count, self.seconds):
                    break
            self.hanging.clear()
        if fault.kind == "lost" and gpu is not None:
            self._dead[gpu] = self._generation
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    def _alive(self, name: str, handle: _Handle) -> int:
        self._enter(name, handle.gpu)
        if handle.generation != self._generation or self.open_count == 0:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
        if self.devices[handle.gpu].lost or self._dead.get(handle.gpu) == handle.generation:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return handle.gpu

    def _get(self, name: str, handle: _Handle, *arguments: int) -> Any:
        index = self._alive(name, handle)
        attribute = GETTERS[name]
        if name == "nvmlDeviceGetClockInfo":
            (kind,) = arguments
            attribute = "sm_megahertz" if kind == pynvml.NVML_CLOCK_SM else "memory_megahertz"
        value = getattr(self.devices[index], attribute)
        if value is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        if name == "nvmlDeviceGetMigMode":
            return [value, value]
        return list(value) if isinstance(value, tuple) else self._disturbed(name, index, value)

    def _disturbed(self, name: str, gpu: int, value: float) -> float:
        for number, fault in enumerate(self.faults):
            key = (number, name, gpu)
            if not fault.active(self._count, self.seconds):
                self._frozen.pop(key, None)
            elif fault.kind == "limit" and name == "nvmlDeviceGetEnforcedPowerLimit":
                value = int(fault.value) if fault.hits(fault.call, gpu) else value
            elif fault.kind == "backwards" and ("ENERGY" in name or "Energy" in name):
                value = max(0, int(value - fault.value)) if fault.hits(fault.call, gpu) else value
            elif not fault.hits(name, gpu):
                continue
            elif fault.kind == "garbage":
                value = fault.value
            elif fault.kind == "frozen":
                value = self._frozen.setdefault(key, value)
        return value


def _code(fault: Fault) -> int:
    return int(getattr(pynvml, f"NVML_ERROR_{fault.code}"))


def fake_from(script: Mapping[str, Any]) -> FakeNvml:
    """A fake from JSON values: `gpus`, `faults`, `driver_version`."""
    gpus = []
    for values in script.get("gpus", []):
        gpus.append(FakeGpu(**{"counts": "recording" not in values, **values}))
    faults = [Fault.of(values) for values in script.get("faults", [])]
    fake = FakeNvml(gpus, faults=faults)
    fake.driver_version = script.get("driver_version", fake.driver_version)
    return fake
