"""Is there a budget? One answer for the engine, its admission, its heat and the API server."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest

from shaper.core.budget import Constraints
from shaper.core.supervise.admission import AdmissionReason
from shaper.core.supervise.status import AdmissionState, Usage, usage
from shaper.core.types import PowerBudget, PowerLimit
from shaper.engine import build
from shaper.ipc.control_file import ControlFile
from shaper.ipc.enforcement import Enforcement, enforcement_of
from shaper.ipc.engine_record import Status, read_statuses
from shaper.ipc.status_block import control_paths, run_id
from shaper.server.admission import most_open
from tests.controlled import record
from tests.engine.harness import GPU, MODEL

LIMIT = (PowerLimit(420.0, 0.1),)


@pytest.mark.parametrize(
    ("constraints", "asked", "budgeted"),
    [
        (Constraints(), False, False),
        (Constraints(PowerBudget(LIMIT)), True, True),
        (Constraints(PowerBudget((), 200.0)), True, True),
        (Constraints(shared_limits=LIMIT), True, True),
        (Constraints(heat_limits=LIMIT), False, True),
    ],
)
def test_any_limit_is_a_budget(constraints: Constraints, asked: bool, budgeted: bool) -> None:
    """Of the engine, of its group, and against heat; the last is not the operator's."""
    assert (constraints.asked, constraints.budgeted) == (asked, budgeted)


def test_an_engine_holds_its_own_limits_and_the_heats() -> None:
    """The group's are in the shared ledger."""
    heat = (PowerLimit(600.0, 0.2),)
    whole = Constraints(PowerBudget(LIMIT, 200.0), heat, (PowerLimit(4000.0, 0.1),))
    assert whole.own == PowerBudget(LIMIT + heat, 200.0)


def test_usage_of_several_limits_is_that_of_the_tightest() -> None:
    """And what is not known counts for nothing."""
    loose, tight = usage(1000.0, 400.0, 100.0), usage(500.0, 450.0, 100.0)
    assert loose.together(tight) == tight.together(loose) == Usage(50.0, 350.0 / 400.0)
    assert loose.together(Usage()) == Usage().together(loose) == loose


@cache
def config() -> Any:
    from shaper.simulate.engine import engine_config

    return engine_config(MODEL, GPU)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Starts the shaper of an engine as a server does, with its sampler's thread."""
    made = []

    def start(**settings: Any) -> Any:
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler

        from shaper.core.model.power_model import StepModel
        from shaper.engine.work import engine_coefficients
        from shaper.gpu.profiles import load_profile
        from shaper.simulate.engine import kv_cache, new_scheduler

        model = StepModel(load_profile(GPU), engine_coefficients(config()))
        scheduler = new_scheduler(config(), AsyncScheduler, kv_cache(config(), model, 2500))
        monkeypatch.setattr(config(), "additional_config", {"power_shaper": settings})
        made.append(build.attach(scheduler))
        return made[-1]

    yield start
    for shaper in made:
        shaper.close()
    for path in control_paths(run_id()):
        path.unlink(missing_ok=True)


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30.0
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def gate() -> AdmissionState | None:
    found = most_open(read_statuses(run_id()), time.monotonic())
    return None if found is None else found.state


def reason(shaper: Any) -> str | None:
    return None if shaper.standing is None else shaper.standing.admissibility.reason


def test_a_group_alone_is_a_budget_for_all_who_ask(started: Callable[..., Any]) -> None:
    """As README's own command gives it: admission acts in the engine and at the API server, and
    pressure and headroom are shown."""
    shaper = started(power_group=f"budgeted-{uuid.uuid4().hex[:8]}", group_limits="4000W@100ms")
    assert shaper.constraints.budgeted
    assert shaper.budget.empty
    until(lambda: reason(shaper) == AdmissionReason.ROOM and gate() is AdmissionState.OPEN)
    (status,) = read_statuses(run_id())
    assert enforcement_of(status).constraints.shared_limits == (PowerLimit(4000.0, 0.1),)
    assert enforcement_of(status).unkept is None
    assert status.record.usage is not None
    assert 3500.0 < status.record.usage.headroom_watts < 4000.0
    assert 0.0 <= status.record.usage.use_ratio < 0.1


def test_a_budget_that_comes_later_is_one_for_all_who_ask(started: Callable[..., Any]) -> None:
    """By PUT, to an engine that was started without any; and no more once it is taken back."""
    shaper = started()
    until(lambda: reason(shaper) == AdmissionReason.NO_BUDGET and gate() is None)
    file = ControlFile(run_id())
    file.write(record(run_id(), 1))
    until(lambda: reason(shaper) == AdmissionReason.ROOM and gate() is AdmissionState.OPEN)
    file.write(record(run_id(), 2).model_copy(update={"budget": None}))
    until(lambda: reason(shaper) == AdmissionReason.NO_BUDGET and gate() is None)


def blocked(**info: Any) -> Enforcement:
    return enforcement_of(Status({"engine": 0, "passes_through": "why", **info}))


def test_why_a_limit_is_not_kept(started: Callable[..., Any]) -> None:
    """By its mode, its policy, and where not even a block is written but the reason."""
    shaper = started(limits="500W@1s", shadow=True)
    until(lambda: enforcement_of(read_statuses(run_id())[0]).unkept == "shadow")
    shaper.close()
    shaper = started(limits="500W@1s", policy="fixed")
    until(lambda: enforcement_of(read_statuses(run_id())[0]).unkept == "policy")
    shaper.close()
    assert blocked(limits_power=True).unkept == "passes_through"
    assert blocked(limits_power=False).unkept is None
