"""Which class of work may enter: the law of pressure, the states and their holds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shaper.core.supervise.admission import (
    DEFAULT_TTFT_SECONDS,
    EDGES,
    SHORTEST_HOLD_SECONDS,
    Admission,
    AdmissionInput,
    AdmissionReason,
    admission_input,
    pressure_ratio,
)
from shaper.core.supervise.status import (
    Admissibility,
    AdmissionState,
    EngineDemand,
    ThermalOutlook,
)
from shaper.core.types import PowerLimit
from tests.strategies import admission_inputs

TICK = 0.02
NOTHING = AdmissionInput()
FULL = AdmissionInput(use_ratio=1.0, held_ratio=1.0)
"""A budget in use to its last watt, and nobody waits."""
SATURATED = dataclasses.replace(FULL, wait_seconds=30.0)


def at_pressure(ratio: float) -> AdmissionInput:
    """What is of exactly this pressure."""
    if ratio <= 0.5:
        return AdmissionInput(use_ratio=2 * ratio)
    return dataclasses.replace(FULL, wait_seconds=(2 * ratio - 1) * DEFAULT_TTFT_SECONDS)


def run(
    admission: Admission, given: AdmissionInput, start: float, seconds: float, tick: float = TICK
) -> list[tuple[float, Admissibility]]:
    """Feed one input for some time; all that came out, with its time."""
    count = round(seconds / tick)
    times = [start + (index + 1) * tick for index in range(count)]
    return [(now, admission.update(given, now)) for now in times]


def states(outcomes: Iterable[tuple[float, Admissibility]]) -> list[AdmissionState]:
    """The states in their order, each once."""
    found: list[AdmissionState] = []
    for _, outcome in outcomes:
        if not found or found[-1] is not outcome.state:
            found.append(outcome.state)
    return found


@given(admission_inputs, admission_inputs)
def test_pressure_is_a_ratio_that_rises_with_each_part(
    one: AdmissionInput, other: AdmissionInput
) -> None:
    """Within [0, 1]; an input that is at least as large in each part presses at least as much."""
    low, high = pressure_ratio(one, 1.0), pressure_ratio(other, 1.0)
    assert 0.0 <= low <= 1.0
    parts = [
        (one.use_ratio or 0.0, other.use_ratio or 0.0),
        (one.held_ratio, other.held_ratio),
        (one.wait_seconds, other.wait_seconds),
    ]
    if all(a <= b for a, b in parts):
        assert low <= high


@pytest.mark.parametrize(
    ("given", "ratio"),
    [
        (NOTHING, 0.0),
        (AdmissionInput(use_ratio=0.5), 0.25),
        (FULL, 0.5),
        (dataclasses.replace(FULL, wait_seconds=0.5), 0.75),
        (SATURATED, 1.0),
        # Prompts that wait while power is free wait for something else.
        (AdmissionInput(use_ratio=0.1, wait_seconds=100.0), 0.1),
        # A sensor that lies says nothing; what is held back still counts.
        (AdmissionInput(use_ratio=math.nan, held_ratio=1.0), 0.5),
        (AdmissionInput(use_ratio=math.inf, held_ratio=-3.0), 0.5),
        (dataclasses.replace(FULL, wait_seconds=math.nan), 0.5),
        (dataclasses.replace(FULL, wait_seconds=-1.0), 0.5),
    ],
)
def test_pressure_follows_its_law(given: AdmissionInput, ratio: float) -> None:
    """Figures by hand, with a target of one second."""
    assert pressure_ratio(given, 1.0) == pytest.approx(ratio)


def test_the_table_leaves_no_state_without_a_way_back() -> None:
    """One step at a time; down levels lie below up levels, so that no pressure speaks for both."""
    order = list(AdmissionState)
    assert set(EDGES) == set(order)
    for state, edges in EDGES.items():
        for edge in edges:
            assert order.index(edge.to) - order.index(state) == (1 if edge.rising else -1)
            assert edge.hold_seconds > 0
        back = [edge for edge in edges if not edge.rising]
        assert len(back) == (state is not AdmissionState.OPEN)
    for low, high in pairwise(order):
        up = next(edge for edge in EDGES[low] if edge.rising)
        down = next(edge for edge in EDGES[high] if not edge.rising)
        assert down.level_ratio < up.level_ratio


@pytest.mark.parametrize(
    ("ratio", "ends", "returns"),
    [
        (0.39, AdmissionState.OPEN, AdmissionState.OPEN),
        (0.44, AdmissionState.OPEN, AdmissionState.SHAPED),
        (0.46, AdmissionState.SHAPED, AdmissionState.SHAPED),
        (0.60, AdmissionState.SHAPED, AdmissionState.DEFER),
        (0.72, AdmissionState.DEFER, AdmissionState.DEFER),
        (0.85, AdmissionState.DEFER, AdmissionState.SHED),
        (0.96, AdmissionState.SHED, AdmissionState.SHED),
    ],
)
def test_the_state_depends_on_where_the_pressure_came_from(
    ratio: float, ends: AdmissionState, returns: AdmissionState
) -> None:
    """Hysteresis: from open it ends at `ends`, from shed it stays at `returns` or falls to it."""
    up = Admission(None, 0.0)
    assert run(up, at_pressure(ratio), 0.0, 5.0)[-1][1].state is ends
    down = Admission(None, 0.0)
    assert run(down, SATURATED, 0.0, 5.0)[-1][1].state is AdmissionState.SHED
    assert run(down, at_pressure(ratio), 5.0, 5.0)[-1][1].state is returns


def test_a_pressure_shorter_than_the_hold_moves_nothing() -> None:
    """A spike of four ticks is forgotten by the next calm one, however often it comes."""
    admission = Admission(None, 0.0)
    now = 0.0
    for _ in range(500):
        now = run(admission, SATURATED, now, 4 * TICK)[-1][0]
        now, outcome = run(admission, NOTHING, now, TICK)[-1]
        assert outcome.state is AdmissionState.OPEN


@given(
    st.lists(st.tuples(st.floats(0.0, 1.0), st.floats(0.001, 0.2)), max_size=300),
)
def test_moves_are_bounded_by_the_holds(ticks: list[tuple[float, float]]) -> None:
    """Whatever the input does, two moves are a hold apart, one step of the table each."""
    admission = Admission(None, 0.0)
    order = list(AdmissionState)
    now, moved, before = 0.0, 0.0, AdmissionState.OPEN
    for ratio, step in ticks:
        now += step
        outcome = admission.update(at_pressure(ratio), now)
        if outcome.state is not before:
            edge = next(edge for edge in EDGES[before] if edge.to is outcome.state)
            assert now - moved >= edge.hold_seconds - 1e-9 >= SHORTEST_HOLD_SECONDS - 1e-9
            assert abs(order.index(outcome.state) - order.index(before)) == 1
            assert outcome.since_seconds == now
            moved, before = now, outcome.state


@pytest.mark.parametrize("saturated_seconds", [1.0, 600.0])
def test_recovery_does_not_depend_on_how_long_it_lasted(saturated_seconds: float) -> None:
    """After ten minutes of saturation it is back at shaped and open within a second."""
    admission = Admission(None, 0.0)
    assert run(admission, SATURATED, 0.0, saturated_seconds)[-1][1].state is AdmissionState.SHED
    # The meter's long window is still full when the last prompt has started.
    outcomes = run(admission, FULL, saturated_seconds, 1.0)
    assert outcomes[-1][1].state is AdmissionState.SHAPED
    assert run(admission, NOTHING, saturated_seconds + 1.0, 0.4)[-1][1].state is AdmissionState.OPEN


def test_it_rises_to_shed_within_a_second() -> None:
    """A flood is answered by refusing flex work soon, through every state on the way."""
    outcomes = run(Admission(None, 0.0), SATURATED, 0.0, 1.0)
    assert states(outcomes) == list(AdmissionState)


def test_without_a_budget_it_is_open_at_once() -> None:
    """No hold and no pressure: there is nothing to protect."""
    admission = Admission(None, 0.0)
    run(admission, SATURATED, 0.0, 2.0)
    outcome = admission.update(dataclasses.replace(SATURATED, budgeted=False), 2.02)
    assert outcome.state is AdmissionState.OPEN
    assert outcome.reason == AdmissionReason.NO_BUDGET
    assert outcome.pressure_ratio == 0.0
    assert outcome.recovery_seconds is None
    # And it starts anew when a budget is set again.
    assert admission.update(SATURATED, 2.04).state is AdmissionState.OPEN


@pytest.mark.parametrize("gap", [30.0, -5.0])
def test_a_sampler_that_stood_still_proves_nothing(gap: float) -> None:
    """Two ticks of pressure half a minute apart, or in the wrong order, are not a hold."""
    admission = Admission(None, 0.0)
    admission.update(SATURATED, 0.02)
    assert admission.update(SATURATED, 0.02 + gap).state is AdmissionState.OPEN
    start = 0.02 + gap
    assert run(admission, SATURATED, start, 2.0)[-1][1].state is AdmissionState.SHED


def test_the_target_sets_the_scale_of_waiting() -> None:
    """The same wait is much against half a second and little against ten."""
    given = dataclasses.replace(FULL, wait_seconds=0.5)
    assert run(Admission(0.5, 0.0), given, 0.0, 3.0)[-1][1].state is AdmissionState.SHED
    assert run(Admission(10.0, 0.0), given, 0.0, 3.0)[-1][1].state is AdmissionState.SHAPED


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (NOTHING, AdmissionReason.ROOM),
        (AdmissionInput(use_ratio=1.0), AdmissionReason.BUDGET),
        (AdmissionInput(use_ratio=0.3, held_ratio=1.0), AdmissionReason.HELD),
        (SATURATED, AdmissionReason.WAIT),
        (dataclasses.replace(FULL, hot=True), AdmissionReason.THERMAL),
    ],
)
def test_the_reason_names_what_presses(given: AdmissionInput, reason: AdmissionReason) -> None:
    """Of the state that it settles in."""
    assert run(Admission(None, 0.0), given, 0.0, 3.0)[-1][1].reason == reason


def test_the_recovery_hint_comes_from_the_queue_and_from_the_heat() -> None:
    """None while flex work may enter; then the longer of both, and the holds on the way down."""
    admission = Admission(None, 0.0)
    hints = [(x.state, x.recovery_seconds) for _, x in run(admission, SATURATED, 0.0, 2.0)]
    for state, hint in hints:
        assert (hint is None) == (state in (AdmissionState.OPEN, AdmissionState.SHAPED))
    assert hints[-1] == (AdmissionState.SHED, pytest.approx(30.6))  # type: ignore[comparison-overlap]
    hot = dataclasses.replace(SATURATED, hot=True, cool_seconds=90.0)
    assert admission.update(hot, 2.02).recovery_seconds == pytest.approx(90.6)
    unknown = dataclasses.replace(SATURATED, hot=True, wait_seconds=math.inf)
    assert admission.update(unknown, 2.04).recovery_seconds == pytest.approx(0.6)


DEMAND = EngineDemand(at_seconds=0.0, busy=True, held_ratio=1.0)


def tick(demand: EngineDemand, thermal: ThermalOutlook, **rest: Any) -> Admissibility:
    """Two seconds of ticks; the last answer."""
    admission, given = Admission(None, 0.0), admission_input(demand, thermal, **rest)
    return [admission.update(given, (index + 1) * TICK) for index in range(100)][-1]


@pytest.mark.parametrize(
    ("demand", "thermal", "lost", "budgeted", "use_ratio", "state"),
    [
        (DEMAND, ThermalOutlook(), False, True, 1.0, AdmissionState.SHED),
        (DEMAND, ThermalOutlook(), False, False, 1.0, AdmissionState.OPEN),
        # A limit against overheating is one to keep, with or without the operator's.
        (
            DEMAND,
            ThermalOutlook(limit=PowerLimit(500.0, 1.0)),
            False,
            False,
            1.0,
            AdmissionState.SHED,
        ),
        # What was true when the engine was busy says nothing of an idle one.
        (
            dataclasses.replace(DEMAND, busy=False),
            ThermalOutlook(),
            False,
            True,
            0.0,
            AdmissionState.OPEN,
        ),
        # A lost sensor's last reading is not used.
        (
            dataclasses.replace(DEMAND, held_ratio=0.0),
            ThermalOutlook(),
            True,
            True,
            1.0,
            AdmissionState.OPEN,
        ),
    ],
)
def test_the_supervisors_signals_are_judged(
    demand: EngineDemand,
    thermal: ThermalOutlook,
    lost: bool,
    budgeted: bool,
    use_ratio: float,
    state: AdmissionState,
) -> None:
    """Demand, heat and the sensor's health enter as they should."""
    rest = {"sensor_lost": lost, "budgeted": budgeted, "use_ratio": use_ratio}
    assert tick(demand, thermal, wait_seconds=2.0, **rest).state is state
