"""A progress bar."""

from __future__ import annotations

import time
from typing import TextIO

_REDRAWN_SECONDS = 0.1


class ProgressBar:
    """A bar on a terminal, nothing elsewhere; a context manager that clears its line."""

    def __init__(self, stream: TextIO, shown: bool = True) -> None:
        self._stream = stream
        self._shown = shown and stream.isatty()
        self._drawn_seconds = 0.0
        self.name = ""

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *failure: object) -> None:
        self.clear()

    def clear(self) -> None:
        """Make room for a line of text."""
        if self._shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def update(self, now_seconds: float, duration_seconds: float, requests: int) -> None:
        """Draw how far the run is, ten times a second at most."""
        now = time.monotonic()
        if not self._shown or now - self._drawn_seconds < _REDRAWN_SECONDS:
            return
        self._drawn_seconds = now
        share = now_seconds / duration_seconds
        bar = "#" * round(30 * share)
        self._stream.write(
            f"\r\x1b[K{self.name}[{bar:<30}] {share:4.0%}  {now_seconds:.0f} of "
            f"{duration_seconds:.0f} s, {requests} requests"
        )
        self._stream.flush()
