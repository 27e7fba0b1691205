"""What each NVML read costs: the driver's calls one by one, and a whole sample.

Getters only. Over an emulated GPU there is no driver, and a whole sample is all.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from shaper.errors import GpuError
from shaper.gpu.reader import GpuReader


@dataclass(frozen=True, slots=True)
class ReadCost:
    """Seconds of one kind of read, over many calls."""

    name: str
    calls: int
    median_seconds: float
    p99_seconds: float
    longest_seconds: float
    error: str = ""
    """Why it can't be read here; the seconds are then 0."""


def read_costs(reader: GpuReader, calls: int, *, driver: bool) -> list[ReadCost]:
    """Times `calls` calls of each read, one after the other.

    Args:
        reader: times its whole sample too.
        calls: of each.
        driver: also NVIDIA's driver, call by call.
    """
    found = [_timed("a whole sample", lambda _: reader.read(), None, calls, (GpuError,))]
    if driver:
        pynvml: Any = importlib.import_module("pynvml")
        handle = pynvml.nvmlDeviceGetHandleByIndex(reader.gpus[0].index)
        for name, way in _getters(pynvml).items():
            found.append(_timed(name, way, handle, calls, (pynvml.NVMLError, AttributeError)))
    return found


def _timed(
    name: str,
    way: Callable[[Any], object],
    handle: Any,
    calls: int,
    errors: tuple[type[Exception], ...],
) -> ReadCost:
    seconds = np.empty(calls)
    try:
        way(handle)
        for index in range(calls):
            start = time.perf_counter()
            way(handle)
            seconds[index] = time.perf_counter() - start
    except errors as error:
        return ReadCost(name, 0, 0.0, 0.0, 0.0, str(error) or type(error).__name__)
    return ReadCost(
        name,
        calls,
        float(np.median(seconds)),
        float(np.quantile(seconds, 0.99)),
        float(seconds.max()),
    )


def _getters(pynvml: Any) -> dict[str, Callable[[Any], object]]:
    instant, average = pynvml.NVML_FI_DEV_POWER_INSTANT, pynvml.NVML_FI_DEV_POWER_AVERAGE
    energy = pynvml.NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION
    scope = pynvml.NVML_POWER_SCOPE_GPU

    def fields(*numbers: int) -> Callable[[Any], object]:
        return lambda handle: _field_values(pynvml, handle, [(n, scope) for n in numbers])

    return {
        "field POWER_INSTANT": fields(instant),
        "field POWER_AVERAGE": fields(average),
        "fields POWER_INSTANT and POWER_AVERAGE together": fields(instant, average),
        "field TOTAL_ENERGY_CONSUMPTION": fields(energy),
        "nvmlDeviceGetTotalEnergyConsumption": lambda h: pynvml.nvmlDeviceGetTotalEnergyConsumption(
            h
        ),
        "nvmlDeviceGetPowerUsage": lambda h: pynvml.nvmlDeviceGetPowerUsage(h),
        "nvmlDeviceGetEnforcedPowerLimit": lambda h: pynvml.nvmlDeviceGetEnforcedPowerLimit(h),
        "nvmlDeviceGetClockInfo, SM": lambda h: pynvml.nvmlDeviceGetClockInfo(
            h, pynvml.NVML_CLOCK_SM
        ),
        "nvmlDeviceGetCurrentClocksEventReasons": lambda h: (
            pynvml.nvmlDeviceGetCurrentClocksEventReasons(h)
        ),
        "nvmlDeviceGetTemperature": lambda h: pynvml.nvmlDeviceGetTemperature(
            h, pynvml.NVML_TEMPERATURE_GPU
        ),
    }


def _field_values(pynvml: Any, handle: Any, numbers: list[Any]) -> object:
    values = pynvml.nvmlDeviceGetFieldValues(handle, numbers)
    for value in values:
        if value.nvmlReturn != pynvml.NVML_SUCCESS:
            raise pynvml.NVMLError(value.nvmlReturn)
    return values
