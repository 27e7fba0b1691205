"""Runs of a rack that tests make up, and a pool that makes them in no time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bench.harness import runner as pool
from bench.racks.outcome import Arrays, Outcome
from bench.racks.rows import Reference
from shaper.simulate.setup import RackSetup
from shaper.traffic.workload import TimedRequest, Workload

WORKLOAD = Workload("two requests", (TimedRequest(0.0, 8, 2), TimedRequest(1.0, 8, 2)))
RACK = RackSetup(shaped=False, duration_seconds=10.0)


def outcome(
    watts: Sequence[float] = (4000.0,), metered_ratio: float = 1.0, **changes: Any
) -> Outcome:
    """A run whose windows have these means; all else is round."""
    means = np.asarray(watts, dtype=np.float32)
    arrays = Arrays(
        means,
        means * np.float32(metered_ratio),
        np.full((2, 5), 100.0, dtype=np.float32),
        np.array([0.1, 0.2], dtype=np.float32),
        np.array([0.01, 0.02, 0.03], dtype=np.float32),
    )
    found = Outcome(
        engines=8,
        duration_seconds=120.0,
        peak_watts=float(means.max()),
        metered_peak_watts=float(means.max()) * metered_ratio,
        mean_watts=float(means.mean()),
        ttft_p50_seconds=0.1,
        ttft_p99_seconds=0.2,
        itl_p50_seconds=0.01,
        itl_p99_seconds=0.04,
        e2el_p50_seconds=2.0,
        e2el_p99_seconds=4.0,
        output_tokens_per_second=1000.0,
        tokens_per_joule=0.5,
        goodput_requests_per_second=4.0,
        requests_arrived=50,
        requests_finished=45,
        too_long_requests=0,
        kv_mean_ratio=0.01,
        kv_peak_ratio=0.02,
        preemptions=0,
        forced_steps=0,
        shaper_errors=0,
        steps=100,
        decisions=100,
        wall_seconds=4.0,
        ledger_seconds=0.005,
        arrays=arrays,
    )
    return replace(found, **changes)


REFERENCE = Reference(outcome([5000.0]), outcome([5000.0], itl_p99_seconds=0.05))


class Inline:
    """In place of the pool of processes: runs at once, with what a test makes of a rack."""

    answer: Callable[[RackSetup], Outcome]

    def __init__(self, *arguments: Any) -> None:
        pass

    def submit(self, call: object, setup: RackSetup) -> Future[Outcome]:
        future: Future[Outcome] = Future()
        future.set_result(type(self).answer(setup))
        return future

    def shutdown(self, **how: bool) -> None:
        pass


def fake_rack(setup: RackSetup) -> Outcome:
    """A rack with about the right powers: what shapes keeps its limit, clocks cut power."""
    watts = 5000.0
    if setup.gpu_clock_hertz:
        watts = 1000.0 + 4000.0 * setup.gpu_clock_hertz / 1.98e9
    if setup.group_limits:
        watts = setup.group_limits[0].watts
    return outcome([watts], ttft_p99_seconds=0.2 * 5000.0 / watts)


def fake_pool(monkeypatch: pytest.MonkeyPatch) -> list[RackSetup]:
    """No processes: `fake_rack` answers. The racks that are run, in order, as they come."""
    runs: list[RackSetup] = []

    def answer(setup: RackSetup) -> Outcome:
        runs.append(setup)
        return fake_rack(setup)

    monkeypatch.setattr(Inline, "answer", staticmethod(answer), raising=False)
    monkeypatch.setattr(pool, "ProcessPoolExecutor", Inline)
    return runs
