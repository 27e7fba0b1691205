"""Routers: who gets a request."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from shaper.errors import ConfigError
from shaper.simulate.arrivals import Arrival
from shaper.simulate.router import ROUTERS, new_router
from shaper.traffic.workload import TimedRequest


@dataclass
class Engine:
    unfinished_requests: int = 0
    watts: float = 0.0

    def headroom_watts(self, now_seconds: float) -> float:
        return 500.0 - self.watts


def arrival(segment: int = 0) -> Arrival:
    return Arrival(0.0, segment, TimedRequest(0.0, 10, 10))


def test_split_goes_by_the_segment():
    """Whatever the engines do."""
    route = new_router("split", [Engine(9), Engine(0)])
    assert [route(arrival(k)) for k in (1, 0, 0, 1)] == [1, 0, 0, 1]


def test_round_robin_takes_turns():
    """Whatever the engines do, and whatever the segment."""
    route = new_router("round-robin", [Engine(9), Engine(0), Engine(3)])
    assert [route(arrival(2)) for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_least_loaded_goes_by_what_is_unfinished():
    """Ties go to the one that was served longest ago."""
    engines = [Engine(2), Engine(1), Engine(1)]
    route = new_router("least-loaded", engines)
    assert [route(arrival()) for _ in range(3)] == [1, 2, 1]
    engines[0].unfinished_requests = 0
    assert route(arrival()) == 0


def test_headroom_goes_by_watts():
    """The engine with the most room below its share."""
    engines = [Engine(0, 300.0), Engine(5, 200.0)]
    route = new_router("headroom", engines)
    assert route(arrival()) == 1
    engines[1].watts = 400.0
    assert route(arrival()) == 0


@pytest.mark.parametrize("name", ROUTERS)
def test_one_engine_gets_all(name):
    """No router looks for an engine that isn't there."""
    route = new_router(name, [Engine()])
    assert [route(arrival()) for _ in range(3)] == [0, 0, 0]


def test_an_unknown_router_is_refused_with_the_nearest():
    """One line says what was meant."""
    with pytest.raises(ConfigError, match="did you mean 'round-robin'"):
        new_router("roundrobin", [Engine()])
