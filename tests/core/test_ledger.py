"""The ledger's arithmetic, against a brute-force integration of the same power."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shaper.core.ledger import Ledger
from shaper.core.types import PowerLimit
from shaper.errors import LedgerError
from tests import strategies

IDLE = 100.0


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
    ledger, curve = Ledger(limits, IDLE, 0.0), Curve()
    for gap, seconds, watts in runs:
        curve.add(gap, seconds, watts)
        start, end, _ = curve.segments[-1]
        ledger.spend(start, end, watts * seconds)
    return ledger, curve


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
                    if b <= start and b + limit.window_seconds > start + 1e-9
                ]
                + [start + seconds]
            )
            end = start + seconds + limit.window_seconds
            worst = max(worst, worst_excess(curve, limit, first, end))
        return worst

    assert excess(allowed) <= 1e-6 * max(1.0, abs(allowed))
    assert excess(allowed + 2.0) > 0.0


@given(strategies.runs)
def test_joules_between_equals_the_sum(runs):
    """Energy between two times is that of the segments, idle before, between and after."""
    ledger, curve = build(runs, [PowerLimit(500.0, 1.0)])
    end = ledger.end_seconds
    expected = curve.joules(end / 3, end) + IDLE * 0.5
    assert ledger.joules_between(end / 3, end + 0.5) == pytest.approx(expected)


def test_in_flight_steps_count_like_spent_ones():
    """A launched step weighs on the next as if it had already run."""
    limits = [PowerLimit(400.0, 0.1)]
    spent, flying = Ledger(limits, IDLE, 0.0), Ledger(limits, IDLE, 0.0)
    spent.spend(0.01, 0.05, 28.0)
    after = spent.ask(0.05, IDLE).max_watts(0.02)
    assert flying.ask(0.05, IDLE, [(0.01, 0.05, 28.0)]).max_watts(0.02) == pytest.approx(after)


def test_hand_calculation():
    """40 J of a 100 ms window are allowed; 0.04 s at 700 W and 0.03 s idle leave 9 J for 30 ms."""
    ledger = Ledger([PowerLimit(400.0, 0.1)], IDLE, 0.0)
    ledger.spend(1.0, 1.04, 28.0)
    # The window that ends with the step, [1.0, 1.1]: 28 + 3 + x <= 40.
    assert ledger.ask(1.07, IDLE).max_watts(0.03) == pytest.approx(9.0 / 0.03)


def test_a_window_is_not_spent_before_the_floor_is_served():
    """A higher floor after the step leaves the step less."""
    ledger = Ledger([PowerLimit(400.0, 0.1)], IDLE, 0.0)
    low = ledger.ask(0.0, IDLE).max_watts(0.05)
    high = ledger.ask(0.0, 350.0).max_watts(0.05)
    assert high < low


def test_a_window_shorter_than_the_step_allows_its_mean():
    """Over 10 ms, a step of 50 ms may draw the limit and no more."""
    ledger = Ledger([PowerLimit(400.0, 0.01)], IDLE, 0.0)
    assert ledger.ask(0.0, IDLE).max_watts(0.05) == pytest.approx(400.0)


def test_a_margin_lowers_the_limit():
    """A margin of 10% is a limit lower by 10%."""
    kept = Ledger([PowerLimit(400.0, 0.1)], IDLE, 0.0).ask(0.0, IDLE, margin_ratio=0.1)
    lower = Ledger([PowerLimit(360.0, 0.1)], IDLE, 0.0).ask(0.0, IDLE)
    assert kept.max_watts(0.03) == pytest.approx(lower.max_watts(0.03))


def test_without_limits_everything_fits():
    """No limit, no bound."""
    assert Ledger([], IDLE, 0.0).ask(0.0, 1e9).max_watts(1.0) == math.inf


def test_memory_stays_bounded_and_answers_stay_exact():
    """A hundred thousand steps keep some thousand corners, and the last second's joules."""
    ledger = Ledger([PowerLimit(500.0, 1.0)], IDLE, 0.0)
    now = 0.0
    for _ in range(100_000):
        ledger.spend(now, now + 0.008, 3.0)
        now += 0.008
    assert len(ledger._times) <= 8192
    assert ledger.joules_between(now - 0.8, now) == pytest.approx(300.0)


def test_a_run_that_overlaps_the_past_is_moved_behind_it():
    """The device runs one step at a time, whatever the clocks say."""
    ledger = Ledger([PowerLimit(500.0, 1.0)], IDLE, 0.0)
    ledger.spend(0.0, 0.1, 50.0)
    ledger.spend(0.05, 0.2, 40.0)
    assert ledger.joules_between(0.0, 0.2) == pytest.approx(90.0)
    ledger.spend(0.0, 0.1, 40.0)
    assert ledger.end_seconds == 0.2


@pytest.mark.parametrize("joules", [math.nan, math.inf])
def test_bad_joules_are_refused_and_nothing_is_entered(joules):
    """NaN must not spread through the sums."""
    ledger = Ledger([PowerLimit(500.0, 1.0)], IDLE, 0.0)
    with pytest.raises(LedgerError):
        ledger.spend(0.0, 0.1, joules)
    assert ledger.end_seconds == 0.0


def test_a_question_older_than_the_ledger_is_an_error():
    """What was dropped can't be summed."""
    ledger = Ledger([PowerLimit(500.0, 1.0)], IDLE, 0.0)
    with pytest.raises(LedgerError, match="begins at"):
        ledger.joules_between(-100.0, 0.0)


def test_random_alignment_agrees_with_fine_integration():
    """Corners don't need to lie on any grid: a 0.05 ms scan finds no window over the limit."""
    rng = np.random.default_rng(7)
    limit = PowerLimit(450.0, 0.0731)
    ledger, curve = Ledger([limit], IDLE, 0.0), Curve()
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
        for t in np.arange(0.0, now, 5e-5).tolist()
    )
    assert worst <= limit.watts + 1e-6
