"""What an engine's controller does with a ledger that it shares."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from shaper.core.controller import Controller
from shaper.core.ledger.headroom import WindowPart
from shaper.core.ledger.shared import Committed, EngineShare, GroupView, Step
from shaper.core.policy.windowed import WindowedPlanner
from shaper.core.types import (
    EngineLoad,
    LatencyTargets,
    PowerBudget,
    PowerLimit,
    PrefillDemand,
    Reason,
    StepBatch,
    StepPrediction,
)
from shaper.group import memory_groups

IDLE = 140.0
DECODES = EngineLoad(8, 8, 8000, running_requests=8)
PROMPT = EngineLoad(prefills=(PrefillDemand(1000, 0),), waiting_requests=1)
BOTH = dataclasses.replace(DECODES, prefills=PROMPT.prefills, waiting_requests=1)


class Model:
    """8 ms and 450 W for decodes, 40 us a prompt token at 700 W."""

    gap_watts = IDLE

    def predict(self, batch, **state):
        """Seconds and joules."""
        base = 0.008 if batch.decode_tokens else 0.0
        own = 40e-6 * batch.prefill_tokens
        return StepPrediction(base + own, base * 450.0 + own * 700.0)


class Recording:
    """A group that writes down what it is told, and refuses as often as it is told to."""

    limits = (PowerLimit(2000.0, 0.1),)

    def __init__(self, refusals: int = 0, view: GroupView | None = None) -> None:
        self.refusals = refusals
        self.view = view or GroupView(())
        self.told: list[EngineShare] = []
        self.claims: list[tuple[Committed, Step | None]] = []
        self.entered: list[Committed] = []

    def query(self, start_seconds, now_seconds, share):
        """See the protocol."""
        return self.view

    def publish(self, share, now_seconds):
        """See the protocol."""
        self.told.append(share)

    def reserve(self, committed, share, now_seconds, step):
        """See the protocol."""
        if step is not None and self.refusals:
            self.refusals -= 1
            return False
        self.claims.append((committed, step))
        return True

    def commit(self, committed, share, now_seconds):
        """See the protocol."""
        self.entered.append(committed)


def controller(group, itl=None, **more):
    """An engine without limits of its own."""
    targets = LatencyTargets(itl)
    return Controller(
        Model(), WindowedPlanner(), PowerBudget(), 0.0, targets=targets, group=group, **more
    )


def test_a_step_is_claimed_before_it_is_launched():
    """It stands at the end of what is committed; launched as planned, no more is said."""
    group = Recording()
    control = controller(group)
    assert control.plan(DECODES, 1.0).run
    ((committed, step),) = group.claims
    assert step is not None
    assert committed.times[-1] == pytest.approx(1.008)
    assert committed.joules[-1] - committed.joules[-2] == pytest.approx(0.008 * 450.0)
    control.launched(DECODES.batch(), 1.0)
    assert not group.entered
    control.finished(1.008)
    assert len(group.entered) == 1


def test_what_the_engine_ran_instead_is_entered():
    """vLLM scheduled fewer requests than planned, or none: the claim is corrected."""
    for ran, joules in ((StepBatch(4, 4, 4000), 3.6), (StepBatch(), 0.0)):
        group = Recording()
        control = controller(group)
        control.plan(BOTH, 1.0)
        control.launched(ran, 1.0)
        (entered,) = group.entered
        claimed = group.claims[0][0]
        assert claimed.joules[-1] - _joules_at(claimed, 1.0) == pytest.approx(3.6 + 28.0)
        assert entered.joules[-1] - _joules_at(entered, 1.0) == pytest.approx(joules)


def _joules_at(committed: Committed, seconds: float) -> float:
    return float(np.interp(seconds, committed.times, committed.joules))


def test_a_refused_claim_is_planned_again_and_then_given_up():
    """One refusal: the second plan runs. Two: the engine waits for its next turn."""
    once, twice = Recording(refusals=1), Recording(refusals=2)
    assert controller(once).plan(DECODES, 1.0).run
    assert len(once.claims) == 1
    assert not controller(twice).plan(DECODES, 1.0).run
    assert not twice.claims
    assert twice.told


def test_what_waits_too_long_runs_whatever_the_group_says():
    """Refused for ever, decodes run at their deadline, entered without a check."""
    group = Recording(refusals=10**6)
    control = controller(group, max_pause_seconds=0.5)
    ran = [now for now in (0.01 * i for i in range(60)) if control.plan(DECODES, now).run]
    assert ran
    assert ran[0] == pytest.approx(0.5, abs=0.011)
    assert group.claims[0][1] is None


def test_in_shadow_nothing_is_claimed_and_what_runs_is_entered():
    """Shadow tells the others what it draws, and asks nobody."""
    group = Recording()
    control = controller(group, shadow=True)
    assert control.plan(DECODES, 1.0).run
    control.launched(DECODES.batch(), 1.0)
    assert not group.claims
    assert len(group.entered) == 1


def leaving(joules: float, **first: float) -> GroupView:
    """A window of 100 ms with headroom for so many joules above this engine's idle power."""
    corners = np.array([0.0, 0.1])
    headroom = np.array([joules, joules + IDLE * 0.1])
    return GroupView((WindowPart(0.1, 2000.0, IDLE, corners, headroom),), **first)


# Above idle power: 2.48 J for the decodes, and 22.4 J for the prompt.
TAKES = 2.48 + 22.4


def test_a_prompt_runs_beside_those_that_have_waited_longer_where_both_fit():
    """With 20 J of others ahead it waits where they would not fit beside it, and only there."""
    for headroom, runs in ((TAKES + 20.5, True), (TAKES + 19.5, False)):
        control = controller(Recording(view=leaving(headroom, ahead_joules=20.0)), itl=0.2)
        limits = control.plan(BOTH, 1.0)
        assert (limits.run and limits.prefill_tokens is None) is runs


def test_prompts_that_have_waited_for_their_bound_yield_to_nothing():
    """After 0.3 s of others ahead they take the headroom themselves."""
    group = Recording(view=leaving(TAKES + 1.0, ahead_joules=1000.0))
    control = controller(group, max_pause_seconds=0.3)
    ran = [now for now in np.arange(1.0, 1.5, 0.005) if control.plan(PROMPT, now).run]
    assert ran[0] == pytest.approx(1.3, abs=0.01)


def test_late_decodes_of_others_come_before_any_step():
    """What they take is left to them; with headroom for both nobody waits."""
    for headroom, runs in ((2.48 + 5.5, True), (2.48 + 4.5, False)):
        control = controller(Recording(view=leaving(headroom, late_joules=5.0)))
        assert control.plan(DECODES, 1.0).run is runs


def test_decodes_slow_down_only_as_far_as_waiting_prompts_of_others_need():
    """They wait for their slowest cadence where a prompt would not fit beside them, else not."""
    for headroom, reason in (
        (2.48 + 30.5, Reason.UNCONSTRAINED),
        (2.48 + 29.5, Reason.DECODE_PACING),
    ):
        view = leaving(headroom, waiting_joules=30.0)
        control = controller(Recording(view=view), itl=0.1)
        limits = control.plan(DECODES, 1.0)
        batch = DECODES.batch() if limits.run else StepBatch()
        assert control.launched(batch, 1.0).reason is reason
        # 40 ms after they were ready they are late, and run.
        assert control.plan(DECODES, 1.033).run


def test_the_cadence_is_the_groups():
    """Decodes of two engines that draw more than the limit together are spaced alike."""
    handles = memory_groups(
        (PowerLimit(700.0, 0.1),), 2, idle_watts=IDLE, rest_watts=IDLE, rest_after_seconds=1.0
    )
    controls = [controller(handle, itl=0.1) for handle in handles]
    steps = [0, 0]
    due = [0.0, 0.0]
    for tick in range(3000):
        now = 0.001 * tick
        for k, control in enumerate(controls):
            if due[k] and now >= due[k] - 1e-9:
                control.finished(now)
                due[k] = 0.0
            if not due[k] and control.plan(DECODES, now).run:
                control.launched(DECODES.batch(), now)
                due[k] = now + 0.008
                steps[k] += tick > 1000
    assert min(steps) > 0.8 * max(steps)
    # 420 W above idle for both are 2.48 J a step each: 11.8 ms between steps, or less often.
    assert 0.0118 < 2.0 / max(steps) < 0.0177
