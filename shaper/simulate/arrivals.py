"""The arrivals of a rack: as many segments of one trace as it has engines, side by side.

The trace is taken as a loop of `period` seconds. With N engines, segment k begins at

    start_k = shift(seed) + k * period / N

and goes on from there for the whole run, over the trace's end if need be. Each engine so
gets the trace's own rate, times `rate_scale`, whatever the router does with the arrivals.
Seed 0 has no shift.
"""

from __future__ import annotations

import bisect
import random
from dataclasses import dataclass

from shaper.errors import ConfigError
from shaper.traffic.workload import TimedRequest, Workload

# A day of eight engines at the conversation trace's rate is four millions.
MAX_ARRIVALS = 5_000_000


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request of segment `segment`, due `at_seconds` after the run's start."""

    at_seconds: float
    segment: int
    request: TimedRequest


def loop_seconds(workload: Workload, rate_scale: float = 1.0) -> float:
    """How long the trace lasts, with a mean gap after its last request.

    A trace whose requests all come at once has no length of its own: it takes a second.
    """
    count = len(workload.requests)
    if count < 2 or not workload.span_seconds:
        return 1.0
    return workload.span_seconds * count / (count - 1) / rate_scale


def check_count(expected: float) -> None:
    """Refuse more arrivals than this machine's memory should be asked to hold.

    Raises:
        ConfigError: they are more than `MAX_ARRIVALS`.
    """
    if expected > MAX_ARRIVALS:
        raise ConfigError(
            f"{expected:,.0f} requests would arrive, over {MAX_ARRIVALS:,}: take fewer engines, a "
            "shorter run or a lower rate"
        )


def segments(
    workload: Workload,
    engines: int,
    duration_seconds: float,
    *,
    seed: int = 0,
    rate_scale: float = 1.0,
) -> list[Arrival]:
    """The arrivals in `[0, duration_seconds)` of all segments, in the order of time.

    Args:
        workload: with at least one request; not changed.
        engines: how many segments.
        duration_seconds: of the run.
        seed: shifts where the segments begin.
        rate_scale: the trace runs so many times as fast.

    Raises:
        ConfigError: they are too many.
        ValueError: there is no request, or a number is not above 0.
    """
    for name, value in (
        ("engines", engines),
        ("duration_seconds", duration_seconds),
        ("rate_scale", rate_scale),
    ):
        if not value > 0:
            raise ValueError(f"{name} is {value}, not above 0")
    if not workload.requests:
        raise ValueError("the workload holds no request")
    period = loop_seconds(workload, rate_scale)
    check_count(len(workload.requests) * engines * duration_seconds / period)
    shift = random.Random(f"segments {seed}").random() * period if seed else 0.0
    times = [request.arrival_seconds / rate_scale for request in workload.requests]
    found: list[Arrival] = []
    for segment in range(engines):
        start = (shift + segment * period / engines) % period
        index = bisect.bisect_left(times, start)
        lap = -start
        while True:
            if index == len(times):
                index, lap = 0, lap + period
            at = lap + times[index]
            if at >= duration_seconds:
                break
            found.append(Arrival(at, segment, workload.requests[index]))
            index += 1
    found.sort(key=lambda arrival: (arrival.at_seconds, arrival.segment))
    return found
