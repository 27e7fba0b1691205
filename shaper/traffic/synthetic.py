"""Seeded conversation traffic with the statistics of a recorded trace.

Lengths: a prompt length by inverting the recorded quantile function, then an
output length by inverting that of the recorded prompts of about that length.

Arrivals: a Poisson process whose rate fluctuates. The relative rate is a
product of log-normal factors, one per time scale, each the exponential of an
Ornstein-Uhlenbeck process with the variance and correlation time that
`bench.studies.summarise` found. What is slower than the run itself can't show in it:
the mean rate over the run is the one asked for.

Not kept: the weak correlation of successive requests' lengths (about 0.1).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shaper.traffic.workload import TimedRequest, Workload

FloatArray = NDArray[np.float64]

SUMMARY_PATH = Path(__file__).with_name("conversation.json")
# A quarter of the fastest fluctuation (0.2 s).
_GRID_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class ConversationSummary:
    """What `bench.studies.summarise` keeps of a trace; see there for the meaning."""

    source: str
    rate_hertz: float
    prompt_levels: tuple[float, ...]
    prompt_tokens: tuple[int, ...]
    output_levels: tuple[float, ...]
    output_prompt_edges: tuple[int, ...]
    output_tokens: tuple[tuple[int, ...], ...]
    rate_correlation_seconds: tuple[float, ...]
    rate_relative_variances: tuple[float, ...]


def load_summary(path: Path = SUMMARY_PATH) -> ConversationSummary:
    """The summary that ships with the benchmark: Azure's 2023 conversation trace."""
    data: dict[str, Any] = json.loads(path.read_text())
    data["output_tokens"] = [tuple(row) for row in data["output_tokens"]]
    data = {key: tuple(x) if isinstance(x, list) else x for key, x in data.items()}
    return ConversationSummary(
        **{field.name: data[field.name] for field in fields(ConversationSummary)}
    )


def synthesise(
    duration_seconds: float,
    rate_hertz: float | None = None,
    seed: int = 0,
    summary: ConversationSummary | None = None,
) -> Workload:
    """Conversation traffic of a given length and mean rate.

    Args:
        duration_seconds: arrivals fall within `[0, duration)`.
        rate_hertz: mean requests per second; None: the recorded trace's.
        seed: the same seed gives the same traffic.
        summary: None: the one that ships.

    Raises:
        ValueError: a duration or rate that is not above 0.
    """
    summary = summary or load_summary()
    rate_hertz = summary.rate_hertz if rate_hertz is None else rate_hertz
    for name, value in (("duration", duration_seconds), ("rate", rate_hertz)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"a {name} of {value:g} is not above 0")
    rng = np.random.default_rng(seed)
    arrivals = _arrivals(summary, duration_seconds, rate_hertz, rng)
    prompts = _prompt_lengths(summary, rng.random(len(arrivals)))
    outputs = _output_lengths(summary, prompts, rng.random(len(arrivals)))
    requests = tuple(
        TimedRequest(float(arrival), int(prompt), int(output))
        for arrival, prompt, output in zip(arrivals, prompts, outputs, strict=True)
    )
    name = f"synthetic conversation, {rate_hertz:g} requests/s for {duration_seconds:g} s"
    return Workload(name, requests, seed)


def _arrivals(
    summary: ConversationSummary,
    duration_seconds: float,
    rate_hertz: float,
    rng: np.random.Generator,
) -> FloatArray:
    steps = max(2, math.ceil(duration_seconds / _GRID_SECONDS))
    log_rate = np.zeros(steps)
    for seconds, variance in zip(
        summary.rate_correlation_seconds, summary.rate_relative_variances, strict=True
    ):
        if variance:
            log_rate += math.sqrt(math.log1p(variance)) * _correlated_noise(steps, seconds, rng)
    expected = np.concatenate(([0.0], np.cumsum(np.exp(log_rate))))
    expected *= rate_hertz * duration_seconds / expected[-1]
    # A Poisson process of rate 1 in expected arrivals, seen in time.
    count = rng.poisson(expected[-1])
    places = np.sort(rng.uniform(0.0, expected[-1], count))
    times = np.interp(places, expected, np.linspace(0.0, duration_seconds, steps + 1))
    return np.asarray(times, dtype=np.float64)


def _correlated_noise(
    steps: int, correlation_seconds: float, rng: np.random.Generator
) -> FloatArray:
    """Ornstein-Uhlenbeck noise of variance 1 on the grid, exact at its points."""
    keep = math.exp(-_GRID_SECONDS / correlation_seconds)
    kick = math.sqrt(1.0 - keep * keep)
    noise: FloatArray = rng.standard_normal(steps)
    value = noise[0]
    for step in range(1, steps):
        value = keep * value + kick * noise[step]
        noise[step] = value
    return noise


def _prompt_lengths(summary: ConversationSummary, levels: FloatArray) -> FloatArray:
    lengths = np.interp(levels, summary.prompt_levels, summary.prompt_tokens)
    return np.asarray(np.maximum(1.0, np.rint(lengths)), dtype=np.float64)


def _output_lengths(
    summary: ConversationSummary, prompts: FloatArray, levels: FloatArray
) -> FloatArray:
    bins = np.searchsorted(summary.output_prompt_edges, prompts, side="left")
    lengths = np.empty_like(prompts)
    for index, tokens in enumerate(summary.output_tokens):
        here = bins == index
        lengths[here] = np.interp(levels[here], summary.output_levels, tokens)
    return np.asarray(np.maximum(1.0, np.rint(lengths)), dtype=np.float64)
