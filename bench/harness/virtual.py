"""One engine in virtual time under a load, and its figures: vLLM's real scheduler, no sleeping.

Power is the emulated GPU's true power on a grid of 1 ms (`shaper.traffic.figures` has the
windows). Latency is defined as in `bench.harness.latency`, but for requests that the end of a
run cuts off: one without a first token counts in TTFT with the time it has waited, so
that a queue which never moves is not left out; its tokens count in the throughput.
"""

from __future__ import annotations

import bisect
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shaper.core.policy import Policy
from shaper.core.policy.windowed import WindowedPlanner
from shaper.core.types import Decision, PowerBudget, PowerLimit, Reason
from shaper.simulate.build import new_engine
from shaper.simulate.engine import engine_config, new_request
from shaper.traffic.figures import GRID_SECONDS, PowerGrid, window_means
from shaper.traffic.quantiles import Quantiles, quantiles
from shaper.traffic.workload import TimedRequest, Workload, prompt_token_ids

FloatArray = NDArray[np.float64]

GPU, MODEL = "h200-sxm", "llama-3.1-8b"
# What 0.9 of an H200's memory leaves beside the weights, in blocks of 16 tokens.
KV_BLOCKS = 50_000


@dataclass(frozen=True, slots=True)
class Setup:
    """What an engine is built from. `limits=None` is vLLM's own scheduler, unshaped."""

    limits: tuple[PowerLimit, ...] | None = None
    policy: Callable[[], Policy] = WindowedPlanner
    itl_seconds: float | None = None
    spend_slack: bool = False
    power_cap_watts: float | None = None
    """The emulated driver's own power cap; None: the GPU's default."""
    supervise: bool = False
    """Judge health and heat, as a live engine does."""
    ambient_celsius: float | None = None
    """Of the air at the GPU's inlet; None: the profile's."""


@dataclass(frozen=True, slots=True)
class RunFigures:
    """What came of one run."""

    seconds: float
    requests: int
    unfinished: int
    tokens: int
    """Output tokens, those of unfinished requests included."""
    joules: float
    peak_watts: float
    """Highest mean of 100 ms."""
    ttft_seconds: Quantiles
    itl_seconds: Quantiles
    e2el_seconds: Quantiles
    """Of finished requests."""
    kv_mean_ratio: float
    kv_peak_ratio: float
    preemptions: int
    forced: int

    @property
    def tokens_per_second(self) -> float:
        """Output tokens over the run's seconds."""
        return self.tokens / self.seconds

    @property
    def joules_per_token(self) -> float:
        """All joules of the run, idle ones too, per output token."""
        return self.joules / self.tokens if self.tokens else float("nan")

    @property
    def mean_watts(self) -> float:
        """Over the whole run."""
        return self.joules / self.seconds


@cache
def _config() -> Any:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    return engine_config(MODEL, GPU)


class VirtualRun:
    """An engine, its load so far and what it did.

    Args:
        setup: what it is built from.
        seed: of the prompts' text.
    """

    def __init__(self, setup: Setup, seed: int = 0) -> None:
        self._config = _config()
        self._seed = seed
        self._count = itertools.count()
        self._kv_sum = self._kv_peak = 0.0
        self._kv_steps = self._preemptions = 0
        self._replayed_seconds = 0.0
        self._crowd: list[str] = []
        self._segments: list[FloatArray] = []
        self.reasons: Counter[Reason] = Counter()
        self.engine = new_engine(
            self._config,
            GPU,
            setup.limits,
            policy=setup.policy,
            itl_target_seconds=setup.itl_seconds,
            spend_slack=setup.spend_slack,
            kv_blocks=KV_BLOCKS,
            supervise=setup.supervise,
            ambient_celsius=setup.ambient_celsius,
            log=self,
            on_output=self._on_output,
        )
        if setup.power_cap_watts is not None:
            self.engine.gpus.set_power_cap(setup.power_cap_watts)

    def add(self, decision: Decision, meter_watts: float | None) -> None:
        """Counts a decision."""
        self.reasons[decision.reason] += 1

    def _on_output(self, output: Any) -> None:
        used = float(self.engine.scheduler.kv_cache_manager.usage)
        self._kv_sum += used
        self._kv_peak = max(self._kv_peak, used)
        self._kv_steps += 1
        self._preemptions += len(output.preempted_req_ids or ())

    @property
    def now_seconds(self) -> float:
        """The engine's time."""
        return self.engine.now_seconds

    def send(self, request: TimedRequest) -> str:
        """A request arrives now; returns its id."""
        index = next(self._count)
        prompt = prompt_token_ids(request, index, self._seed)
        name = f"r{index}"
        self.engine.add(new_request(name, prompt, request.output_tokens, self._config))
        return name

    def replay(
        self, workload: Workload, until_seconds: float | None = None, start_seconds: float = 0.0
    ) -> None:
        """Send each request when it is due; a second call goes on where the first stopped.

        Args:
            workload: what to send.
            until_seconds: stop then, whatever is left; None: when all is served.
            start_seconds: engine time at which the workload begins.
        """
        engine = self.engine
        for request in workload.requests:
            due = start_seconds + request.arrival_seconds
            if due < self._replayed_seconds:
                continue
            if until_seconds is not None and due >= until_seconds:
                break
            engine.run_until(due)
            self.send(request)
            # Two may be due at once.
            self._replayed_seconds = due
        if until_seconds is not None:
            self._replayed_seconds = until_seconds
            engine.run_until(until_seconds)
            return
        while engine.busy:
            engine.step()

    def crowd(self, source: Iterator[TimedRequest], clients: int, until_seconds: float) -> None:
        """So many clients that each send a next request when their last one is answered."""
        engine, names = self.engine, self._crowd
        names += [self.send(next(source)) for _ in range(clients - len(names))]
        while engine.now_seconds < until_seconds:
            engine.step()
            for place, name in enumerate(names):
                if engine.requests[name].finished_seconds is not None:
                    names[place] = self.send(next(source))

    def set_limits(self, limits: tuple[PowerLimit, ...]) -> None:
        """Put other limits in force, from the next step on."""
        self.engine.scheduler.shaper.set_budget(PowerBudget(limits))

    def abort_all(self) -> None:
        """Every client hangs up."""
        from vllm.v1.request import RequestStatus

        scheduler = self.engine.scheduler
        scheduler.finish_requests(list(scheduler.requests), RequestStatus.FINISHED_ABORTED)

    def grid(self) -> PowerGrid:
        """True power so far, by millisecond from time 0."""
        self.engine.gpus.advance(self.now_seconds)
        self._segments.append(self.engine.gpus.take_segments())
        rows = np.concatenate(self._segments)
        self._segments = [rows]
        joules = np.concatenate(([0.0], np.cumsum((rows[:, 1] - rows[:, 0]) * rows[:, 2])))
        times = np.concatenate(([rows[0, 0]], rows[:, 1]))
        edges = np.arange(0, int(times[-1] / GRID_SECONDS) + 1) * GRID_SECONDS
        watts = np.diff(np.interp(edges, times, joules)) / GRID_SECONDS
        return PowerGrid(0.0, np.asarray(watts, dtype=np.float64))

    def tokens_until(self, seconds: float) -> int:
        """Output tokens sent by then."""
        return sum(
            bisect.bisect_right(record.token_seconds, seconds)
            for record in self.engine.requests.values()
        )

    def ttft_seconds(self, from_seconds: float = 0.0) -> FloatArray:
        """[requests] that arrived since then; the waiting ones with what they have waited."""
        now = self.now_seconds
        return np.array(
            [
                (r.token_seconds[0] if r.token_seconds else now) - r.arrival_seconds
                for r in self.engine.requests.values()
                if r.arrival_seconds >= from_seconds
            ]
        )

    def figures(self) -> RunFigures:
        """Of the whole run, from time 0 to now."""
        records = self.engine.requests.values()
        grid = self.grid()
        means = window_means(grid, 0.1)
        finished = [
            record.finished_seconds - record.arrival_seconds
            for record in records
            if record.finished_seconds is not None
        ]
        return RunFigures(
            seconds=len(grid.watts) * GRID_SECONDS,
            requests=len(records),
            unfinished=len(records) - len(finished),
            tokens=sum(len(record.token_seconds) for record in records),
            joules=grid.joules,
            peak_watts=float(means.max()),
            ttft_seconds=quantiles(self.ttft_seconds()),
            itl_seconds=quantiles(
                np.concatenate([np.empty(0), *(np.diff(r.token_seconds) for r in records)])
            ),
            e2el_seconds=quantiles(np.array(finished)),
            kv_mean_ratio=self._kv_sum / max(1, self._kv_steps),
            kv_peak_ratio=self._kv_peak,
            preemptions=self._preemptions,
            forced=self.reasons[Reason.FORCED_OVER_BUDGET],
        )
