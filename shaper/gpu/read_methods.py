"""The ways in which NVML can be asked for each quantity, best first.

The only place where the vendor's units (mW, mJ, MHz, ns) are converted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shaper.errors import GpuError
from shaper.gpu.nvml_driver import Driver
from shaper.gpu.nvml_errors import Behaviour, behaviour

_WATTS_PER_MILLIWATT = 1e-3
_JOULES_PER_MILLIJOULE = 1e-3
_HERTZ_PER_MEGAHERTZ = 1e6
_SECONDS_PER_NANOSECOND = 1e-9

GPU_SCOPE, MODULE_SCOPE = "GPU", "module"
_SCOPES = {GPU_SCOPE: "NVML_POWER_SCOPE_GPU", MODULE_SCOPE: "NVML_POWER_SCOPE_MODULE"}
_REASON = "CLOCKS_EVENT_REASON_"

# The two parts of `thermal_throttle_seconds`; a part is no quantity of a sample.
HEAT_PARTS = ("software_heat_seconds", "hardware_heat_seconds")


@dataclass(frozen=True, slots=True)
class Way:
    """One way to ask a GPU for one quantity: a field, or else a getter."""

    label: str
    scale: float = 1.0
    field: tuple[int, int] | None = None
    """Number and scope; asked for together with the GPU's other fields."""
    getter: str = ""
    arguments: tuple[int, ...] = ()


class ReadMethods:
    """The ways of one GPU.

    Args:
        driver: its constants are looked up.
        scope: of the power fields.
        module: the driver also meters GPU and CPU together, so that a counter without a
            scope may be of both.
        usage_is_instant: see `meters_instant`.
    """

    def __init__(self, driver: Driver, scope: str, module: bool, usage_is_instant: bool) -> None:
        self._driver, self._scope = driver, scope
        usage = [
            Way("nvmlDeviceGetPowerUsage", _WATTS_PER_MILLIWATT, None, "nvmlDeviceGetPowerUsage")
        ]
        # The usage is of the GPU; beside a module's other reading it would be another scope.
        usage = usage if scope == GPU_SCOPE else []
        instant = self._power("POWER_INSTANT") + (usage if usage_is_instant else [])
        average = self._power("POWER_AVERAGE") + ([] if usage_is_instant else usage)
        total = self._field("TOTAL_ENERGY_CONSUMPTION", _JOULES_PER_MILLIJOULE)
        total += self._getter("nvmlDeviceGetTotalEnergyConsumption", _JOULES_PER_MILLIJOULE)
        energy = total
        if module:
            energy = self._field("ENERGY", _JOULES_PER_MILLIJOULE, scope)
            energy += total if scope == MODULE_SCOPE else []
        limit = self._getter("nvmlDeviceGetEnforcedPowerLimit", _WATTS_PER_MILLIWATT)
        if scope == MODULE_SCOPE:
            limit = self._field("POWER_CURRENT_LIMIT", _WATTS_PER_MILLIWATT, scope) + limit
        self.ticked: dict[str, list[Way]] = {
            "instant_watts": instant,
            "average_watts": average,
            "energy_joules": energy,
            "sm_clock_hertz": self._clock("SM"),
            # The second of each of the next two is the name that drivers knew first.
            "clock_event_reasons": [
                *self._getter("nvmlDeviceGetCurrentClocksEventReasons"),
                *self._getter("nvmlDeviceGetCurrentClocksThrottleReasons"),
            ],
            "power_cap_throttle_seconds": self._counter("SW_POWER_CAP"),
            HEAT_PARTS[0]: self._counter("SW_THERM_SLOWDOWN"),
            HEAT_PARTS[1]: self._counter("HW_THERM_SLOWDOWN"),
            "brake_throttle_seconds": self._counter("HW_POWER_BRAKE_SLOWDOWN"),
            "memory_temperature_celsius": self._field("MEMORY_TEMP"),
        }
        sensor = self._number("NVML_TEMPERATURE_GPU")
        self.slow: dict[str, list[Way]] = {
            "enforced_limit_watts": limit,
            "memory_clock_hertz": self._clock("MEM"),
            "temperature_celsius": [
                *self._getter("nvmlDeviceGetTemperatureV", 1.0, sensor),
                *self._getter("nvmlDeviceGetTemperature", 1.0, sensor),
            ],
            "slowdown_margin_celsius": self._getter("nvmlDeviceGetMarginTemperature"),
        }
        """What changes rarely, or says little at the sampler's pace."""

    def _number(self, name: str) -> int:
        return self._driver.number(name) or 0

    def _power(self, name: str) -> list[Way]:
        return self._field(name, _WATTS_PER_MILLIWATT, self._scope)

    def _counter(self, reason: str) -> list[Way]:
        return self._field(f"{_REASON}{reason}", _SECONDS_PER_NANOSECOND)

    def _field(self, name: str, scale: float = 1.0, scope: str | None = None) -> list[Way]:
        number = self._driver.number(f"NVML_FI_DEV_{name}")
        if number is None:
            return []
        where = "" if scope is None else f", {scope} scope"
        scoped = 0 if scope is None else self._number(_SCOPES[scope])
        return [Way(f"field {name}{where}", scale, (number, scoped))]

    def _getter(self, function: str, scale: float = 1.0, *arguments: int) -> list[Way]:
        return [Way(function, scale, None, function, arguments)]

    def _clock(self, kind: str) -> list[Way]:
        number = self._number(f"NVML_CLOCK_{kind}")
        (way,) = self._getter("nvmlDeviceGetClockInfo", _HERTZ_PER_MEGAHERTZ, number)
        return [Way(f"{way.label}, {kind}", way.scale, None, way.getter, way.arguments)]


def power_scopes(driver: Driver, handle: Any, subject: str) -> tuple[str, bool]:
    """The scope in which this GPU's power fields are read, and whether it has a module's.

    The GPU's own scope where it is metered, else the module's (GPU and CPU together, as
    on Grace Hopper), else the GPU's again, for the getter that knew no scope.
    """
    gpu, module = (_answers(driver, handle, subject, scope) for scope in (GPU_SCOPE, MODULE_SCOPE))
    return (MODULE_SCOPE if module and not gpu else GPU_SCOPE), module


def _answers(driver: Driver, handle: Any, subject: str, scope: str) -> bool:
    number = driver.number(_SCOPES[scope])
    names = ("NVML_FI_DEV_POWER_INSTANT", "NVML_FI_DEV_POWER_AVERAGE")
    fields = [found for name in names if (found := driver.number(name)) is not None]
    if number is None or not fields:
        return False
    answers = driver.fields(handle, [(field, number) for field in fields], subject)
    # One that failed this time only is there.
    return any(a.error is None or behaviour(a.error) is Behaviour.RETRY for a in answers)


def meters_instant(driver: Driver, handle: Any, name: str, subject: str) -> bool:
    """Whether `nvmlDeviceGetPowerUsage` is instantaneous here rather than a 1 s mean.

    NVML's reference: a mean on Ampere and newer, except GA100 (A100, A30), and
    instantaneous on GA100 and older.
    """
    architecture = optional(
        lambda: driver.call("nvmlDeviceGetArchitecture", handle, subject=subject)
    )
    ampere = driver.number("NVML_DEVICE_ARCH_AMPERE")
    if architecture is None or ampere is None:
        return True
    return architecture < ampere or "A100" in name or "A30" in name.split()


def optional(ask: Callable[[], Any]) -> Any:
    """What is nice to know; None where the driver does not say, or not this time.

    Raises:
        GpuError: the GPU or the driver is gone.
    """
    try:
        return ask()
    except GpuError as error:
        if behaviour(error) is Behaviour.RECONNECT:
            raise
        return None


def limit_range(driver: Driver, handle: Any, subject: str) -> tuple[float | None, ...]:
    """Default, lowest and highest limit that this GPU may be given, in watts."""
    default = optional(
        lambda: driver.call("nvmlDeviceGetPowerManagementDefaultLimit", handle, subject=subject)
    )
    function = "nvmlDeviceGetPowerManagementLimitConstraints"
    ends = optional(lambda: driver.call(function, handle, subject=subject)) or (None, None)
    return tuple(
        None if found is None else float(found) * _WATTS_PER_MILLIWATT for found in (default, *ends)
    )


def max_sm_clock_hertz(driver: Driver, handle: Any, subject: str) -> float | None:
    """The highest clock that this GPU knows."""
    kind = driver.number("NVML_CLOCK_SM")
    found = optional(
        lambda: driver.call("nvmlDeviceGetMaxClockInfo", handle, kind, subject=subject)
    )
    return None if found is None else float(found) * _HERTZ_PER_MEGAHERTZ


def mig_mode(driver: Driver, handle: Any, subject: str) -> bool | None:
    """Whether this GPU is in MIG mode; None: it knows none."""
    modes = optional(lambda: driver.call("nvmlDeviceGetMigMode", handle, subject=subject))
    return None if modes is None else bool(modes[0])
