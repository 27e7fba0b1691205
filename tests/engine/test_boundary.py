"""A failure inside the shaper never takes the engine down, and never lifts the cap."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from shaper.core.model.power_model import StepModel
from shaper.core.model.work import ModelShape, WorkCoefficients
from shaper.core.policy import Plan
from shaper.core.policy.windowed import WindowedPlanner
from shaper.core.types import PowerBudget, PowerLimit, Reason, StepLimits
from shaper.engine.fallback_cap import MAX_SPACING_SECONDS, fallback_cap
from shaper.gpu.profiles import load_profile
from tests.engine.harness import random_traffic, worst_ratio

LIMIT = PowerLimit(500.0, 0.1)


class Failing:
    """Plans like ours, and raises in between."""

    def __init__(self, first: int, last: int) -> None:
        self.calls, self.first, self.last = 0, first, last
        self.inner = WindowedPlanner()

    def plan(self, view):
        self.calls += 1
        if self.first <= self.calls < self.last:
            raise ZeroDivisionError("a mistake in a policy")
        return self.inner.plan(view)


def test_a_policy_that_raises_leaves_the_fallback_cap(make_rig):
    """All requests finish, each failure is counted, the cap keeps the budget, shaping resumes."""
    policy = Failing(300, 303)
    rig = make_rig((LIMIT,), policy=lambda: policy)
    rig.run(random_traffic(21, count=120, rate=5.0))
    assert all(r.finished_seconds is not None for r in rig.engine.requests.values())
    assert rig.shaper.counters.errors == 3
    assert rig.shaper.counters.steps == rig.engine.steps
    reasons = [d.reason for d in rig.log.decisions]
    assert reasons.count(Reason.FALLBACK_CAP) > 50
    last = len(reasons) - 1 - reasons[::-1].index(Reason.FALLBACK_CAP)
    assert Reason.CHUNK_POWER in reasons[last:]
    assert worst_ratio(rig.engine.gpus.take_segments(), LIMIT) <= 1.01


def test_a_new_controller_counts_its_own_steps_only(make_rig):
    """A step that was in flight when the old controller failed is not taken for a later one."""
    policies = iter([Failing(300, 301), WindowedPlanner()])
    rig = make_rig((LIMIT,), policy=lambda: next(policies))
    rig.run([(0.0, [7] * 600, 3000), (0.0, [8] * 600, 3000)])  # the queue never runs empty
    assert rig.shaper.counters.errors == 1
    controller = rig.shaper._controller
    assert not controller._in_flight_steps
    # Off by one step, the ledger would end a step too early or too late, for good.
    assert controller.ledger.end_seconds == pytest.approx(rig.engine.now_seconds, abs=0.003)


def test_one_step_that_is_not_recorded_does_not_shift_the_others(make_rig):
    """Steps are matched by what vLLM returns, not by counting."""
    rig = make_rig((LIMIT,))
    recorded: list[Any] = []
    rig.shaper._record_step = recorded.append
    inner, calls = rig.shaper._record, []

    def once_broken(output):
        calls.append(output)
        if len(calls) == 50:
            raise RuntimeError("broken")
        return inner(output)

    rig.shaper._record = once_broken
    rig.run([(0.0, [7] * 600, 400)])
    assert rig.shaper.counters.errors == 1
    contexts = [step.batch.decode_context_tokens for step in recorded if step.batch.decode_tokens]
    missing = [b - a for a, b in pairwise(contexts)]
    assert missing.count(2) == 1
    assert set(missing) == {1, 2}


class HoldAllButTwo:
    """Lets two decodes run at a time."""

    def plan(self, view):
        return Plan(StepLimits(decode_requests=2), Reason.DECODE_ONLY)


@pytest.mark.parametrize(("asynchronous", "v2_runner"), [(True, True), (False, False)])
def test_held_decodes_take_turns(make_rig, asynchronous, v2_runner):
    """With a cap of two of eight, all eight advance at the same pace."""
    rig = make_rig((LIMIT,), policy=HoldAllButTwo, asynchronous=asynchronous, v2_runner=v2_runner)
    rig.run([(0.0, [index] * 40, 120) for index in range(8)], seconds=1.5)
    counts = [len(r.token_seconds) for r in rig.engine.requests.values()]
    assert min(counts) > 5
    assert max(counts) - min(counts) <= 3
    decodes = [len(output["tokens"]) for output in rig.outputs[20:]]
    assert max(decodes) <= 2


def model() -> StepModel:
    shape = ModelShape(
        name="dense 8B", layers=32, hidden_size=4096, attention_heads=32, kv_heads=8, head_dim=128,
        intermediate_size=14336, vocab_size=128256, max_context_tokens=131072,
    )  # fmt: skip
    return StepModel(load_profile("h200-sxm"), WorkCoefficients.from_shape(shape))


@pytest.mark.parametrize("watts", [300.0, 400.0, 500.0, 600.0])
@pytest.mark.parametrize("window", [0.05, 0.1, 1.0])
def test_the_fallback_cap_keeps_its_law(watts, window):
    """The worst steps at the least spacing stay within the limit, summed by hand."""
    step_model = model()
    idle = step_model.gap_watts
    cap = fallback_cap(step_model.predict, idle, PowerBudget((PowerLimit(watts, window),)))
    assert cap.decode_requests is not None
    assert cap.prefill_tokens is not None
    from shaper.engine.fallback_cap import _worst_batch

    tokens = cap.decode_requests + cap.prefill_tokens
    worst = (_worst_batch(cap.decode_requests, cap.prefill_tokens), _worst_batch(0, tokens))
    step = max(map(step_model.predict, worst), key=lambda s: s.joules - idle * s.seconds)
    if cap.spacing_seconds >= MAX_SPACING_SECONDS:
        assert step.joules - idle * step.seconds > (watts - idle) * window * 0.9
        return
    # Steps of `seconds`, one each `spacing`: the busiest window starts with a step.
    full, rest = divmod(window, cap.spacing_seconds)
    busy = full * step.seconds + min(rest, step.seconds)
    mean = idle + busy * (step.watts - idle) / window
    assert mean <= watts * 1.001


def test_without_limits_the_fallback_cap_is_none():
    """Nothing to keep, nothing to hold."""
    step_model = model()
    assert (
        not fallback_cap(step_model.predict, step_model.gap_watts, PowerBudget())
        .limits(0.0)
        .binding
    )
