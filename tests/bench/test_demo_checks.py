"""What the demo makes of several servers' power and latency, and what it judges."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bench.harness.client import Replay, RequestRecord
from bench.harness.live import Comparison, LiveSettings, deal, sum_power
from bench.harness.tables import comparison_checks, steady_tokens_per_second
from shaper.core.types import PowerLimit
from shaper.emulator.trace import PowerTrace, Stall
from shaper.traffic.synthetic import synthesise
from shaper.traffic.workload import TimedRequest, Workload


def made_up(
    name: str,
    replay: Any = None,
    *,
    worst: float = 0.9,
    unstalled: float = 0.9,
    itl_seconds: float = 0.01,
    stalled: float = 0.0,
    lag_seconds: float = 0.0,
) -> Any:
    """A run with the figures that checks look at."""
    limits = [
        SimpleNamespace(
            worst_ratio=worst, windows=9, unstalled_worst_ratio=unstalled, unstalled_windows=1
        )
    ]
    return SimpleNamespace(
        name=name,
        replay=replay or SimpleNamespace(max_loop_lag_seconds=lag_seconds),
        power=SimpleNamespace(limits=limits, stalled_window_share=stalled),
        latency=SimpleNamespace(requests_failed=0, itl_seconds=SimpleNamespace(p99=itl_seconds)),
    )


@pytest.mark.parametrize(
    ("figures", "found"),
    [
        ({}, [True, True, True, True]),
        ({"itl_seconds": 0.02}, [True, True, False, True]),
        ({"itl_seconds": 0.02, "stalled": 0.2}, [True, True, None, True]),
        ({"itl_seconds": 0.02, "lag_seconds": 0.05}, [True, True, None, True]),
        ({"worst": 1.2}, [None, True, True, True]),
        ({"worst": 1.2, "unstalled": 1.1}, [False, False, True, True]),
        ({"worst": 1.2, "unstalled": 1.1, "stalled": 0.2}, [None, None, True, True]),
    ],
)
def test_a_busy_machine_is_named_and_the_shaper_not_blamed(
    figures: dict[str, float], found: list[bool | None]
) -> None:
    """What a host that is late spoils is not judged, and the line says so."""
    runs = (made_up("unshaped"), made_up("shaped", **figures))
    comparison = Comparison(LiveSettings(Workload("w", ()), Path()), PowerLimit(900.0, 0.1), runs)
    checks = comparison_checks(comparison)
    assert [held for held, _ in checks] == found
    assert all("this machine" in text for held, text in checks if held is None)


def test_every_request_is_dealt_once() -> None:
    """In turn, at its own time."""
    load = synthesise(20.0, 5.0, seed=1)
    parts = deal(load, 3)
    assert sorted(r.arrival_seconds for part in parts for r in part.requests) == [
        r.arrival_seconds for r in load.requests
    ]
    assert max(len(part.requests) for part in parts) <= len(load.requests) // 3 + 1
    assert parts[1].requests[0] == load.requests[1]


def test_power_is_added_up_on_one_clock() -> None:
    """Traces that start at different times and off the grid keep their joules where they lie."""
    first = PowerTrace(np.array([[0.0, 0.0104, 100.0], [0.0104, 0.05, 500.0]]))
    second = PowerTrace(np.array([[0.0203, 0.0300, 700.0]]), (Stall(0.025, 0.003),))
    grids, total = sum_power([first, second], 0.0, 0.04)
    assert len(total.watts) == 40
    assert total.joules == pytest.approx(0.0104 * 100 + 0.0296 * 500 + 0.0097 * 700)
    assert grids[1].watts[20] == pytest.approx(490.0)  # 0.7 ms of 700 W
    assert grids[1].watts[30:].tolist() == pytest.approx([0.0] * 10)
    assert total.stalls == (Stall(0.025, 0.003),)


@pytest.mark.parametrize(
    ("tokens", "held"), [(10, True), (9, False)], ids=["all-in-time", "a-tenth-late"]
)
def test_throughput_is_judged_while_requests_arrive(tokens: int, held: bool) -> None:
    """What comes before the first quarter is over, or after the last arrival, counts for none."""

    def run(each_second: int) -> Any:
        seconds = np.arange(0.0, 60.0, 1 / each_second, dtype=np.float64) + 100.0
        records = [RequestRecord(TimedRequest(0.0, 1, 1), 100.0, 100.0, seconds, 2 * len(seconds))]
        for lost in (np.full(5000, 105.0), np.full(5000, 141.0)):
            records.append(RequestRecord(TimedRequest(40.0, 1, 1), 100.0, 100.0, lost, len(lost)))
        replay = Replay(tuple(records), 100.0, 160.0, 0.0, 0.0)
        return made_up("shared", replay=replay)

    load = Workload("test", (TimedRequest(0.0, 1, 1), TimedRequest(40.0, 1, 1)))
    limit, settings = PowerLimit(900.0, 0.1), LiveSettings(load, Path(), servers=2)
    comparison = Comparison(settings, limit, (run(10), run(tokens)))
    assert steady_tokens_per_second(comparison, comparison.runs[0]) == pytest.approx(20.0, rel=0.01)
    assert [each for each, _ in comparison_checks(comparison)] == [True, True, held, True]
    short = replace(comparison, settings=replace(settings, workload=load.clipped(20.0)))
    assert comparison_checks(short)[2][0] is None
