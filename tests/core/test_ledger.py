"""The ledger's arithmetic, against a brute-force integration of the same power."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shaper.core.ledger.ledger import Ledger
from shaper.core.types import PowerBudget, PowerLimit, StepPrediction
from shaper.errors import LedgerError
from tests import strategies

IDLE = 100.0


def budget(*limits: PowerLimit, ramp: float | None = None) -> PowerBudget:
    return PowerBudget(limits, ramp)


class Curve:
    """Power over time as a list of segments; the mean over any window, by summing."""

    def __init__(self) -> None:
        self.segments: list[tuple[float, float, float]] = [(-100.0, 0.0, IDLE)]

    def add(self, gap: float, seconds: float, watts: float) -> None:
        end = self.segments[-1][1]
        if gap:
            self.segments.append((end, end + gap, IDLE))
        self.segments.append((end + gap, end + gap + seconds, watts))

    def joules(self, start: float, end: float) -> float:
        return sum(max(0.0, min(end, b) - max(start, a)) * watts for a, b, watts in self.segments)


def build(runs, limits) -> tuple[Ledger, Curve]:
    curve = Curve()
    for run in runs:
        curve.add(*run)
    return strategies.ledger_of(runs, *limits), curve


def worst_excess(curve: Curve, limit: PowerLimit, start: float, end: float) -> float:
    """Greatest mean over the limit's window minus its watts, for windows that end in [start, end].

    The mean is piecewise linear in the window's end, so its greatest value is at a corner.
    """
    window = limit.window_seconds
    corners = {edge for a, b, _ in curve.segments for edge in (a, b, a + window, b + window)}
    corners |= {start, end}
    return max(
        curve.joules(t - window, t) / window - limit.watts for t in corners if start <= t <= end
    )


@given(strategies.runs, strategies.limits, strategies.step_seconds, st.floats(IDLE, 450.0))
@example([(0.001, 0.002, 475.0)], [PowerLimit(200.0, 2.0)], 0.125, 100.0)
def test_what_fits_keeps_every_window_and_a_watt_more_does_not(runs, limits, seconds, floor):
    """A step at exactly the allowed watts breaks no window that it touches; at more, it does."""
    ledger, _ = build(runs, limits)
    start = ledger.end_seconds
    allowed = ledger.ask(start, floor).max_watts(seconds)

    def excess(step_watts: float) -> float:
        worst = -math.inf
        for limit in limits:
            _, curve = build(runs, limits)
            curve.add(0.0, seconds, step_watts)
            curve.add(0.0, 5.0, min(floor, 0.9 * limit.watts))
            # The windows that the step is in; those before its first corner are the past's own.
            first = min(
                [
                    b + limit.window_seconds
                    for _, b, _ in curve.segments
                    if b <= start and b + limit.window_seconds > start + 1e-6
                ]
                + [start + seconds]
            )
            end = start + seconds + limit.window_seconds
            worst = max(worst, worst_excess(curve, limit, first, end))
        return worst

    assert excess(allowed) <= 1e-6 * max(1.0, abs(allowed))
    # Corners that lie close are merged, and what that may hide is kept free.
    hidden_joules = 0.01 * max(limit.watts * limit.window_seconds for limit in limits)
    assert excess(allowed + 2.0 + hidden_joules / seconds) > 0.0


@given(strategies.runs)
def test_joules_between_equals_the_sum(runs):
    """Energy between two times is that of the segments, idle before, between and after."""
    ledger, curve = build(runs, [PowerLimit(500.0, 1.0)])
    end = ledger.end_seconds
    expected = curve.joules(end / 3, end) + IDLE * 0.5
    assert ledger.joules_between(end / 3, end + 0.5) == pytest.approx(expected)


def test_in_flight_steps_count_like_spent_ones():
    """A launched step weighs on the next as if it had already run."""
    limits = (PowerLimit(400.0, 0.1),)
    spent, flying = Ledger(PowerBudget(limits), IDLE, 0.0), Ledger(PowerBudget(limits), IDLE, 0.0)
    spent.spend(0.01, 0.05, 28.0)
    after = spent.ask(0.05, IDLE).max_watts(0.02)
    assert flying.ask(0.05, IDLE, [(0.01, 0.05, 28.0)]).max_watts(0.02) == pytest.approx(after)


def test_hand_calculation():
    """40 J of a 100 ms window are allowed; 0.04 s at 700 W and 0.03 s idle leave 9 J for 30 ms."""
    ledger = Ledger(budget(PowerLimit(400.0, 0.1)), IDLE, 0.0)
    ledger.spend(1.0, 1.04, 28.0)
    # The window that ends with the step, [1.0, 1.1]: 28 + 3 + x <= 40.
    assert ledger.ask(1.07, IDLE).max_watts(0.03) == pytest.approx(9.0 / 0.03)


def test_what_a_step_may_draw_by_hand():
    """A higher floor after it leaves it less; over a window shorter than itself it may draw the
    limit; a margin of 10% is a limit lower by 10%; without limits there is no bound."""

    def most(seconds, floor=IDLE, *limits, **more):
        return Ledger(budget(*limits), IDLE, 0.0).ask(0.0, floor, **more).max_watts(seconds)

    limit = PowerLimit(400.0, 0.1)
    assert most(0.05, 350.0, limit) < most(0.05, IDLE, limit)
    assert most(0.05, IDLE, PowerLimit(400.0, 0.01)) == pytest.approx(400.0)
    lower = most(0.03, IDLE, PowerLimit(360.0, 0.1))
    assert most(0.03, IDLE, limit, margin_ratio=0.1) == pytest.approx(lower)
    assert most(1.0, 1e9) == math.inf


def test_memory_stays_bounded_and_answers_stay_exact():
    """A hundred thousand steps keep some thousand corners, and the last second's joules."""
    ledger = Ledger(budget(PowerLimit(500.0, 1.0)), IDLE, 0.0)
    now = 0.0
    for _ in range(100_000):
        ledger.spend(now, now + 0.008, 3.0)
        now += 0.008
    assert len(ledger._history.times) <= 32_768
    assert ledger.joules_between(now - 0.8, now) == pytest.approx(300.0)


def test_a_run_that_overlaps_the_past_is_moved_behind_it():
    """The device runs one step at a time, whatever the clocks say."""
    ledger = Ledger(budget(PowerLimit(500.0, 1.0)), IDLE, 0.0)
    ledger.spend(0.0, 0.1, 50.0)
    ledger.spend(0.05, 0.2, 40.0)
    assert ledger.joules_between(0.0, 0.2) == pytest.approx(90.0)
    ledger.spend(0.0, 0.1, 40.0)
    assert ledger.end_seconds == 0.2


def test_bad_joules_are_refused_and_nothing_is_entered():
    """NaN must not spread through the sums; what was dropped can't be summed."""
    ledger = Ledger(budget(PowerLimit(500.0, 1.0)), IDLE, 0.0)
    for joules in (math.nan, math.inf):
        with pytest.raises(LedgerError):
            ledger.spend(0.0, 0.1, joules)
    assert ledger.end_seconds == 0.0
    with pytest.raises(LedgerError, match="begins at"):
        ledger.joules_between(-100.0, 0.0)


def test_random_alignment_agrees_with_fine_integration():
    """Corners need no grid: a scan of each 0.2 ms finds no window over the limit."""
    rng = np.random.default_rng(7)
    limit = PowerLimit(450.0, 0.0731)
    ledger, curve = Ledger(budget(limit), IDLE, 0.0), Curve()
    now = 0.0
    for _ in range(60):
        seconds = float(rng.uniform(0.003, 0.04))
        now += float(rng.choice([0.0, 0.0017, 0.02]))
        allowed = ledger.ask(now, 200.0).max_watts(seconds)
        watts = float(np.clip(allowed, IDLE, 700.0)) if allowed > IDLE else IDLE
        curve.add(now - ledger.end_seconds, seconds, watts)
        ledger.spend(now, now + seconds, watts * seconds)
        now += seconds
    worst = max(
        curve.joules(t - limit.window_seconds, t) / limit.window_seconds
        for t in np.arange(0.0, now, 2e-4).tolist()
    )
    assert worst <= limit.watts + 1e-6


def mean_watts(curve: Curve, end: float, window: float) -> float:
    return curve.joules(end - window, end) / window


@given(strategies.runs, st.floats(250.0, 700.0), st.sampled_from([0.05, 0.1]))
def test_a_changed_limit_counts_the_past_at_no_more_than_itself(runs, watts, window):
    """The answer after a change is that of a ledger whose past was lower by one factor."""
    changed, curve = build(runs, [PowerLimit(900.0, window)])
    end = changed.end_seconds
    ratio = min(1.0, watts * window / curve.joules(end - window, end))
    changed.set_budget(budget(PowerLimit(watts, window)))
    plain = Ledger(budget(PowerLimit(watts, window)), IDLE * ratio, 0.0)
    for start, stop, drawn in curve.segments[1:]:
        plain.spend(start, stop, drawn * ratio * (stop - start))
    for ledger in (changed, plain):
        ledger.spend(end, end + 0.01, watts * 0.01)
    start = end + 0.01
    for seconds in (0.008, 0.04):
        asked = changed.ask(start, IDLE).max_watts(seconds)
        assert asked == pytest.approx(plain.ask(start, IDLE).max_watts(seconds), abs=1e-3)


def test_changes_that_change_little_forgive_nothing():
    """A limit set again and again to almost the same is kept as if it had been set once."""
    rng = np.random.default_rng(5)
    ledger, curve = Ledger(budget(PowerLimit(500.0, 0.1)), IDLE, 0.0), Curve()
    for step in range(400):
        ledger.set_budget(budget(PowerLimit(500.0 + step % 2, 0.1), ramp=9e9 + step))
        start, seconds = ledger.end_seconds, float(rng.uniform(0.005, 0.04))
        watts = max(IDLE, min(700.0, ledger.ask(start, 200.0).max_watts(seconds)))
        curve.add(0.0, seconds, watts)
        ledger.spend(start, start + seconds, watts * seconds)
    ends = np.arange(0.2, ledger.end_seconds, 1e-3)
    assert max(mean_watts(curve, float(end), 0.1) for end in ends[::5]) <= 501.0 * 1.003


def test_lowering_a_long_window_never_stops_service():
    """After 60 s at 650 W a limit of 500 W over 60 s still lets 500 W run, and no more."""
    ledger = Ledger(budget(PowerLimit(650.0, 60.0)), IDLE, 0.0)
    for step in range(3000):
        ledger.spend(step * 0.02, (step + 1) * 0.02, 650.0 * 0.02)
    ledger.set_budget(budget(PowerLimit(500.0, 60.0)))
    # A merged corner costs a little of the limit.
    assert ledger.ask(60.0, IDLE).max_watts(0.02) == pytest.approx(500.0)


def test_raising_a_lowered_limit_brings_the_true_past_back():
    """Down and up again within a window: the energy of before counts as it was."""
    ledger = Ledger(budget(PowerLimit(650.0, 1.0)), IDLE, 0.0)
    ledger.spend(0.0, 1.0, 650.0)
    ledger.set_budget(budget(PowerLimit(300.0, 1.0)))
    ledger.set_budget(budget(PowerLimit(650.0, 1.0)))
    assert ledger.ask(1.0, IDLE).max_watts(0.1) == pytest.approx(650.0)


def test_steps_in_flight_at_a_change_are_not_held_against_the_limit():
    """A launched step of 700 W can't be undone: under 400 W it counts as 400 W."""
    ledger = Ledger(budget(PowerLimit(800.0, 0.1)), IDLE, 0.0)
    flight = (1.0, 1.1, 70.0)
    ledger.set_budget(budget(PowerLimit(400.0, 0.1)), [flight])
    assert ledger.ask(1.1, IDLE, [flight]).max_watts(0.02) == pytest.approx(400.0)
    ledger.spend(*flight)
    assert ledger.ask(1.1, IDLE).max_watts(0.02) == pytest.approx(400.0)


def test_a_full_ledger_leaves_the_limit_and_no_burst():
    """Where nobody knows what ran, the past is taken as the limit itself."""
    limits = budget(PowerLimit(500.0, 0.1), PowerLimit(400.0, 2.0))
    full, idle = Ledger(limits, IDLE, 0.0, full=True), Ledger(limits, IDLE, 0.0)
    assert full.ask(0.0, IDLE).max_watts(0.02) == pytest.approx(400.0, abs=1.0)
    assert idle.ask(0.0, IDLE).max_watts(0.02) > 700.0


@given(strategies.runs, strategies.step_seconds, st.floats(50.0, 400.0))
def test_the_ramp_limit_bounds_the_rise_within_a_second(runs, seconds, rise):
    """At the allowed watts the mean of 100 ms is nowhere more than `rise` over a second before."""
    ledger, curve = strategies.ledger_of(runs, ramp=rise), build(runs, [])[1]
    start = ledger.end_seconds
    # What the step may rise from is the lowest mean of the time that it will be compared with.
    lowest = min(mean_watts(curve, start - 1.0 + float(x), 0.1) for x in np.linspace(0, 0.6, 121))
    before = max(mean_watts(curve, start - x, 0.1) - lowest for x in (0.0, 0.05))
    allowed = ledger.ask(start, IDLE).max_watts(seconds)
    if allowed <= 0.0 or before > rise:
        return  # the past has broken it already
    curve.add(0.0, seconds, allowed)
    curve.add(0.0, 1.0, IDLE)
    for x in np.linspace(1e-4, seconds, 30):
        now = start + float(x)
        assert mean_watts(curve, now, 0.1) <= mean_watts(curve, now - 1.0, 0.1) + rise + 1e-6


def test_after_a_rest_the_ramp_starts_from_the_power_at_rest():
    """100 ms of idle power are followed by the rest's: the rise counts from there."""
    ledger = Ledger(budget(ramp=200.0), IDLE, 0.0, rest_watts=60.0, rest_after_seconds=0.1)
    ledger.spend(0.0, 0.1, 50.0)
    assert ledger.joules_between(0.1, 10.0) == pytest.approx(0.1 * IDLE + 9.8 * 60.0)
    # 100 ms at the allowed power, mean 260 W.
    assert ledger.ask(10.0, 60.0).max_watts(0.1) == pytest.approx(260.0)


@given(strategies.runs, st.floats(300.0, 800.0), strategies.step_seconds, st.floats(IDLE, 800.0))
def test_the_quick_answer_agrees_with_the_exact_one(runs, watts, seconds, step_watts):
    """Where nothing of late was above a limit, what is under it fits without a look at the past."""
    ledger, _ = build(runs, [PowerLimit(watts, 0.1), PowerLimit(watts * 0.9, 1.0)])
    start = ledger.end_seconds
    prediction = StepPrediction(seconds, step_watts * seconds)
    exact = ledger.ask(start, 200.0).max_watts(seconds)
    assert not ledger.ask(start, 200.0).fits(prediction) or step_watts <= exact + 1e-6
    assert ledger.ask(start, 200.0).fits(prediction) == (step_watts <= exact) or (
        abs(step_watts - exact) < 1e-6
    )


def test_a_long_window_is_kept_in_few_corners_and_errs_to_the_safe_side():
    """60 s of steps cost some hundred corners; what they allow is never more than exact."""
    limit = PowerLimit(520.0, 60.0)
    ledger, now = Ledger(budget(limit), IDLE, 0.0), 0.0
    rng, joules = np.random.default_rng(3), []
    while now < 70.0:
        watts = float(rng.choice([300.0, 700.0]))
        ledger.spend(now, now + 0.01, watts * 0.01)
        joules.append((now, watts))
        now = ledger.end_seconds
    headroom = ledger.ask(now, IDLE)
    curve = ledger._windows[0].curve
    assert curve.count < 1500
    past = sum(w * 0.01 for t, w in joules if t >= now + 0.02 - 60.0)
    exact = (520.0 * 60.0 - past) / 0.02
    allowed = headroom.max_watts(0.02)
    assert allowed <= exact + 1e-6
    assert (exact - allowed) * 0.02 <= 0.0005 * 520.0 * 60.0
