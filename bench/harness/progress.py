"""Shows which phase a comparison is in and how long it will still take.

One plain line per phase; on a terminal also what goes on in it, on a line that is drawn over.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, TextIO


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of the work and how long it is expected to take."""

    name: str
    expected_seconds: float


def clock(seconds: float) -> str:
    """Minutes and seconds as `m:ss`."""
    whole = round(max(0.0, seconds))
    return f"{whole // 60}:{whole % 60:02d}"


class PhaseProgress:
    """Goes through phases in order; used as a context manager that clears its line."""

    def __init__(self, phases: Sequence[Phase], stream: TextIO | None = None) -> None:
        self._phases = list(phases)
        self._stream = stream or sys.stdout
        self._current = -1
        self._begin = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self._draw("")

    def next(self) -> None:
        """The next phase begins."""
        self._current += 1
        self._begin = time.monotonic()
        left = sum(phase.expected_seconds for phase in self._phases[self._current :])
        place = f"[{self._current + 1}/{len(self._phases)}]"
        self.say(f"{place} {self._phases[self._current].name} (about {clock(left)} left)")

    def update(self, detail: str = "") -> None:
        """Show how far the phase is: the time that it will still take, and `detail`."""
        expected = self._phases[self._current].expected_seconds
        left = clock(expected - (time.monotonic() - self._begin))
        self._draw(f"    {left} {detail}")

    def say(self, text: str) -> None:
        """A line that stays."""
        self._draw("")
        print(text, file=self._stream, flush=True)

    def _draw(self, text: str) -> None:
        if self._stream.isatty():
            self._stream.write(f"\r\x1b[K{text}")
            self._stream.flush()
