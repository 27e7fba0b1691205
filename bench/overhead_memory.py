"""Whether the shaper's memory stays the same: `python -m bench.overhead --memory`.

A live shaper (controller, ledger, estimator, tally, levers, decision log) takes steps of a
stub in the place of vLLM's scheduler, in virtual time and one after the other: no model, no
GPU and no vLLM. What could grow is stirred all the time: each request has an id of its own,
some are aborted, budgets and modes change, the controller fails now and then, clocks move,
the sensor is lost and comes back. Python's own allocations are traced (`tracemalloc`).
"""

from __future__ import annotations

import enum
import gc
import json
import logging
import os
import random
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from shaper.core.controller import Controller
from shaper.core.policy.windowed import WindowedPlanner
from shaper.core.power_model import StepModel
from shaper.core.shape import ModelShape
from shaper.core.types import LatencyTargets, PowerBudget, PowerLimit, PowerState, StepBatch
from shaper.core.work import WorkCoefficients
from shaper.emulator.models import model_directory
from shaper.engine.runtime import LiveShaper
from shaper.engine.safe_cap import safe_cap
from shaper.engine.telemetry import DecisionLog
from shaper.gpu.profiles import load_profile

GPU, MODEL = "h200-sxm", "llama-3.1-8b"
# Shares of the run at which memory is told.
CHECKPOINTS = (0.1, 0.25, 0.5, 0.75, 1.0)
_RUNNING = 12
_METER_SECONDS = 0.1
# Each holds for so many steps; all of them come by in the first tenth of a run of 50,000.
_PHASE_STEPS = 600
_FAILURE_STEPS = 2500
_PHASES: tuple[tuple[str, PowerBudget], ...] = (
    ("on", PowerBudget((PowerLimit(430.0, 0.1), PowerLimit(400.0, 1.0)))),
    ("on", PowerBudget((PowerLimit(5000.0, 0.1),))),
    ("on", PowerBudget()),
    ("on", PowerBudget((PowerLimit(420.0, 0.05),), ramp_watts_per_second=300.0)),
    ("shadow", PowerBudget((PowerLimit(450.0, 0.5),))),
    ("off", PowerBudget((PowerLimit(450.0, 0.5),))),
    ("on", PowerBudget((PowerLimit(410.0, 2.0),))),
)
_CLOCKS_HERTZ = (1.98e9, 1.83e9, 1.71e9)


class _Status(enum.Enum):
    WAITING = 1
    RUNNING = 2


@dataclass(slots=True, eq=False)
class _Request:
    """The fields of vLLM's request that the shaper reads."""

    request_id: str
    num_prompt_tokens: int
    max_tokens: int
    shaper_arrival_seconds: float
    num_tokens: int = 0
    num_computed_tokens: int = 0
    num_output_placeholders: int = 0
    next_decode_eligible_step: int = 0
    is_prefill_chunk: bool = False
    status: _Status = _Status.WAITING

    def __post_init__(self) -> None:
        self.num_tokens = self.num_prompt_tokens


@dataclass(frozen=True, slots=True)
class _Output:
    num_scheduled_tokens: dict[str, int]
    total_num_scheduled_tokens: int


@dataclass(slots=True)
class StubScheduler:
    """vLLM's asynchronous scheduler as far as the shaper sees it: no KV cache, no tokens."""

    running: list[_Request] = field(default_factory=list)
    waiting: list[_Request] = field(default_factory=list)
    requests: dict[str, _Request] = field(default_factory=dict)
    current_step: int = 0
    num_spec_tokens: int = 0
    max_num_scheduled_tokens: int = 8192
    max_num_active_reqs: int = 256
    max_num_running_reqs: int = 256
    scheduler_config: Any = field(
        default_factory=lambda: SimpleNamespace(
            long_prefill_token_threshold=0, enable_chunked_prefill=True
        )
    )

    def add(self, request: _Request) -> None:
        """A request arrives."""
        self.requests[request.request_id] = request
        self.waiting.append(request)

    def abort(self, request: _Request) -> None:
        """Its client hangs up."""
        del self.requests[request.request_id]
        (self.running if request in self.running else self.waiting).remove(request)

    def schedule(self) -> _Output:
        """The next step: running requests first, then waiting ones, while tokens last."""
        self.current_step += 1
        budget, scheduled = self.max_num_scheduled_tokens, {}
        for request in self.running:
            budget -= self._take(request, budget, scheduled)
        while self.waiting and budget > 0 and len(self.running) < self.max_num_active_reqs:
            request = self.waiting.pop(0)
            request.status = _Status.RUNNING
            self.running.append(request)
            budget -= self._take(request, budget, scheduled)
        return _Output(scheduled, sum(scheduled.values()))

    def _take(self, request: _Request, budget: int, scheduled: dict[str, int]) -> int:
        computed, placeholders = request.num_computed_tokens, request.num_output_placeholders
        last = request.num_prompt_tokens + request.max_tokens
        if placeholders and computed + 2 - placeholders >= last:
            return 0
        if self.current_step < request.next_decode_eligible_step:
            return 0
        tokens = min(request.num_tokens + placeholders - computed, budget)
        if tokens <= 0:
            return 0
        scheduled[request.request_id] = tokens
        request.num_computed_tokens = computed = computed + tokens
        request.is_prefill_chunk = computed < request.num_tokens + placeholders
        if not request.is_prefill_chunk:
            request.num_output_placeholders += 1
        return tokens

    def update(self, output: _Output) -> None:
        """A step is back: each request that was past its prompt has one more token."""
        for name in output.num_scheduled_tokens:
            request = self.requests.get(name)
            if request is None or not request.num_output_placeholders:
                continue
            request.num_output_placeholders -= 1
            request.num_tokens += 1
            if request.num_tokens - request.num_prompt_tokens >= request.max_tokens:
                del self.requests[name]
                self.running.remove(request)


class SyntheticEngine:
    """A live shaper over the stub, its traffic, and a meter with an energy counter."""

    def __init__(self, seed: int = 0) -> None:
        shape = ModelShape.from_hf_config(
            json.loads((model_directory(MODEL) / "config.json").read_text())
        )
        self._model = StepModel(load_profile(GPU), WorkCoefficients.from_shape(shape))
        self._random = random.Random(seed)
        self.scheduler = StubScheduler()
        self.now_seconds = 0.0
        self.steps = self._polls = self._requests = 0
        self._joules = self._metered_seconds = 0.0
        self.latest: PowerState | None = None
        self.log = DecisionLog(os.devnull)
        self._flying: list[tuple[_Output, float]] = []
        self._busy_until_seconds = 0.0
        self._fails_at = _FAILURE_STEPS
        self.shaper = LiveShaper(
            self.scheduler,
            self._new_controller,
            lambda budget: safe_cap(self._model.predict, self._model.gap_watts, budget),
            _PHASES[0][1],
            sampler=self,
            log=self.log,
            clock=lambda: self.now_seconds,
        )

    def _new_controller(self, budget: PowerBudget, now_seconds: float, full: bool) -> Controller:
        return Controller(
            self._model,
            WindowedPlanner(),
            budget,
            now_seconds,
            targets=LatencyTargets(itl_seconds=0.05, ttft_seconds=1.0),
            full=full,
        )

    def run(self, steps: int) -> None:
        """Go on until so many steps with tokens have been launched."""
        while self.steps < steps:
            self._step()

    def _step(self) -> None:
        self._stir()
        output = self.shaper.schedule(self.scheduler.schedule)
        if output.total_num_scheduled_tokens:
            self.steps += 1
            seconds = 0.004 + 2e-5 * output.total_num_scheduled_tokens
            self._busy_until_seconds = max(self.now_seconds, self._busy_until_seconds) + seconds
            self._joules += 500.0 * seconds
            self._flying.append((output, self._busy_until_seconds))
            if len(self._flying) < 2:
                return
        elif not self._flying:
            self._pass(self.now_seconds + 0.001)
            return
        done, end = self._flying.pop(0)
        self._pass(max(self.now_seconds, end))
        self.shaper.returned(done)
        self.scheduler.update(done)

    def _pass(self, until_seconds: float) -> None:
        """Time goes on, and the meter shows it a few times a second."""
        self._joules += 100.0 * (until_seconds - self.now_seconds)
        self.now_seconds = until_seconds
        phase = self.steps // _PHASE_STEPS
        if phase % 5 == 4 or until_seconds < self._metered_seconds + 0.02:
            return  # now and then nobody reads the sensor
        self._metered_seconds = until_seconds
        refreshed = until_seconds // _METER_SECONDS
        joules = self._joules if self.latest is None else self.latest.energy_joules
        if self.latest is None or self.latest.sampled_seconds // _METER_SECONDS != refreshed:
            joules = self._joules
            self.log.drain()
        self.latest = PowerState(
            until_seconds,
            1,
            energy_joules=joules,
            sm_clock_hertz=_CLOCKS_HERTZ[phase % len(_CLOCKS_HERTZ)],
            temperature_celsius=float(50 + phase % 3),
        )

    def _stir(self) -> None:
        rng, scheduler = self._random, self.scheduler
        while len(scheduler.requests) < _RUNNING:
            self._requests += 1
            scheduler.add(
                _Request(
                    f"request-{self._requests}",
                    rng.randint(20, 600),
                    rng.randint(5, 60),
                    self.now_seconds,
                )
            )
        if rng.random() < 0.01:
            scheduler.abort(rng.choice(list(scheduler.requests.values())))
        mode, budget = _PHASES[self.steps // _PHASE_STEPS % len(_PHASES)]
        self.shaper.set_budget(budget)
        self.shaper.set_mode(mode)  # type: ignore[arg-type]
        if self.steps >= self._fails_at:
            self._fails_at = self.steps + _FAILURE_STEPS
            self.shaper._controller = _Broken()  # type: ignore[assignment]


class _Broken:
    """A controller that fails at any use."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("a failure on purpose")


@dataclass(frozen=True, slots=True)
class Memory:
    """What Python holds after some steps of a run."""

    steps: int
    virtual_seconds: float
    traced_bytes: int
