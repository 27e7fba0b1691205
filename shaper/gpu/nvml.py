"""The real GPU: readings from NVIDIA's driver through `nvidia-ml-py`.

The only module that imports `pynvml`, and the only place where the vendor's
units (mW, mJ, MHz) are converted. It reads; it never sets a clock, a limit or a
mode, so it needs no root.

A field is an ordered list of ways to read it. A way that this GPU or driver does
not support is struck out for good the first time it says so; a field with no way
left is None from then on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pynvml

from shaper.core.types import ClockEventReasons, GpuIdentity, GpuSample
from shaper.errors import GpuError, GpuLostError, GpuPermissionError, GpuUnavailableError

_WATTS_PER_MILLIWATT = 1e-3
_JOULES_PER_MILLIJOULE = 1e-3
_HERTZ_PER_MEGAHERTZ = 1e6
_SECONDS_PER_NANOSECOND = 1e-9

# What changes rarely, or says little at the sampler's pace, is asked once a second.
_SLOW_PERIOD_SECONDS = 1.0

# The one table from the driver's codes to this project's errors; a code that is not here is a
# plain GpuError.
_ERRORS: dict[int, type[GpuError]] = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: GpuUnavailableError,
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: GpuUnavailableError,
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: GpuUnavailableError,
    pynvml.NVML_ERROR_NOT_FOUND: GpuUnavailableError,
    pynvml.NVML_ERROR_INVALID_ARGUMENT: GpuUnavailableError,
    pynvml.NVML_ERROR_NO_PERMISSION: GpuPermissionError,
    pynvml.NVML_ERROR_OPERATING_SYSTEM: GpuPermissionError,
    pynvml.NVML_ERROR_UNINITIALIZED: GpuLostError,
    pynvml.NVML_ERROR_GPU_IS_LOST: GpuLostError,
    pynvml.NVML_ERROR_RESET_REQUIRED: GpuLostError,
}
_UNSUPPORTED = frozenset(
    (
        pynvml.NVML_ERROR_NOT_SUPPORTED,
        pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
        pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
    )
)

Way = Callable[[Any], float]
"""Takes a device handle, returns a value in SI units; raises `pynvml.NVMLError`."""


def visible_gpus(
    environ: Mapping[str, str], world_size: int, data_parallel_rank: int = 0
) -> tuple[int | str, ...]:
    """The GPUs of one engine, as indices or (beginnings of) UUIDs.

    Args:
        environ: `CUDA_VISIBLE_DEVICES` is read from it as CUDA reads it: a list that
            ends at the first negative entry. Unset means all GPUs in the driver's order,
            which is CUDA's order where the GPUs are alike (or `CUDA_DEVICE_ORDER=PCI_BUS_ID`).
        world_size: GPUs per engine (tensor times pipeline parallel).
        data_parallel_rank: which of the engines of this host, from 0.

    Raises:
        GpuUnavailableError: fewer GPUs are visible than the engine needs, or MIG
            slices are named, whose power the driver does not meter.
    """
    first, last = data_parallel_rank * world_size, (data_parallel_rank + 1) * world_size
    variable = environ.get("CUDA_VISIBLE_DEVICES")
    if variable is None:
        return tuple(range(first, last))
    names: list[int | str] = []
    for entry in (part.strip() for part in variable.split(",")):
        if entry.upper().startswith("MIG"):
            raise GpuUnavailableError(
                f"CUDA_VISIBLE_DEVICES names {entry}: MIG slices are not supported, because the "
                "driver meters the power of whole GPUs only; use a GPU with MIG off"
            )
        if entry.startswith("-") or not entry:
            break
        names.append(int(entry) if entry.isdigit() else entry)
    if len(names) < last:
        raise GpuUnavailableError(
            f"CUDA_VISIBLE_DEVICES={variable!r} shows {len(names)} GPUs, and this engine needs "
            f"those at positions {first} to {last - 1}"
        )
    return tuple(names[first:last])


class NvmlReader:
    """A `GpuReader` over the driver.

    Args:
        selectors: indices in the driver's order, or UUIDs or unique beginnings of
            them, as `visible_gpus` returns.
        clock: seconds of the monotonic clock; stamps the samples.

    Raises:
        GpuUnavailableError: no driver, no such GPU, or a GPU in MIG mode.
        GpuPermissionError: the driver refuses this user.
    """

    def __init__(
        self, selectors: Sequence[int | str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise translate(error, "the NVIDIA driver") from error
        self._open = True
        try:
            handles = [_find(selector) for selector in selectors]
            self._devices = [_Device(handle) for handle in handles]
        except pynvml.NVMLError as error:
            self.close()
            raise translate(error, "the NVIDIA driver") from error
        except GpuError:
            self.close()
            raise
        self._gpus = tuple(device.identity for device in self._devices)

    @property
    def gpus(self) -> tuple[GpuIdentity, ...]:
        """The GPUs, in the order of the selectors."""
        return self._gpus

    def read(self) -> tuple[GpuSample, ...]:
        """One sample per GPU, each stamped just before it was read.

        Raises:
            GpuError: the driver refused, a GPU is gone, or the reader is closed.
        """
        if not self._open:
            raise GpuUnavailableError("this reader is closed")
        return tuple(device.sample(self._clock()) for device in self._devices)

    def close(self) -> None:
        """Let go of the driver. May be called twice."""
        if not self._open:
            return
        self._open = False
        try:
            pynvml.nvmlShutdown()
        except pynvml.NVMLError as error:
            # A driver that is gone has nothing left to let go of.
            if not issubclass(_ERRORS.get(error.value, GpuError), GpuLostError):
                raise translate(error, "the NVIDIA driver") from error


def translate(error: Exception, subject: str) -> GpuError:
    """The project's error for one of the driver's, with the driver's own words."""
    kind = _ERRORS.get(getattr(error, "value", -1), GpuError)
    return kind(f"{subject}: {error}")


class _Device:
    """One GPU: its handle and the ways that still work."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        index = int(pynvml.nvmlDeviceGetIndex(handle))
        name = str(pynvml.nvmlDeviceGetName(handle))
        self._subject = f"GPU {index} ({name})"
        self._ways: dict[str, list[Way]] = _ways(_meters_instant(handle, name))
        if self._first([_mig_mode]):
            raise GpuUnavailableError(
                f"{self._subject} is in MIG mode, in which its power cannot be told apart by "
                "slice; turn MIG off or use another GPU"
            )
        self._slow: dict[str, float | None] = {}
        self._slow_due_seconds = float("-inf")
        self.identity = GpuIdentity(
            index=index,
            name=name,
            uuid=str(pynvml.nvmlDeviceGetUUID(handle)),
            enforced_limit_watts=self._field("enforced_limit_watts"),
            max_sm_clock_hertz=self._field("max_sm_clock_hertz"),
            slowdown_celsius=self._field("slowdown_celsius"),
        )

    def sample(self, now_seconds: float) -> GpuSample:
        if now_seconds >= self._slow_due_seconds:
            self._slow = {name: self._field(name) for name in _SLOW_FIELDS}
            self._slow_due_seconds = now_seconds + _SLOW_PERIOD_SECONDS
        reasons = self._field("clock_event_reasons")
        return GpuSample(
            read_seconds=now_seconds,
            gpu_index=self.identity.index,
            instant_watts=self._field("instant_watts"),
            average_watts=self._field("average_watts"),
            energy_joules=self._field("energy_joules"),
            sm_clock_hertz=self._field("sm_clock_hertz"),
            clock_event_reasons=ClockEventReasons(int(reasons or 0)),
            **self._slow,
        )

    def _field(self, name: str) -> float | None:
        try:
            return self._first(self._ways[name])
        except pynvml.NVMLError as error:
            raise translate(error, self._subject) from error

    def _first(self, ways: list[Way]) -> float | None:
        """The first way that this GPU supports; strikes out those before it."""
        while ways:
            try:
                return ways[0](self._handle)
            except pynvml.NVMLError as error:
                if error.value not in _UNSUPPORTED:
                    raise
                ways.pop(0)
        return None


_THERMAL_REASONS = ("SW_THERM_SLOWDOWN", "HW_THERM_SLOWDOWN")
_SLOW_FIELDS = (
    *("enforced_limit_watts", "memory_clock_hertz", "temperature_celsius"),
    *("thermal_throttle_seconds", "brake_throttle_seconds"),
)


def _ways(usage_is_instant: bool) -> dict[str, list[Way]]:
    instant: list[Way] = [_power_field(pynvml.NVML_FI_DEV_POWER_INSTANT)]
    average: list[Way] = [_power_field(pynvml.NVML_FI_DEV_POWER_AVERAGE)]
    (instant if usage_is_instant else average).append(
        _call("nvmlDeviceGetPowerUsage", scale=_WATTS_PER_MILLIWATT)
    )
    sm, memory = pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM
    sensor, gpu_max = pynvml.NVML_TEMPERATURE_GPU, pynvml.NVML_TEMPERATURE_THRESHOLD_GPU_MAX
    return {
        "instant_watts": instant,
        "average_watts": average,
        "energy_joules": [
            _call("nvmlDeviceGetTotalEnergyConsumption", scale=_JOULES_PER_MILLIJOULE)
        ],
        "enforced_limit_watts": [
            _call("nvmlDeviceGetEnforcedPowerLimit", scale=_WATTS_PER_MILLIWATT)
        ],
        "sm_clock_hertz": [_call("nvmlDeviceGetClockInfo", sm, scale=_HERTZ_PER_MEGAHERTZ)],
        "memory_clock_hertz": [_call("nvmlDeviceGetClockInfo", memory, scale=_HERTZ_PER_MEGAHERTZ)],
        "max_sm_clock_hertz": [
            _optional(_call("nvmlDeviceGetMaxClockInfo", sm, scale=_HERTZ_PER_MEGAHERTZ))
        ],
        # Where software lowers the clocks; the hardware's own slowdown comes some degrees later.
        "slowdown_celsius": [_optional(_call("nvmlDeviceGetTemperatureThreshold", gpu_max))],
        "thermal_throttle_seconds": [_optional(_reason_seconds(*_THERMAL_REASONS))],
        "brake_throttle_seconds": [_optional(_reason_seconds("HW_POWER_BRAKE_SLOWDOWN"))],
        # The second of each is the name that drivers knew first.
        "temperature_celsius": [
            _call("nvmlDeviceGetTemperatureV", sensor),
            _call("nvmlDeviceGetTemperature", sensor),
        ],
        "clock_event_reasons": [
            _call("nvmlDeviceGetCurrentClocksEventReasons"),
            _call("nvmlDeviceGetCurrentClocksThrottleReasons"),
        ],
    }


def _call(function: str, *arguments: int, scale: float = 1.0) -> Way:
    """One of the driver's getters; a binding too old to have it does not support it."""

    def way(handle: Any) -> float:
        getter = getattr(pynvml, function, None)
        if getter is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        return float(getter(handle, *arguments)) * scale

    return way


def _power_field(field: int) -> Way:
    """A power reading of the GPU's scope (board memory included), in watts."""

    def way(handle: Any) -> float:
        (value,) = pynvml.nvmlDeviceGetFieldValues(handle, [(field, pynvml.NVML_POWER_SCOPE_GPU)])
        if value.nvmlReturn != pynvml.NVML_SUCCESS:
            raise pynvml.NVMLError(value.nvmlReturn)
        return float(value.value.uiVal) * _WATTS_PER_MILLIWATT

    return way


def _reason_seconds(*reasons: str) -> Way:
    """How long some clock event reasons have held, by the driver's own counters."""

    def way(handle: Any) -> float:
        names = [f"NVML_FI_DEV_CLOCKS_EVENT_REASON_{reason}" for reason in reasons]
        fields = [(getattr(pynvml, name), 0) for name in names if hasattr(pynvml, name)]
        values = pynvml.nvmlDeviceGetFieldValues(handle, fields)
        if not values or any(value.nvmlReturn != pynvml.NVML_SUCCESS for value in values):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return sum(float(value.value.ullVal) for value in values) * _SECONDS_PER_NANOSECOND

    return way


def _optional(way: Way) -> Way:
    """A way whose errors, but for a lost GPU, mean that it is not supported."""

    def lenient(handle: Any) -> float:
        try:
            return way(handle)
        except pynvml.NVMLError as error:
            if issubclass(_ERRORS.get(error.value, GpuError), GpuLostError):
                raise
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED) from error

    return lenient


def _mig_mode(handle: Any) -> float:
    current, _pending = pynvml.nvmlDeviceGetMigMode(handle)
    return float(current)


def _meters_instant(handle: Any, name: str) -> bool:
    """Whether `nvmlDeviceGetPowerUsage` is instantaneous here rather than a 1 s mean.

    NVML's reference: a mean on Ampere and newer, except GA100 (A100, A30), and
    instantaneous on GA100 and older.
    """
    try:
        architecture = pynvml.nvmlDeviceGetArchitecture(handle)
    except pynvml.NVMLError as error:
        if error.value not in _UNSUPPORTED:
            raise
        return True
    return architecture < pynvml.NVML_DEVICE_ARCH_AMPERE or "A100" in name or "A30" in name.split()


def _find(selector: int | str) -> Any:
    """The handle of one GPU.

    Raises:
        GpuUnavailableError: there is no such GPU, or more than one.
    """
    count = int(pynvml.nvmlDeviceGetCount())
    if isinstance(selector, int):
        if selector >= count:
            raise GpuUnavailableError(f"there is no GPU {selector}; the driver shows {count}")
        return pynvml.nvmlDeviceGetHandleByIndex(selector)
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
    uuids = [str(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles]
    matches = [
        handle
        for handle, uuid in zip(handles, uuids, strict=True)
        if uuid.lower().startswith(selector.lower())
    ]
    if len(matches) != 1:
        known = ", ".join(uuids) or "none"
        what = "more than one GPU" if matches else "no GPU"
        raise GpuUnavailableError(f"{selector!r} is the beginning of {what}'s UUID; known: {known}")
    return matches[0]
