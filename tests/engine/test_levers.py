"""Limits applied to vLLM's scheduler: whose turn it is, what is capped, and all put back."""

from __future__ import annotations

import itertools
import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shaper.core.policy import Plan
from shaper.core.types import NOTHING, PowerLimit, Reason, StepLimits
from shaper.engine.compat import admission_limit, has, may_enter, waiting_requests
from shaper.engine.levers import LONGEST_BLOCK, Levers, Rotation
from shaper.engine.load import engine_load
from tests.engine.harness import random_traffic
from tests.engine.test_running_batch import FakeRequest, fake_request


def names(count: int, first: int = 0) -> list[Any]:
    return [SimpleNamespace(request_id=f"r{index}") for index in range(first, first + count)]


def longest_waits(turns: list[tuple[list[Any], set[str]]]) -> dict[str, int]:
    """Steps without a turn in a row, by request."""
    waits: dict[str, int] = {}
    longest: dict[str, int] = {}
    for ready, chosen in turns:
        for request in ready:
            name = request.request_id
            waits[name] = 0 if name in chosen else waits.get(name, 0) + 1
            longest[name] = max(longest.get(name, 0), waits[name])
    return longest


@given(count=st.integers(2, 80), cap=st.integers(1, 79))
def test_a_rotation_is_fair(count, cap):
    """None waits longer than the others' turns take, and turns come in blocks."""
    cap = min(cap, count - 1)
    rotation, ready = Rotation(), names(count)
    groups = math.ceil(count / cap)
    turns = [(ready, rotation.choose(ready, cap)) for _ in range(6 * groups * LONGEST_BLOCK)]
    assert all(len(chosen) == cap for _, chosen in turns)
    worst = max(longest_waits(turns).values())
    assert worst <= max(LONGEST_BLOCK, groups - 1)
    assert worst <= groups + LONGEST_BLOCK
    changes = sum(len(b - a) for (_, a), (_, b) in itertools.pairwise(turns))
    block = max(1, LONGEST_BLOCK // (groups - 1))
    assert changes <= cap * (len(turns) / block + 1)


@given(seed=st.integers(0, 10_000))
def test_a_rotation_stays_fair_while_requests_and_the_cap_move(seed):
    """One that is ready waits for at most the turns of those that were there before it; a cap of
    0 holds all decodes, and the turns go on afterwards."""
    rng = random.Random(seed)
    rotation, ready, made = Rotation(), names(12), 12
    assert rotation.choose(ready, 0) == set()
    turns = []
    for _ in range(400):
        if rng.random() < 0.2:
            ready = [*ready, *names(1, made)]
            made += 1
        if rng.random() < 0.2 and len(ready) > 6:
            ready = list(ready)
            ready.pop(rng.randrange(len(ready)))
        turns.append((ready, rotation.choose(ready, min(len(ready) - 1, rng.randint(4, 20)))))
    most = max(len(ready) for ready, _ in turns)
    assert max(longest_waits(turns).values()) <= math.ceil(most / 4) + LONGEST_BLOCK


def scheduler(running: list[Any], **values: Any) -> Any:
    defaults: dict[str, Any] = {
        "running": running,
        "waiting": [],
        "requests": {},
        "current_step": 5,
        "num_spec_tokens": 0,
        "max_num_scheduled_tokens": 8192,
        "max_num_active_reqs": 1024,
        "max_num_running_reqs": 1024,
        "scheduler_config": SimpleNamespace(
            long_prefill_token_threshold=0, enable_chunked_prefill=True
        ),
    }
    return SimpleNamespace(**(defaults | values))


ALL_LIMITS = [
    NOTHING,
    StepLimits(prefill_tokens=0),
    StepLimits(prefill_tokens=64),
    StepLimits(decode_requests=1),
    StepLimits(running_requests=2),
    StepLimits(prefill_tokens=100, decode_requests=1, running_requests=1),
]


@pytest.mark.parametrize("limits", ALL_LIMITS, ids=str)
def test_everything_is_put_back(limits):
    """Also when vLLM raises, and when the step that was set up is never run."""
    mixed = [fake_request("a", is_prefill_chunk=True), fake_request("b"), fake_request("c")]
    target = scheduler(mixed)
    caps = ("max_num_scheduled_tokens", "max_num_active_reqs", "max_num_running_reqs")
    before = {name: getattr(target, name) for name in caps}
    levers = Levers(target)
    with pytest.raises(RuntimeError), levers.apply(limits, 2):
        raise RuntimeError
    assert {name: getattr(target, name) for name in caps} == before
    levers.apply(limits, 2)  # never run
    with levers.apply(StepLimits()):
        assert {name: getattr(target, name) for name in caps} == before


def test_a_lever_that_fails_half_way_is_put_back():
    """A request without the fields that vLLM gives it makes it raise."""
    target = scheduler([SimpleNamespace(is_prefill_chunk=True)])
    with pytest.raises(AttributeError):
        Levers(target).apply(StepLimits(prefill_tokens=0, running_requests=3))
    assert target.max_num_active_reqs == 1024


def test_the_tighter_cap_on_admissions_holds():
    """Prompts that wait let nobody in, whatever may run at once; nor is a cap raised."""
    target = scheduler([fake_request("a")], max_num_active_reqs=4)
    for limits, cap in (
        (StepLimits(prefill_tokens=0, running_requests=9), 0),
        (StepLimits(running_requests=9), 4),
        (StepLimits(running_requests=2), 2),
    ):
        with Levers(target).apply(limits, 1):
            assert target.max_num_active_reqs == cap


def test_the_cap_on_admissions_by_version():
    """Where vLLM counts a session that waits, the cap has to; for a cap of 0 it makes no
    difference. Before 0.31 there is no cap on active requests; the running ones must fit it."""
    target = scheduler([fake_request("a")], num_waiting_for_streaming_input=2)
    counted = 2 if has("counted_sessions") else 0
    assert admission_limit(target, 1) == ("max_num_active_reqs", 1 + counted)
    assert admission_limit(target, 0) == ("max_num_active_reqs", 0)
    older = SimpleNamespace(max_num_running_reqs=64, running=[1, 2, 3])
    assert admission_limit(older, 0) == ("max_num_running_reqs", 3)
    assert admission_limit(older, 5) == ("max_num_running_reqs", 5)


def test_decodes_come_first_where_prompts_are_cut():
    """vLLM serves in order: a prompt before a decode would eat its token."""
    running = [
        fake_request("p", is_prefill_chunk=True),
        fake_request("d"),
        fake_request("q", is_prefill_chunk=True),
        fake_request("e"),
    ]
    target = scheduler(running)
    with Levers(target).apply(StepLimits(prefill_tokens=64), 2):
        assert target.max_num_scheduled_tokens == 66
    assert [request.request_id for request in running] == ["d", "e", "p", "q"]


def test_drafts_get_their_tokens():
    """With speculative decoding each decode takes the drafts that it holds, and no more."""
    running = [
        fake_request("d", num_tokens_with_spec=104),
        fake_request("e", num_tokens_with_spec=101),
    ]
    target = scheduler(running, num_spec_tokens=3, max_model_len=1000)
    assert engine_load(target, set()).decode_tokens == 4 + 1
    for known in (5, None):
        with Levers(target).apply(StepLimits(prefill_tokens=64), known):
            assert target.max_num_scheduled_tokens == 4 + 1 + 64


@pytest.mark.parametrize(
    ("status", "ready", "enters"),
    [
        ("WAITING", True, True),
        ("PREEMPTED", True, True),
        ("WAITING_FOR_REMOTE_KVS", True, True),
        ("WAITING_FOR_REMOTE_KVS", False, False),
        ("WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR", True, True),
        ("WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR", False, False),
        ("WAITING_FOR_STREAMING_REQ", True, False),
    ],
)
def test_what_has_come_is_a_prompt_of_the_next_step(status, ready, enters):
    """vLLM lets go of it inside its own scan, so it must be planned for before."""
    request = fake_request(
        "w",
        status=SimpleNamespace(name=status),
        num_computed_tokens=40,
        structured_output_request=SimpleNamespace(is_grammar_ready=ready),
    )
    target = scheduler([], waiting=[request], finished_recving_kv_req_ids={"w"} if ready else set())
    assert may_enter(target, request) is enters
    load = engine_load(target, set())
    assert [demand.remaining_tokens for demand in load.prefills] == ([61] if enters else [])


def test_a_long_queue_of_blocked_requests_is_not_looked_through():
    """A thousand grammars that compile must not cost a thousand looks at each step."""
    looks = []

    class Blocked(FakeRequest):
        @property
        def status(self) -> Any:
            looks.append(self)
            return SimpleNamespace(name="WAITING_FOR_STREAMING_REQ")

    engine_load(scheduler([], waiting=[Blocked() for _ in range(5000)]), set())
    assert len(looks) <= 256


def test_deferred_requests_of_older_versions_are_seen():
    """0.23 to 0.30 keep those that were skipped in a queue of their own, looked at as well."""
    older = SimpleNamespace(waiting=["new"], skipped_waiting=["skipped"])
    assert set(waiting_requests(older)) == {"new", "skipped"}


class EachAtATime:
    """A policy: only `cap` decodes run, always."""

    def __init__(self, cap: int) -> None:
        self._cap = cap

    def plan(self, view: Any) -> Plan:
        if view.load.decode_requests <= self._cap:
            return Plan(StepLimits(), Reason.UNCONSTRAINED)
        return Plan(StepLimits(decode_requests=self._cap), Reason.PARTIAL_DECODE)


@pytest.mark.parametrize(("asynchronous", "kv_blocks"), [(True, 700), (False, 50_000)])
def test_a_rotation_over_the_real_scheduler_ends_and_is_fair(make_rig, asynchronous, kv_blocks):
    """With arrivals, ends and preemptions: all finish, and the steps hold what they may."""
    rig = make_rig(
        (PowerLimit(2000.0, 0.1),),
        policy=lambda: EachAtATime(4),
        asynchronous=asynchronous,
        kv_blocks=kv_blocks,
    )
    rig.run(random_traffic(4, count=30, rate=40.0))
    assert not rig.engine.busy
    assert rig.shaper.counters.errors == 0
    assert all(r.finished_seconds is not None for r in rig.engine.requests.values())
    rotated = [d for d in rig.log.decisions if d.reason is Reason.PARTIAL_DECODE]
    assert len(rotated) > 50
    # A prompt's last chunk is a decode at the next step: it isn't one of the four.
    assert max(d.decode_requests for d in rotated) <= 4


class AtMost:
    """A policy: a cap on requests that run at once, always."""

    def plan(self, view: Any) -> Plan:
        return Plan(StepLimits(running_requests=3), Reason.CAP)


def test_a_cap_on_running_requests_over_the_real_scheduler(make_rig):
    """No more run at once, and all are served."""
    rig = make_rig((PowerLimit(2000.0, 0.1),), policy=AtMost)
    rig.run(random_traffic(6, count=25, rate=40.0))
    assert not rig.engine.busy
    most = max(len(output["tokens"]) for output in rig.outputs)
    assert most == 3
