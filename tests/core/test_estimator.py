"""What is learned from step times and from the energy counter."""

from __future__ import annotations

import bisect
import math

import pytest

from shaper.core.learn.estimator import MAX_GAIN, MAX_MODEL_MARGIN_RATIO, MIN_GAIN, Estimator
from shaper.core.types import PowerState, StepBatch, StepPrediction

IDLE_WATTS = 140.0
DECODES = StepBatch(decode_tokens=8, decode_requests=8)
STEP = StepPrediction(0.008, 3.6)


def state(now: float, joules: float | None) -> PowerState:
    return PowerState(sampled_seconds=now, gpu_count=1, energy_joules=joules)


def serve(
    estimator: Estimator, seconds: float, true_joules, start: float = 0.0, joules: float = 1e6
) -> float:
    """Steps of 8 ms one after the other; a counter that moves each 96 ms, read each 16 ms.

    Returns the joules that the counter has reached.
    """
    shown = joules
    first = round(start / 0.008)
    for tick in range(first, first + round(seconds / 0.008)):
        begin, end = 0.008 * tick, 0.008 * (tick + 1)
        estimator.observe_run(DECODES, STEP, begin, end, 0.008)
        joules += true_joules(begin)
        shown = joules if tick % 12 == 0 else shown
        if tick % 2 == 0:
            estimator.observe_power(state(end, shown))
    return joules


@pytest.mark.parametrize("ratio", [1.1, 0.9])
def test_step_times_correct_seconds(ratio):
    """Steps that take a tenth more or less are predicted so. Until the meter speaks, longer ones
    draw the same power, and shorter ones save no joule on trust."""
    estimator = Estimator()
    seconds = 0.008 * ratio
    for tick in range(600):
        estimator.observe_run(DECODES, STEP, seconds * tick, seconds * (tick + 1), seconds)
    corrected = estimator.correct(DECODES, STEP)
    assert corrected.seconds == pytest.approx(seconds, rel=0.01)
    joules = STEP.watts * corrected.seconds if ratio > 1.0 else STEP.joules
    assert corrected.joules == pytest.approx(joules, rel=0.001)


@pytest.mark.parametrize("true_ratio", [0.85, 1.15])
def test_joules_are_known_within_seconds(true_ratio):
    """A GPU that draws 15% more or less: within 2% after three seconds, within 1% after ten."""
    estimator = Estimator(IDLE_WATTS)
    joules = serve(estimator, 3.0, lambda begin: 3.6 * true_ratio)
    assert estimator.correct(DECODES, STEP).joules == pytest.approx(3.6 * true_ratio, rel=0.02)
    serve(estimator, 7.0, lambda begin: 3.6 * true_ratio, 3.0, joules)
    assert estimator.correct(DECODES, STEP).joules == pytest.approx(3.6 * true_ratio, rel=0.01)
    assert estimator.margin_ratio < 0.02
    assert not estimator.disagrees


def test_a_sudden_excess_is_kept_free_before_it_is_learned():
    """A step of a tenth in power shows in margin and gain together within a second."""
    estimator = Estimator(IDLE_WATTS)
    joules = serve(estimator, 10.0, lambda begin: 3.6)
    assert estimator.correct(DECODES, STEP).joules == pytest.approx(3.6)
    serve(estimator, 1.0, lambda begin: 3.96, 10.0, joules)
    planned = estimator.correct(DECODES, STEP).joules / (1.0 - estimator.margin_ratio)
    assert planned > 3.85


def test_what_no_gain_explains_is_a_disagreement():
    """A counter at twice the model: gains at their bounds, the margin at its own, and said so."""
    estimator = Estimator(IDLE_WATTS)
    serve(estimator, 20.0, lambda begin: 7.2)
    assert estimator.disagrees
    assert estimator.disagreement_ratio > 0.2
    assert estimator.joules_gain_ratio <= MAX_GAIN + 1e-9
    assert estimator.margin_ratio <= MAX_MODEL_MARGIN_RATIO


def test_some_seconds_of_a_busy_host_are_no_disagreement():
    """Three seconds in which the device did half as much as was entered, now and then: nothing
    is said. The same for good is."""
    estimator = Estimator(IDLE_WATTS)
    joules = serve(estimator, 5.0, lambda begin: 3.6)
    said = []
    for round_ in range(4):
        start = 5.0 + 11.0 * round_
        for tick in range(10):
            joules = serve(estimator, 0.3, lambda begin: 1.8, start + 0.3 * tick, joules)
            said.append(estimator.disagrees)
        for tick in range(10):
            joules = serve(estimator, 0.8, lambda begin: 3.6, start + 3.0 + 0.8 * tick, joules)
            said.append(estimator.disagrees)
    assert not any(said)
    serve(estimator, 20.0, lambda begin: 7.2, 49.0, joules)
    assert estimator.disagrees


def test_absurd_measurements_are_clamped():
    """Stalls of a minute and a counter gone wild move gains to their bounds at most."""
    estimator = Estimator(IDLE_WATTS)
    for tick in range(3000):
        estimator.observe_run(DECODES, STEP, 0.008 * tick, 0.008 * (tick + 1), 60.0)
    assert 1.0 < estimator.seconds_gain_ratio <= MAX_GAIN
    for watts, least, most in ((1e9, 1.0, MAX_GAIN), (1e-9, MIN_GAIN, 1.0)):
        estimator = Estimator(IDLE_WATTS)
        serve(estimator, 10.0, lambda begin, watts=watts: watts)
        assert least - 1e-9 <= estimator.joules_gain_ratio <= most + 1e-9
        assert estimator.joules_gain_ratio != 1.0
        assert 0.0 <= estimator.margin_ratio <= MAX_MODEL_MARGIN_RATIO


@pytest.mark.parametrize("nonsense", [math.nan, math.inf, 0.0, -1.0, None])
def test_times_and_counters_that_are_none_teach_nothing(nonsense):
    """What is not a duration is left out, and so is a sensor without an energy counter."""
    estimator = Estimator(IDLE_WATTS)
    for tick in range(300):
        end = 0.008 * (tick + 1)
        seconds = 0.008 if nonsense is None else nonsense
        estimator.observe_run(DECODES, STEP, 0.008 * tick, end, seconds)
        estimator.observe_power(state(end, nonsense if nonsense != 0.0 else None))
    assert estimator.correct(DECODES, STEP) == STEP
    assert estimator.margin_ratio == 0.0


def test_a_counter_that_resets_starts_a_new_span():
    """Going back to zero is not negative energy; what is learned stays."""
    estimator = Estimator(IDLE_WATTS)
    serve(estimator, 5.0, lambda begin: 3.6)
    estimator.observe_power(state(5.001, 0.0))
    estimator.observe_power(state(5.02, 1.0))
    serve(estimator, 5.0, lambda begin: 3.6, 5.04, 2.0)
    assert estimator.correct(DECODES, STEP).joules == pytest.approx(3.6, rel=0.01)
    assert not estimator.disagrees


def serve_with_pauses(
    estimator: Estimator, step_watts: float, pause_watts: float, pause_seconds: float, steps: int
) -> None:
    """Steps of 8 ms with pauses; a counter that moves each 100 ms, read after each."""
    now = joules = 0.0
    times, totals = [0.0], [0.0]
    for _ in range(steps):
        estimator.observe_run(DECODES, STEP, now, now + 0.008, 0.008)
        for part, watts in ((0.008, step_watts), (pause_seconds, pause_watts)):
            now, joules = now + part, joules + part * watts
            times.append(now)
            totals.append(joules)
            tick = 0.1 * int(now / 0.1)
            at = bisect.bisect_left(times, tick)
            share = (tick - times[at - 1]) / (times[at] - times[at - 1]) if at else 0.0
            shown = totals[at - 1] + share * (totals[at] - totals[at - 1]) if at else 0.0
            estimator.observe_power(state(now, shown))


@pytest.mark.parametrize("pause_seconds", [0.0071, 0.0173, 0.0371])
def test_a_gpu_that_pauses_is_learned_too(pause_seconds):
    """With nothing to run for most of the time, a model 15% too high is found all the same."""
    estimator = Estimator(IDLE_WATTS)
    serve_with_pauses(estimator, 0.85 * 450.0, IDLE_WATTS, pause_seconds, 2000)
    assert 0.84 * 3.6 < estimator.correct(DECODES, STEP).joules < 0.9 * 3.6


def test_a_resting_gpu_teaches_nothing():
    """Hours at half the power that the model has between steps leave every prediction alone."""
    estimator = Estimator(IDLE_WATTS)
    joules = serve(estimator, 5.0, lambda begin: 3.6)
    for tick in range(1, 3000):
        now = 5.0 + 0.02 * tick
        estimator.observe_power(state(now, joules + 70.0 * 0.02 * (tick // 5 * 5)))
    assert estimator.correct(DECODES, STEP) == STEP
    assert estimator.margin_ratio == 0.0
    assert not estimator.disagrees


def test_idle_power_above_the_models_is_kept_free():
    """The ledger enters the model's idle power: what the meter shows above it is margin."""
    estimator = Estimator(IDLE_WATTS)
    serve_with_pauses(estimator, 450.0, 1.4 * IDLE_WATTS, 0.0163, 2000)
    mean_watts = (3.6 + 0.0163 * 1.4 * IDLE_WATTS) / 0.0243
    planned = (estimator.correct(DECODES, STEP).joules + 0.0163 * IDLE_WATTS) / 0.0243
    assert planned / (1.0 - estimator.margin_ratio) > 0.96 * mean_watts


def test_what_is_kept_is_bounded():
    """A counter that never moves, then one that moves at each reading: nothing grows."""
    estimator = Estimator(IDLE_WATTS)
    for tick in range(20_000):
        estimator.observe_run(DECODES, STEP, 0.008 * tick, 0.008 * (tick + 1), 0.008)
        estimator.observe_power(state(0.008 * (tick + 1), 3.6 * max(0, tick - 10_000)))
    assert len(estimator._runs) <= 2048
    assert len(estimator._moves) <= 64
