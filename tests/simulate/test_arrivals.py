"""The segments of a trace: each engine gets the trace's own rate, from another place."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shaper.errors import ConfigError
from shaper.simulate.arrivals import loop_seconds, segments
from shaper.traffic.workload import TimedRequest, Workload


def workload(*times: float) -> Workload:
    """A request at each time, told apart by its length."""
    return Workload("test", tuple(TimedRequest(t, 10 + i, 5) for i, t in enumerate(times)))


EVEN = workload(*range(10))  # a loop of ten seconds


def test_each_engine_replays_its_own_part():
    """Engine k begins at the k-th part of the trace and goes on over its end."""
    found = segments(EVEN, 2, 7.0)
    first = [(a.at_seconds, a.request.prompt_tokens) for a in found if a.segment == 0]
    second = [(a.at_seconds, a.request.prompt_tokens) for a in found if a.segment == 1]
    assert first == [(float(k), 10 + k) for k in range(7)]
    assert second == [(float(k), 10 + (5 + k) % 10) for k in range(7)]


def test_a_run_longer_than_the_trace_goes_round():
    """The loop has a mean gap between its last request and its first."""
    assert loop_seconds(EVEN) == 10.0
    found = segments(EVEN, 1, 25.0)
    assert [a.at_seconds for a in found] == [float(k) for k in range(25)]


def test_a_faster_trace_is_the_same_requests_sooner():
    """`rate_scale` divides every time."""
    found = segments(EVEN, 1, 5.0, rate_scale=2.0)
    assert [a.at_seconds for a in found] == [k / 2 for k in range(10)]


def test_the_seed_moves_where_the_segments_begin():
    """Another seed is another piece of the traffic; the same is the same."""
    a, b, c = (segments(EVEN, 2, 20.0, seed=seed) for seed in (1, 1, 2))
    assert a == b
    assert [x.at_seconds for x in a] != [x.at_seconds for x in c]


def test_requests_that_all_come_at_once_are_no_endless_loop():
    """A trace without a length of its own takes a second."""
    assert len(segments(workload(0.0, 0.0), 2, 3.0)) == 12


def test_more_arrivals_than_memory_holds_are_refused():
    """Before they are made."""
    with pytest.raises(ConfigError, match="would arrive"):
        segments(EVEN, 8, 60.0, rate_scale=1e6)


@settings(max_examples=60, deadline=None)
@given(
    times=st.lists(st.integers(0, 100).map(lambda half: half / 2), min_size=1, max_size=20),
    engines=st.integers(1, 9),
    duration=st.floats(0.1, 200),
    seed=st.integers(0, 3),
    scale=st.floats(0.1, 10),
)
def test_arrivals_are_in_order_and_at_the_traces_rate(times, engines, duration, seed, scale):
    """Sorted, within the run, and as many for each engine as the loop has in that time."""
    trace = workload(*sorted(t - min(times) for t in times))
    found = segments(trace, engines, duration, seed=seed, rate_scale=scale)
    at = [a.at_seconds for a in found]
    assert at == sorted(at)
    assert all(0.0 <= t < duration for t in at)
    laps = duration / loop_seconds(trace, scale)
    for segment in range(engines):
        count = sum(a.segment == segment for a in found)
        assert int(laps) * len(times) <= count <= (int(laps) + 1) * len(times)


@pytest.mark.parametrize(("engines", "duration", "scale"), [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_nothing_to_deal_is_refused(engines, duration, scale):
    """A number that is not above 0 is named."""
    with pytest.raises(ValueError, match="not above 0"):
        segments(EVEN, engines, duration, rate_scale=scale)
