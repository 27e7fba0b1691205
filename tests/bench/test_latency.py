"""Latency figures against hand calculations."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bench.harness.client import Replay, RequestRecord
from bench.harness.latency import bench_serve_keys, latency_figures
from shaper.traffic.workload import TimedRequest


def record(
    sent: float, tokens: list[float], output_tokens: int | None = None, error: str | None = None
) -> RequestRecord:
    return RequestRecord(
        TimedRequest(sent, 10, len(tokens)),
        sent,
        sent,
        np.array(tokens),
        len(tokens) if output_tokens is None else output_tokens,
        error,
    )


def replay_of(*records: RequestRecord) -> Replay:
    ends = [r.token_seconds[-1] for r in records if len(r.token_seconds)]
    return Replay(records, 0.0, max(ends, default=0.0), 0.1, 0.0)


def test_by_hand() -> None:
    """TTFT, ITL, TPOT, end-to-end and rates of two requests."""
    figures = latency_figures(
        replay_of(record(0.0, [0.5, 0.6, 0.8]), record(1.0, [1.1, 1.2, 1.3, 1.4, 2.0]))
    )
    assert figures.ttft_seconds.max == pytest.approx(0.5)
    assert figures.ttft_seconds.p50 == pytest.approx(0.3)
    assert figures.itl_seconds.mean == pytest.approx((0.3 + 0.9) / 6)
    assert figures.itl_seconds.max == pytest.approx(0.6)
    assert figures.tpot_seconds.max == pytest.approx(0.9 / 4)
    assert figures.e2el_seconds.mean == pytest.approx((0.8 + 1.0) / 2)
    assert figures.duration_seconds == pytest.approx(2.0)
    assert figures.output_tokens_per_second == pytest.approx(4.0)
    assert figures.requests_per_second == pytest.approx(1.0)
    assert figures.prompt_tokens == 20


def test_failures_are_counted_and_otherwise_left_out() -> None:
    """A failed request gives no latency, and its message is kept with a count."""
    figures = latency_figures(
        replay_of(
            record(0.0, [0.1, 0.2]),
            record(0.0, [9.0], error="cut"),
            record(0.0, [], error="cut"),
            record(0.0, [], error="HTTP 500"),
        )
    )
    assert (figures.requests_finished, figures.requests_failed) == (1, 3)
    assert figures.errors == (("cut", 2), ("HTTP 500", 1))
    assert figures.ttft_seconds.max == pytest.approx(0.1)
    assert figures.output_tokens == 2


def test_nothing_finished() -> None:
    """Without a finished request latencies are missing and rates are 0."""
    figures = latency_figures(replay_of(record(0.0, [], error="HTTP 500")))
    assert math.isnan(figures.itl_seconds.p99)
    assert math.isnan(figures.ttft_seconds.p50)
    assert figures.output_tokens_per_second == 0.0


def test_a_single_token_has_no_inter_token_latency() -> None:
    """One token: TPOT is 0, as in vLLM, and there is no ITL."""
    figures = latency_figures(replay_of(record(0.0, [0.5])))
    assert figures.tpot_seconds.max == 0.0
    assert math.isnan(figures.itl_seconds.max)


def test_late_sends_are_counted() -> None:
    """Leaving over 20 ms after due counts, by less does not."""
    late = RequestRecord(TimedRequest(0.0, 1, 1), 1.0, 1.05, np.array([2.0]), 1)
    slightly = RequestRecord(TimedRequest(0.0, 1, 1), 1.0, 1.01, np.array([2.0]), 1)
    figures = latency_figures(replay_of(late, slightly))
    assert figures.late_sends == 1
    assert figures.max_late_seconds == pytest.approx(0.05)


def test_names_of_vllm_bench_serve() -> None:
    """The same figures carry vLLM's names, in milliseconds."""
    keys = bench_serve_keys(latency_figures(replay_of(record(0.0, [0.5, 0.6, 0.8]))))
    assert keys["mean_ttft_ms"] == pytest.approx(500.0)
    assert keys["median_itl_ms"] == pytest.approx(150.0)
    assert keys["p99_e2el_ms"] == pytest.approx(800.0)
    assert keys["completed"] == 1
