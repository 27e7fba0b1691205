"""The GPU before anything runs: is it idle, what does it draw, which limits hold. Getters only."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import time
from typing import Any

from shaper.core.types import GpuSample
from shaper.errors import GpuError
from shaper.gpu.capabilities import describe_gpus
from shaper.gpu.nvml import NvmlReader, visible_gpus
from shaper.gpu.nvml_driver import Driver
from shaper.gpu.profiles import profile_for_device
from shaper.gpu.reader import GpuReader

WATCH_SECONDS = 3.0
_SAMPLE_SECONDS = 0.05
# Half of what the smallest context of another program would show.
_MOST_MEMORY_BYTES = 2 * 2**30
# Above that of a mere context by this ratio, something runs. (GPUs that have just been woken
# draw more than idle ones.)
_CONTEXT_TOLERANCE_RATIO = 1.15
# For a GPU that no profile describes.
_MOST_IDLE_WATTS = 150.0


@dataclasses.dataclass(frozen=True, slots=True)
class GpuState:
    """The GPU at rest, without an engine, and what speaks against starting there."""

    name: str
    uuid: str
    driver: str
    idle_watts: float | None
    """Median instant reading (the average one where that is all there is)."""
    highest_watts: float | None
    temperature_celsius: float | None
    sm_clock_hertz: float | None
    enforced_limit_watts: float | None
    default_limit_watts: float | None
    memory_used_bytes: int | None
    processes: tuple[int, ...]
    objections: tuple[str, ...] = ()


def open_gpu() -> GpuReader:
    """The first GPU of this process.

    Raises:
        GpuError: there is none, or NVIDIA's binding is missing.
    """
    return NvmlReader(visible_gpus(os.environ, 1))


def look(reader: GpuReader) -> GpuState:
    """Watches the GPU for a while; its first reading is left out, since it wakes the driver.

    Raises:
        GpuError: the driver refuses.
    """
    samples: list[GpuSample] = []
    reader.read()
    for _ in range(max(1, round(WATCH_SECONDS / _SAMPLE_SECONDS))):
        samples += reader.read()[:1]
        time.sleep(_SAMPLE_SECONDS)
    watts = [w for s in samples if (w := s.instant_watts or s.average_watts) is not None]
    gpu, last = describe_gpus(reader)[0], samples[-1]
    state = GpuState(
        name=gpu.gpu.name,
        uuid=gpu.gpu.uuid,
        driver=gpu.driver_version or "unknown",
        idle_watts=statistics.median(watts) if watts else None,
        highest_watts=max(watts, default=None),
        temperature_celsius=last.temperature_celsius,
        sm_clock_hertz=last.sm_clock_hertz,
        enforced_limit_watts=gpu.gpu.enforced_limit_watts,
        default_limit_watts=gpu.default_limit_watts,
        **_users(gpu.gpu.index),
    )
    return dataclasses.replace(state, objections=_objections(state))


def _objections(state: GpuState) -> tuple[str, ...]:
    profile = profile_for_device(state.name)
    most = (
        _MOST_IDLE_WATTS
        if profile is None
        else profile.power.context_watts * _CONTEXT_TOLERANCE_RATIO
    )
    found = []
    if state.processes:
        found.append(f"processes {', '.join(map(str, state.processes))} run on it")
    if state.memory_used_bytes is not None and state.memory_used_bytes > _MOST_MEMORY_BYTES:
        found.append(f"{state.memory_used_bytes / 2**30:.1f} GiB of its memory are in use")
    if state.highest_watts is not None and state.highest_watts > most:
        found.append(f"it draws {state.highest_watts:.0f} W, and idle it would be below {most:.0f}")
    return tuple(found)


def _users(index: int) -> dict[str, Any]:
    """Memory and processes; what this driver does not say stays unknown, and is shown so."""
    found: dict[str, Any] = {"memory_used_bytes": None, "processes": ()}
    driver = Driver()
    with contextlib.suppress(GpuError):
        handle = driver.call("nvmlDeviceGetHandleByIndex", index)
        with contextlib.suppress(GpuError):
            found["memory_used_bytes"] = int(driver.call("nvmlDeviceGetMemoryInfo", handle).used)
        running = driver.call("nvmlDeviceGetComputeRunningProcesses", handle)
        found["processes"] = tuple(int(each.pid) for each in running)
    return found
