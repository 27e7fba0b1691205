"""Latency and throughput of a replay, with the definitions of `vllm bench serve`.

| figure | is |
|---|---|
| TTFT | first token's time less the time the request was sent |
| ITL | time between successive chunks of one stream |
| E2EL | last token's time less the time the request was sent |
| TPOT | (E2EL - TTFT) / (output tokens - 1), 0 for a single token |

Only finished requests count, but for the totals of failures.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.harness.client import Replay, RequestRecord
from shaper.traffic.quantiles import Quantiles, quantiles

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LatencyFigures:
    """What the client saw."""

    requests_finished: int
    requests_failed: int
    errors: tuple[tuple[str, int], ...]
    """Message and count, most frequent first."""
    duration_seconds: float
    prompt_tokens: int
    output_tokens: int
    output_tokens_per_second: float
    requests_per_second: float
    ttft_seconds: Quantiles
    itl_seconds: Quantiles
    tpot_seconds: Quantiles
    e2el_seconds: Quantiles
    late_sends: int
    max_late_seconds: float
    chunks_with_several_tokens: int
    """Tokens that shared a chunk with another: each hides one ITL."""


def ttft_seconds(records: list[RequestRecord]) -> FloatArray:
    """[requests] time to first token."""
    return np.array([r.token_seconds[0] - r.sent_seconds for r in records])


def e2el_seconds(records: list[RequestRecord]) -> FloatArray:
    """[requests] end-to-end latency."""
    return np.array([r.token_seconds[-1] - r.sent_seconds for r in records])


def itl_seconds(records: list[RequestRecord]) -> FloatArray:
    """[chunks after a first one] inter-token latency over all requests."""
    return np.concatenate([np.empty(0), *(np.diff(r.token_seconds) for r in records)])


def tpot_seconds(records: list[RequestRecord]) -> FloatArray:
    """[requests] mean time per output token after the first."""
    spans = np.array([r.token_seconds[-1] - r.token_seconds[0] for r in records])
    later = np.array([max(1, r.output_tokens - 1) for r in records])
    return np.asarray(spans / later, dtype=np.float64)


def finished(replay: Replay) -> list[RequestRecord]:
    """The requests that finished."""
    return [record for record in replay.records if record.error is None]


def latency_figures(replay: Replay) -> LatencyFigures:
    """All figures of a replay."""
    records = finished(replay)
    errors = Counter(record.error for record in replay.records if record.error is not None)
    duration = replay.duration_seconds
    output_tokens = sum(record.output_tokens for record in records)
    return LatencyFigures(
        requests_finished=len(records),
        requests_failed=len(replay.records) - len(records),
        errors=tuple(errors.most_common()),
        duration_seconds=duration,
        prompt_tokens=sum(record.request.prompt_tokens for record in records),
        output_tokens=output_tokens,
        output_tokens_per_second=output_tokens / duration if duration > 0 else 0.0,
        requests_per_second=len(records) / duration if duration > 0 else 0.0,
        ttft_seconds=quantiles(ttft_seconds(records)),
        itl_seconds=quantiles(itl_seconds(records)),
        tpot_seconds=quantiles(tpot_seconds(records)),
        e2el_seconds=quantiles(e2el_seconds(records)),
        late_sends=replay.late_sends,
        max_late_seconds=max((r.late_seconds for r in replay.records), default=0.0),
        chunks_with_several_tokens=sum(
            max(0, r.output_tokens - len(r.token_seconds)) for r in records
        ),
    )


def bench_serve_keys(figures: LatencyFigures) -> dict[str, float]:
    """The figures under the names that `vllm bench serve --save-result` gives them."""
    keys: dict[str, float] = {
        "duration": figures.duration_seconds,
        "completed": figures.requests_finished,
        "failed": figures.requests_failed,
        "total_input_tokens": figures.prompt_tokens,
        "total_output_tokens": figures.output_tokens,
        "request_throughput": figures.requests_per_second,
        "output_throughput": figures.output_tokens_per_second,
    }
    for name in ("ttft", "tpot", "itl", "e2el"):
        spread: Quantiles = getattr(figures, f"{name}_seconds")
        keys[f"mean_{name}_ms"] = 1e3 * spread.mean
        keys[f"median_{name}_ms"] = 1e3 * spread.p50
        keys[f"p90_{name}_ms"] = 1e3 * spread.p90
        keys[f"p99_{name}_ms"] = 1e3 * spread.p99
    return keys
