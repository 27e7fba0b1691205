"""How a recording that was asked for over HTTP goes, as it stands in the status block."""

from __future__ import annotations

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
