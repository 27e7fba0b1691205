"""A clock that tests turn by hand."""

from __future__ import annotations


class HandClock:
    def __init__(self, now_seconds: float = 100.0) -> None:
        self.now_seconds = now_seconds

    def __call__(self) -> float:
        return self.now_seconds

    def advance(self, seconds: float) -> None:
        self.now_seconds += seconds
