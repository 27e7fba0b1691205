"""Hypothesis strategies, all in one place."""

from __future__ import annotations

import math

from hypothesis import settings
from hypothesis import strategies as st

from shaper.core.ledger.ledger import Ledger
from shaper.core.supervise.admission import AdmissionInput
from shaper.core.types import EngineLoad, PowerBudget, PowerLimit, PrefillDemand
from shaper.gpu.nvml_errors import ERRORS
from shaper.ipc.group_status import MEMBER_STATES, GroupStatus, MemberStatus
from tests.conftest import SCALE
from tests.gpu.fake_faults import Fault


def examples(count: int, steps: int = 50) -> settings:
    """For tests whose examples take long, or are many: a count at HYPOTHESIS_SCALE=1."""
    return settings(max_examples=max(1, round(count * SCALE)), stateful_step_count=steps)


watts = st.floats(min_value=1.0, max_value=900.0)
step_seconds = st.floats(min_value=0.002, max_value=0.2)
gap_seconds = st.sampled_from([0.0, 0.0, 0.001, 0.01, 0.3])

runs = st.lists(st.tuples(gap_seconds, step_seconds, watts), max_size=40)
"""Steps as (gap before, seconds, watts)."""


def ledger_of(runs, *limits: PowerLimit, ramp: float | None = None, idle: float = 100.0) -> Ledger:
    """A ledger in which such runs are spent."""
    ledger = Ledger(PowerBudget(limits, ramp), idle, 0.0)
    for gap, seconds, watts in runs:
        start = ledger.end_seconds + gap
        ledger.spend(start, start + seconds, watts * seconds)
    return ledger


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


admission_inputs = st.builds(
    AdmissionInput,
    use_ratio=st.none() | st.floats(0.0, 1.5),
    held_ratio=st.floats(0.0, 1.0),
    wait_seconds=st.floats(0.0, 100.0),
)
"""What presses on an engine, where all of it is known."""


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


AMPLE_WATTS, AMPLE_SECONDS = 430.0, 0.1
"""Above the floor of a small model's few requests on an H200, over this window and longer."""

ample_limits = st.builds(
    PowerLimit,
    watts=st.floats(AMPLE_WATTS, 700.0),
    window_seconds=st.sampled_from([AMPLE_SECONDS, 0.25, 1.0, 5.0, 60.0]),
)
any_limits = st.builds(
    PowerLimit,
    watts=st.one_of(st.floats(1.0, 800.0), st.sampled_from([76.0, 140.0, 141.0, 200.0, 300.0])),
    window_seconds=st.sampled_from([0.01, 0.05, 0.1, 1.0, 10.0, 60.0]),
)
ramps = st.one_of(st.none(), st.none(), st.sampled_from([20.0, 200.0, 2000.0]))


def budgets() -> st.SearchStrategy[PowerBudget]:
    """Ample ones, tight ones, some below the floor, and none."""
    ample = st.lists(ample_limits, min_size=1, max_size=2)
    tight = st.lists(any_limits, max_size=3)
    return st.one_of(
        st.builds(PowerBudget, ample.map(tuple)),
        st.builds(PowerBudget, tight.map(tuple), ramps),
        st.just(PowerBudget()),
    )


def is_ample(budget: PowerBudget) -> bool:
    """Whether work is never held back for long by this budget alone."""
    return budget.ramp_watts_per_second is None and all(
        limit.watts >= AMPLE_WATTS and limit.window_seconds >= AMPLE_SECONDS
        for limit in budget.limits
    )


_sums = st.floats(0.0, 1e6)
group_statuses = st.builds(
    GroupStatus,
    limits=st.lists(st.builds(PowerLimit, _sums, _sums), min_size=1, max_size=32).map(tuple),
    members=st.lists(
        st.builds(
            MemberStatus,
            pid=st.integers(1, 2**22),
            state=st.sampled_from(MEMBER_STATES),
            floor_watts=_sums,
            committed_watts=_sums,
            waiting_seconds=st.none() | _sums,
        ),
        max_size=32,
    ).map(tuple),
    committed_watts=_sums,
    floor_watts=_sums,
    claims_refused=st.integers(0, 10**9),
    static_steps=st.integers(0, 10**9),
    lock_wait_seconds=_sums,
    detached=st.booleans(),
    errors=st.integers(0, 10**9),
)
"""What an engine says of its power group, as large as its block has room for."""

DRIVER_CALLS = (
    *("", "nvmlInit", "nvmlDeviceGetFieldValues", "nvmlDeviceGetHandleByIndex"),
    *("nvmlDeviceGetClockInfo", "nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetUUID"),
    *("nvmlDeviceGetEnforcedPowerLimit", "nvmlDeviceGetTemperatureV"),
    *("nvmlDeviceGetMarginTemperature", "CLOCKS_EVENT_REASON_SW_POWER_CAP"),
    *("POWER_INSTANT", "POWER_AVERAGE", "TOTAL_ENERGY_CONSUMPTION", "MEMORY_TEMP"),
)
_garbage = st.sampled_from([0.0, -1.0, 1.0, 1e3, 1e12, 2.0**64, math.nan, math.inf, -math.inf])


@st.composite
def driver_faults(draw: st.DrawFn, end_seconds: float) -> Fault:
    """One fault of any kind but a hang (which needs two threads), over before the end."""
    begin = draw(st.floats(0.5, end_seconds - 0.5))
    kind = draw(
        st.sampled_from(
            ["code", "garbage", "frozen", "backwards", "slow", "limit", "lost", "unloaded"]
        )
    )
    value = draw(st.floats(0.0, 1e7) if kind in ("limit", "backwards") else _garbage)
    return Fault(
        kind,
        call=draw(st.sampled_from(DRIVER_CALLS)),
        gpu=draw(st.sampled_from([None, 0, 1])),
        code=draw(st.sampled_from(sorted(ERRORS))),
        value=value,
        seconds=draw(st.floats(0.0, 0.3)),
        from_seconds=begin,
        until_seconds=draw(st.floats(begin, end_seconds)),
    )
