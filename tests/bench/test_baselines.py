"""The baseline policies' laws, each in a few lines."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.baselines.latency_chunk import LatencyChunk
from bench.baselines.reactive import ReactiveConcurrency
from bench.baselines.static import StaticCaps
from shaper.core.ledger.ledger import Ledger
from shaper.core.policy import PlanInput
from shaper.core.policy.fixed import FixedPolicy
from shaper.core.types import (
    UNLIMITED,
    EngineLoad,
    LatencyTargets,
    PowerBudget,
    PowerLimit,
    PowerState,
    PrefillDemand,
    Reason,
    StepBatch,
    StepPrediction,
)
from shaper.errors import ConfigError
from shaper.simulate.policies import new_policy
from shaper.simulate.setup import RackSetup
from tests import strategies

LIMIT = 500.0


def predict(batch: StepBatch) -> StepPrediction:
    """6 ms for the weights, and 20 us a prompt token on top."""
    seconds = 0.006 + 20e-6 * batch.prefill_tokens
    return StepPrediction(seconds, 700.0 * seconds)


def headroom(watts=LIMIT):
    return Ledger(PowerBudget((PowerLimit(watts, 0.1),)), 100.0, 0.0).ask(0.0, 100.0)


def view(load, state=None, itl=None, watts=LIMIT) -> PlanInput:
    return PlanInput(
        load=load,
        headroom=headroom(watts),
        predict=predict,
        state=state,
        targets=LatencyTargets(itl),
    )


def running(decodes: int, waiting: int = 0) -> EngineLoad:
    """Decodes that run, and prompts of 600 tokens that wait."""
    return EngineLoad(
        decode_requests=decodes,
        decode_tokens=decodes,
        decode_context_tokens=1000 * decodes,
        prefills=(PrefillDemand(600, 0),) * waiting,
        running_requests=decodes,
        waiting_requests=waiting,
    )


# --- null and static caps


def test_the_null_policy_never_limits():
    """Whatever it sees."""
    assert FixedPolicy().plan(view(running(300, 9), itl=0.001)).limits is UNLIMITED


def test_static_caps_cut_prompts_and_stop_entries():
    """Both caps hold at once, and neither is named where it does not bind."""
    policy = StaticCaps(prefill_tokens=512, running_requests=16)
    both = policy.plan(view(running(15, 4)))
    assert (both.limits.prefill_tokens, both.limits.running_requests) == (512, 16)
    assert both.reason is Reason.CAP
    assert policy.plan(view(running(16))).limits is not None
    assert not policy.plan(view(running(16))).limits.binding
    full = policy.plan(view(running(16, 4))).limits
    # Nobody enters, so there is no prompt to cut.
    assert (full.prefill_tokens, full.running_requests) == (None, 16)
    assert policy.plan(view(EngineLoad())).reason is Reason.IDLE


def test_a_static_cap_never_stops_a_prompt_that_cannot_be_split():
    """An engine without chunked prefill gets its first prompt whole."""
    load = EngineLoad(prefills=(PrefillDemand(4000, 0),), splittable=False)
    plan = StaticCaps(prefill_tokens=512).plan(view(load))
    assert not plan.limits.binding


@pytest.mark.parametrize("caps", [{"prefill_tokens": 0}, {"running_requests": -1}])
def test_caps_that_stop_the_engine_are_refused(caps):
    """Zero is a typing error, not a wish."""
    with pytest.raises(ConfigError, match="would stop the engine"):
        StaticCaps(**caps)


# --- adaptive chunks for latency


def test_the_chunk_is_the_largest_that_keeps_the_itl_target():
    """One grain more would miss it."""
    plan = LatencyChunk().plan(view(running(8, 9), itl=0.04))
    chunk = plan.limits.prefill_tokens
    assert plan.reason is Reason.CHUNK_ITL
    assert chunk is not None
    assert predict(running(8, 9).batch(chunk)).seconds <= 0.04
    assert predict(running(8, 9).batch(chunk + 64)).seconds * 1.02 > 0.04


@pytest.mark.parametrize(
    ("load", "itl"),
    [(running(8, 9), None), (running(0, 9), 0.01), (running(8), 0.01), (running(8, 1), 0.05)],
    ids=["no target", "no decodes", "no prompts", "fits"],
)
def test_without_a_decode_to_protect_nothing_is_limited(load, itl):
    """The target is for decodes that wait behind a prompt, and for nothing else."""
    assert not LatencyChunk().plan(view(load, itl=itl)).limits.binding


def test_chunks_are_blind_to_power():
    """A budget of a tenth changes nothing."""
    tight, loose = (
        LatencyChunk().plan(view(running(8, 9), itl=0.04, watts=watts)) for watts in (110.0, 9e9)
    )
    assert tight == loose


@given(strategies.loads(), st.floats(0.001, 0.2))
def test_prompts_always_move_and_large_chunks_keep_the_target(load, itl):
    """Any load and any target: some prompt runs, and more than the least only inside the target."""
    limits = LatencyChunk().plan(view(load, itl=itl)).limits
    batch = load.batch(limits.prefill_tokens)
    assert limits.run
    assert bool(batch.prefill_tokens) == bool(load.batch().prefill_tokens)
    if load.decode_requests and load.splittable and batch.prefill_tokens > 64:
        assert predict(batch).seconds <= itl


# --- the reactive loop


class Loop:
    """A reactive policy, and a sensor that is read every 20 ms."""

    def __init__(self, **settings):
        self.policy = ReactiveConcurrency(**settings)
        self.ticks, self.joules = 0, 0.0

    def drive(self, load, watts, seconds, *, energy=True):
        """Go on at constant power; the last plan."""
        plan = None
        for _ in range(round(seconds / 0.02)):
            joules = self.joules if energy else None
            state = PowerState(self.ticks * 0.02, 1, average_watts=watts, energy_joules=joules)
            plan = self.policy.plan(view(load, state))
            self.ticks += 1
            self.joules += watts * 0.02
        return plan

    @classmethod
    def lowered_to(cls, cap):
        """One that has just been over the limit."""
        loop = cls(decrease_ratio=0.5)
        loop.drive(running(2 * cap), 600.0, 0.52)
        assert loop.policy.cap == cap
        return loop


def test_below_the_limit_nothing_is_ever_capped():
    """No cap until the limit was exceeded once."""
    loop = Loop()
    assert loop.drive(running(200, 50), 499.0, 5.0).limits is UNLIMITED
    assert loop.policy.cap is None


def test_over_the_limit_the_cap_falls_by_a_quarter_each_half_second():
    """From what ran, not from what the engine could run; and never to nothing."""
    loop = Loop()
    loop.drive(running(40), 600.0, 0.5)
    assert loop.policy.cap is None
    plan = loop.drive(running(40), 600.0, 0.02)
    assert loop.policy.cap == 30
    assert (plan.limits.running_requests, plan.limits.decode_requests) == (30, 30)
    assert plan.reason is Reason.CAP
    loop.drive(running(40), 600.0, 0.5)
    assert loop.policy.cap == 22
    loop.drive(running(40), 600.0, 60.0)
    assert loop.policy.cap == 1


def test_a_cap_that_binds_rises_by_two_each_half_second():
    """Additive, as long as the power is well below the limit; just below it, it stays."""
    loop = Loop.lowered_to(10)
    loop.drive(running(10, 20), 400.0, 1.5)
    assert loop.policy.cap == 16
    loop.drive(running(16, 20), 490.0, 0.5)
    settled = loop.policy.cap
    loop.drive(running(16, 20), 490.0, 20.0)
    assert loop.policy.cap == settled


def test_a_cap_that_demand_stays_below_does_not_rise():
    """Low power at low demand says nothing about the cap."""
    loop = Loop.lowered_to(10)
    plan = loop.drive(running(10), 300.0, 30.0)
    assert loop.policy.cap == 10
    assert not plan.limits.binding


def test_without_a_new_reading_the_cap_stays():
    """A sensor that is lost or stuck neither raises nor lowers it."""
    policy = Loop.lowered_to(10).policy
    for _ in range(1000):
        policy.plan(view(running(10, 5), None))
        policy.plan(view(running(10, 5), PowerState(0.5, 1, energy_joules=300.0)))
    assert policy.cap == 10


def test_a_counter_that_resets_is_replaced_by_the_meters_mean():
    """A negative difference is no power."""
    policy = ReactiveConcurrency()
    policy.plan(view(running(8), PowerState(0.0, 1, average_watts=600.0, energy_joules=9e6)))
    policy.plan(view(running(8), PowerState(0.5, 1, average_watts=600.0, energy_joules=3.0)))
    assert policy.cap == 6


def test_without_a_counter_the_meters_mean_is_used():
    """Some GPUs have no energy counter."""
    loop = Loop()
    loop.drive(running(8), 600.0, 0.52, energy=False)
    assert loop.policy.cap == 6


def test_nan_watts_move_nothing():
    """What is not a number is neither above nor below the limit."""
    loop = Loop.lowered_to(10)
    loop.drive(running(10, 5), float("nan"), 3.0)
    assert loop.policy.cap == 10


def test_the_loop_follows_the_budget_in_force():
    """The target is the lowest limit of the moment."""
    policy = ReactiveConcurrency()
    for now, watts in ((0.0, 700.0), (0.5, 700.0), (1.0, 550.0)):
        state = PowerState(now, 1, energy_joules=600.0 * now)
        policy.plan(view(running(8), state, watts=watts))
    assert policy.cap == 6


def test_a_loop_with_senseless_settings_is_refused():
    """Each bound, one by one."""
    for wrong in (
        {"interval_seconds": 0.0},
        {"decrease_ratio": 1.0},
        {"increase_requests": 0},
        {"raise_below_ratio": 1.5},
    ):
        with pytest.raises(ConfigError, match="reactive loop"):
            ReactiveConcurrency(**wrong)


def test_an_installed_package_says_where_baselines_are(monkeypatch):
    """It has no `bench`: one line names the clone; the live engine's policies are there."""
    monkeypatch.setitem(sys.modules, "bench.baselines", None)
    with pytest.raises(ConfigError, match=r"'reactive' is a baseline.*from a clone"):
        new_policy(RackSetup(policy="reactive"))
    assert isinstance(new_policy(RackSetup(policy="fixed")), FixedPolicy)
