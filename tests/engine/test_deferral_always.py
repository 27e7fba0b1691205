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
from tests.engine.flex_engine import DEFER, LIMIT, OPEN, SHAPED, SHED, FlexEngine
from tests.strategies import examples


@pytest.fixture
def engine(make_rig: Any) -> FlexEngine:
    return FlexEngine(make_rig((LIMIT,)))


@pytest.mark.parametrize("way", ["off", "shadow", "silent", "stale", "failed"])
def test_without_shaping_nothing_is_deferred(
    engine: FlexEngine, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """What was deferred runs at once; what comes after is not deferred."""
    engine.say(SHED, 1.0)
    names = [engine.add(flex=True) for _ in range(3 * MAX_LET_IN)]
    if way in ("off", "shadow"):
        engine.shaper.set_mode(way)
    elif way == "failed":
        engine.shaper._controller = None
        engine.shaper._failed_seconds = engine.simulated.now_seconds
    else:
        monkeypatch.setattr(engine, "_tick", lambda: None)
        if way == "silent":
            engine.shaper.standing = None
        else:
            engine.run(1.9)
            assert engine.started == []
            engine.run(0.2)
    engine.run(3.0, lambda: len(engine.deferral) == 0)
    names.append(engine.add(flex=True))
    assert len(engine.deferral) == 0
    engine.run(4.0, lambda: all(engine.ends(name) is not None for name in names))
    assert all(engine.ends(name) is not None for name in names)
    assert engine.released()["off"] == 3 * MAX_LET_IN


@pytest.mark.parametrize(
    "what", ["_follow", "_defer", "_publish", "_take_back", "_release", "is_flex", "pop"]
)
def test_a_failure_gives_every_request_back(
    engine: FlexEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    """Wherever it happens no request is lost or doubled, and it is logged once."""
    engine.say(DEFER)
    names = [engine.add(flex=True) for _ in range(5)]

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("broken")

    logging.getLogger("shaper").propagate = True
    with caplog.at_level(logging.ERROR), monkeypatch.context() as patch:
        if what == "is_flex":
            patch.setattr(deferral_module, what, broken)
        elif what == "pop":
            patch.setattr(type(engine.scheduler.waiting), "pop", broken)
        else:
            patch.setattr(engine.deferral, what, broken)
        if what == "_release":
            engine.say(OPEN)
        names.append(engine.add(flex=True))
        names.append(engine.add())
        engine.run(0.5)
    engine.say(OPEN)
    engine.run(10.0)
    assert all(engine.ends(name) is not None for name in names)
    assert len(engine.started) == len(set(engine.started))
    assert engine.deferral._counts.errors > 0
    assert sum("deferral failed" in record.message for record in caplog.records) == 1
    # Later it defers again.
    engine.run(10.0)
    engine.simulated.now_seconds += 10.0
    engine.say(DEFER)
    engine.add(flex=True)
    assert len(engine.deferral) == 1


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
    engine = FlexEngine(
        make_rig((LIMIT,), asynchronous=asynchronous),
        max_wait_seconds=bound,
        refuse_on_timeout=refuse,
    )
    aborted: set[str] = set()
    for action, state, ratio, size in script:
        if action == "say":
            engine.say(state, ratio)
        elif action in ("flex", "chat"):
            engine.add(flex=action == "flex", prompt=size, tokens=1 + size % 20)
        elif action == "run":
            engine.run(2.0 * ratio)
        elif action == "mode":
            engine.shaper.set_mode(("on", "shadow", "off")[size % 3])
        elif action == "silent":
            engine.shaper.standing = None
        elif action == "pause":
            engine.scheduler.set_pause_state(PauseState.PAUSED_NEW)
            engine.run(ratio)
            engine.scheduler.set_pause_state(PauseState.UNPAUSED)
        elif engine.scheduler.requests:
            names = list(engine.scheduler.requests)
            aborted.add(names[size % len(names)])
            engine.scheduler.finish_requests(
                names[size % len(names)], RequestStatus.FINISHED_ABORTED
            )
        deferred = set(engine.deferral._deferred)
        assert deferred.isdisjoint(engine.wait_queue())
        assert deferred <= set(engine.scheduler.requests)
        assert not deferred or engine.scheduler.has_requests()
    engine.run(bound + 0.1)
    # vLLM serves what it was given; nothing of it waits for us any more.
    assert len(engine.deferral) == 0
    engine.run(120.0)
    for name in engine.simulated.requests:
        assert engine.ends(name) is not None or name in aborted
    assert not engine.simulated.busy


def test_a_flood_is_weathered_in_closed_loop(make_rig: Any) -> None:
    """With the real law of admission: interactive first, flex after, all served."""
    rig = make_rig((PowerLimit(450.0, 1.0), LIMIT))
    engine = FlexEngine(rig)
    admission = Admission(None, 0.0)
    seen: set[AdmissionState] = set()

    def tick() -> None:
        now = engine.simulated.now_seconds
        demand = engine.shaper.demand
        held = demand.held_ratio if demand is not None and demand.busy else 0.0
        waited = engine.deferral.queue.wait_seconds(now)
        outcome = admission.update(AdmissionInput(held_ratio=held, wait_seconds=waited), now)
        seen.add(outcome.state)
        engine.shaper.standing = EngineStatus(now, outcome)

    engine._tick = tick  # type: ignore[method-assign]
    tick()
    for _ in range(60):
        engine.add(prompt=3000, tokens=30)
    engine.run(3.0)
    flex = [engine.add(flex=True, prompt=500, tokens=10) for _ in range(20)]
    chat = [engine.add(prompt=500, tokens=10) for _ in range(20)]
    assert len(engine.deferral) == 20
    engine.run(200.0)
    assert all(engine.ends(name) is not None for name in engine.simulated.requests)
    assert max(engine.ends(name) or 0 for name in chat) < min(
        engine.ends(name) or 0 for name in flex
    )
    assert {SHAPED, DEFER, SHED} <= seen
