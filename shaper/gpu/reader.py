"""The edge to the GPU: what every source of readings offers.

NVML, the emulated GPU and a replayed recording implement the same protocol,
and the same contract tests run over all three.
"""

from __future__ import annotations

from typing import Protocol

from shaper.core.types import GpuIdentity, GpuSample


class GpuReader(Protocol):
    """Reads the GPUs of one engine. Called from the sampler's thread only."""

    @property
    def gpus(self) -> tuple[GpuIdentity, ...]:
        """The GPUs, in the order in which `read` returns them."""
        ...

    def read(self) -> tuple[GpuSample, ...]:
        """One sample per GPU, taken now.

        Raises:
            GpuError: the driver refused, or a GPU is gone.
        """
        ...

    def close(self) -> None:
        """Let go of the driver. May be called twice."""
        ...
