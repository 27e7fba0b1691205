"""What the API server takes from the engines' status blocks."""

from __future__ import annotations

import math

import pytest

from shaper.core.budget import Source
from shaper.core.supervise.status import Admissibility, AdmissionState, EngineStatus, ThermalOutlook
from shaper.core.types import PowerBudget, PowerLimit
from shaper.ipc.control_file import EngineControl, Mode
from shaper.ipc.engine_record import EngineRecord, Status
from shaper.ipc.group_status import GroupStatus
from shaper.server.admission import AdmissionGate, GateReader, most_open
from tests.server.exchange import DEFER, OPEN, SHED

LIMITED = PowerBudget((PowerLimit(500.0, 1.0),))


def status(
    state: AdmissionState,
    recovery: float | None = None,
    *,
    at: float = 100.0,
    mode: Mode = "on",
    budget: PowerBudget = LIMITED,
    heat: bool = False,
    group: tuple[PowerLimit, ...] = (),
) -> Status:
    """An engine's block, as its own writer makes it."""
    outcome = Admissibility(state, 0.5, "wait", recovery)
    thermal = ThermalOutlook(limit=PowerLimit(400.0, 1.0)) if heat else ThermalOutlook()
    standing = EngineStatus(at, admissibility=outcome, thermal=thermal)
    control = EngineControl(budget, mode, next(iter(Source)), 0, 0, 0, math.inf)
    shared = GroupStatus(group, ()) if group else None
    return Status({"engine": 0}, EngineRecord(at, standing=standing, control=control, group=shared))


NOTHING = PowerBudget()


@pytest.mark.parametrize(
    ("statuses", "gate"),
    [
        ([], None),
        ([status(SHED, 30.0)], AdmissionGate(SHED, 30.0)),
        ([status(OPEN)], AdmissionGate(OPEN, None)),
        # The most open one counts, and of two that are alike the one that is sooner back.
        ([status(SHED, 30.0), status(DEFER, 9.0)], AdmissionGate(DEFER, 9.0)),
        ([status(SHED, 30.0), status(SHED, 20.0)], AdmissionGate(SHED, 20.0)),
        # A silent engine, one in shadow, one that is off and one without a budget admit all.
        ([status(SHED, at=97.9)], None),
        ([status(SHED), status(SHED, at=97.9)], AdmissionGate(OPEN, None)),
        ([status(SHED, mode="shadow")], None),
        ([status(SHED), status(SHED, mode="off")], AdmissionGate(OPEN, None)),
        ([status(SHED, budget=NOTHING)], None),
        ([status(SHED, 5.0, budget=NOTHING, heat=True)], AdmissionGate(SHED, 5.0, thermal=True)),
        # A group's limit is a budget too.
        ([status(SHED, 5.0, budget=NOTHING, group=LIMITED.limits)], AdmissionGate(SHED, 5.0)),
        ([status(OPEN, budget=NOTHING, group=LIMITED.limits)], AdmissionGate(OPEN, None)),
        ([status(SHED, budget=NOTHING, group=LIMITED.limits, mode="shadow")], None),
        # So is a ramp alone.
        ([status(SHED, 5.0, budget=PowerBudget((), 200.0))], AdmissionGate(SHED, 5.0)),
        # An engine that has written nothing yet.
        ([Status({})], None),
    ],
)
def test_the_most_open_engine_counts(statuses: list[Status], gate: AdmissionGate | None) -> None:
    """From the blocks, two seconds of silence allowed."""
    assert most_open(statuses, 100.0) == gate


def test_the_blocks_are_read_now_and_then() -> None:
    """Not at every request; one that can't be read opens the gate, and it is tried again."""
    now, calls, found = 100.0, 0, [status(SHED, 30.0)]

    def read() -> list[Status]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError("no space")
        return found

    gates = GateReader(read, lambda: now)
    for _ in range(50):
        assert gates.gate() == AdmissionGate(SHED, 30.0)
    assert calls == 1
    now = 100.06
    assert gates.gate() is None
    now = 100.12
    assert gates.gate() == AdmissionGate(SHED, 30.0)
