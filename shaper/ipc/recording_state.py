"""How a recording that was asked for over HTTP goes, as it stands in the status block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum


class RecordingPhase(IntEnum):
    """Where a recording is."""

    NONE = 0
    RECORDING = 1
    FINISHING = 2
    ENDED = 3
    FAILED = 4


@dataclass(frozen=True, slots=True)
class RecordingState:
    """One engine's recording."""

    sequence: int = 0
    """Of the change that asked for it."""
    phase: RecordingPhase = RecordingPhase.NONE
    rows: int = 0
    bytes: int = 0
    dropped: int = 0
    """Steps and samples that came faster than the disk takes them."""
    error_number: int = 0
    """Of the operating system, where it failed."""

    @property
    def over(self) -> bool:
        """Nothing more is written."""
        return self.phase in (RecordingPhase.ENDED, RecordingPhase.FAILED)

    def values(self) -> list[float]:
        """As numbers for the status block."""
        numbers = (self.sequence, self.phase, self.rows, self.bytes, self.dropped)
        return [float(number) for number in (*numbers, self.error_number)]

    @classmethod
    def from_values(cls, values: Sequence[float]) -> RecordingState:
        """From a status block; the first state where nothing was written yet."""
        if len(values) < 6:
            return cls()
        sequence, phase, *rest = (int(value) for value in values[:6])
        return cls(sequence, RecordingPhase(phase), *rest)
