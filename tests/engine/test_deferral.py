"""Flex requests wait in the engine, beside vLLM's real scheduler, in virtual time."""

from __future__ import annotations

from typing import Any

import pytest

from shaper.core.supervise.status import AdmissionState, EngineStatus
from shaper.engine.compat import admission_attribute
from shaper.engine.deferral import MAX_LET_IN
from shaper.ipc.flex import REFUSED
from shaper.simulate.engine import new_request
from tests.engine.flex_engine import DEFER, LIMIT, OPEN, SHAPED, SHED, FlexEngine
from tests.engine.harness import random_traffic


@pytest.fixture
def engine(make_rig: Any) -> FlexEngine:
    return FlexEngine(make_rig((LIMIT,)))


@pytest.mark.parametrize("state", [DEFER, SHED])
def test_flex_waits_outside_vllms_queue(engine: FlexEngine, state: AdmissionState) -> None:
    """It is vLLM's by every count, its loop goes on for it, and it costs no step."""
    engine.say(state)
    name = engine.add(flex=True)
    assert engine.wait_queue() == []
    assert name in engine.scheduler.requests
    assert engine.scheduler.get_request_counts() == (0, 1)
    assert engine.scheduler.get_num_unfinished_requests() == 1
    assert engine.scheduler.has_requests()
    engine.run(1.0)
    assert engine.simulated.steps == 0
    assert engine.ends(name) is None
    # vLLM's own poll: one call a millisecond, no more.
    assert engine.simulated.now_seconds == pytest.approx(1.0, abs=0.01)
    engine.say(OPEN)
    engine.run(1.0)
    assert engine.ends(name) is not None
    assert not engine.scheduler.has_requests()


def test_interactive_requests_are_never_deferred(make_rig: Any) -> None:
    """In no state."""
    for state in AdmissionState:
        engine = FlexEngine(make_rig((LIMIT,)))
        engine.say(state, 1.0)
        names = [engine.add() for _ in range(5)]
        engine.run(2.0)
        assert all(engine.ends(name) is not None for name in names)
        assert engine.deferral.queue.deferrals == 0


def test_a_priority_above_zero_is_flex(engine: FlexEngine) -> None:
    """vLLM's own word for it; one at or below 0 is not."""
    engine.say(DEFER)
    engine.add(priority=3)
    engine.add(priority=-1)
    engine.add(priority=0)
    assert len(engine.deferral) == 1


def test_they_are_let_in_by_arrival_a_few_at_a_time(engine: FlexEngine) -> None:
    """Also those that arrive while others still wait; each starts after its elders."""
    engine.say(DEFER)
    names = [engine.add(flex=True, prompt=2000) for _ in range(30)]
    engine.run(1.0)
    engine.say(OPEN)
    seen = 0

    def watch() -> bool:
        nonlocal seen
        seen = max(seen, len(engine.wait_queue()))
        return len(engine.started) >= 5

    engine.run(20.0, watch)
    names.append(engine.add(flex=True))
    engine.run(60.0, lambda: bool(watch() and False))
    assert engine.started == names
    assert 0 < seen <= MAX_LET_IN
    assert all(engine.ends(name) is not None for name in names)
    assert engine.released()["room"] == 31


def test_interactive_goes_first_while_shaped(engine: FlexEngine) -> None:
    """Flex that came first, and waits in vLLM's queue, gives way to what comes later."""
    big = [engine.add(prompt=8000) for _ in range(4)]
    flex = [engine.add(flex=True, prompt=4000) for _ in range(4)]
    late = [engine.add(prompt=4000) for _ in range(3)]
    engine.say(SHAPED, 0.5)
    engine.run(60.0)
    assert engine.started == [*big, *late, *flex]
    assert all(engine.ends(name) is not None for name in engine.simulated.requests)


def test_running_flex_is_left_alone(engine: FlexEngine) -> None:
    """What has started ends, also when the state changes to shed."""
    name = engine.add(flex=True, tokens=50)
    engine.run(5.0, lambda: bool(engine.started))
    engine.say(SHED, 1.0)
    engine.run(10.0)
    assert engine.ends(name) is not None
    assert engine.deferral.queue.deferrals == 0


def test_preempted_flex_is_left_alone(make_rig: Any) -> None:
    """With a KV cache that is too small for both, vLLM preempts and resumes as it likes."""
    engine = FlexEngine(make_rig((LIMIT,), kv_blocks=70))
    chat = engine.add(prompt=400, tokens=400)
    flex = engine.add(flex=True, prompt=400, tokens=400)
    engine.run(1.0, lambda: len(engine.started) == 2)
    engine.say(SHED, 1.0)
    preempted = False

    def watch() -> bool:
        nonlocal preempted
        preempted |= any(r.status.name == "PREEMPTED" for r in engine.scheduler.waiting)
        return False

    engine.run(120.0, watch)
    assert preempted
    assert engine.ends(chat) is not None
    assert engine.ends(flex) is not None
    assert engine.deferral.queue.deferrals == 0


def test_waiting_makes_the_bar_lower(make_rig: Any) -> None:
    """At a pressure of 0.6 the oldest enters at 0.6 of its bound, alone."""
    engine = FlexEngine(make_rig((LIMIT,)), max_wait_seconds=10.0)
    engine.say(DEFER, 0.6)
    names = [engine.add(flex=True) for _ in range(3)]
    engine.run(5.9)
    assert engine.started == []
    engine.run(1.0)
    assert engine.started == names
    ends = [engine.ends(name) for name in names]
    assert ends == sorted(ends)  # type: ignore[type-var]
    assert engine.released() == {"room": 0, "aged": 3, "timeout": 0, "off": 0}


def test_aged_requests_enter_one_at_a_time(make_rig: Any) -> None:
    """The next one waits until the one before has started."""
    engine = FlexEngine(make_rig((LIMIT,)), max_wait_seconds=10.0)
    engine.say(DEFER, 0.5)
    for _ in range(4):
        engine.add(flex=True)
    engine.run(5.0)
    # Nothing can start: the queue is blocked, and only one of them stands in it.
    setattr(engine.scheduler, admission_attribute(engine.scheduler), 0)
    engine.run(0.5)
    assert len(engine.wait_queue()) == 1
    assert len(engine.deferral) == 3


def test_at_the_bound_it_runs(make_rig: Any) -> None:
    """Whatever the pressure; it is not taken back again."""
    engine = FlexEngine(make_rig((LIMIT,)), max_wait_seconds=3.0)
    engine.say(SHED, 1.0)
    name = engine.add(flex=True)
    engine.run(2.9)
    assert engine.started == []
    engine.run(1.0)
    ended = engine.ends(name)
    assert ended is not None
    assert ended == pytest.approx(3.0, abs=0.2)
    assert engine.released()["timeout"] + engine.released()["aged"] == 1


@pytest.mark.parametrize(
    ("kind", "reason", "asynchronous"), [("FINAL_ONLY", "abort", True), ("DELTA", "error", False)]
)
def test_at_the_bound_it_is_refused(make_rig, monkeypatch, kind, reason, asynchronous) -> None:
    """As an abort whose stop reason says why, or as a stream's error; the client hears of it."""
    from vllm.sampling_params import RequestOutputKind

    rig = make_rig((LIMIT,), asynchronous=asynchronous)
    engine = FlexEngine(rig, max_wait_seconds=3.0, refuse_on_timeout=True)
    heard = []  # type: ignore[var-annotated]
    original = engine.scheduler.update_from_output

    def listen(*args: Any, **kwargs: Any) -> Any:
        outputs = original(*args, **kwargs)
        heard.extend(each for client in outputs.values() for each in client.outputs)
        return outputs

    monkeypatch.setattr(engine.scheduler, "update_from_output", listen)
    engine.say(SHED, 1.0)
    name = engine.add(flex=True)
    waiting = engine.scheduler.requests[name]
    waiting.sampling_params.output_kind = RequestOutputKind[kind]
    other = engine.add(tokens=500)
    engine.run(20.0)
    answer = next(each for each in heard if each.request_id == name)
    assert str(answer.finish_reason) == reason
    assert answer.stop_reason == REFUSED
    assert engine.ends(name) == pytest.approx(3.0, abs=0.2)
    assert engine.ends(other) is not None
    assert engine.deferral.queue.refused == 1
    assert engine.scheduler.requests == {}
    assert not engine.scheduler.has_requests()


def test_an_abort_finds_a_deferred_request(engine: FlexEngine) -> None:
    """One by one, in a batch that is a generator, and all at once."""
    from vllm.v1.request import RequestStatus

    engine.say(DEFER)
    names = [engine.add(flex=True) for _ in range(6)]
    aborted = RequestStatus.FINISHED_ABORTED
    engine.scheduler.finish_requests(names[0], aborted)
    engine.scheduler.finish_requests((name for name in names[1:3]), aborted)
    engine.scheduler.finish_requests(names[0], aborted)
    assert len(engine.deferral) == 3
    assert engine.scheduler.get_request_counts() == (0, 3)
    engine.scheduler.finish_requests(None, aborted)
    assert len(engine.deferral) == 0
    assert engine.deferral.queue.deferred_requests == 0
    assert engine.deferral.queue.oldest_deferred_seconds is None
    assert engine.scheduler.requests == {}
    engine.say(OPEN)
    engine.run(1.0)
    assert engine.started == []
    assert not engine.scheduler.has_requests()


def test_a_second_request_of_the_same_name_fails_as_in_vllm(engine: FlexEngine) -> None:
    """And the first is not lost."""
    engine.say(DEFER)
    name = engine.add(flex=True)
    again = new_request(name, [7] * 10, 1, engine.config)
    with pytest.raises(AssertionError, match="duplicate"):
        engine.scheduler.add_request(again)
    engine.say(OPEN)
    engine.run(1.0)
    assert engine.ends(name) is not None


def test_a_session_with_streaming_input_is_not_deferred(engine: FlexEngine) -> None:
    """Its parts come one after another, and somebody speaks to it."""
    engine.say(SHED, 1.0)
    engine.add(flex=True, resumable=True)
    assert len(engine.deferral) == 0
    assert len(engine.wait_queue()) == 1


def test_a_paused_engine_has_no_work_for_deferred_requests(engine: FlexEngine) -> None:
    """Else a pause would never be done; after it they go on."""
    from vllm.v1.core.sched.interface import PauseState

    engine.say(DEFER)
    name = engine.add(flex=True)
    for pause in (PauseState.PAUSED_NEW, PauseState.PAUSED_ALL):
        engine.scheduler.set_pause_state(pause)
        assert not engine.scheduler.has_requests()
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    assert engine.scheduler.has_requests()
    engine.say(OPEN)
    engine.run(1.0)
    assert engine.ends(name) is not None


def test_a_reset_of_the_prefix_cache_keeps_deferred_requests(engine: FlexEngine) -> None:
    """Running ones are preempted by it; the deferred wait on."""
    chat = engine.add(tokens=200)
    engine.run(0.3)
    engine.say(DEFER)
    name = engine.add(flex=True)
    while engine.simulated._queue:  # a reset is made between steps
        engine.simulated._finish(engine.simulated._queue.popleft())
    engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert len(engine.deferral) == 1
    engine.say(OPEN)
    engine.run(20.0)
    assert engine.ends(chat) is not None
    assert engine.ends(name) is not None


def test_without_flex_vllm_schedules_the_same(make_rig: Any) -> None:
    """Interactive traffic gets the same steps in every state."""
    traffic = random_traffic(5, count=12)
    plain = make_rig(())
    plain.run(traffic)
    for state in AdmissionState:
        rig = make_rig(())
        engine = FlexEngine(rig)
        engine.say(state, 1.0)
        engine.shaper.standing = EngineStatus(1e9, engine.shaper.standing.admissibility)
        rig.run(traffic)
        assert rig.outputs == plain.outputs


def test_the_priority_queue_gets_its_requests_back(make_rig: Any) -> None:
    """vLLM's other queue is a heap; the priority that a client gave stays."""
    from vllm.v1.core.sched.request_queue import PriorityRequestQueue

    rig = make_rig((LIMIT,))
    rig.engine.scheduler.waiting = PriorityRequestQueue()
    engine = FlexEngine(rig)
    engine.say(DEFER)
    late = engine.add(flex=True, priority=9)
    soon = engine.add(flex=True, priority=2)
    engine.add()
    assert len(engine.deferral) == 2
    assert len(engine.wait_queue()) == 1
    engine.say(OPEN)
    engine.run(5.0)
    assert engine.started.index(soon) < engine.started.index(late)
