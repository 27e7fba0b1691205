"""A reader whose readings also go to somebody else."""

from __future__ import annotations

from collections.abc import Callable

from shaper.core.types import GpuIdentity, GpuSample
from shaper.gpu.reader import GpuReader, TellsWhatItDoes


class Tap:
    """The same reader; what it reads also goes to `sink`, in the reading thread."""

    def __init__(self, reader: GpuReader, sink: Callable[[tuple[GpuSample, ...]], object]) -> None:
        self._reader, self._sink = reader, sink

    @property
    def gpus(self) -> tuple[GpuIdentity, ...]:
        """The reader's."""
        return self._reader.gpus

    @property
    def doing(self) -> str:
        """The reader's, where it says."""
        return self._reader.doing if isinstance(self._reader, TellsWhatItDoes) else ""

    @property
    def reconnects(self) -> int:
        """The reader's, where it counts."""
        return self._reader.reconnects if isinstance(self._reader, TellsWhatItDoes) else 0

    def read(self) -> tuple[GpuSample, ...]:
        """The reader's reading.

        Raises:
            GpuError: as the reader does.
        """
        samples = self._reader.read()
        self._sink(samples)
        return samples

    def close(self) -> None:
        """Close the reader."""
        self._reader.close()
