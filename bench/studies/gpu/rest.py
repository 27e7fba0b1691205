"""The GPU before anything runs: is it idle, what does it draw, which limits hold. Getters only."""

from __future__ import annotations

import contextlib
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


def open_gpu() -> GpuReader:
    """The first GPU of this process.

    Raises:
        GpuError: there is none, or NVIDIA's binding is missing.
    """
    return NvmlReader(visible_gpus(os.environ, 1))


def look(reader: GpuReader) -> dict[str, Any]:
    """Watches the GPU for a while; its first reading is left out, since it wakes the driver.

    Returns:
        Its name, driver, limits and readings at rest; `objections` says what speaks against
        starting there. None stands where the driver does not say.

    Raises:
        GpuError: the driver refuses.
    """
    samples: list[GpuSample] = []
    reader.read()
    for _ in range(max(1, round(WATCH_SECONDS / _SAMPLE_SECONDS))):
        samples += reader.read()[:1]
        time.sleep(_SAMPLE_SECONDS)
    watts = [w for s in samples if (w := s.instant_watts or s.average_watts) is not None]
    gpu = describe_gpus(reader)[0]
    memory_bytes, processes = _users(gpu.gpu.index)
    profile = profile_for_device(gpu.gpu.name)
    most = profile.power.context_watts * _CONTEXT_TOLERANCE_RATIO if profile else _MOST_IDLE_WATTS
    objections = []
    if processes:
        objections.append(f"processes {', '.join(map(str, processes))} run on it")
    if memory_bytes is not None and memory_bytes > _MOST_MEMORY_BYTES:
        objections.append(f"{memory_bytes / 2**30:.1f} GiB of its memory are in use")
    if max(watts, default=0.0) > most:
        objections.append(f"it draws {max(watts):.0f} W, and idle it would be below {most:.0f}")
    return {
        "name": gpu.gpu.name,
        "uuid": gpu.gpu.uuid,
        "driver": gpu.driver_version or "unknown",
        "idle_watts": statistics.median(watts) if watts else None,
        "temperature_celsius": samples[-1].temperature_celsius,
        "sm_clock_hertz": samples[-1].sm_clock_hertz,
        "enforced_limit_watts": gpu.gpu.enforced_limit_watts,
        "default_limit_watts": gpu.default_limit_watts,
        "objections": objections,
    }


def _users(index: int) -> tuple[int | None, list[int]]:
    """Bytes of memory in use, and processes."""
    memory_bytes, driver = None, Driver()
    with contextlib.suppress(GpuError):
        handle = driver.call("nvmlDeviceGetHandleByIndex", index)
        with contextlib.suppress(GpuError):
            memory_bytes = int(driver.call("nvmlDeviceGetMemoryInfo", handle).used)
        running = driver.call("nvmlDeviceGetComputeRunningProcesses", handle)
        return memory_bytes, [int(each.pid) for each in running]
    return memory_bytes, []
