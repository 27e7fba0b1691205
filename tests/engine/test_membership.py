"""What an engine counts for in its group while nobody schedules by the ledger."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from shaper.config.group import GroupTerms
from shaper.core.policy import Plan, PlanInput
from shaper.core.policy.windowed import WindowedPlanner
from shaper.core.types import PowerBudget, PowerLimit, Reason
from shaper.engine import membership
from shaper.engine.membership import Membership, join
from shaper.engine.readers import EngineGpus, NoSensor
from shaper.gpu.profiles import load_profile
from tests.engine.harness import random_traffic

FREE_WATTS = 700.0
STATIC = (PowerLimit(500.0, 0.1), PowerLimit(450.0, 1.0))


class FakeHandle:
    """A group of two, and what was asked of it."""

    def __init__(self) -> None:
        self.limits = (PowerLimit(1000.0, 0.1), PowerLimit(900.0, 1.0))
        self.static_limits: tuple[PowerLimit, ...] = STATIC
        self.broken = False
        self.looks = 0
        self.asked: list[tuple[Any, ...]] = []

    def tick(self, now_seconds: float) -> None:
        if self.broken:
            raise OSError("the segment is gone")
        self.asked.append(("tick", now_seconds))

    def reserve_fixed(self, floor_watts: float, now_seconds: float) -> None:
        self.asked.append(("reserve_fixed", floor_watts))

    def snapshot(self, now_seconds: float) -> Any:
        self.looks += 1
        engine = SimpleNamespace(
            **{"pid": 7, "state": "alive", "floor_watts": 150.0, "watts": 400.0, "refused": 3},
            **{
                "idle_watts": 115.0,
                "gpu_count": 2,
                "waiting_seconds": None,
                "static_steps": 1,
                "lock_wait_seconds": 0.5,
            },
        )
        return SimpleNamespace(
            limits=self.limits,
            used_watts=(600.0, 860.0),
            engines=(engine, engine),
            own=1,
            detached=True,
        )

    def leave(self) -> None:
        self.asked.append(("leave",))


@pytest.fixture
def handle() -> FakeHandle:
    return FakeHandle()


@pytest.fixture
def member(handle: FakeHandle) -> Membership:
    return Membership(handle, FREE_WATTS, clock=lambda: 5.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mode", "decides", "parked"),
    [
        ("on", True, []),
        ("shadow", True, []),
        ("on", False, [("reserve_fixed", 500.0)]),
        ("shadow", False, [("reserve_fixed", FREE_WATTS)]),
        ("off", False, [("reserve_fixed", FREE_WATTS)]),
        # The controller is still there in the step after which the mode is off.
        ("off", True, [("reserve_fixed", FREE_WATTS)]),
    ],
)
def test_an_engine_without_a_controller_counts_for_the_most_it_may_draw(
    handle: FakeHandle, member: Membership, mode: Any, decides: bool, parked: list[Any]
) -> None:
    """At every tick, because the scheduler's thread may have had the last word before."""
    for _ in range(2):
        handle.asked.clear()
        member.tick(mode, decides=decides)
        assert handle.asked == [("tick", 5.0), *parked]


def test_the_fallback_cap_keeps_the_static_share_too(
    handle: FakeHandle, member: Membership
) -> None:
    """Beside the engine's own limits, and as it is now."""
    own = PowerLimit(600.0, 1.0)
    assert member.capped(PowerBudget((own,), 300.0)) == PowerBudget((own, *STATIC), 300.0)
    handle.static_limits = STATIC[:1]
    member.tick("on", decides=True)
    assert member.capped(PowerBudget()) == PowerBudget(STATIC[:1])


def test_a_cap_made_anew_holds_after_a_failure(make_rig: Callable[..., Any]) -> None:
    """The next fallback cap keeps a share that has become smaller, and nothing else changes."""

    class Broken(WindowedPlanner):
        def plan(self, view: PlanInput) -> Plan:
            raise RuntimeError("broken")

    traffic = random_traffic(3, count=10)
    rig = make_rig((PowerLimit(600.0, 0.1),), policy=Broken)
    new_cap, limits = rig.shaper._new_cap, (PowerLimit(300.0, 0.1),)
    rig.shaper._new_cap = lambda budget: new_cap(replace(budget, limits=limits))
    wide = rig.shaper._cap
    rig.shaper.renew_cap()
    rig.run(traffic, seconds=2.0)
    assert rig.shaper._cap == new_cap(PowerBudget(limits))
    assert rig.shaper._cap != wide
    assert rig.shaper.budget == PowerBudget((PowerLimit(600.0, 0.1),))
    assert {each.reason for each in rig.log.decisions} == {Reason.FALLBACK_CAP}


def test_a_share_that_changes_is_told_once(handle: FakeHandle, member: Membership) -> None:
    """As engines join and go."""
    assert not member.tick("on", decides=True)
    handle.static_limits = STATIC[:1]
    assert member.tick("on", decides=True)
    assert not member.tick("on", decides=True)


def test_what_the_group_says_reaches_the_status_block(member: Membership) -> None:
    """Counters are this engine's own, watts those of all."""
    member.tick("on", decides=True)
    found = member.status
    assert found.committed_watts == 800.0
    assert found.detached
    assert (found.claims_refused, found.static_steps, found.lock_wait_seconds) == (3, 1, 0.5)
    assert found.count("alive") == 2


def test_what_is_in_use_of_the_groups_limits(member: Membership) -> None:
    """The tightest of them counts, above what all of its engines draw idle."""
    assert math.isnan(member.usage.use_ratio)
    member.tick("on", decides=True)
    idle_watts = 2 * 115.0
    assert member.usage.headroom_watts == pytest.approx(900.0 - 860.0)
    assert member.usage.use_ratio == pytest.approx((860.0 - idle_watts) / (900.0 - idle_watts))


def test_the_others_are_looked_at_now_and_then(handle: FakeHandle) -> None:
    """Twice a second: the interpreter that schedules pays for it."""
    times = iter(0.02 * tick for tick in range(100))
    member = Membership(handle, FREE_WATTS, clock=lambda: next(times))  # type: ignore[arg-type]
    for _ in range(100):
        member.tick("on", decides=True)
    assert handle.looks == 4
    assert len(handle.asked) == 100


def test_a_tick_that_fails_is_counted_and_logged_once(
    handle: FakeHandle, member: Membership, caplog: pytest.LogCaptureFixture
) -> None:
    """The engine and its metrics go on with what was last known."""
    member.tick("on", decides=True)
    handle.broken = True
    with caplog.at_level(logging.ERROR, logger="shaper"):
        for _ in range(3):
            assert not member.tick("on", decides=True)
    assert len(caplog.records) == 1
    found = member.status
    assert (found.errors, found.count("alive")) == (3, 2)


def test_an_engine_that_names_no_group_joins_none() -> None:
    """And nothing else is asked."""
    assert join(None, None, None, "run/0") is None  # type: ignore[arg-type]


def test_a_shared_limit_that_can_never_bind_is_said(
    handle: FakeHandle, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the GPUs of all that have joined; the limit may be meant for those still to come."""
    handle.limits = (PowerLimit(3000.0, 0.1), PowerLimit(2800.0, 1.0))
    monkeypatch.setattr(membership, "join_group", lambda *_, **__: handle)
    profile = load_profile("h200-sxm")
    gpus = EngineGpus(NoSensor(), profile)
    model = SimpleNamespace(gap_watts=230.0, idle_watts=230.0, gpu_count=2)
    with caplog.at_level(logging.WARNING, logger="shaper"):
        join(GroupTerms("rack", handle.limits), gpus, model, "run/0")  # type: ignore[arg-type]
    (said,) = [r.getMessage() for r in caplog.records if "never bind" in r.getMessage()]
    assert said.startswith("power group rack, with the 2 engine(s) that have joined so far: ")
    assert "2800 W over 1 s can never bind: the enforced limit of all 4 GPUs is 2800 W" in said
