"""The liveness machine: everything at once, over vLLM's real scheduler in virtual time.

What is promised, and checked after each turn of the engine's loop. `P` is
`max_pause_seconds`, `S` the longest step so far, `R` the fallback cap's own spacing (1 s at
most), and each is counted in virtual seconds:

- while anything can run, some token is scheduled within `2 P + R + S`;
- a running request is held one step ahead at most, and vLLM's own settings are as they
  were between two calls;
- nothing raises in the shaper that was not made to;
- the engine's loop never turns without time going on, and never stops with work left.

At the end faults are over, all that is left is served, and then:

- it took no longer than `drain_bound_seconds`;
- nothing is left in the scheduler, in the shaper or in its controller;
- where the budget always left room and nothing was broken, no step was forced and no
  window was over.
"""

from __future__ import annotations

import math
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from bench.baselines.latency_chunk import LatencyChunk
from bench.baselines.reactive import ReactiveConcurrency
from bench.baselines.static import StaticCaps
from shaper.core.policy import Policy
from shaper.core.policy.fixed import FixedPolicy
from shaper.core.policy.windowed import WindowedPlanner
from shaper.core.supervise.admission import FlexRules
from shaper.core.supervise.status import AdmissionState
from shaper.core.types import PowerBudget, Reason
from shaper.engine.compat import admission_cap
from tests import strategies
from tests.engine.attack import SEAMS, SENSOR_FAULTS, Sabotage
from tests.engine.harness import Attacked, attacked, worst_ratio
from tests.engine.leaks import leaks

POLICIES: dict[str, Any] = {
    "windowed": WindowedPlanner,
    "fixed": FixedPolicy,
    "static": lambda: StaticCaps(prefill_tokens=256, running_requests=2),
    "reactive": ReactiveConcurrency,
    "latency": LatencyChunk,
}
# The least of a prompt that a turn gives it: the smallest chunk that is ever planned.
LEAST_CHUNK_TOKENS = 64
MOST_TOKENS = 2000
# Blocks of 16 tokens: the first holds one of the longest requests and little more.
KV_BLOCKS = (160, 50_000)
SAFE_CAP_SECONDS = 1.0
RETRY_SECONDS = 5.0
FLEX_SECONDS = 1.0
DEFER, SHED = AdmissionState.DEFER, AdmissionState.SHED
# The loop may turn so often with no time going on: to fill the queue of steps.
TURNS_WITHOUT_TIME = 3


ENGINE: dict[str, st.SearchStrategy[Any]] = {
    "asynchronous": st.booleans(),
    "priorities": st.booleans(),
    "kv_blocks": st.sampled_from(KV_BLOCKS),
    # Longer than what decodes wait by themselves for the slack of the targets below.
    "max_pause_seconds": st.sampled_from([0.05, 0.1, 0.5]),
    "itl_target_seconds": st.sampled_from([None, None, 0.03, 0.1]),
    "ttft_target_seconds": st.sampled_from([None, 0.2, 1.0]),
    "spend_slack": st.booleans(),
    "shadow": st.sampled_from([False, False, False, True]),
    "supervise": st.booleans(),
}


class Liveness(RuleBasedStateMachine):
    """Rules do to an engine what the world does; `_turn` checks each step of it."""

    def __init__(self) -> None:
        super().__init__()
        self.sabotage = Sabotage()
        self.world: Attacked | None = None

    # --- the world

    @initialize(
        budget=strategies.budgets(),
        policy=st.sampled_from(["windowed", "windowed", "windowed", *POLICIES]),
        engine=st.fixed_dictionaries(ENGINE),
        refuse=st.booleans(),
        state=st.sampled_from(AdmissionState),
        first=st.tuples(st.integers(2, 12), st.integers(200, MOST_TOKENS), st.integers(2, 60)),
    )
    def start(self, budget: PowerBudget, policy: str, engine: dict[str, Any], refuse: bool,
              state: AdmissionState, first: tuple[int, int, int]) -> None:  # fmt: skip
        make: Policy = POLICIES[policy]
        self.world = attacked(
            budget.limits,
            ramp_watts_per_second=budget.ramp_watts_per_second,
            policy=make,
            **engine,
            on_output=self._scheduled,
        )
        self.world.shaper.flex = FlexRules(FLEX_SECONDS, refuse)
        self.world.mood.say(state, 1.0)
        scheduler = self.world.engine.scheduler
        self.pause_seconds: float = engine["max_pause_seconds"]
        self.settings = self._settings(scheduler)
        self.longest_seconds = self.since_seconds = 0.0
        self.turns_without_time = self.added = self.work_tokens = self.decode_tokens = 0
        self.shaping = policy == "windowed" and not engine["shadow"]
        self.disturbed = False
        self.budgets: list[tuple[float, PowerBudget]] = [(0.0, budget)]
        # Something to do for all that comes.
        self.arrive(*first, 1, 0, False, 5)

    # --- what the world does

    @rule(
        count=st.integers(1, 4),
        prompt_tokens=st.integers(1, MOST_TOKENS),
        output_tokens=st.integers(1, 40),
        text=st.integers(1, 3),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
        flex=st.booleans(),
        turns=st.sampled_from([0, 1, 5, 30]),
    )
    def arrive(self, count: int, prompt_tokens: int, output_tokens: int, text: int,
               priority: int, flex: bool, turns: int) -> None:  # fmt: skip
        """Some alike requests; those of the same text share all of the shorter one."""
        world = self._world()
        if not world.engine.scheduler.has_unfinished_requests():
            self.since_seconds = world.engine.now_seconds
        for _ in range(count):
            prompt = [text] * prompt_tokens
            world.add(f"r{self.added}", prompt, output_tokens, priority, flex)
            self.added += 1
            self.work_tokens += prompt_tokens
            self.decode_tokens += output_tokens
        self._turns(turns)

    @rule(turns=st.integers(1, 40))
    def turn(self, turns: int) -> None:
        """The engine goes on for some turns of its loop."""
        self._turns(turns)

    @rule(seconds=st.sampled_from([0.01, 0.1, 0.5, 2.0]))
    def wait(self, seconds: float) -> None:
        """The engine goes on for some time, if only to do nothing."""
        engine = self._world().engine
        until = engine.now_seconds + seconds
        while engine.busy and engine.now_seconds < until:
            self._turn()
        engine.run_until(until)

    @rule(which=st.lists(st.integers(0, 60), min_size=1, max_size=5))
    def abort(self, which: list[int]) -> None:
        """Clients hang up, whatever state their requests are in."""
        alive = sorted(self._world().engine.scheduler.requests)
        if alive:
            self._world().abort([alive[index % len(alive)] for index in which])

    @rule(budget=strategies.budgets())
    def set_budget(self, budget: PowerBudget) -> None:
        """An operator changes the budget."""
        world = self._world()
        world.shaper.set_budget(budget)
        self.budgets.append((world.engine.now_seconds, budget))

    @rule(mode=st.sampled_from(["on", "shadow", "off"]))
    def set_mode(self, mode: str) -> None:
        """An operator switches."""
        self._world().shaper.set_mode(mode)
        self.disturbed = self.shaping = False

    @rule(state=st.sampled_from(AdmissionState), pressure=st.sampled_from([0.0, 0.5, 1.0]))
    def admission(self, state: AdmissionState, pressure: float) -> None:
        """Flex work is let in, deferred or refused."""
        self._world().mood.say(state, pressure)

    @rule(fault=st.sampled_from([None, *SENSOR_FAULTS]), stalled=st.booleans())
    def sensor(self, fault: str | None, stalled: bool) -> None:
        """The sensors fail, otherwise than before, or work again."""
        world = self._world()
        world.reader.fault, world.sampler.stalled = fault, stalled
        self.disturbed |= fault is not None

    @rule(seam=st.sampled_from(SEAMS), times=st.sampled_from([1, 1, 3, 1000]))
    def break_seam(self, seam: str, times: int) -> None:
        """A part of the shaper raises, once or for as long as it is asked."""
        self.sabotage.arm(seam, times)
        self.disturbed = True

    @precondition(lambda self: self.sabotage.armed)
    @rule()
    def mend(self) -> None:
        """Nothing raises any more."""
        self.sabotage.disarm()

    # --- what must hold

    def _world(self) -> Attacked:
        assert self.world is not None
        return self.world

    @staticmethod
    def _settings(scheduler: Any) -> tuple[Any, ...]:
        config = scheduler.scheduler_config
        return (
            scheduler.max_num_scheduled_tokens,
            admission_cap(scheduler),
            scheduler.max_num_running_reqs,
            config.long_prefill_token_threshold,
        )

    def _scheduled(self, output: Any) -> None:
        self.since_seconds = self._world().engine.now_seconds

    def _turns(self, turns: int) -> None:
        for _ in range(turns):
            if self._world().engine.busy:
                self._turn()

    def _turn(self) -> None:
        world = self._world()
        engine, scheduler = world.engine, world.engine.scheduler
        before = engine.now_seconds
        if not scheduler.has_unfinished_requests():
            self.since_seconds = before
        engine.step()
        passed = engine.now_seconds - before
        self.longest_seconds = max(self.longest_seconds, passed)
        self.turns_without_time = 0 if passed else self.turns_without_time + 1
        assert self.turns_without_time <= TURNS_WITHOUT_TIME, "the loop spins"
        assert self._settings(scheduler) == self.settings, "a lever was not put back"
        for request in scheduler.running:
            assert request.next_decode_eligible_step <= scheduler.current_step + 1
        errors = world.shaper.counters.errors + scheduler.deferral.queue.errors
        assert errors <= self.sabotage.raised, "the shaper raised by itself"
        waited = engine.now_seconds - self.since_seconds
        assert waited <= self.stall_bound_seconds, f"nothing was scheduled for {waited:.3f} s"

    @property
    def stall_bound_seconds(self) -> float:
        """Longest time without any token while something can run."""
        cap = SAFE_CAP_SECONDS if self.sabotage.raised else 0.0
        flex = FLEX_SECONDS if self._world().mood.said.state in (DEFER, SHED) else 0.0
        return 2 * self.pause_seconds + cap + flex + 2 * self.longest_seconds + 0.01

    @property
    def drain_bound_seconds(self) -> float:
        """Longest time in which all that has arrived is served.

        Each turn of a prompt brings it a chunk, each turn of the decodes brings one of them
        a token, and a turn comes after `2 P + S` at most; a request that vLLM preempts
        does its prompt, and what it had said, once more.
        """
        scheduler = self._world().engine.scheduler
        again = 1 + max((r.num_preemptions for r in scheduler.requests.values()), default=0)
        chunks = math.ceil((self.work_tokens + self.decode_tokens) / LEAST_CHUNK_TOKENS)
        turns = (chunks + self.added) * again + self.decode_tokens
        return RETRY_SECONDS + turns * self.stall_bound_seconds

    def teardown(self) -> None:
        """Everything that is left is served, and nothing is left behind."""
        try:
            if self.world is not None:
                self._finish(self.world)
        finally:
            self.sabotage.remove()

    def _finish(self, world: Attacked) -> None:
        self.sabotage.disarm()
        world.reader.fault, world.sampler.stalled = None, False
        engine = world.engine
        start, bound = engine.now_seconds, 0.0
        while engine.busy:
            self._turn()
            bound = max(bound, self.drain_bound_seconds)
            assert engine.now_seconds - start <= bound, "what is left takes too long"
        ended = [r.request_id for r in engine.scheduler.requests.values()]
        assert not ended, f"work was left without a wake-up: {ended}"
        # One more request, alone: the world goes on, and what was kept for the last is gone.
        self.since_seconds = engine.now_seconds
        world.add("last", [9] * 20, 2)
        while engine.busy:
            self._turn()
        assert engine.requests["last"].finished_seconds is not None
        assert not leaks(world)
        self._check_budget(world)

    def _check_budget(self, world: Attacked) -> None:
        if not self.shaping or self.disturbed or self.sabotage.raised:
            return
        if not all(strategies.is_ample(budget) for _, budget in self.budgets):
            return
        forced = sum(
            decision.reason is Reason.FORCED_OVER_BUDGET for decision in world.log.decisions
        )
        assert not forced, f"{forced} steps were forced although the budget left room"
        world.engine.run_until(world.engine.now_seconds + 1.0)
        segments = world.engine.gpus.take_segments()
        ends = [start for start, _ in self.budgets[1:]] + [math.inf]
        for (start, budget), end in zip(self.budgets, ends, strict=True):
            for limit in budget.limits:
                # What was launched before a change runs under it, and can't be undone.
                begin = start + 2 * self.longest_seconds if start else 0.0
                ratio = worst_ratio(segments, limit, begin, end)
                assert ratio <= 1.01, f"{limit} is over by {ratio - 1:.1%}"
