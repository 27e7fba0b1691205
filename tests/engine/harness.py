"""One engine in virtual time that can be attacked, with what is measured of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from shaper.core.types import Decision, PowerLimit
from shaper.gpu.reader import GpuReader
from shaper.ipc.flex import CLASS_ARGUMENT
from shaper.recording.format import RecordedStep
from tests.engine.attack import FaultyReader, Mood, StallingSampler

GPU, MODEL = "h200-sxm", "llama-3.1-8b"
GRID_SECONDS = 0.001
BLOCK_TOKENS = 16


def random_traffic(
    seed: int, count: int = 60, rate: float = 8.0
) -> list[tuple[float, list[int], int]]:
    """Arrivals as (seconds, prompt, output tokens): bursts, long and short prompts, some sharing
    a prefix."""
    rng = random.Random(seed)
    shared = [rng.randrange(256) for _ in range(640)]
    traffic, now = [], 0.0
    for _ in range(count):
        now += rng.expovariate(rate) if rng.random() > 0.3 else 0.0
        length = min(12_000, max(1, int(rng.lognormvariate(6.3, 1.1))))
        prompt = [rng.randrange(256) for _ in range(length)]
        if rng.random() < 0.3:
            prompt = shared + prompt
        traffic.append((now, prompt, rng.randint(1, 200)))
    return traffic


class RecordingLog:
    """Keeps every decision and every step."""

    def __init__(self) -> None:
        self.decisions: list[Decision] = []
        self.steps: list[RecordedStep] = []

    def add(self, decision: Decision, meter_watts: float | None) -> None:
        self.decisions.append(decision)

    def record(self, step: RecordedStep) -> None:
        self.steps.append(step)


@cache
def config_of(asynchronous: bool = True, priorities: bool = False, gpus: int = 1) -> Any:
    """vLLM's configuration, once a process."""
    from shaper.simulate.engine import engine_config

    return engine_config(
        MODEL,
        GPU,
        async_scheduling=asynchronous,
        scheduling_policy="priority" if priorities else "fcfs",
        tensor_parallel_size=gpus,
    )


@dataclass
class Attacked:
    """The engine, and where to attack it."""

    engine: Any
    config: Any
    reader: FaultyReader
    sampler: StallingSampler
    log: RecordingLog
    mood: Mood
    outputs: list[tuple[float, dict[str, int]]] = field(default_factory=list)
    """Of each step: when it was scheduled, and tokens by request."""

    @property
    def shaper(self) -> Any:
        return self.engine.scheduler.shaper

    def add(
        self,
        name: str,
        prompt: Sequence[int],
        output_tokens: int,
        priority: int = 0,
        flex: bool = False,
    ) -> None:
        """A request arrives now."""
        from shaper.simulate.engine import new_request

        request = new_request(name, list(prompt), output_tokens, self.config)
        request.priority = priority
        request.sampling_params.extra_args = {CLASS_ARGUMENT: "flex"} if flex else None
        self.engine.add(request)

    def abort(self, names: Sequence[str]) -> None:
        """Clients hang up."""
        from vllm.v1.request import RequestStatus

        self.engine.scheduler.finish_requests(names, RequestStatus.FINISHED_ABORTED)

    def serve(self, traffic: Sequence[tuple[float, list[int], int]], until: float) -> None:
        """Serve (arrival, prompt, output tokens) in their order, up to a time."""
        for index, (arrival, prompt, tokens) in enumerate(traffic):
            if arrival >= until:
                break
            self.engine.run_until(arrival)
            self.add(f"r{index}", prompt, tokens)
        self.engine.run_until(until)


def attacked(
    limits: Sequence[PowerLimit],
    *,
    asynchronous: bool = True,
    priorities: bool = False,
    gpus: int = 1,
    on_output: Callable[[Any], None] | None = None,
    **settings: Any,
) -> Attacked:
    """An engine under attack; `settings` are those of `new_engine`."""
    from shaper.simulate.build import new_engine

    config = config_of(asynchronous, priorities, gpus)
    log, readers = RecordingLog(), []
    outputs: list[tuple[float, dict[str, int]]] = []

    def faults(reader: GpuReader) -> GpuReader:
        readers.append(FaultyReader(reader))
        return readers[0]

    def seen(output: Any) -> None:
        outputs.append((engine.now_seconds, dict(output.num_scheduled_tokens)))
        if on_output is not None:
            on_output(output)

    mood = Mood()
    engine = new_engine(
        config,
        GPU,
        limits,
        log=log,
        faults=faults,
        on_output=seen,
        admission=mood if settings.get("supervise") else None,
        **settings,
    )
    shaper = engine.scheduler.shaper
    # Looked up at each call, so that it can be made to raise.
    shaper._record_step = lambda step: log.record(step)
    sampler = shaper._sampler = StallingSampler(shaper._sampler)
    return Attacked(engine, config, readers[0], sampler, log, mood, outputs)


def sliding(segments: np.ndarray, window_seconds: float) -> tuple[np.ndarray, np.ndarray]:
    """Ends and mean watts of every window of true power, each millisecond."""
    edges = np.concatenate(([segments[0, 0]], segments[:, 1]))
    joules = np.concatenate(([0.0], np.cumsum((segments[:, 1] - segments[:, 0]) * segments[:, 2])))
    ends = np.arange(edges[0] + window_seconds, edges[-1], GRID_SECONDS)
    spent = np.interp(ends, edges, joules) - np.interp(ends - window_seconds, edges, joules)
    return ends, spent / window_seconds


def worst_ratio(
    segments: np.ndarray,
    limit: PowerLimit,
    start_seconds: float = 0.0,
    end_seconds: float = np.inf,
) -> float:
    """Greatest mean of a window that lies wholly between two times, over the limit."""
    ends, means = sliding(segments, limit.window_seconds)
    inside = (ends - limit.window_seconds >= start_seconds) & (ends <= end_seconds)
    return float(means[inside].max() / limit.watts) if inside.any() else 0.0


def gaps(engine: Any) -> list[float]:
    """Seconds between a request's tokens, of all requests."""
    records = engine.requests.values()
    return [b - a for record in records for a, b in pairwise(record.token_seconds)]
