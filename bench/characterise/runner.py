"""What puts load on the GPU, step by step, and the log of its steps.

Three implement it: vLLM's engine on a real or an emulated GPU (`engine.py`), bare
GEMMs and attention in torch, and the bare emulated GPU (both `bare.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Protocol

from shaper.core.types import StepBatch
from shaper.gpu.reader import GpuReader
from shaper.recording.format import RecordedStep


class Runner(Protocol):
    """Runs steps whose work is exactly what was asked for."""

    @property
    def reader(self) -> GpuReader:
        """The meter of the GPU that runs the steps."""
        ...

    @property
    def kv_tokens(self) -> int:
        """How many tokens of context fit at once."""
        ...

    @property
    def about(self) -> Mapping[str, Any]:
        """What ran: engine, versions, settings."""
        ...

    def start_decodes(self, batch: int, context_tokens: int) -> None:
        """From the next step on, `batch` requests decode; the first step's contexts have
        a little more than `context_tokens`, and each step adds a token."""
        ...

    def start_chunks(self, context_tokens: int, chunk_tokens: int, count: int) -> None:
        """The next `count` steps are prefill chunks, each after `context_tokens` tokens."""
        ...

    def step(self) -> bool:
        """One step right behind the last; returns once the step before it has ended.
        False when nothing is left to run."""
        ...

    def drain(self) -> None:
        """Return when all launched steps have ended."""
        ...

    def clear(self) -> None:
        """Forget what was started."""
        ...

    def take_steps(self) -> list[RecordedStep]:
        """The steps that ended since the last call."""
        ...

    def close(self) -> None:
        """Let go of the GPU. May be called twice."""
        ...


class StepLog:
    """Pairs launches with ends, in order. A step starts when it was launched or when its
    predecessor ended, whichever is later, as in a live engine's recording."""

    def __init__(self) -> None:
        self._flying: deque[tuple[float, StepBatch | None]] = deque()
        self._emitted = 0
        self._done: list[RecordedStep] = []
        self._last_end_seconds = float("-inf")
        self.last_batch: StepBatch | None = None
        """Work of the newest launch; None for an empty step."""

    def launched(self, at_seconds: float, batch: StepBatch | None) -> None:
        """A step was launched; None for one without tokens."""
        self.last_batch = batch
        self._flying.append((at_seconds, batch))

    def ended(self, at_seconds: float) -> None:
        """All launched steps have ended, the newest of them now."""
        while self._emitted < len(self._flying):
            self._emit(at_seconds)

    def returned(self, at_seconds: float) -> None:
        """The oldest step's output is here; its end is now, unless it was known before."""
        if not self._emitted:
            self._emit(at_seconds)
        self._emitted -= 1
        self._flying.popleft()

    def _emit(self, at_seconds: float) -> None:
        launch_seconds, batch = self._flying[self._emitted]
        self._emitted += 1
        start = max(launch_seconds, self._last_end_seconds)
        if batch is not None and at_seconds > start:
            self._done.append(RecordedStep(start, at_seconds, batch))
            self._last_end_seconds = at_seconds

    def take(self) -> list[RecordedStep]:
        """The steps that ended since the last take."""
        done, self._done = self._done, []
        return done


class NoLoad:
    """A `Runner` that runs nothing: for the stages that only read."""

    kv_tokens = 0

    def __init__(self, reader: GpuReader) -> None:
        self.reader = reader
        self.about: Mapping[str, Any] = {"runner": "none"}

    def start_decodes(self, batch: int, context_tokens: int) -> None:
        """Nothing."""

    def start_chunks(self, context_tokens: int, chunk_tokens: int, count: int) -> None:
        """Nothing."""

    def step(self) -> bool:
        """Nothing is left to run, ever."""
        return False

    def drain(self) -> None:
        """Nothing."""

    def clear(self) -> None:
        """Nothing."""

    def take_steps(self) -> list[RecordedStep]:
        """None."""
        return []

    def close(self) -> None:
        """Nothing; the reader is its maker's."""
