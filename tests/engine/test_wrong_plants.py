"""Promises on GPUs that the model can't represent: what is left after ten seconds."""

from __future__ import annotations

import pytest

from bench.studies import learning
from shaper.core.types import PowerLimit

# Metered, after the first ten seconds, with the default margin.
MOST_OVER_RATIO, MOST_EXCESS_RATIO = 0.005, 0.03
LIMIT_SHARE, WINDOW_SECONDS, TRAFFIC_SECONDS = 0.7, 0.1, 16.0
PLANTS = {**learning.plants(), **dict(learning.term_plants())}


@pytest.mark.parametrize(
    "name",
    [
        "joules +15%",
        "joules -15%",
        "seconds +15%",
        "seconds -15%",
        "cliff above 512 tokens",
        "ceiling at 560 W",
        "steeper above 450 W",
        "terms -+++---",
        "terms +-+-+-+",
    ],
)
def test_wrong_plants_keep_the_budget_once_seen(name):
    """A plant wrong in its own way is over its limit seldom and by little, and all is served."""
    traffic = learning.random_traffic(1, TRAFFIC_SECONDS)
    peak = learning.unshaped_peak(PLANTS[name], traffic[: len(traffic) // 4])
    outcome = learning.judge(
        PLANTS[name](), PowerLimit(LIMIT_SHARE * peak, WINDOW_SECONDS), traffic
    )
    assert outcome.finished
    assert outcome.forced == 0
    assert outcome.excess_ratio < MOST_EXCESS_RATIO
    assert outcome.over_ratio < MOST_OVER_RATIO
