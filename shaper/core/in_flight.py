"""Steps that were launched and are not back: they run one after the other."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from shaper.core.ledger.window import Run
from shaper.core.types import EngineLoad, StepBatch, StepPrediction


@dataclass(slots=True)
class Unsure:
    """Bounds of a step whose clock may climb while it waits or runs."""

    free: StepPrediction
    """At the clock that nothing holds down: the earliest that it can be over."""
    slowest_seconds: float
    """At the clock that was read when it was launched, of an idle GPU too."""
    lowest_hertz: float
    highest_hertz: float
    """Of the readings around it."""


class InFlightStep(NamedTuple):
    """One of them."""

    launched_seconds: float
    queued: bool
    """It was launched behind another one, so it starts when that one ends."""
    batch: StepBatch
    raw: StepPrediction
    """As the model says."""
    prediction: StepPrediction
    """The same, corrected by what was measured, at the power that is planned with."""
    unsure: Unsure | None = None
    """None: it runs at the clock that it was predicted at."""


class InFlightSteps:
    """All of them, in their order. Stateful fields: the queue, and when decodes ran last."""

    def __init__(self) -> None:
        self._queue: deque[InFlightStep] = deque()
        self._decode_end_seconds = -math.inf
        self._decodes_since = math.inf
        self.queues = False
        """Whether a step was ever launched behind another one."""

    def __bool__(self) -> bool:
        return bool(self._queue)

    @property
    def holds_prompts(self) -> bool:
        """Whether any of them computes prompts."""
        return any(flight.batch.prefill_tokens for flight in self._queue)

    @property
    def unsure(self) -> list[Unsure]:
        """Of those whose clock is not known."""
        return [flight.unsure for flight in self._queue if flight.unsure is not None]

    def launch(
        self,
        now_seconds: float,
        batch: StepBatch,
        raw: StepPrediction,
        prediction: StepPrediction,
        unsure: Unsure | None,
    ) -> None:
        """Another one is launched."""
        queued = bool(self._queue)
        self.queues = self.queues or queued
        self._queue.append(InFlightStep(now_seconds, queued, batch, raw, prediction, unsure))

    def complete(self) -> InFlightStep:
        """The oldest is back. There must be one."""
        return self._queue.popleft()

    def decoded(self, end_seconds: float) -> None:
        """A step with decodes ended."""
        self._decode_end_seconds = end_seconds

    def runs(self, free_seconds: float, now_seconds: float) -> list[Run]:
        """When they run at the earliest, as `(start, end, joules)`; one that is overdue ends now.

        Args:
            free_seconds: when the last step that is back ended.
            now_seconds: now.
        """
        runs: list[Run] = []
        for flight in self._queue:
            start = max(free_seconds, flight.launched_seconds)
            step = flight.prediction if flight.unsure is None else flight.unsure.free
            free_seconds, joules = start + step.seconds, step.joules
            if not runs and now_seconds > free_seconds:
                free_seconds = now_seconds
                if flight.unsure is not None:
                    # Slower, and at no more power.
                    joules = max(joules, step.watts * (now_seconds - start))
            runs.append((start, free_seconds, joules))
        return runs

    def since_decode(self, load: EngineLoad, start_seconds: float, runs: list[Run]) -> float:
        """From the last decode step's end, or from when there were decodes again, to `start`.

        Args:
            load: with the decodes that are ready.
            start_seconds: when the next step can start.
            runs: of these flights.
        """
        if not load.decode_requests:
            self._decodes_since = math.inf
            return 0.0
        self._decodes_since = min(self._decodes_since, start_seconds)
        last = self._decode_end_seconds
        for flight, (_, end, _) in zip(self._queue, runs, strict=True):
            if flight.batch.decode_tokens:
                last = end
        return start_seconds - max(last, self._decodes_since)
