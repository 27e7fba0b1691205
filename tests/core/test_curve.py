"""The energy curve: its corners, and that merging them never says less than was spent."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shaper.core.ledger.curve import EnergyCurve

LENGTHS = st.lists(st.floats(0.0005, 0.05), min_size=1, max_size=60)


@given(start=st.floats(0.0, 1e5), lengths=LENGTHS, window=st.sampled_from([0.05, 0.1, 1.0]))
def test_any_corners_may_be_taken_over(start, lengths, window):
    """Whatever rounding does to the grid, the curve begins and ends where they do."""
    times = start + np.cumsum([0.0, *lengths])
    joules = np.cumsum([0.0, *(500.0 * length for length in lengths)])
    curve = EnergyCurve(start, window, window / 512)
    curve.begin(times, joules)
    assert curve.end_seconds == times[-1]
    assert curve.times[0] == times[0]
    assert curve.joules[curve.count - 1] == joules[-1]


def test_a_grid_that_ends_just_behind_the_last_corner():
    """Rounding lets 512 spacings end after 0.55 s: there is no corner behind the last."""
    curve = EnergyCurve(0.0, 0.05, 0.05 / 512)
    curve.begin(np.array([0.5, 0.51, 0.55]), np.array([0.0, 1.0, 2.0]))
    assert curve.count == 3


@given(lengths=LENGTHS, spacing=st.sampled_from([0.0, 0.001, 0.01]))
def test_what_is_kept_of_the_end_is_the_end(lengths, spacing):
    """The floats beside the arrays follow every append, merged or compacted."""
    curve = EnergyCurve(0.0, 0.2, spacing)
    now = total = 0.0
    for index in range(400):
        length = lengths[index % len(lengths)]
        now, total = now + length, total + 300.0 * length
        curve.append(now, 300.0 * length)
        last = curve.count - 1
        assert curve.end_seconds == curve.times[last] == now
        spent = curve.joules[last] - curve.joules[0]
        assert abs(spent - 300.0 * (now - curve.times[0])) <= 1e-6 + curve.merged_joules
