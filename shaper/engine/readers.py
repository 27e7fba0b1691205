"""Finds the GPUs of this engine, how to read them, and the profile that describes them."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shaper.config import ShaperConfig
from shaper.core.profile import GpuProfile
from shaper.core.types import GpuIdentity, GpuSample
from shaper.engine.compat import assigned_gpus, gpus_per_engine
from shaper.errors import ConfigError
from shaper.gpu.profiles import known_profiles, load_profile, profile_for_device
from shaper.gpu.reader import GpuReader

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

EMULATE_VARIABLE = "SHAPER_EMULATE"


class NoSensor:
    """A reader of no GPU: the sampler goes on ticking and publishes no state."""

    gpus: tuple[GpuIdentity, ...] = ()

    def read(self) -> tuple[GpuSample, ...]:
        """Nothing: no read of it fails."""
        return ()

    def close(self) -> None:
        """Nothing."""


@dataclass(frozen=True, slots=True)
class EngineGpus:
    """The GPUs of one engine."""

    reader: GpuReader
    profile: GpuProfile

    @property
    def free_hertz(self) -> float:
        """The SM clock that nothing holds down: the boards' own where they tell it."""
        told = [gpu.max_sm_clock_hertz for gpu in self.reader.gpus if gpu.max_sm_clock_hertz]
        return max(told, default=self.profile.clocks.sm_max_hertz)

    def enforced_watts(self, gpu_count: int) -> float:
        """What the driver lets the engine's GPUs draw for long, summed.

        By the profile where the driver does not say.

        Args:
            gpu_count: of the engine.
        """
        said = [gpu.enforced_limit_watts for gpu in self.reader.gpus] or [None] * gpu_count
        default_watts = self.profile.power.limit_watts
        return sum(default_watts if watts is None else watts for watts in said)


def engine_gpus(vllm_config: VllmConfig, config: ShaperConfig) -> EngineGpus:
    """The reader and the profile of this engine's GPUs.

    Raises:
        GpuError: there is no GPU to read, or the driver refuses.
        ConfigError: no profile describes the GPU.
    """
    if EMULATE_VARIABLE in os.environ:
        # Only where it was asked for: the emulator is no part of a real engine.
        from shaper.emulator.executor import emulated_reader

        profile = load_profile(config.gpu_profile or os.environ[EMULATE_VARIABLE])
        reader = emulated_reader(vllm_config)
        return EngineGpus(reader or NoSensor(), profile)
    if config.sensor == "none":
        if config.gpu_profile is None:
            raise ConfigError(
                "sensor is 'none' and gpu_profile is not given: name the profile to predict "
                f"with, one of {', '.join(known_profiles())}"
            )
        return EngineGpus(NoSensor(), load_profile(config.gpu_profile))
    from shaper.gpu.nvml import NvmlReader
    from shaper.gpu.visible import dealt_gpus, visible_gpus

    parallel = vllm_config.parallel_config
    world = gpus_per_engine(parallel)
    rank = parallel.data_parallel_rank_local or 0
    # What `--device-ids` or vLLM's own dealing to ranks has settled; else as CUDA counts.
    assigned = assigned_gpus(parallel)
    own = dealt_gpus(assigned, world, rank) or visible_gpus(os.environ, world, rank)
    nvml = NvmlReader(own)
    if not assigned:
        _warn_of_order(own)
    return EngineGpus(nvml, _profile_of(nvml, config))


def _warn_of_order(selectors: tuple[int | str, ...]) -> None:
    from shaper.gpu.nvml import host_gpus
    from shaper.gpu.visible import device_order_warning

    names = [gpu.name for gpu in host_gpus()]
    warning = device_order_warning(os.environ, selectors, names)
    if warning is not None:
        logger.warning("%s", warning)


def _profile_of(reader: GpuReader, config: ShaperConfig) -> GpuProfile:
    if config.gpu_profile is not None:
        return load_profile(config.gpu_profile)
    name = reader.gpus[0].name
    profile = profile_for_device(name)
    if profile is None:
        raise ConfigError(
            f"no profile describes the GPU {name!r}: set gpu_profile to the nearest of "
            f"{', '.join(known_profiles())}, or to the path of your own"
        )
    return profile


def check_gpus(config: ShaperConfig) -> None:
    """What `shaper serve` asks before it starts vLLM on real GPUs.

    Raises:
        GpuError: there is no GPU to read.
        ConfigError: no profile describes it.
    """
    if not config.asks_for_shaping or config.sensor == "none":
        return
    from shaper.gpu.nvml import NvmlReader, visible_gpus

    reader = NvmlReader(visible_gpus(os.environ, 1, 0))
    try:
        _profile_of(reader, config)
    finally:
        reader.close()
