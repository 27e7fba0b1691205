"""Which attribute of a fake GPU answers which field and which getter."""

from __future__ import annotations

import pynvml

_FIELDS = {
    "POWER_INSTANT": "instant_milliwatts",
    "POWER_AVERAGE": "average_milliwatts",
    "TOTAL_ENERGY_CONSUMPTION": "energy_millijoules",
    "ENERGY": "scoped_energy_millijoules",
    "MEMORY_TEMP": "memory_celsius",
    "CLOCKS_EVENT_REASON_SW_POWER_CAP": "power_cap_nanoseconds",
    "CLOCKS_EVENT_REASON_SW_THERM_SLOWDOWN": "sw_thermal_nanoseconds",
    "CLOCKS_EVENT_REASON_HW_THERM_SLOWDOWN": "hw_thermal_nanoseconds",
    "CLOCKS_EVENT_REASON_HW_POWER_BRAKE_SLOWDOWN": "brake_nanoseconds",
}
_MODULE_FIELDS = {
    "POWER_INSTANT": "module_instant_milliwatts",
    "POWER_AVERAGE": "module_average_milliwatts",
    "ENERGY": "module_energy_millijoules",
    "POWER_CURRENT_LIMIT": "module_limit_milliwatts",
}
FIELD_NAMES = {
    getattr(pynvml, f"NVML_FI_DEV_{name}"): name for name in {**_FIELDS, **_MODULE_FIELDS}
}
GETTERS = {
    "nvmlDeviceGetArchitecture": "architecture",
    "nvmlDeviceGetClockInfo": "",
    "nvmlDeviceGetCurrentClocksEventReasons": "reasons",
    "nvmlDeviceGetCurrentClocksThrottleReasons": "reasons",
    "nvmlDeviceGetEnforcedPowerLimit": "limit_milliwatts",
    "nvmlDeviceGetMarginTemperature": "margin_celsius",
    "nvmlDeviceGetMaxClockInfo": "max_sm_megahertz",
    "nvmlDeviceGetMigMode": "mig_mode",
    "nvmlDeviceGetPowerManagementDefaultLimit": "default_limit_milliwatts",
    "nvmlDeviceGetPowerManagementLimitConstraints": "limit_range_milliwatts",
    "nvmlDeviceGetPowerUsage": "usage_milliwatts",
    "nvmlDeviceGetTemperature": "celsius",
    "nvmlDeviceGetTemperatureThreshold": "threshold_celsius",
    "nvmlDeviceGetTemperatureV": "celsius",
    "nvmlDeviceGetTotalEnergyConsumption": "energy_millijoules",
}


def field_attribute(number: int, scope: int) -> str | None:
    """The attribute behind a field in a scope; None: there is none."""
    name = FIELD_NAMES.get(number, "")
    if scope == pynvml.NVML_POWER_SCOPE_MODULE:
        return _MODULE_FIELDS.get(name)
    assert scope == pynvml.NVML_POWER_SCOPE_GPU
    return _FIELDS.get(name)
