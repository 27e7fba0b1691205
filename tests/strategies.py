"""Hypothesis strategies, all in one place."""

from __future__ import annotations

from hypothesis import strategies as st

from shaper.core.types import EngineLoad, PowerLimit, PrefillDemand

watts = st.floats(min_value=1.0, max_value=900.0)
step_seconds = st.floats(min_value=0.002, max_value=0.2)
gap_seconds = st.sampled_from([0.0, 0.0, 0.001, 0.01, 0.3])

runs = st.lists(st.tuples(gap_seconds, step_seconds, watts), max_size=40)
"""Steps as (gap before, seconds, watts)."""

limits = st.lists(
    st.builds(
        PowerLimit,
        watts=st.floats(min_value=200.0, max_value=800.0),
        window_seconds=st.sampled_from([0.01, 0.05, 0.1, 0.5, 2.0]),
    ),
    min_size=1,
    max_size=3,
)

demands = st.builds(
    PrefillDemand,
    remaining_tokens=st.integers(1, 20_000),
    computed_tokens=st.integers(0, 5_000),
)


@st.composite
def loads(draw: st.DrawFn) -> EngineLoad:
    """Engine loads with consistent sums."""
    decodes = draw(st.integers(0, 300))
    return EngineLoad(
        decode_requests=decodes,
        decode_tokens=decodes,
        decode_context_tokens=decodes * draw(st.integers(1, 4000)),
        prefills=tuple(draw(st.lists(demands, max_size=6))),
        request_chunk_tokens=draw(st.sampled_from([0, 0, 512])),
        splittable=draw(st.sampled_from([True, True, True, False])),
    )
