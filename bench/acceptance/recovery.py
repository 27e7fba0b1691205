"""Anti-windup: after minutes of saturation, is anything held back longer than the windows ask?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from bench.acceptance.signals import limits_text
from bench.acceptance.traffic import lengths
from bench.harness.aims import Column, Job, Results, Section, cases
from bench.harness.virtual import Setup, VirtualRun
from shaper.core.types import PowerLimit
from shaper.traffic.workload import TimedRequest, Workload

SATURATED_SECONDS, QUICK_SECONDS = 600.0, 60.0
# Light enough that a fresh engine never queues: what a probe waits for is the past.
PROBE = TimedRequest(0.0, 400, 30)
PROBE_SECONDS, PROBE_GAP_SECONDS = 15.0, 0.25
CLIENTS = 64
# A probe is normal when its TTFT is within this of what a fresh engine gives it; half a
# decode step is where in a step it happened to arrive.
NORMAL_RATIO, NORMAL_SECONDS = 1.1, 0.01
BUDGETS: tuple[tuple[tuple[PowerLimit, ...], float | None], ...] = (
    ((PowerLimit(430.0, 0.1),), None),
    ((PowerLimit(560.0, 0.1), PowerLimit(480.0, 1.0)), None),
    ((PowerLimit(480.0, 1.0),), 0.05),
)


def jobs(quick: bool) -> list[Job]:
    """One for each budget."""
    seconds = QUICK_SECONDS if quick else SATURATED_SECONDS
    return [Job(recover, (*each, seconds)) for each in BUDGETS[:: 2 if quick else 1]]


def recover(
    limits: tuple[PowerLimit, ...], itl_seconds: float | None, seconds: float
) -> dict[str, Any]:
    """Saturate, let every client hang up at once, and send the same probes to a fresh engine."""
    count = round(PROBE_SECONDS / PROBE_GAP_SECONDS)
    due = np.arange(count) * PROBE_GAP_SECONDS
    probes = Workload("probes", tuple(replace(PROBE, arrival_seconds=float(at)) for at in due))
    waits = []
    setup = Setup(limits, itl_seconds=itl_seconds)
    for load_seconds in (seconds, 0.0):
        run = VirtualRun(setup, 5)
        if load_seconds:
            run.crowd(lengths(5), CLIENTS, load_seconds)
            run.abort_all()
        # The steps in flight are not the controller's to take back.
        begin = run.now_seconds
        run.replay(probes, begin + PROBE_SECONDS, begin)
        waits.append(run.ttft_seconds(begin)[-count:])
    after, fresh = waits
    slow = after > fresh * NORMAL_RATIO + NORMAL_SECONDS
    recovery = float(due[slow].max()) if slow.any() else 0.0
    target = "" if itl_seconds is None else f", ITL {itl_seconds * 1e3:g} ms"
    return {
        "name": limits_text(limits) + target,
        "recovery_seconds": recovery,
        "late_probes": int(slow.sum()),
        "worst_extra_seconds": float((after - fresh).max()),
        "fresh_ttft_p99_seconds": float(np.percentile(fresh, 99)),
        "ttft_p99_seconds": float(np.percentile(after, 99)),
    }


def sections(results: Results, quick: bool) -> list[Section]:
    """One table."""
    seconds = QUICK_SECONDS if quick else SATURATED_SECONDS
    return [
        Section(
            f"Recovery from {seconds:g} s of saturation",
            (
                Column("recovery_seconds", "recovery s", 2, aim=1.0),
                Column("late_probes", "late probes", 0),
                Column("worst_extra_seconds", "most extra TTFT ms", 0, 1e3),
                Column("fresh_ttft_p99_seconds", "p99 TTFT ms fresh", 0, 1e3),
                Column("ttft_p99_seconds", "p99 TTFT ms after", 0, 1e3),
            ),
            cases(results),
            f"{CLIENTS} clients keep the engine above its budget, then all hang up at once; small "
            f"probes follow each {PROBE_GAP_SECONDS:g} s. Recovery: arrival of the last probe "
            f"whose TTFT is over {NORMAL_RATIO:g} times that of the same probe in a fresh "
            f"engine, plus {NORMAL_SECONDS * 1e3:g} ms.",
        )
    ]
