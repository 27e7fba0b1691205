"""The control loop: what it commits, learns and keeps free."""

from __future__ import annotations

import dataclasses

import pytest

from shaper.core.controller import (
    HOST_LATE_SECONDS,
    OWN_LATE_RATIO,
    Controller,
)
from shaper.core.policy.windowed import WindowedPlanner
from shaper.core.types import (
    ClockEventReasons,
    EngineLoad,
    LatencyTargets,
    PowerBudget,
    PowerLimit,
    PowerState,
    PrefillDemand,
    Reason,
    StepPrediction,
)

DECODES = EngineLoad(8, 8, 8000)
BATCH = DECODES.batch()


class Model:
    """A decode step of 8 ms at 450 W; remembers the clocks it was asked for."""

    gap_watts = 140.0

    def __init__(self) -> None:
        self.clocks: list[float | None] = []

    def predict(self, batch, *, sm_clock_hertz=None, temperature_celsius=None):
        self.clocks.append(sm_clock_hertz)
        seconds = 0.008 + 20e-6 * batch.prefill_tokens
        return StepPrediction(seconds, 450.0 * 0.008 + 0.014 * batch.prefill_tokens)


def controller(*limits: PowerLimit, **settings) -> Controller:
    targets = LatencyTargets(settings.pop("itl", None), None, settings.pop("slack", False))
    return Controller(
        Model(), WindowedPlanner(), PowerBudget(limits), 0.0, targets=targets, **settings
    )


def state(now: float, **fields) -> PowerState:
    return PowerState(sampled_seconds=now, gpu_count=1, **fields)


@pytest.mark.parametrize(("first", "second"), [(1.008, 1.016), (1.011, 1.016)])
def test_finished_steps_become_spent_energy(first, second):
    """With two in flight the second is entered behind the first; a return seen 3 ms late leaves
    both steps' energy where the device spent it."""
    control = controller(PowerLimit(600.0, 0.1))
    for now in (1.0, 1.001):
        control.plan(DECODES, now)
        control.launched(BATCH, now)
    control.finished(first)
    control.finished(second)
    assert control.ledger.joules_between(1.0, 1.008) == pytest.approx(3.6)
    late_joules = 450.0 * (first - 1.008)
    assert control.ledger.joules_between(1.008, 1.016) == pytest.approx(3.6, abs=late_joules + 1e-9)
    assert control.ledger.end_seconds == pytest.approx(1.016)


def test_a_slow_step_adds_idle_power_only():
    """What a step is late by beyond the host's share is time at the gap power."""
    control = controller(PowerLimit(600.0, 0.1))
    control.plan(DECODES, 1.0)
    control.launched(BATCH, 1.0)
    control.finished(1.038)
    end = 1.038 - HOST_LATE_SECONDS
    assert control.ledger.end_seconds == pytest.approx(end)
    own = OWN_LATE_RATIO * 0.008
    expected = 3.6 + own * 450.0 + (end - 1.008 - own) * 140.0
    assert control.ledger.joules_between(1.0, end) == pytest.approx(expected)


def test_predictions_follow_the_measured_clock_but_not_an_idle_one():
    """A sagging clock reaches the model; what an idle GPU shows does not."""
    model = Model()
    control = Controller(model, WindowedPlanner(), PowerBudget((PowerLimit(900.0, 0.1),)), 0.0)
    control.observe(state(1.0, sm_clock_hertz=1.2e9))
    control.plan(DECODES, 1.0)
    assert model.clocks[-1] == 1.2e9
    control.observe(
        state(2.0, sm_clock_hertz=0.3e9, clock_event_reasons=ClockEventReasons.GPU_IDLE)
    )
    control.plan(DECODES, 2.0)
    assert model.clocks[-1] is None


def test_an_old_state_again_teaches_nothing():
    """The sampler publishes the same state to many steps."""
    control = controller()
    seen = state(1.0, energy_joules=5.0)
    control.observe(seen)
    control.observe(seen)
    control.observe(state(0.5, energy_joules=900.0))
    assert control._state is seen


def test_a_coarse_counter_does_not_move_a_right_model():
    """Power that swings, and a counter that moves each 100 ms out of step with the spans."""
    control = controller(PowerLimit(900.0, 0.1))
    load = dataclasses.replace(DECODES, prefills=(PrefillDemand(512, 0),))
    joules = shown = now = 0.0
    gains, margins = [], []
    for tick in range(6000):
        batch = load.batch() if tick % 37 < 9 else BATCH
        step = Model().predict(batch)
        control.plan(load, now)
        control.launched(batch, now)
        now += step.seconds
        control.finished(now)
        joules += step.joules
        if tick % 11 == 0:
            shown = joules
        if tick % 2 == 0:
            control.observe(state(now, energy_joules=shown))
        if now > 2.0:
            gains.append(control.estimator.joules_gain_ratio)
            margins.append(control.estimator.margin_ratio)
        assert not control.estimator.disagrees
    assert gains == pytest.approx([1.0] * len(gains), abs=0.0075)
    assert gains.count(1.0) > 0.9 * len(gains)
    assert max(margins) < 0.01


def test_a_decision_says_what_was_wanted_and_what_ran():
    """One decision a step, with the reason and the prediction of the step that ran."""
    load = dataclasses.replace(DECODES, prefills=(PrefillDemand(4000, 0),))
    control = controller(PowerLimit(500.0, 0.1))
    limits = control.plan(load, 0.0)
    decision = control.launched(load.batch(limits.prefill_tokens), 0.0)
    assert decision.reason is Reason.CHUNK_POWER
    assert decision.wanted_prefill_tokens == 4000
    assert decision.prefill_tokens == limits.prefill_tokens
    assert decision.headroom_watts >= 0
    assert decision.applied
