"""Whether the shaper's memory stays the same: `python -m bench.overhead --memory`.

A live shaper (controller, ledger, estimator, tally, levers, decision log) takes steps of a
stub in the place of vLLM's scheduler, in virtual time and one after the other: no model, no
GPU and no vLLM. What could grow is stirred all the time: each request has an id of its own,
some are aborted, budgets and modes change, the controller fails now and then, clocks move,
the sensor is lost and comes back. Objects are counted, not traced: `tracemalloc` makes the
steps six times as long.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

from bench.harness.stub_scheduler import StubOutput, StubRequest, StubScheduler
from shaper.core.controller import Controller
from shaper.core.model.power_model import StepModel
from shaper.core.model.shape import ModelShape
from shaper.core.model.work import WorkCoefficients
from shaper.core.policy.windowed import WindowedPlanner
from shaper.core.types import LatencyTargets, PowerBudget, PowerLimit, PowerState
from shaper.emulator.models import model_directory
from shaper.engine.decision_log import DecisionLog
from shaper.engine.fallback_cap import fallback_cap
from shaper.engine.runtime import LiveShaper
from shaper.gpu.profiles import load_profile

GPU, MODEL = "h200-sxm", "llama-3.1-8b"
# Shares of the run at which memory is told.
CHECKPOINTS = (0.1, 0.25, 0.5, 0.75, 1.0)
_RUNNING = 8
_METER_SECONDS = 0.1
# Each holds for so many steps; all of them come by in the first tenth of a run of 50,000.
_PHASE_STEPS = 600
_FAILURE_STEPS = 10_000
_PHASES_LOOKED_AT = 6
_PHASES: tuple[tuple[str, PowerBudget], ...] = (
    ("on", PowerBudget((PowerLimit(620.0, 0.1), PowerLimit(600.0, 1.0)))),
    ("on", PowerBudget((PowerLimit(5000.0, 0.1),))),
    ("on", PowerBudget()),
    ("on", PowerBudget((PowerLimit(640.0, 0.05),), ramp_watts_per_second=500.0)),
    ("shadow", PowerBudget((PowerLimit(450.0, 0.5),))),
    ("off", PowerBudget((PowerLimit(450.0, 0.5),))),
    ("on", PowerBudget((PowerLimit(600.0, 2.0),))),
)
_CLOCKS_HERTZ = (1.98e9, 1.83e9, 1.71e9)


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
        self.steps = self.arrived = 0
        self._joules = self._metered_seconds = 0.0
        self.latest: PowerState | None = None
        self.log = DecisionLog(os.devnull)
        self._flying: list[tuple[StubOutput, float]] = []
        self._busy_until_seconds = 0.0
        self._fails_at = _FAILURE_STEPS
        self.shaper = LiveShaper(
            self.scheduler,
            self._new_controller,
            lambda budget: fallback_cap(self._model.predict, self._model.gap_watts, budget),
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

    def close(self) -> None:
        """Let go of the log's file."""
        self.log.close()

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
            self.arrived += 1
            scheduler.add(
                StubRequest(
                    f"request-{self.arrived}",
                    64 * rng.randint(1, 10),
                    rng.randint(5, 120),
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
    """What is held after some steps of a run."""

    steps: int
    virtual_seconds: float
    requests: int
    failures: int
    held_bytes: int
    """By all that can be reached from the shaper and its stub."""
    blocks: int
    """Of the whole process, as Python's allocator counts them."""


def measure(steps: int) -> Iterator[Memory]:
    """Memory at each of the `CHECKPOINTS` of a run of so many steps, as soon as it is there.

    Buffers fill and empty by the phases, so the least of the last few phases is taken.
    """
    with _silent(), closing(SyntheticEngine()) as engine:
        for share in CHECKPOINTS:
            end = round(share * steps)
            held, blocks = [], []
            for phases in reversed(range(_PHASES_LOOKED_AT)):
                engine.run(end - phases * _PHASE_STEPS)
                gc.collect()
                held.append(held_bytes(engine))
                blocks.append(sys.getallocatedblocks())
            errors = engine.shaper.counters.errors
            yield Memory(
                engine.steps, engine.now_seconds, engine.arrived, errors, min(held), min(blocks)
            )


def held_bytes(root: Any) -> int:
    """Bytes of all objects that can be reached from `root`, without code, types and modules."""
    seen, left, total = {id(root)}, [root], 0
    while left:
        each = left.pop()
        total += sys.getsizeof(each)
        if isinstance(each, FunctionType):
            referents = list(each.__closure__ or ())
        else:
            referents = gc.get_referents(each)
        for one in referents:
            if id(one) not in seen and not isinstance(one, type | ModuleType | BuiltinFunctionType):
                seen.add(id(one))
                left.append(one)
    return total


@contextmanager
def _silent() -> Iterator[None]:
    """The failures on purpose are counted; their log lines would be all that one sees."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def show(steps: int) -> None:
    """Print the memory of a run as Markdown, and what it gained in its second half."""
    print("| steps | virtual seconds | requests | failures | held kB | blocks |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    memories = []
    for one in measure(steps):
        memories.append(one)
        print(
            f"| {one.steps:,} | {one.virtual_seconds:,.0f} | {one.requests:,} | {one.failures} "
            f"| {one.held_bytes / 1e3:,.0f} | {one.blocks:,} |",
            flush=True,
        )
    held, blocks = grown(memories)
    print(f"\nfrom half of the steps to their end: {held / 1e3:+,.0f} kB, {blocks:+,} blocks")


def grown(memories: Sequence[Memory]) -> tuple[int, int]:
    """Bytes and blocks held at the end more than at half of the run."""
    half, last = memories[CHECKPOINTS.index(0.5)], memories[-1]
    return last.held_bytes - half.held_bytes, last.blocks - half.blocks
