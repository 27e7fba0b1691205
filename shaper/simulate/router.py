"""Routers: which engine gets a request. Each is a function of the arrival and the engines.

| router | law |
|---|---|
| `split` | segment k of the trace goes to engine k |
| `round-robin` | the engines in turn |
| `least-loaded` | fewest requests that are not finished |
| `headroom` | most watts between the engine's share and what it draws and is about to draw |

Ties go to the engine that got its last request longest ago. A router sees what a front
end could see: requests that it sent and that have not ended, and the engines' meters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from shaper.config.suggest import suggest
from shaper.errors import ConfigError
from shaper.simulate.arrivals import Arrival


class RoutedEngine(Protocol):
    """What a router may ask about an engine."""

    @property
    def unfinished_requests(self) -> int:
        """Requests that were sent to it and have not ended."""
        ...

    def headroom_watts(self, now_seconds: float) -> float:
        """Its share of the budget, less what its meter says it draws, less what its prompts
        that are not computed yet will take if they are in a second."""
        ...


Router = Callable[[Arrival], int]


def _split(engines: Sequence[RoutedEngine]) -> Router:
    return lambda arrival: arrival.segment


def _best(engines: Sequence[RoutedEngine], score: Callable[[RoutedEngine, float], float]) -> Router:
    """The engine with the highest score."""
    served = [0] * len(engines)  # the number of the last request that it got
    count = 0

    def choose(arrival: Arrival) -> int:
        nonlocal count
        count += 1
        scores = [score(engine, arrival.at_seconds) for engine in engines]
        best = max(scores)
        index = min(
            (index for index, value in enumerate(scores) if value == best), key=served.__getitem__
        )
        served[index] = count
        return index

    return choose


def _round_robin(engines: Sequence[RoutedEngine]) -> Router:
    return _best(engines, lambda engine, now_seconds: 0.0)


def _least_loaded(engines: Sequence[RoutedEngine]) -> Router:
    return _best(engines, lambda engine, now_seconds: -engine.unfinished_requests)


def _headroom(engines: Sequence[RoutedEngine]) -> Router:
    return _best(engines, lambda engine, now_seconds: engine.headroom_watts(now_seconds))


ROUTERS: dict[str, Callable[[Sequence[RoutedEngine]], Router]] = {
    "split": _split,
    "round-robin": _round_robin,
    "least-loaded": _least_loaded,
    "headroom": _headroom,
}


def new_router(name: str, engines: Sequence[RoutedEngine]) -> Router:
    """The router of this name over these engines.

    Raises:
        ConfigError: there is none of this name; the message names the nearest.
    """
    if name not in ROUTERS:
        raise ConfigError(f"router {name!r} is not known; {suggest(name, ROUTERS, 'routers:')}")
    return ROUTERS[name](engines)
