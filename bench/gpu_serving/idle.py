"""The GPU before anything runs: is it idle, what does it draw, which limits hold. Getters only."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from shaper.core.types import GpuSample
from shaper.errors import ConfigError
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
    """The GPU at rest, and what speaks against starting there."""

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
    objections: tuple[str, ...]


def open_gpu() -> GpuReader:
    """The first GPU of this process.

    Raises:
        GpuError: there is none.
        ConfigError: NVIDIA's binding is missing.
    """
    if importlib.util.find_spec("pynvml") is None:
        raise ConfigError(
            "NVIDIA's Python binding is missing: pip install nvidia-ml-py, or give --emulate"
        )
    from shaper.gpu.nvml import NvmlReader, visible_gpus

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
    identity = reader.gpus[0]
    watts = [
        value
        for sample in samples
        if (value := sample.instant_watts or sample.average_watts) is not None
    ]
    last = samples[-1]
    driver = _driver(identity.index)
    state = GpuState(
        name=identity.name,
        uuid=identity.uuid,
        driver=driver.get("driver", "unknown"),
        idle_watts=statistics.median(watts) if watts else None,
        highest_watts=max(watts, default=None),
        temperature_celsius=last.temperature_celsius,
        sm_clock_hertz=last.sm_clock_hertz,
        enforced_limit_watts=identity.enforced_limit_watts,
        default_limit_watts=driver.get("default_limit_watts"),
        memory_used_bytes=driver.get("memory_used_bytes"),
        processes=driver.get("processes", ()),
        objections=(),
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


def _driver(index: int) -> dict[str, Any]:
    """What the readings don't have; what this driver does not say is left out."""
    nvml: Any = sys.modules.get("pynvml") or importlib.import_module("pynvml")
    found: dict[str, Any] = {}

    def ask(name: str, getter: Callable[[], Any]) -> None:
        try:
            found[name] = getter()
        except (nvml.NVMLError, AttributeError, TypeError):
            # Not said here: the field stays unknown, and the report shows it so.
            found.pop(name, None)

    ask("driver", lambda: str(nvml.nvmlSystemGetDriverVersion()))

    def handle() -> Any:
        return nvml.nvmlDeviceGetHandleByIndex(index)

    ask(
        "default_limit_watts",
        lambda: nvml.nvmlDeviceGetPowerManagementDefaultLimit(handle()) * 1e-3,
    )
    ask("memory_used_bytes", lambda: int(nvml.nvmlDeviceGetMemoryInfo(handle()).used))
    ask(
        "processes",
        lambda: tuple(
            int(each.pid) for each in nvml.nvmlDeviceGetComputeRunningProcesses(handle())
        ),
    )
    return found
