"""A command that is told to end, and ends in order."""

from __future__ import annotations

import signal
from types import FrameType


class Termination:
    """Within it SIGTERM does what Ctrl-C does: it raises `KeyboardInterrupt`."""

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGTERM, self._interrupt)

    def __exit__(self, *exc: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt
