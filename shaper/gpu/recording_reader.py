"""A reader whose readings also go to somebody else."""

from __future__ import annotations

from collections.abc import Callable

from shaper.core.types import GpuIdentity, GpuSample
from shaper.gpu.parts import Parts
from shaper.gpu.reader import GpuReader, TellsWhatItDoes


class RecordingReader:
    """The same reader; what it reads also goes to `sink`, in the reading thread.

    Args:
        reader: whose readings they are; a sink that fails costs none of them.
        sink: called with each.
        parts: counts failures of the sink, as those of a recording.
    """

    def __init__(
        self,
        reader: GpuReader,
        sink: Callable[[tuple[GpuSample, ...]], object],
        parts: Parts | None = None,
    ) -> None:
        self._reader, self._sink = reader, sink
        self._parts = Parts() if parts is None else parts

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
        self._parts.run("recording", self._sink, samples)
        return samples

    def close(self) -> None:
        """Close the reader."""
        self._reader.close()
