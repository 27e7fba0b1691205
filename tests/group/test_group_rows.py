"""One row after the other: what is entered is what others see."""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shaper.core.ledger.shared import Committed, EngineShare, Step
from shaper.core.types import PowerLimit, StepPrediction
from shaper.errors import LedgerError
from shaper.group import GroupLedger, memory_groups
from shaper.group.lock import ClaimLock
from shaper.group.reservations import AHEAD_SECONDS, BINS, HEARD_SECONDS, Reservations, table_bytes
from shaper.group.usage import mean_watts
from tests.group.group_judge import Device, Drawn

LIMITS = (PowerLimit(1000.0, 0.1), PowerLimit(900.0, 2.0), PowerLimit(800.0, 10.0))
IDLE = EngineShare(100.0)


def groups(count: int = 2, limits: tuple[PowerLimit, ...] = LIMITS) -> list[GroupLedger]:
    return memory_groups(
        limits,
        count,
        idle_watts=100.0,
        rest_watts=60.0,
        rest_after_seconds=3.0,
        start_seconds=1000.0,
    )


def device() -> Device:
    return Device(Drawn(100.0, 60.0, 3.0, 1000.0, 1000.0))


def room(group: GroupLedger, now: float, seconds: float = 0.02) -> list[float]:
    view = group.query(now, now, IDLE)
    return [part.max_watts(seconds) for part in view.parts]


def test_a_claim_that_is_taken_back_leaves_no_trace():
    """Others have the same room as before, however often, and the next entry is whole."""
    one, two, other = groups(3)
    claimer = device()
    for now in (1000.5, 1000.52):
        run = now, now + 0.015, 500.0
        assert one.reserve(claimer.committed([run]), IDLE, now, None)
        claimer.launch(run)
    two.publish(IDLE, 1000.54)
    before = room(other, 1000.54)
    two.query(1000.54, 1000.54, IDLE)
    heavy = 1000.54, 1000.64, 5000.0
    step = Step(1000.54, StepPrediction(0.1, 500.0))
    one.commit(claimer.committed(), IDLE, 1000.54)
    for _ in range(3):
        assert not two.reserve(device().committed([heavy]), IDLE, 1000.54, step)
        assert room(other, 1000.54) == pytest.approx(before)
    assert two.refused == 3
    light = 1000.54, 1000.55, 200.0
    mine = device()
    assert two.reserve(mine.committed([light]), IDLE, 1000.54, None)
    mine.launch(light)
    seen = mean_watts(two._rows, two._rows.read(), 0.1, 1000.6)[1]
    assert seen == pytest.approx(110.0)


def test_nothing_new_since_the_look_is_not_checked_again():
    """What the engine decided is its affair: it may have to go on at its floor."""
    one, two = groups()
    heavy = 1000.5, 1000.6, 5000.0
    step = Step(1000.5, StepPrediction(0.1, 500.0))
    one.query(1000.5, 1000.5, IDLE)
    assert one.reserve(device().committed([heavy]), IDLE, 1000.5, step)
    two.query(1000.5, 1000.5, IDLE)
    one.commit(device().committed(), IDLE, 1000.5)
    assert not two.reserve(device().committed([heavy]), IDLE, 1000.5, step)
    assert two.reserve(device().committed([heavy]), IDLE, 1000.5, None)


@given(
    runs=st.lists(
        st.tuples(st.floats(0.0, 3.0), st.floats(0.001, 0.5), st.floats(100.0, 900.0)), max_size=30
    ),
    after=st.floats(0.0, 5.0),
)
def test_the_mean_of_every_window_is_what_was_entered(runs, after):
    """Through idle time, rest, the ring's end and both copies; to the rounding of a bin."""
    one, *_ = groups(1)
    own = device()
    now = 1000.0
    for gap, seconds, watts in runs:
        now += gap
        run = now, now + seconds, watts
        assert one.reserve(own.committed([run]), IDLE, now, None)
        own.launch(run)
        now += seconds
        own.finish(now)
        one.commit(own.committed(), IDLE, now)
    now += after
    for limit, length in zip(LIMITS, (0.001, 0.004, 0.04), strict=True):
        window = limit.window_seconds
        begin = max(now - window, 1000.0)
        joules = own.ledger.joules_between(begin, now)
        [seen] = mean_watts(one._rows, one._rows.read(), window, now)
        assert seen * window == pytest.approx(joules, abs=800.0 * length)


def test_an_engine_counts_with_its_floor_while_it_is_heard():
    """Then with what it draws idle, and at last at rest; a parked one with its floor."""
    one, two = groups()
    two.publish(EngineShare(400.0), 1000.5)
    heard = room(one, 1000.5)[0]
    assert heard == pytest.approx(room(groups()[0], 1000.5)[0] - 0.1 * 300.0 / 0.02, abs=1.0)
    assert room(one, 1000.5 + 2 * HEARD_SECONDS)[0] > heard
    resting = room(one, 1010.0)[0]
    two.reserve_fixed(400.0, 1010.0)
    assert room(one, 1000000.0)[0] < resting
    two.publish(IDLE, 1000000.0)
    assert room(one, 1000010.0)[0] == pytest.approx(resting, abs=1.0)


def test_a_run_far_ahead_is_floor_until_it_comes_near():
    """The ring never overwrites what a window still needs."""
    one, two = groups()
    own = device()
    past = 1000.0, 1000.5, 700.0
    assert one.reserve(own.committed([past]), IDLE, 1000.0, None)
    own.launch(past)
    before = room(two, 1000.5)
    far = 1000.5, 1000.5 + 2 * BINS * 0.001, 100.0
    assert one.reserve(own.committed([far]), IDLE, 1000.5, None)
    assert room(two, 1000.5) == pytest.approx(before, abs=1.0)
    assert one._rows.end_seconds(0) == pytest.approx(1000.5 + AHEAD_SECONDS)
    assert one._rows.floor_watts(0, 1005.0) == 100.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_never_reaches_the_others(bad):
    """One engine's fault would stop all of them."""
    one, two = groups()
    before = room(two, 1000.5)
    good = device().committed([(1000.5, 1000.6, 500.0)])
    for committed, share in (
        (Committed(1000.0, good.times, good.joules + bad), IDLE),
        (Committed(1000.0, good.times + bad, good.joules), IDLE),
        (good, EngineShare(bad)),
    ):
        with pytest.raises(LedgerError):
            one.reserve(committed, share, 1000.5, None)
        with pytest.raises(LedgerError):
            one.commit(committed, share, 1000.5)
    with pytest.raises(LedgerError):
        one.publish(EngineShare(100.0, decode_joules=bad), 1000.5)
    assert room(two, 1000.5) == before


def test_static_shares_add_up_to_each_limit():
    """By idle power and by GPUs."""
    rows = Reservations(bytearray(table_bytes(3, LIMITS)), 3, LIMITS)
    for row, (idle, count) in enumerate(((100.0, 1), (400.0, 4), (80.0, 1))):
        rows.open(row, idle, idle, 1.0, 0.0, count)
    shares = [GroupLedger(rows, row, LIMITS).static_limits for row in range(3)]
    for index, limit in enumerate(LIMITS):
        assert sum(share[index].watts for share in shares) == pytest.approx(limit.watts)
    assert shares[1][0].watts == pytest.approx(400.0 + 4 / 6 * (1000.0 - 580.0))


def test_only_the_grids_that_limits_need_take_space():
    """And a long window costs no more bins than a short one."""
    one = table_bytes(8, LIMITS[:1])
    assert table_bytes(8, LIMITS[1:2]) == one
    assert table_bytes(8, LIMITS) > 2.9 * one


def test_a_row_that_changes_all_the_time_is_read_at_last():
    """Counted, since it may be half of one and half of another entry."""
    one, two = groups()
    rows = one._rows
    original = rows.read

    def read(*asked):
        reading = original(*asked)
        rows.versions[1] += 2
        return reading

    rows.read = read  # type: ignore[method-assign]
    room(one, 1000.5)
    assert rows.torn == 1
    assert np.isfinite(room(two, 1000.5)).all()


def test_what_a_parked_engine_draws_is_entered_as_time_passes():
    """Also what it drew before: others see its floor in their windows, not its idle power."""
    one, two = groups()
    claimer = device()
    run = 1000.5, 1000.6, 500.0
    assert two.reserve(claimer.committed([run]), IDLE, 1000.5, None)
    for now in (1000.55, 1000.59, 1000.61, 1000.63, 1000.73, 1000.8):
        two.reserve_fixed(700.0, now)
    for now, watts in ((1000.6, 500.0), (1000.8, 700.0), (1000.85, 700.0), (1001.5, 700.0)):
        assert mean_watts(one._rows, one._rows.read(), 0.1, now)[1] == pytest.approx(watts, abs=2)
    assert room(one, 1000.8, 0.1)[0] == pytest.approx(300.0, abs=2.0)
    two.commit(Committed(1000.8, np.array([1000.75, 1000.8]), np.array([0.0, 35.0])), IDLE, 1000.8)
    assert mean_watts(one._rows, one._rows.read(), 0.1, 1000.8)[1] == pytest.approx(700.0, abs=7)
    assert mean_watts(one._rows, one._rows.read(), 0.1, 1000.9)[1] == pytest.approx(100.0, abs=7)


class NoLock:
    """A lock that can't be had."""

    waited_seconds = 2e-4

    def enter(self) -> bool:
        return False

    def late(self) -> bool:
        return False

    def leave(self) -> None:
        pass


def test_who_missed_the_lock_plans_and_claims_on_its_static_share():
    """For about a step; then it tries again what the whole group has room for."""
    free, _ = groups()
    group = GroupLedger(free._rows, 0, LIMITS, cast(ClaimLock, NoLock()))
    group.query(1000.5, 1000.5, IDLE)
    assert room(group, 1000.5, 0.1)[0] == pytest.approx(900.0, abs=1.0)
    for watts, claimed in ((900.0, False), (490.0, True)):
        run = 1000.5, 1000.6, watts
        step = Step(1000.5, StepPrediction(0.1, 0.1 * watts))
        assert group.reserve(device().committed([run]), IDLE, 1000.5, step) is claimed
        assert group.static_steps == 1 + claimed
    group.commit(device().committed(), IDLE, 1000.5)
    view = group.query(1000.505, 1000.505, IDLE)
    assert min(part.max_watts(0.1) for part in view.parts) == pytest.approx(500.0, abs=1.0)
    view = group.query(1000.52, 1000.52, IDLE)
    assert min(part.max_watts(0.1) for part in view.parts) == pytest.approx(900.0, abs=1.0)


@pytest.mark.parametrize(("joules", "fits"), [(5000.0, False), (50.0, True)])
def test_a_claim_of_one_that_never_looked_is_checked(joules: float, fits: bool):
    """It knows of nobody's steps, so the windows are asked with the floor that it names."""
    one, _ = groups()
    run = 1000.54, 1000.64, joules
    step = Step(1000.54, StepPrediction(0.1, joules))
    assert one.reserve(device().committed([run]), IDLE, 1000.54, step) is fits
