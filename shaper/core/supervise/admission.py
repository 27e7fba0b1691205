"""Which class of work may enter: open, shaped, defer, shed.

Law. Pressure is how far the budget is used, weighted by how long prompts wait for it:

    use      = max(metered share of the limits' headroom above idle, share of time work was held)
    wait     = age of the oldest waiting interactive prompt / TTFT target
    pressure = use * (1 + wait) / 2                     each of use and wait within [0, 1]

It rises with each of its parts. A budget used to its last watt is 0.5 as long as nobody
waits for it; prompts that wait for something else than power (no free KV cache) press
little. 1 is a full budget with a prompt as old as the target.

The state moves one step along `EDGES`, when the pressure was beyond the edge's level at
every tick of its hold time. Up and down levels lie apart, and each hold restarts with the
state, so in `t` seconds there are at most `t / SHORTEST_HOLD_SECONDS` moves whatever the
input does. Nothing is integrated or averaged: when the pressure is gone, the way from shed
to shaped is the sum of two holds, however long it lasted.

`degraded` is no state: a GPU that gives less than it should may carry its load all the same.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass

from shaper.core.supervise.status import (
    Admissibility,
    AdmissionState,
    EngineDemand,
    ThermalOutlook,
)

# The TTFT that prompts are measured against where the operator names none: what a person
# who waits for an answer still takes for prompt.
DEFAULT_TTFT_SECONDS = 1.0
# Ticks further apart than this prove nothing about the time between them.
_LONGEST_TICK_SECONDS = 0.5


class AdmissionReason(enum.StrEnum):
    """What presses most."""

    NO_BUDGET = "no_budget"
    """Nothing is limited: always open."""
    ROOM = "headroom"
    """The budget has headroom."""
    BUDGET = "budget"
    """The metered power is near a limit."""
    HELD = "held"
    """Work is held back for the budget."""
    WAIT = "wait"
    """Interactive prompts wait."""
    THERMAL = "thermal"
    """The limit in force is one against overheating."""


@dataclass(frozen=True, slots=True)
class FlexRules:
    """What happens to flex requests that wait in the engine."""

    max_wait_seconds: float = 600.0
    """Longest time that one is deferred."""
    refuse_on_timeout: bool = False
    """Then it is refused; else it runs."""


@dataclass(frozen=True, slots=True)
class Edge:
    """A move to another state: once the pressure was beyond `level_ratio` for so long."""

    to: AdmissionState
    level_ratio: float
    hold_seconds: float
    rising: bool

    def beyond(self, pressure_ratio: float) -> bool:
        """Whether this pressure speaks for the move."""
        if self.rising:
            return pressure_ratio >= self.level_ratio
        return pressure_ratio < self.level_ratio


# 0.45 is 90% of the budget in use. 0.70 is a full budget and prompts as old as 0.4 of the
# target, 0.90 as old as 0.8 of it: there deferring alone has not helped. Holds are short,
# so that flex work is back within a second, and longer towards refusing than towards
# deferring, since a refused client is gone.
EDGES: Mapping[AdmissionState, tuple[Edge, ...]] = {
    AdmissionState.OPEN: (Edge(AdmissionState.SHAPED, 0.45, 0.1, True),),
    AdmissionState.SHAPED: (
        Edge(AdmissionState.DEFER, 0.70, 0.2, True),
        Edge(AdmissionState.OPEN, 0.40, 0.3, False),
    ),
    AdmissionState.DEFER: (
        Edge(AdmissionState.SHED, 0.90, 0.5, True),
        Edge(AdmissionState.SHAPED, 0.55, 0.3, False),
    ),
    AdmissionState.SHED: (Edge(AdmissionState.DEFER, 0.75, 0.3, False),),
}
SHORTEST_HOLD_SECONDS = min(edge.hold_seconds for edges in EDGES.values() for edge in edges)


@dataclass(frozen=True, slots=True)
class AdmissionInput:
    """What admission decides on at one tick. A value that is not finite is not known."""

    budgeted: bool = True
    """A limit holds, the operator's or one against overheating."""
    use_ratio: float | None = None
    """Greatest share of a limit's headroom above idle that is in use, as metered."""
    held_ratio: float = 0.0
    """Share of the last time in which work was held back for the budget."""
    wait_seconds: float = 0.0
    """Age of the oldest interactive prompt that has not started."""
    hot: bool = False
    """A limit against overheating holds."""
    cool_seconds: float | None = None
    """Until that limit may be let go; None: it can't be said."""


def admission_input(
    demand: EngineDemand,
    thermal: ThermalOutlook,
    *,
    sensor_lost: bool,
    budgeted: bool,
    use_ratio: float | None,
    wait_seconds: float,
) -> AdmissionInput:
    """The input of a tick, from what was sensed and judged.

    Args:
        demand: what there is to do.
        thermal: where the heat is going, and the limit for it.
        sensor_lost: the readings are not believed, and `use_ratio` with them.
        budgeted: an operator limits something.
        use_ratio, wait_seconds: as of `AdmissionInput`.
    """
    hot = thermal.limit is not None
    return AdmissionInput(
        budgeted=budgeted or hot,
        use_ratio=None if sensor_lost else use_ratio,
        # What is said of an idle engine is about the time when it was not.
        held_ratio=demand.held_ratio if demand.busy else 0.0,
        wait_seconds=wait_seconds if demand.busy else 0.0,
        hot=hot,
        cool_seconds=thermal.recovery_seconds,
    )


def _within_one(value: float | None) -> float:
    """Clamped to [0, 1]; what is not known counts as nothing."""
    return 0.0 if value is None or math.isnan(value) else min(1.0, max(0.0, value))


def pressure_ratio(given: AdmissionInput, ttft_seconds: float) -> float:
    """The law, in [0, 1]."""
    use = max(_within_one(given.use_ratio), _within_one(given.held_ratio))
    return use * (1.0 + _within_one(given.wait_seconds / ttft_seconds)) / 2.0


class Admission:
    """The state of one engine. Call `update` at every tick of the sampler, some 20 ms.

    Args:
        ttft_target_seconds: what the operator promises; None: `DEFAULT_TTFT_SECONDS`.
        start_seconds: now.
    """

    def __init__(self, ttft_target_seconds: float | None, start_seconds: float) -> None:
        self._ttft_seconds = ttft_target_seconds or DEFAULT_TTFT_SECONDS
        self._state = AdmissionState.OPEN
        self._since_seconds = self._tick_seconds = start_seconds
        self._edge: Edge | None = None
        self._edge_seconds = start_seconds

    def update(self, given: AdmissionInput, now_seconds: float) -> Admissibility:
        """The state after this tick."""
        pressure = pressure_ratio(given, self._ttft_seconds)
        if not given.budgeted:
            pressure = 0.0
            self._edge = None
            if self._state is not AdmissionState.OPEN:
                self._move(AdmissionState.OPEN, now_seconds)
        else:
            self._step(pressure, now_seconds)
        self._tick_seconds = now_seconds
        return Admissibility(
            state=self._state,
            pressure_ratio=pressure,
            reason=self._reason(given),
            recovery_seconds=self._recovery_seconds(given),
            since_seconds=self._since_seconds,
        )

    def _step(self, pressure: float, now_seconds: float) -> None:
        edge = next((edge for edge in EDGES[self._state] if edge.beyond(pressure)), None)
        elapsed = now_seconds - self._tick_seconds
        if edge is not self._edge or not 0.0 <= elapsed <= _LONGEST_TICK_SECONDS:
            self._edge, self._edge_seconds = edge, now_seconds
        elif edge is not None and now_seconds - self._edge_seconds >= edge.hold_seconds:
            self._move(edge.to, now_seconds)

    def _move(self, state: AdmissionState, now_seconds: float) -> None:
        self._state, self._since_seconds, self._edge = state, now_seconds, None

    def _reason(self, given: AdmissionInput) -> AdmissionReason:
        if not given.budgeted:
            return AdmissionReason.NO_BUDGET
        if self._state is AdmissionState.OPEN:
            return AdmissionReason.ROOM
        if given.hot:
            return AdmissionReason.THERMAL
        # Beyond shaped it is prompts that wait which got it there.
        if self._state is not AdmissionState.SHAPED:
            return AdmissionReason.WAIT
        held, used = _within_one(given.held_ratio), _within_one(given.use_ratio)
        return AdmissionReason.HELD if held > used else AdmissionReason.BUDGET

    def _recovery_seconds(self, given: AdmissionInput) -> float | None:
        """When flex work should come back; None while it may enter.

        A queue that is served in order and whose head has waited `w` seconds takes about
        `w` to clear. Then the state falls, a hold each.
        """
        if self._state in (AdmissionState.OPEN, AdmissionState.SHAPED):
            return None
        cool = given.cool_seconds if given.hot else None
        waits = [x for x in (given.wait_seconds, cool) if x is not None and math.isfinite(x)]
        return max([0.0, *waits]) + _fall_seconds(self._state)


def _fall_seconds(state: AdmissionState) -> float:
    """The holds on the way down to shaped."""
    seconds = 0.0
    while state is not AdmissionState.SHAPED:
        edge = next(edge for edge in EDGES[state] if not edge.rising)
        seconds, state = seconds + edge.hold_seconds, edge.to
    return seconds
