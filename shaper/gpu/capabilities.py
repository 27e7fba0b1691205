"""What each GPU can be asked, and where each of its readings comes from."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol, runtime_checkable

from shaper.core.types import GpuIdentity, GpuSample
from shaper.gpu.reader import GpuReader

QUANTITIES = tuple(
    field.name for field in fields(GpuSample) if field.name not in ("read_seconds", "gpu_index")
)
"""What a sample says of a GPU, in its order."""

INTEGRATED = "integrated from power"
NOT_SUPPORTED = "not supported"


@dataclass(frozen=True, slots=True)
class Source:
    """Where one quantity of a GPU comes from."""

    quantity: str
    """A field of `GpuSample`."""
    how: str = ""
    """E.g. `field POWER_INSTANT, GPU scope`; empty where it is not read."""
    missing: str = ""
    """Why it is not read, or not as it should be; empty where all is well."""


@dataclass(frozen=True, slots=True)
class HostGpu:
    """One GPU that the driver shows, whoever uses it."""

    index: int
    name: str
    uuid: str
    mig: bool | None
    """None: this GPU knows no MIG."""


@dataclass(frozen=True, slots=True)
class GpuCapabilities:
    """What one GPU of an engine can be asked."""

    gpu: GpuIdentity
    power_scope: str
    """`GPU`, or `module` where the power is that of GPU and CPU together; empty: no power."""
    sources: tuple[Source, ...]
    """One for each of `QUANTITIES`, in this order."""
    default_limit_watts: float | None = None
    min_limit_watts: float | None = None
    max_limit_watts: float | None = None
    mig: bool | None = None
    """None: this GPU knows no MIG. One in MIG mode is refused when the reader is made."""
    driver_version: str = ""

    def source(self, quantity: str) -> Source:
        """Where a quantity comes from.

        Raises:
            KeyError: there is no such quantity.
        """
        for source in self.sources:
            if source.quantity == quantity:
                return source
        raise KeyError(quantity)


@runtime_checkable
class Describing(Protocol):
    """A reader that knows what its GPUs can be asked."""

    def capabilities(self) -> tuple[GpuCapabilities, ...]:
        """One for each GPU, in the order of `gpus`."""
        ...


def describe_gpus(reader: GpuReader) -> tuple[GpuCapabilities, ...]:
    """What each GPU of a reader can be asked. One that does not say so is read once.

    Raises:
        GpuError: as `reader.read` does.
    """
    if isinstance(reader, Describing):
        return reader.capabilities()
    return tuple(
        _as_read(gpu, sample) for gpu, sample in zip(reader.gpus, reader.read(), strict=True)
    )


def _as_read(gpu: GpuIdentity, sample: GpuSample) -> GpuCapabilities:
    sources = tuple(
        Source(name, "as read")
        if getattr(sample, name) is not None
        else Source(name, INTEGRATED if name == "energy_joules" else "", NOT_SUPPORTED)
        for name in QUANTITIES
    )
    metered = sample.instant_watts is not None or sample.average_watts is not None
    return GpuCapabilities(gpu, "GPU" if metered else "", sources)
