"""Requests that wait for something vLLM waits for: remote KV, a grammar, a session's next part.

They are not for the shaper to hold, and they must not make its caps hold others for good.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from shaper.core.policy import Plan
from shaper.core.policy.windowed import WindowedPlanner
from shaper.core.types import PowerLimit, Reason, StepLimits
from shaper.engine.compat import has
from shaper.simulate.build import new_engine
from shaper.simulate.engine import engine_config, new_request
from tests.engine.harness import GPU, MODEL, RecordingLog, worst_ratio
from tests.engine.remote_kv import NEVER, Load, attach, kv_transfer_config

PAUSE_SECONDS = 0.2
BELOW_THE_FLOOR = (PowerLimit(160.0, 0.1),)
BINDING = (PowerLimit(450.0, 0.1),)
# Two that decode all the time, one whose KV comes from elsewhere, and one after it.
LONG, REMOTE, AFTER = 2000, "remote", "after"
LOAD_SECONDS = 0.3
FAILED = pytest.param(
    True,
    marks=pytest.mark.skipif(
        not has("failed_receiving"), reason="this vLLM is told of blocks that failed"
    ),
)


@cache
def config(connector: bool) -> Any:
    arguments: dict[str, Any] = {}
    if connector:
        arguments["kv_transfer_config"] = kv_transfer_config()
        arguments["disable_hybrid_kv_cache_manager"] = True
    return engine_config(MODEL, GPU, async_scheduling=True, **arguments)


class Served:
    """An engine with two decodes that go on, and what else comes."""

    def __init__(
        self, limits: tuple[PowerLimit, ...] | None, connector: bool = True, **settings: Any
    ) -> None:
        self.log = RecordingLog()
        self.engine = new_engine(
            config(connector),
            GPU,
            limits,
            max_pause_seconds=PAUSE_SECONDS,
            log=self.log,
            **settings,
        )
        self.scheduler = self.engine.scheduler
        self.connector = attach(self.engine) if connector else None
        self.config = config(connector)
        for index in range(2):
            self.add(f"decode{index}", [index + 1] * 600, LONG)
        self.engine.run_until(0.5)

    def add(self, name: str, prompt: list[int], tokens: int, load: Load | None = None) -> Any:
        if load is not None:
            assert self.connector is not None
            self.connector.loads[name] = load
        request = new_request(name, prompt, tokens, self.config)
        self.engine.add(request)
        return request

    def first_token_seconds(self, name: str) -> float | None:
        record = self.engine.requests[name]
        return record.token_seconds[0] - record.arrival_seconds if record.token_seconds else None


@pytest.mark.parametrize("fails", [False, FAILED], ids=["loaded", "failed"])
def test_remote_kv_that_has_come_is_served(fails):
    """Its turn comes within the prompts' bound, whether the load was good or not."""
    served = Served(BELOW_THE_FLOOR)
    served.add(REMOTE, [7] * 1500, 20, Load(1400, LOAD_SECONDS, fails))
    served.engine.run_until(4.0)
    waited = served.first_token_seconds(REMOTE)
    # The load itself begins and ends in a step; then a turn for each 512 tokens at least.
    turns = 1 + (3 if fails else 1)
    assert waited is not None
    assert waited <= LOAD_SECONDS + (turns + 1) * (2 * PAUSE_SECONDS + 0.1)


@pytest.mark.parametrize("fails", [False, FAILED], ids=["loaded", "failed"])
def test_what_remote_kv_leaves_to_compute_is_planned(fails):
    """The rest of a prompt whose load is over is held to the budget like any other."""
    served = Served(BINDING)
    served.add(REMOTE, [7] * 7000, 20, Load(1000, LOAD_SECONDS, fails))
    served.engine.run_until(6.0)
    assert served.engine.requests[REMOTE].finished_seconds is not None
    assert worst_ratio(served.engine.gpus.take_segments(), BINDING[0]) <= 1.01
    assert not any(d.reason is Reason.FORCED_OVER_BUDGET for d in served.log.decisions)


@pytest.mark.parametrize(
    ("limits", "load"),
    [(BELOW_THE_FLOOR, Load(1400, NEVER)), (BINDING, Load(1400, 0.1, unsure_seconds=NEVER))],
    ids=["never-comes", "never-known"],
)
def test_remote_kv_that_never_comes_stops_nobody(limits, load):
    """Other requests enter and run as if it were not there."""
    alone, served = Served(limits), Served(limits)
    served.add(REMOTE, [7] * 1500, 20, load)
    for each in (alone, served):
        each.engine.run_until(1.0)
        each.add(AFTER, [8] * 300, 20)
        each.engine.run_until(5.0)
    waited, without = served.first_token_seconds(AFTER), alone.first_token_seconds(AFTER)
    assert waited is not None
    assert without is not None
    assert waited <= without + 2 * PAUSE_SECONDS + 0.1

    def tokens(each: Served) -> int:
        return len(each.engine.requests["decode0"].token_seconds)

    assert tokens(served) >= 0.9 * tokens(alone)
    forced = [
        sum(d.reason is Reason.FORCED_OVER_BUDGET for d in x.log.decisions) for x in (served, alone)
    ]
    assert forced[0] <= forced[1] * 1.2 + 2


def load_began_seconds(served: Served, names: list[str], until: float) -> dict[str, float]:
    """How long after it arrived each load began."""
    assert served.connector is not None
    began: dict[str, float] = {}
    start = served.engine.now_seconds
    while served.engine.now_seconds < until and served.engine.busy:
        served.engine.step()
        for name in names:
            due = served.connector.begun.get(name)
            if due is not None:
                began.setdefault(name, due - start)
    return began


TIGHT = (PowerLimit(350.0, 0.1),)


@pytest.mark.parametrize(("limits", "before"), [(TIGHT, 0), (BINDING, 2), (BELOW_THE_FLOOR, 2)])
def test_a_load_begins_as_it_would_without_a_budget(limits, before):
    """Prompts of a decode engine: each costs a token here, and none waits for the budget. A long
    prompt that is computed here, and that the budget holds back, holds no load back."""
    began = {}
    names = [f"{REMOTE}{index}" for index in range(40)]
    for each in (None, limits):
        served = Served(each)
        for index in range(before):
            served.add(f"here{index}", [50 + index] * 6000, 2)
        for index, name in enumerate(names):
            served.add(name, [7 + index] * 5000, 20, Load(5000, LOAD_SECONDS))
        began[each] = load_began_seconds(served, names, served.engine.now_seconds + 5.0)
        assert len(began[each]) == len(names)
        served.engine.run_until(served.engine.now_seconds + 10.0)
        assert all(served.first_token_seconds(name) is not None for name in names)
        if each is not None:
            assert served.scheduler.shaper.counters.errors == 0
            if each is not BELOW_THE_FLOOR:
                assert worst_ratio(served.engine.gpus.take_segments(), each[0]) <= 1.01
    late = [began[limits][name] - began[None][name] for name in names]
    # A step that runs when they arrive ends first, and may be a longer one.
    assert max(late) <= 0.1


def test_the_queue_is_left_as_vllm_would_leave_it():
    """While prompts are held a load goes past them, and they are in their order afterwards."""
    served = Served(TIGHT)
    order = []
    for index in range(6):
        name = f"{REMOTE}{index}" if index % 2 else f"here{index}"
        order.append(name)
        load = Load(3000, NEVER) if index % 2 else None
        served.add(name, [20 + index] * 3000, 2, load)
    here = [name for name in order if name.startswith("here")]
    while served.engine.now_seconds < 3.0:
        served.engine.step()
        left = [r.request_id for r in served.scheduler.waiting if r.request_id in here]
        assert left == here[len(here) - len(left) :]
    firsts = [served.first_token_seconds(name) for name in here]
    known = [seconds for seconds in firsts if seconds is not None]
    assert firsts == sorted(known)


class CappedAtTwo:
    """Plans like ours under a cap of two running requests."""

    def __init__(self) -> None:
        self.inner = WindowedPlanner()

    def plan(self, view):
        plan = self.inner.plan(view)
        limits = plan.limits
        return Plan(
            StepLimits(limits.run, limits.prefill_tokens, limits.decode_requests, 2), plan.reason
        )


def test_requests_that_hold_kv_do_not_fill_the_running_cap():
    """A cap of two, and three that wait for remote KV for ever: others still enter."""
    served = Served(BINDING, policy=CappedAtTwo)
    for index in range(3):
        served.add(f"{REMOTE}{index}", [7 + index] * 1500, 20, Load(1400, NEVER))
    served.scheduler.finish_requests(["decode0"], _aborted())
    served.engine.run_until(1.0)
    served.add(AFTER, [8] * 300, 20)
    served.engine.run_until(3.0)
    assert served.engine.requests[AFTER].finished_seconds is not None


def test_sessions_that_wait_for_their_next_part_do_not_fill_the_running_cap():
    """vLLM counts a paused session as running; under a cap of two, three of them must not
    keep a new request out for good."""
    served = Served(BINDING, connector=False, policy=CappedAtTwo)
    served.scheduler.finish_requests(["decode0", "decode1"], _aborted())
    for index in range(3):
        request = new_request(f"session{index}", [index + 1] * 40, 2, served.config)
        request.resumable = True
        served.engine.add(request)
        served.engine.run_until(served.engine.now_seconds + 0.5)
    assert served.scheduler.num_waiting_for_streaming_input == 3
    served.add(AFTER, [8] * 300, 20)
    served.engine.run_until(served.engine.now_seconds + 3.0)
    assert served.engine.requests[AFTER].finished_seconds is not None


class Grammar:
    """Compiled; every token is allowed. The scheduler asks no more of it here."""

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        return True

    def is_terminated(self) -> bool:
        return False


def test_a_prompt_whose_grammar_is_ready_is_planned():
    """vLLM lets it in within its own scan: it must be in the plan that this scan runs under."""
    from vllm.v1.request import RequestStatus

    served = Served(BINDING, connector=False)
    request = new_request("json", [7] * 7000, 20, served.config)
    request.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    request.structured_output_request = None
    served.engine.add(request)
    served.engine.run_until(1.0)
    assert served.first_token_seconds("json") is None

    class Ready:
        grammar = Grammar()

    request.structured_output_request = Ready()
    # Only its admission is of interest; the mask of each step is the workers' matter.
    name = "_handle_blocked_waiting_request"
    if not has("handled_blocked"):
        name = "_try_promote_blocked_waiting_request"
    assert getattr(served.scheduler, name)(request)
    request.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    setattr(served.scheduler, name, _promoting(request))
    served.engine.run_until(8.0)
    assert served.engine.requests["json"].finished_seconds is not None
    assert worst_ratio(served.engine.gpus.take_segments(), BINDING[0]) <= 1.01


def _promoting(request: Any) -> Any:
    """As vLLM's own, and then the request is one without a grammar."""
    from vllm.v1.request import RequestStatus

    def handle(other: Any) -> bool:
        if other.status == RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR:
            other.status, other.structured_output_request = RequestStatus.WAITING, None
        return True

    return handle


def _aborted() -> Any:
    from vllm.v1.request import RequestStatus

    return RequestStatus.FINISHED_ABORTED
