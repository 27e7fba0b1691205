"""Whatever happens: no flex request is lost, doubled, or left to wait for good."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shaper.core.supervise.admission import Admission, AdmissionInput
from shaper.core.supervise.status import AdmissionState, EngineStatus
from shaper.core.types import PowerLimit
from shaper.engine import deferral as deferral_module
from shaper.engine.deferral import MAX_LET_IN
from tests.engine.desk import DEFER, LIMIT, OPEN, SHAPED, SHED, Desk
from tests.strategies import examples


@pytest.fixture
def desk(make_rig: Any) -> Desk:
    return Desk(make_rig((LIMIT,)))


@pytest.mark.parametrize("way", ["off", "shadow", "silent", "stale", "failed"])
def test_without_shaping_nothing_is_deferred(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """What was deferred runs at once; what comes after is not deferred."""
    desk.say(SHED, 1.0)
    names = [desk.add(flex=True) for _ in range(3 * MAX_LET_IN)]
    if way in ("off", "shadow"):
        desk.shaper.set_mode(way)
    elif way == "failed":
        desk.shaper._controller = None
        desk.shaper._failed_seconds = desk.engine.now_seconds
    else:
        monkeypatch.setattr(desk, "_tick", lambda: None)
        if way == "silent":
            desk.shaper.standing = None
        else:
            desk.run(1.9)
            assert desk.started == []
            desk.run(0.2)
    desk.run(3.0, lambda: len(desk.deferral) == 0)
    names.append(desk.add(flex=True))
    assert len(desk.deferral) == 0
    desk.run(4.0, lambda: all(desk.ends(name) is not None for name in names))
    assert all(desk.ends(name) is not None for name in names)
    assert desk.released()["off"] == 3 * MAX_LET_IN


@pytest.mark.parametrize(
    "what", ["_follow", "_defer", "_publish", "_take_back", "_release", "is_flex", "pop"]
)
def test_a_failure_gives_every_request_back(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    """Wherever it happens no request is lost or doubled, and it is logged once."""
    desk.say(DEFER)
    names = [desk.add(flex=True) for _ in range(5)]

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("broken")

    logging.getLogger("shaper").propagate = True
    with caplog.at_level(logging.ERROR), monkeypatch.context() as patch:
        if what == "is_flex":
            patch.setattr(deferral_module, what, broken)
        elif what == "pop":
            patch.setattr(type(desk.scheduler.waiting), "pop", broken)
        else:
            patch.setattr(desk.deferral, what, broken)
        if what == "_release":
            desk.say(OPEN)
        names.append(desk.add(flex=True))
        names.append(desk.add())
        desk.run(0.5)
    desk.say(OPEN)
    desk.run(10.0)
    assert all(desk.ends(name) is not None for name in names)
    assert len(desk.started) == len(set(desk.started))
    assert desk.deferral._counts.errors > 0
    assert sum("deferral failed" in record.message for record in caplog.records) == 1
    # Later it defers again.
    desk.run(10.0)
    desk.engine.now_seconds += 10.0
    desk.say(DEFER)
    desk.add(flex=True)
    assert len(desk.deferral) == 1


script = st.lists(
    st.tuples(
        st.sampled_from(["say", "flex", "chat", "run", "abort", "mode", "silent", "pause"]),
        st.sampled_from(list(AdmissionState)),
        st.floats(0.0, 1.0),
        st.integers(1, 3000),
    ),
    max_size=40,
)


@examples(15)
@given(script=script, refuse=st.booleans(), asynchronous=st.booleans())
def test_every_request_ends_within_its_bound(
    make_rig: Any, script: Any, refuse: bool, asynchronous: bool
) -> None:
    """Under any script of states, modes, aborts and pauses; a deferred one has a wake-up."""
    from vllm.v1.core.sched.interface import PauseState
    from vllm.v1.request import RequestStatus

    bound = 5.0
    desk = Desk(
        make_rig((LIMIT,), asynchronous=asynchronous),
        max_wait_seconds=bound,
        refuse_on_timeout=refuse,
    )
    aborted: set[str] = set()
    for action, state, ratio, size in script:
        if action == "say":
            desk.say(state, ratio)
        elif action in ("flex", "chat"):
            desk.add(flex=action == "flex", prompt=size, tokens=1 + size % 20)
        elif action == "run":
            desk.run(2.0 * ratio)
        elif action == "mode":
            desk.shaper.set_mode(("on", "shadow", "off")[size % 3])
        elif action == "silent":
            desk.shaper.standing = None
        elif action == "pause":
            desk.scheduler.set_pause_state(PauseState.PAUSED_NEW)
            desk.run(ratio)
            desk.scheduler.set_pause_state(PauseState.UNPAUSED)
        elif desk.scheduler.requests:
            names = list(desk.scheduler.requests)
            aborted.add(names[size % len(names)])
            desk.scheduler.finish_requests(names[size % len(names)], RequestStatus.FINISHED_ABORTED)
        deferred = set(desk.deferral._deferred)
        assert deferred.isdisjoint(desk.wait_queue())
        assert deferred <= set(desk.scheduler.requests)
        assert not deferred or desk.scheduler.has_requests()
    desk.run(bound + 0.1)
    # vLLM serves what it was given; nothing of it waits for us any more.
    assert len(desk.deferral) == 0
    desk.run(120.0)
    for name in desk.engine.requests:
        assert desk.ends(name) is not None or name in aborted
    assert not desk.engine.busy


def test_a_flood_is_weathered_in_closed_loop(make_rig: Any) -> None:
    """With the real law of admission: interactive first, flex after, all served."""
    rig = make_rig((PowerLimit(450.0, 1.0), LIMIT))
    desk = Desk(rig)
    admission = Admission(None, 0.0)
    seen: set[AdmissionState] = set()

    def tick() -> None:
        now = desk.engine.now_seconds
        demand = desk.shaper.demand
        held = demand.held_ratio if demand is not None and demand.busy else 0.0
        waited = desk.deferral.queue.wait_seconds(now)
        outcome = admission.update(AdmissionInput(held_ratio=held, wait_seconds=waited), now)
        seen.add(outcome.state)
        desk.shaper.standing = EngineStatus(now, outcome)

    desk._tick = tick  # type: ignore[method-assign]
    tick()
    for _ in range(60):
        desk.add(prompt=3000, tokens=30)
    desk.run(3.0)
    flex = [desk.add(flex=True, prompt=500, tokens=10) for _ in range(20)]
    chat = [desk.add(prompt=500, tokens=10) for _ in range(20)]
    assert len(desk.deferral) == 20
    desk.run(200.0)
    assert all(desk.ends(name) is not None for name in desk.engine.requests)
    assert max(desk.ends(name) or 0 for name in chat) < min(desk.ends(name) or 0 for name in flex)
    assert {SHAPED, DEFER, SHED} <= seen
