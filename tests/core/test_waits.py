"""From when a refused step may fit: never later than it does, and not sooner."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from shaper.core.ledger.headroom import Headroom
from shaper.core.ledger.ledger import Ledger
from shaper.core.types import PowerBudget, PowerLimit, StepPrediction
from tests import strategies
from tests.strategies import ledger_of

IDLE = 100.0
STEP = StepPrediction(0.02, 14.0)


# What leaves every window too full for most steps.
HOT = st.tuples(st.just(0.0), st.floats(0.02, 0.5), st.floats(900.0, 1200.0))


@given(
    st.builds(lambda runs, hot: [*runs, hot], strategies.runs, HOT),
    strategies.limits,
    strategies.step_seconds,
    st.floats(300.0, 800.0),
    st.floats(IDLE, 450.0),
    st.lists(st.floats(0.0, 1.0, exclude_max=True), min_size=1, max_size=20),
)
def test_a_refused_step_fits_at_no_moment_before_its_date(
    runs, limits, seconds, watts, floor, shares
):
    """With nothing else launched: asked at any time before, the ledger refuses it still."""
    ledger = ledger_of(runs, *limits)
    step, start = StepPrediction(seconds, watts * seconds), ledger.end_seconds
    headroom = ledger.ask(start, floor)
    # By more than rounding.
    assume(headroom.max_watts(seconds) < watts * (1.0 - 1e-9))
    wait = headroom.wait_seconds(step, IDLE)
    for share in shares:
        # What ended less than a microsecond ago has no corner of its own.
        earlier = start + max(0.0, share * wait - 3e-6)
        assert not ledger.ask(earlier, floor).fits(step)


@given(
    st.builds(lambda runs, hot: [*runs, hot], strategies.runs, HOT),
    st.floats(300.0, 800.0),
    st.sampled_from([0.05, 0.1, 0.5]),
    strategies.step_seconds,
    st.floats(1.0, 1.4),
)
def test_a_step_that_an_empty_window_holds_has_its_date_when_it_fits(
    runs, limit, window, seconds, over
):
    """One window, nothing after the step but idle power: at the date it fits, to a microsecond."""
    ledger = ledger_of(runs, PowerLimit(limit, window))
    empty = Ledger(PowerBudget((PowerLimit(limit, window),)), IDLE, 0.0).ask(0.0, IDLE)
    most = empty.max_watts(seconds)
    step = StepPrediction(seconds, min(limit * over, most) * seconds * (1.0 - 1e-6))
    start = ledger.end_seconds
    headroom = ledger.ask(start, IDLE)
    assume(not headroom.fits(step))
    wait = headroom.wait_seconds(step, IDLE)
    assert 0.0 < wait <= window
    assert ledger.ask(start + wait + 1e-6, IDLE).fits(step)


def test_by_hand():
    """40 J in 100 ms; 28 J of them spent in the last 40 ms: 14 J more fit when 6 J have left."""
    ledger = Ledger(PowerBudget((PowerLimit(400.0, 0.1),)), IDLE, 0.0)
    ledger.spend(1.0, 1.04, 28.0)
    # The window that ends with a step from 1.04 + d on: 28 + 100 d + 14 is 40 at the most, unless
    # it begins after 1.0: for d > 0.04, 28 - 700 (d - 0.04) + 100 d + 14 = 40.
    wait = ledger.ask(1.04, IDLE).wait_seconds(STEP, IDLE)
    assert wait == pytest.approx(0.04 + (42.0 + 4.0 - 40.0) / 600.0)


def test_what_fits_has_no_date_and_the_longest_of_several_counts():
    """A step waits for each of its windows."""
    short, long = PowerLimit(400.0, 0.1), PowerLimit(350.0, 1.0)
    ledger = ledger_of([(0.0, 0.5, 600.0)], short, long)
    waits = [
        ledger_of([(0.0, 0.5, 600.0)], limit).ask(0.5, IDLE).wait_seconds(STEP, IDLE)
        for limit in (short, long)
    ]
    assert 0.0 < waits[0] < waits[1]
    assert ledger.ask(0.5, IDLE).wait_seconds(STEP, IDLE) == waits[1]
    assert ledger.ask(5.0, IDLE).wait_seconds(STEP, IDLE) == 0.0
    assert Headroom(()).wait_seconds(STEP, IDLE) == 0.0


def test_of_a_ramp_nothing_is_known_and_the_search_ends():
    """A ramp's limit rises while a step waits; a step of no number has a date in the window."""
    headroom = ledger_of([(0.0, 0.5, 300.0)], ramp=50.0).ask(0.5, IDLE)
    assert not headroom.fits(STEP)
    assert headroom.wait_seconds(STEP, IDLE) == 0.0
    headroom = ledger_of([(0.0, 0.5, 300.0)], PowerLimit(450.0, 0.1)).ask(0.5, IDLE)
    assert 0.0 <= headroom.wait_seconds(StepPrediction(0.02, math.nan), IDLE) <= 0.1
