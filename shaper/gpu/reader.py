"""The edge to the GPU: what every source of readings offers.

NVML, the emulated GPU and a replayed recording implement the same protocol,
and the same contract tests run over all three.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

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


@runtime_checkable
class TellsWhatItDoes(Protocol):
    """A reader that says which of the driver's calls is under way. Read by another thread."""

    @property
    def doing(self) -> str:
        """The call and its GPU; empty between calls."""
        ...

    @property
    def reconnects(self) -> int:
        """Times that a lost driver or GPU was found again."""
        ...
