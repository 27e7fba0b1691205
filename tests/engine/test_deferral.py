"""Flex requests wait in the engine, beside vLLM's real scheduler, in virtual time."""

from __future__ import annotations

from typing import Any

import pytest

from shaper.core.supervise.status import AdmissionState, EngineStatus
from shaper.engine.compat import admission_attribute
from shaper.engine.deferral import MAX_LET_IN
from shaper.ipc.flex import REFUSED
from shaper.simulate.engine import new_request
from tests.engine.desk import DEFER, LIMIT, OPEN, SHAPED, SHED, Desk
from tests.engine.harness import random_traffic


@pytest.fixture
def desk(make_rig: Any) -> Desk:
    return Desk(make_rig((LIMIT,)))


@pytest.mark.parametrize("state", [DEFER, SHED])
def test_flex_waits_outside_vllms_queue(desk: Desk, state: AdmissionState) -> None:
    """It is vLLM's by every count, its loop goes on for it, and it costs no step."""
    desk.say(state)
    name = desk.add(flex=True)
    assert desk.wait_queue() == []
    assert name in desk.scheduler.requests
    assert desk.scheduler.get_request_counts() == (0, 1)
    assert desk.scheduler.get_num_unfinished_requests() == 1
    assert desk.scheduler.has_requests()
    desk.run(1.0)
    assert desk.engine.steps == 0
    assert desk.ends(name) is None
    # vLLM's own poll: one call a millisecond, no more.
    assert desk.engine.now_seconds == pytest.approx(1.0, abs=0.01)
    desk.say(OPEN)
    desk.run(1.0)
    assert desk.ends(name) is not None
    assert not desk.scheduler.has_requests()


def test_interactive_requests_are_never_deferred(make_rig: Any) -> None:
    """In no state."""
    for state in AdmissionState:
        desk = Desk(make_rig((LIMIT,)))
        desk.say(state, 1.0)
        names = [desk.add() for _ in range(5)]
        desk.run(2.0)
        assert all(desk.ends(name) is not None for name in names)
        assert desk.deferral.queue.deferrals == 0


def test_a_priority_above_zero_is_flex(desk: Desk) -> None:
    """vLLM's own word for it; one at or below 0 is not."""
    desk.say(DEFER)
    desk.add(priority=3)
    desk.add(priority=-1)
    desk.add(priority=0)
    assert len(desk.deferral) == 1


def test_they_are_let_in_by_arrival_a_few_at_a_time(desk: Desk) -> None:
    """Also those that arrive while others still wait; each starts after its elders."""
    desk.say(DEFER)
    names = [desk.add(flex=True, prompt=2000) for _ in range(30)]
    desk.run(1.0)
    desk.say(OPEN)
    seen = 0

    def watch() -> bool:
        nonlocal seen
        seen = max(seen, len(desk.wait_queue()))
        return len(desk.started) >= 5

    desk.run(20.0, watch)
    names.append(desk.add(flex=True))
    desk.run(60.0, lambda: bool(watch() and False))
    assert desk.started == names
    assert 0 < seen <= MAX_LET_IN
    assert all(desk.ends(name) is not None for name in names)
    assert desk.released()["room"] == 31


def test_interactive_goes_first_while_shaped(desk: Desk) -> None:
    """Flex that came first, and waits in vLLM's queue, gives way to what comes later."""
    big = [desk.add(prompt=8000) for _ in range(4)]
    flex = [desk.add(flex=True, prompt=4000) for _ in range(4)]
    late = [desk.add(prompt=4000) for _ in range(3)]
    desk.say(SHAPED, 0.5)
    desk.run(60.0)
    assert desk.started == [*big, *late, *flex]
    assert all(desk.ends(name) is not None for name in desk.engine.requests)


def test_running_flex_is_left_alone(desk: Desk) -> None:
    """What has started ends, also when the state changes to shed."""
    name = desk.add(flex=True, tokens=50)
    desk.run(5.0, lambda: bool(desk.started))
    desk.say(SHED, 1.0)
    desk.run(10.0)
    assert desk.ends(name) is not None
    assert desk.deferral.queue.deferrals == 0


def test_preempted_flex_is_left_alone(make_rig: Any) -> None:
    """With a KV cache that is too small for both, vLLM preempts and resumes as it likes."""
    desk = Desk(make_rig((LIMIT,), kv_blocks=70))
    chat = desk.add(prompt=400, tokens=400)
    flex = desk.add(flex=True, prompt=400, tokens=400)
    desk.run(1.0, lambda: len(desk.started) == 2)
    desk.say(SHED, 1.0)
    preempted = False

    def watch() -> bool:
        nonlocal preempted
        preempted |= any(r.status.name == "PREEMPTED" for r in desk.scheduler.waiting)
        return False

    desk.run(120.0, watch)
    assert preempted
    assert desk.ends(chat) is not None
    assert desk.ends(flex) is not None
    assert desk.deferral.queue.deferrals == 0


def test_waiting_makes_the_bar_lower(make_rig: Any) -> None:
    """At a pressure of 0.6 the oldest enters at 0.6 of its bound, alone."""
    desk = Desk(make_rig((LIMIT,)), max_wait_seconds=10.0)
    desk.say(DEFER, 0.6)
    names = [desk.add(flex=True) for _ in range(3)]
    desk.run(5.9)
    assert desk.started == []
    desk.run(1.0)
    assert desk.started == names
    ends = [desk.ends(name) for name in names]
    assert ends == sorted(ends)  # type: ignore[type-var]
    assert desk.released() == {"room": 0, "aged": 3, "timeout": 0, "off": 0}


def test_aged_requests_enter_one_at_a_time(make_rig: Any) -> None:
    """The next one waits until the one before has started."""
    desk = Desk(make_rig((LIMIT,)), max_wait_seconds=10.0)
    desk.say(DEFER, 0.5)
    for _ in range(4):
        desk.add(flex=True)
    desk.run(5.0)
    # Nothing can start: the queue is blocked, and only one of them stands in it.
    setattr(desk.scheduler, admission_attribute(desk.scheduler), 0)
    desk.run(0.5)
    assert len(desk.wait_queue()) == 1
    assert len(desk.deferral) == 3


def test_at_the_bound_it_runs(make_rig: Any) -> None:
    """Whatever the pressure; it is not taken back again."""
    desk = Desk(make_rig((LIMIT,)), max_wait_seconds=3.0)
    desk.say(SHED, 1.0)
    name = desk.add(flex=True)
    desk.run(2.9)
    assert desk.started == []
    desk.run(1.0)
    ended = desk.ends(name)
    assert ended is not None
    assert ended == pytest.approx(3.0, abs=0.2)
    assert desk.released()["timeout"] + desk.released()["aged"] == 1


@pytest.mark.parametrize(
    ("kind", "reason", "asynchronous"), [("FINAL_ONLY", "abort", True), ("DELTA", "error", False)]
)
def test_at_the_bound_it_is_refused(make_rig, monkeypatch, kind, reason, asynchronous) -> None:
    """As an abort whose stop reason says why, or as a stream's error; the client hears of it."""
    from vllm.sampling_params import RequestOutputKind

    rig = make_rig((LIMIT,), asynchronous=asynchronous)
    desk = Desk(rig, max_wait_seconds=3.0, refuse_on_timeout=True)
    heard = []  # type: ignore[var-annotated]
    original = desk.scheduler.update_from_output

    def listen(*args: Any, **kwargs: Any) -> Any:
        outputs = original(*args, **kwargs)
        heard.extend(each for client in outputs.values() for each in client.outputs)
        return outputs

    monkeypatch.setattr(desk.scheduler, "update_from_output", listen)
    desk.say(SHED, 1.0)
    name = desk.add(flex=True)
    waiting = desk.scheduler.requests[name]
    waiting.sampling_params.output_kind = RequestOutputKind[kind]
    other = desk.add(tokens=500)
    desk.run(20.0)
    answer = next(each for each in heard if each.request_id == name)
    assert str(answer.finish_reason) == reason
    assert answer.stop_reason == REFUSED
    assert desk.ends(name) == pytest.approx(3.0, abs=0.2)
    assert desk.ends(other) is not None
    assert desk.deferral.queue.refused == 1
    assert desk.scheduler.requests == {}
    assert not desk.scheduler.has_requests()


def test_an_abort_finds_a_deferred_request(desk: Desk) -> None:
    """One by one, in a batch that is a generator, and all at once."""
    from vllm.v1.request import RequestStatus

    desk.say(DEFER)
    names = [desk.add(flex=True) for _ in range(6)]
    aborted = RequestStatus.FINISHED_ABORTED
    desk.scheduler.finish_requests(names[0], aborted)
    desk.scheduler.finish_requests((name for name in names[1:3]), aborted)
    desk.scheduler.finish_requests(names[0], aborted)
    assert len(desk.deferral) == 3
    assert desk.scheduler.get_request_counts() == (0, 3)
    desk.scheduler.finish_requests(None, aborted)
    assert len(desk.deferral) == 0
    assert desk.deferral.queue.deferred_requests == 0
    assert desk.deferral.queue.oldest_deferred_seconds is None
    assert desk.scheduler.requests == {}
    desk.say(OPEN)
    desk.run(1.0)
    assert desk.started == []
    assert not desk.scheduler.has_requests()


def test_a_second_request_of_the_same_name_fails_as_in_vllm(desk: Desk) -> None:
    """And the first is not lost."""
    desk.say(DEFER)
    name = desk.add(flex=True)
    again = new_request(name, [7] * 10, 1, desk.config)
    with pytest.raises(AssertionError, match="duplicate"):
        desk.scheduler.add_request(again)
    desk.say(OPEN)
    desk.run(1.0)
    assert desk.ends(name) is not None


def test_a_session_with_streaming_input_is_not_deferred(desk: Desk) -> None:
    """Its parts come one after another, and somebody speaks to it."""
    desk.say(SHED, 1.0)
    desk.add(flex=True, resumable=True)
    assert len(desk.deferral) == 0
    assert len(desk.wait_queue()) == 1


def test_a_paused_engine_has_no_work_for_deferred_requests(desk: Desk) -> None:
    """Else a pause would never be done; after it they go on."""
    from vllm.v1.core.sched.interface import PauseState

    desk.say(DEFER)
    name = desk.add(flex=True)
    for pause in (PauseState.PAUSED_NEW, PauseState.PAUSED_ALL):
        desk.scheduler.set_pause_state(pause)
        assert not desk.scheduler.has_requests()
    desk.scheduler.set_pause_state(PauseState.UNPAUSED)
    assert desk.scheduler.has_requests()
    desk.say(OPEN)
    desk.run(1.0)
    assert desk.ends(name) is not None


def test_a_reset_of_the_prefix_cache_keeps_deferred_requests(desk: Desk) -> None:
    """Running ones are preempted by it; the deferred wait on."""
    chat = desk.add(tokens=200)
    desk.run(0.3)
    desk.say(DEFER)
    name = desk.add(flex=True)
    while desk.engine._queue:  # a reset is made between steps
        desk.engine._finish(desk.engine._queue.popleft())
    desk.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert len(desk.deferral) == 1
    desk.say(OPEN)
    desk.run(20.0)
    assert desk.ends(chat) is not None
    assert desk.ends(name) is not None


def test_without_flex_vllm_schedules_the_same(make_rig: Any) -> None:
    """Interactive traffic gets the same steps in every state."""
    traffic = random_traffic(5, count=12)
    plain = make_rig(())
    plain.run(traffic)
    for state in AdmissionState:
        rig = make_rig(())
        desk = Desk(rig)
        desk.say(state, 1.0)
        desk.shaper.standing = EngineStatus(1e9, desk.shaper.standing.admissibility)
        rig.run(traffic)
        assert rig.outputs == plain.outputs


def test_the_priority_queue_gets_its_requests_back(make_rig: Any) -> None:
    """vLLM's other queue is a heap; the priority that a client gave stays."""
    from vllm.v1.core.sched.request_queue import PriorityRequestQueue

    rig = make_rig((LIMIT,))
    rig.engine.scheduler.waiting = PriorityRequestQueue()
    desk = Desk(rig)
    desk.say(DEFER)
    late = desk.add(flex=True, priority=9)
    soon = desk.add(flex=True, priority=2)
    desk.add()
    assert len(desk.deferral) == 2
    assert len(desk.wait_queue()) == 1
    desk.say(OPEN)
    desk.run(5.0)
    assert desk.started.index(soon) < desk.started.index(late)
