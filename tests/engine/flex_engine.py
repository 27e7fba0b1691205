"""An engine with requests of both classes, whose admission state the test sets."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from shaper.core.supervise.admission import FlexRules
from shaper.core.supervise.status import Admissibility, AdmissionState, EngineStatus
from shaper.core.types import PowerLimit
from shaper.ipc.flex import RELEASED
from shaper.simulate.engine import new_request

LIMIT = PowerLimit(500.0, 0.1)
OPEN, SHAPED = AdmissionState.OPEN, AdmissionState.SHAPED
DEFER, SHED = AdmissionState.DEFER, AdmissionState.SHED


class FlexEngine:
    """An engine with requests of both classes, whose admission state the test sets."""

    def __init__(self, rig: Any, **rules: Any) -> None:
        self.simulated, self.shaper = rig.engine, rig.shaper
        self.scheduler = rig.engine.scheduler
        self.deferral = self.scheduler.deferral
        self.shaper.flex = FlexRules(**rules)
        self.config = self.scheduler.vllm_config
        self._ids = itertools.count()
        self.started: list[str] = []
        self.say(OPEN)

    def say(self, state: AdmissionState, pressure: float = 0.9) -> None:
        """The admission state from now on."""
        self._standing = (state, pressure)
        self._tick()

    def _tick(self) -> None:
        state, pressure = self._standing
        self.shaper.standing = EngineStatus(
            self.simulated.now_seconds, Admissibility(state, pressure, "wait", 1.0)
        )

    def add(self, flex: bool = False, tokens: int = 3, prompt: int = 40, **extra: Any) -> str:
        """A request of a class, as vLLM gives it to the scheduler."""
        number = next(self._ids)
        name = f"{'flex' if flex else 'chat'}-{number}"
        # Of its own: no prefix is shared.
        words = [number % 256, number // 256, *itertools.repeat(7, prompt)][:prompt]
        request = new_request(name, words, tokens, self.config)
        if flex:
            request.sampling_params.extra_args = {"shaper_class": "flex"}
        for key, value in extra.items():
            setattr(request, key, value)
        self.simulated.add(request)
        return name

    def run(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        """Go on, with the supervisor's ticks."""
        end = self.simulated.now_seconds + seconds
        while self.simulated.busy and self.simulated.now_seconds < end and not until():
            self._tick()
            self.simulated.step()
            self.started += [
                request.request_id
                for request in self.scheduler.running
                if request.request_id not in self.started
            ]

    def ends(self, name: str) -> float | None:
        """When a request was finished."""
        seconds: float | None = self.simulated.requests[name].finished_seconds
        return seconds

    def wait_queue(self) -> list[str]:
        """vLLM's own."""
        return [request.request_id for request in self.scheduler.waiting]

    def released(self) -> dict[str, int]:
        """How many were let in, by why."""
        return dict(zip(RELEASED, self.deferral.queue.released, strict=True))
