"""Finds the GPUs of this engine, how to read them, and the profile that describes them."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shaper.config.model import ShaperConfig
from shaper.core.model.profile import GpuProfile
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
        ConfigError: no profile describes the GPUs, or they are not alike.
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
    from shaper.gpu.nvml import NvmlReader, host_gpus
    from shaper.gpu.visible import (
        dealt_gpus,
        device_order_warning,
        named_gpus,
        refuse_twice,
        visible_gpus,
    )

    parallel = vllm_config.parallel_config
    world = gpus_per_engine(parallel)
    rank = parallel.data_parallel_rank_local or 0
    # What `--device-ids` or vLLM's own dealing to ranks has settled; else as CUDA counts.
    assigned = assigned_gpus(parallel)
    own = dealt_gpus(assigned, world, rank) or visible_gpus(os.environ, world, rank)
    nvml = NvmlReader(own)
    host = host_gpus()
    # Of the other engines of this server too: each would count that GPU's power as its own.
    refuse_twice(assigned or named_gpus(os.environ), {gpu.index: gpu.uuid for gpu in host})
    if not assigned:
        warning = device_order_warning(os.environ, own, [gpu.name for gpu in host])
        if warning is not None:
            logger.warning("%s", warning)
    return EngineGpus(nvml, _profile_of(nvml, config))


def _profile_of(reader: GpuReader, config: ShaperConfig) -> GpuProfile:
    """The one profile of the reader's GPUs.

    Raises:
        ConfigError: no profile describes one of them, or they are of several kinds, which no
            one profile describes.
    """
    named = None if config.gpu_profile is None else load_profile(config.gpu_profile)
    known = {gpu.name: profile_for_device(gpu.name) for gpu in reader.gpus}
    kinds = {name if profile is None else profile.name for name, profile in known.items()}
    listed = ", ".join(f"GPU {gpu.index} {gpu.name}" for gpu in reader.gpus)
    if named is not None:
        if len(kinds) > 1:
            logger.warning(
                "the GPUs of this engine are not alike (%s), and gpu_profile %s is used for all: "
                "where it draws less than one of them, limits do not hold",
                *(listed, named.name),
            )
        return named
    for name, profile in known.items():
        if profile is None:
            raise ConfigError(
                f"no profile describes the GPU {name!r}: set gpu_profile to the nearest of "
                f"{', '.join(known_profiles())}, or to the path of your own"
            )
    if len(kinds) > 1:
        raise ConfigError(
            f"the GPUs of this engine are not alike ({listed}), and no one profile describes "
            "them: name GPUs of one kind in CUDA_VISIBLE_DEVICES or --device-ids, or set "
            "gpu_profile to that which draws most"
        )
    (profile,) = (found for found in dict.fromkeys(known.values()) if found is not None)
    return profile


def check_gpus(
    config: ShaperConfig, world_size: int = 1, engines: int = 1, device_ids: Sequence[Any] = ()
) -> None:
    """What `shaper serve` asks before it starts vLLM on real GPUs.

    Args:
        config: the settings.
        world_size: GPUs of each engine.
        engines: of this host.
        device_ids: what vLLM was told to use; else CUDA_VISIBLE_DEVICES counts.

    Raises:
        GpuError: there is no such GPU to read, or one is named twice.
        ConfigError: no profile describes them.
    """
    if not config.asks_for_shaping or config.sensor == "none":
        return
    from shaper.gpu.nvml import NvmlReader, host_gpus
    from shaper.gpu.visible import dealt_gpus, named_gpus, refuse_twice, visible_gpus

    for rank in range(engines):
        own = dealt_gpus(device_ids, world_size, rank)
        reader = NvmlReader(own or visible_gpus(os.environ, world_size, rank))
        try:
            _profile_of(reader, config)
        finally:
            reader.close()
    host = {gpu.index: gpu.uuid for gpu in host_gpus()}
    refuse_twice(device_ids or named_gpus(os.environ), host)
