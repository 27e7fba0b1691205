"""Which budget holds when: layers, durations on one clock, calendar time on the other."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shaper.config.calendar_spans import daily_spans, dated_span, iso
from shaper.core.budget import (
    BudgetChange,
    BudgetPlan,
    BudgetTerms,
    ScheduledTerms,
    Source,
    cannot_bind,
    describe,
    never_binds,
    redundant_pair,
    resolve,
)
from shaper.core.types import PowerBudget, PowerLimit

BERLIN = ZoneInfo("Europe/Berlin")
NOON = datetime(2026, 11, 25, 12, tzinfo=UTC).timestamp()


def terms(watts: float) -> BudgetTerms:
    return BudgetTerms((PowerLimit(watts, 1.0),))


def watts(plan: BudgetPlan, wall: float, now: float = 0.0, change: BudgetChange | None = None):
    """The one limit that holds; None without any."""
    limits = plan.at(wall, now, change).terms.limits
    return limits[0].watts if limits else None


def at(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def local(text: str, zone: ZoneInfo, fold: int = 0) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=zone, fold=fold).timestamp()


def entry(span_of, watts: float, name: str = "entry") -> ScheduledTerms:
    return ScheduledTerms(terms(watts), name, span_of)


# --- layers


def test_each_layer_says_only_what_it_says():
    """A change of the limits leaves the GPUs' own and the ramp as they were configured."""
    below = BudgetTerms((PowerLimit(500.0, 1.0),), (PowerLimit(650.0, 0.1),), 200.0)
    plan = BudgetPlan(below)
    found = plan.at(NOON, 0.0, BudgetChange(terms(400.0)))
    assert found.terms == BudgetTerms((PowerLimit(400.0, 1.0),), (PowerLimit(650.0, 0.1),), 200.0)
    assert found.source is Source.CHANGED
    free = plan.at(NOON, 0.0, BudgetChange(BudgetTerms(ramp_watts_per_second=math.inf)))
    assert resolve(free.terms, 1).ramp_watts_per_second is None
    assert resolve(free.terms, 1).limits == resolve(below, 1).limits


def test_a_budget_of_each_gpu_is_one_of_the_engine():
    """Times the number of GPUs; of two limits with one window the lower holds."""
    said = BudgetTerms(
        (PowerLimit(1100.0, 1.0), PowerLimit(1500.0, 0.1)), (PowerLimit(500.0, 1.0),), 50.0
    )
    assert resolve(said, 2) == PowerBudget((PowerLimit(1500.0, 0.1), PowerLimit(1000.0, 1.0)), 50.0)
    assert resolve(said, 4).limits[1] == PowerLimit(1100.0, 1.0)
    assert resolve(BudgetTerms(), 8).empty


@given(
    st.lists(st.floats(0.0, 1000.0), min_size=200, max_size=200),
    st.integers(1, 40),
    st.integers(1, 40),
)
def test_a_limit_that_never_binds_is_kept_by_the_other(power: list[float], one: int, two: int):
    """Whatever the power does: where the other holds, it holds. In slices of 10 ms."""
    if one == two:
        return

    def worst(window: int) -> float:
        starts = range(len(power) - window + 1)
        return max(sum(power[i : i + window]) / window for i in starts)

    other = PowerLimit(max(worst(two), 1.0), two / 100)
    loose = PowerLimit(worst(one) * 0.999, one / 100)
    if loose.watts > 1.0:
        assert not never_binds(loose, other)


def test_limits_that_contradict_each_other_are_found_exactly():
    """560 W over 100 ms allows 672 W over 250 ms, in two bursts and a half."""
    tight = PowerLimit(560.0, 0.1)
    assert redundant_pair((tight, PowerLimit(560.0, 0.3))) == (PowerLimit(560.0, 0.3), tight)
    assert redundant_pair((tight, PowerLimit(640.0, 0.25))) is None
    assert redundant_pair((tight, PowerLimit(672.0, 0.25))) is not None
    longer = PowerLimit(50.0, 1.0)
    assert redundant_pair((PowerLimit(510.0, 0.1), longer)) == (PowerLimit(510.0, 0.1), longer)


def test_budgets_in_words():
    """For logs."""
    assert describe(PowerBudget()) == "no limit"
    budget = PowerBudget((PowerLimit(560.0, 1.0),), 200.0)
    assert describe(budget) == "560 W over 1 s, rising 200 W/s at most"


# --- changes


def test_a_duration_does_not_ask_the_wall_clock():
    """A wall clock that jumps an hour, or a year, either way changes nothing."""
    plan, change = BudgetPlan(terms(560.0)), BudgetChange(terms(400.0), end_seconds=1000.0)
    for jump in (-31e6, -3600.0, 0.0, 3600.0, 31e6):
        assert watts(plan, NOON + jump, 999.9, change) == 400.0
        assert watts(plan, NOON + jump, 1000.0, change) == 560.0


def test_after_a_change_its_fallback_holds():
    """Until it is cleared; without one, what is configured and scheduled."""
    plan = BudgetPlan(terms(560.0))
    change = BudgetChange(terms(400.0), end_seconds=10.0, fallback=terms(450.0))
    assert plan.at(NOON, 9.0, change).seconds_left == pytest.approx(1.0)
    found = plan.at(NOON, 1e9, change)
    assert (found.source, found.seconds_left) == (Source.FALLBACK, math.inf)
    assert watts(plan, NOON, 1e9, change) == 450.0
    assert watts(plan, NOON, 1e9, None) == 560.0


def test_until_is_calendar_time():
    """It ends when the wall clock says so, and is back if the clock is set back."""
    plan = BudgetPlan(terms(560.0))
    change = BudgetChange(terms(400.0), end_wall_seconds=NOON + 60)
    assert watts(plan, NOON, 1e9, change) == 400.0
    assert watts(plan, NOON + 3600, 1e9, change) == 560.0
    assert watts(plan, NOON, 1e9, change) == 400.0


# --- the schedule


def test_a_dated_entry_holds_from_its_start_to_before_its_end():
    """And tells how long nothing changes, on both sides."""
    span = dated_span(
        datetime.fromisoformat("2026-11-25T18:00:00+01:00"),
        datetime.fromisoformat("2026-11-25T18:00:00Z"),
    )
    plan = BudgetPlan(terms(560.0), (entry(span, 450.0, "evening"),))
    assert plan.at(at("2026-11-25T16:00:00Z"), 0.0).seconds_left == 3600.0
    assert watts(plan, at("2026-11-25T16:59:59Z")) == 560.0
    found = plan.at(at("2026-11-25T17:00:00Z"), 0.0)
    assert (found.source, found.entries, found.seconds_left) == (
        Source.SCHEDULED,
        ("evening",),
        3600.0,
    )
    assert watts(plan, at("2026-11-25T18:00:00Z")) == 560.0
    assert math.isinf(plan.at(at("2030-01-01T00:00:00Z"), 0.0).seconds_left)


def test_a_night_that_began_yesterday_still_holds():
    """A span over midnight belongs to the day on which it began."""
    night = daily_spans(22 * 60, 6 * 60, UTC)
    plan = BudgetPlan(terms(560.0), (entry(night, 450.0),))
    assert watts(plan, at("2026-11-28T05:59:59Z")) == 450.0
    assert watts(plan, at("2026-11-28T06:00:00Z")) == 560.0
    assert watts(plan, at("2026-11-28T22:30:00Z")) == 450.0
    assert plan.at(at("2026-11-28T06:00:00Z"), 0.0).seconds_left == 16 * 3600


def test_later_entries_lie_over_earlier_ones():
    """A dated exception over a daily rule, and a change over both."""
    night = daily_spans(0, 24 * 60, UTC)
    exception = dated_span(
        datetime.fromtimestamp(NOON, UTC), datetime.fromtimestamp(NOON + 60, UTC)
    )
    plan = BudgetPlan(terms(560.0), (entry(night, 450.0), entry(exception, 600.0)))
    assert watts(plan, NOON - 1) == 450.0
    assert watts(plan, NOON) == 600.0
    assert watts(plan, NOON, 0.0, BudgetChange(terms(300.0))) == 300.0


# --- changes to and from daylight saving; Berlin goes to summer time on 2026-03-29 at 02:00


@pytest.mark.parametrize(
    ("day", "start", "end", "hours"),
    [
        ("2026-03-28", 22 * 60, 6 * 60, 7.0),  # the night loses an hour
        ("2026-10-24", 22 * 60, 6 * 60, 9.0),  # and gains one
        ("2026-06-01", 22 * 60, 6 * 60, 8.0),
        ("2026-03-29", 0, 24 * 60, 23.0),
        ("2026-10-25", 0, 24 * 60, 25.0),
        ("2026-03-29", 150, 210, 0.0),  # 02:30 is read as 03:30: no length, left out
        ("2026-03-29", 150, 170, 1 / 3),  # 02:30 to 02:50 is 03:30 to 03:50
        ("2026-10-25", 150, 210, 2.0),  # from the first 02:30
        ("2026-10-25", 120, 150, 0.5),  # to the first 02:30, and not once more
    ],
)
def test_days_of_23_and_25_hours(day, start, end, hours):
    """A span starts once a day, at the first time the clock shows it, and ends once."""
    spans = daily_spans(start, end, BERLIN)
    midnight = local(f"{day}T00:00:00", BERLIN)
    tomorrow = local(f"{(datetime.fromisoformat(day) + timedelta(days=1)).date()}T00:00:00", BERLIN)
    wall, found = midnight, []
    while (span := spans(wall)) is not None and span.start_seconds < tomorrow:
        if span.start_seconds >= midnight:
            found.append(span)
        wall = span.end_seconds
    assert sum(s.end_seconds - s.start_seconds for s in found) == hours * 3600
    assert len(found) == (1 if hours else 0)


def test_a_span_that_the_gap_swallows_comes_the_day_after():
    """02:30 to 03:30 has no length when the clock skips 02:30."""
    span = daily_spans(150, 210, BERLIN)(local("2026-03-28T12:00:00", BERLIN))
    assert span is not None
    assert iso(span.start_seconds) == "2026-03-30T00:30:00Z"


moments = st.floats(0.0, 4e9)


@given(
    moments,
    st.integers(0, 24 * 60 - 1),
    st.integers(1, 24 * 60),
    st.sampled_from([UTC, BERLIN, ZoneInfo("Australia/Lord_Howe"), ZoneInfo("Pacific/Apia")]),
)
def test_the_next_span_is_over_later_and_comes_within_three_days(wall, start, end, zone):
    """In any zone, of any length: it has not ended, and asking inside it finds it again."""
    if start == end:
        return
    spans = daily_spans(start, end, zone)
    span = spans(wall)
    assert span is not None
    assert wall < span.end_seconds
    assert span.start_seconds < wall + 3 * 86_400
    assert span.start_seconds < span.end_seconds <= span.start_seconds + 26 * 3600
    middle = max(wall, span.start_seconds)
    assert spans(middle) == span


@given(moments, st.floats(-1e8, 1e8), st.floats(0.0, 1e6))
def test_a_wall_clock_that_jumps_leaves_nothing_behind(wall, jump, now):
    """What holds depends on the two clocks alone, so a jump and back is no jump."""
    spans = daily_spans(1320, 360, BERLIN)
    plan = BudgetPlan(terms(560.0), (entry(spans, 450.0),))
    change = BudgetChange(terms(400.0), end_seconds=5e5, fallback=BudgetTerms())
    before = plan.at(wall, now, change)
    plan.at(max(0.0, wall + jump), now, change)
    assert plan.at(wall, now, change) == before
    assert before.seconds_left > 0
    if math.isfinite(before.seconds_left) and before.seconds_left > 1.0:
        # Nothing but a change alters it before then.
        later = before.seconds_left * 0.99
        assert plan.at(wall + later, now + later, change).terms == before.terms


@pytest.mark.parametrize(
    ("limit", "binds"),
    [
        (PowerLimit(900.0, 1.0), False),
        (PowerLimit(700.0, 0.5), False),
        (PowerLimit(690.0, 1.0), True),
        (PowerLimit(900.0, 0.01), True),
        (PowerLimit(940.0, 0.49), True),
        (PowerLimit(950.0, 0.01), False),
    ],
)
def test_what_the_power_cap_holds_can_never_bind(limit: PowerLimit, binds: bool) -> None:
    """One GPU of 700 W: for long it draws that, in bursts of some hundred ms up to 1.35 times."""
    assert cannot_bind([limit], 700.0) == (() if binds else (limit,))
