"""The control loop: what it commits, learns and keeps free."""

from __future__ import annotations

import dataclasses

import pytest

from shaper.core.controller import (
    HOST_LATE_SECONDS,
    OWN_LATE_RATIO,
    Controller,
)
from shaper.core.learn.margin import BLIND_MARGIN_RATIO
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
    StepBatch,
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


def test_finished_steps_become_spent_energy():
    """A step's joules lie between its start and its return."""
    control = controller(PowerLimit(600.0, 0.1))
    control.plan(DECODES, 1.0)
    control.launched(BATCH, 1.0)
    control.finished(1.008)
    assert control.ledger.joules_between(1.0, 1.008) == pytest.approx(3.6)


def test_a_queued_step_starts_when_its_predecessor_ends():
    """With two in flight, the second is entered behind the first."""
    control = controller(PowerLimit(600.0, 0.1))
    for now in (1.0, 1.001):
        control.plan(DECODES, now)
        control.launched(BATCH, now)
    control.finished(1.008)
    control.finished(1.016)
    assert control.ledger.joules_between(1.0, 1.008) == pytest.approx(3.6)
    assert control.ledger.joules_between(1.008, 1.016) == pytest.approx(3.6)


def test_a_late_host_is_not_taken_for_a_slow_step():
    """A return seen 3 ms late leaves both steps' energy where the device spent it."""
    control = controller(PowerLimit(600.0, 0.1))
    for now in (1.0, 1.001):
        control.plan(DECODES, now)
        control.launched(BATCH, now)
    control.finished(1.011)
    control.finished(1.016)
    assert control.ledger.joules_between(1.0, 1.008) == pytest.approx(3.6)
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


def test_steps_that_became_slower_are_followed():
    """Every step a tenth longer: after a second the ledger's end is the device's."""
    control = controller(PowerLimit(600.0, 0.1))
    now = 0.0
    for _ in range(400):
        control.plan(DECODES, now)
        control.launched(BATCH, now)
        now += 0.0088
        control.finished(now)
    assert control.ledger.end_seconds == pytest.approx(now, abs=0.0005)


def test_no_recent_reading_keeps_more_free():
    """Blind, the controller plans for a lower limit; with a fresh reading, for the limit."""
    watts = 450.0 / (1 - BLIND_MARGIN_RATIO / 2)  # decodes fit it only when seen
    long = PowerLimit(watts, 0.1)

    def steps(read: bool) -> int:
        control = controller(long)
        count = 0
        for tick in range(200):
            now = 0.008 * tick
            if read:
                control.observe(state(now, instant_watts=450.0))
            limits = control.plan(DECODES, now)
            control.launched(BATCH if limits.run else StepBatch(), now)
            control.finished(now + 0.008)
            count += limits.run and tick >= 180  # the margin falls slowly
        return count

    assert steps(read=True) == 20
    assert steps(read=False) < 20


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


@pytest.mark.parametrize("true_ratio", [0.85, 1.15])
def test_the_energy_counter_corrects_joules(true_ratio):
    """A GPU that draws 15% more or less than its profile is known after a minute."""
    control = controller(PowerLimit(900.0, 0.1))
    joules = shown = 0.0
    for tick in range(8000):
        now = 0.008 * tick
        control.plan(DECODES, now)
        control.launched(BATCH, now)
        control.finished(now + 0.008)
        joules += 3.6 * true_ratio
        if tick % 12 == 0:  # the counter moves about every 100 ms
            shown = joules
        if tick % 2 == 0:  # and is read about every 20
            control.observe(state(now + 0.008, energy_joules=shown))
    assert control.estimator.joules_gain_ratio == pytest.approx(true_ratio, abs=0.02)


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


def test_rest_teaches_nothing_about_steps():
    """A GPU that draws less at rest than the ledger thinks leaves the gain alone."""
    control = controller(PowerLimit(900.0, 0.1))
    joules = now = 0.0
    for tick in range(4000):
        if tick % 4:
            now, joules = now + 0.02, joules + 0.02 * 75.0
        else:
            control.plan(DECODES, now)
            control.launched(BATCH, now)
            now, joules = now + 0.008, joules + 3.6
            control.finished(now)
        control.observe(state(now, energy_joules=joules))
    assert control.estimator.joules_gain_ratio == 1.0


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
