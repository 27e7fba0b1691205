"""What one engine's shaper is made of, and what the scheduler calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from shaper.core.budget import Constraints
from shaper.core.controller import Controller
from shaper.core.supervise.admission import FlexRules
from shaper.core.supervise.status import EngineStatus
from shaper.core.types import Decision, PowerState, StepBatch
from shaper.ipc.flex import ShapingState

Mode = Literal["on", "shadow", "off"]
"""`shadow` decides and records but applies nothing; `off` is vLLM as it is."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What others have asked of the shaper."""

    constraints: Constraints
    mode: Mode


class LaunchedStep(NamedTuple):
    """A step that was launched and is not back, and who had decided it."""

    output: Any
    launched_seconds: float
    batch: StepBatch
    controller: Controller | None


class EngineShaper(ShapingState, Protocol):
    """What the scheduler calls, and what it asks before it defers a request."""

    def schedule(self, run: Callable[[], Any]) -> Any:
        """Decide, let vLLM schedule through `run`, record."""
        ...

    def returned(self, scheduler_output: Any) -> None:
        """A step's output is back."""
        ...

    def changed(self) -> None:
        """A request has arrived or was taken away."""
        ...

    def close(self) -> None:
        """Stop what runs beside the engine."""
        ...


class PassThrough:
    """The shaper of an engine that can't be shaped: vLLM as it is.

    Args:
        on_close: called when the engine ends.
    """

    shaping = False
    standing: EngineStatus | None = None
    flex = FlexRules()
    clock = staticmethod(time.monotonic)

    def __init__(self, on_close: Callable[[], None] = lambda: None) -> None:
        self.close = on_close

    def schedule(self, run: Callable[[], Any]) -> Any:
        """vLLM's own."""
        return run()

    def returned(self, scheduler_output: Any) -> None:
        """Nothing."""

    def changed(self) -> None:
        """Nothing."""


class Sensing(Protocol):
    """The part of the sampler that the runtime reads."""

    @property
    def latest(self) -> PowerState | None:
        """What it last saw."""
        ...


class DecisionSink(Protocol):
    """The part of the decision log that the runtime writes."""

    def add(self, decision: Decision, meter_watts: float | None) -> None:
        """Take one decision."""
        ...
