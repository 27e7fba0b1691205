"""What is learned from step times and from the energy counter."""

from __future__ import annotations

import math

import pytest

from shaper.core.estimator import MAX_GAIN, MAX_MARGIN_RATIO, MIN_GAIN, Estimator
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


def test_step_times_correct_seconds():
    """Steps that take a tenth longer are predicted so after a few hundred."""
    estimator = Estimator()
    for tick in range(600):
        estimator.observe_run(DECODES, STEP, 0.0088 * tick, 0.0088 * (tick + 1), 0.0088)
    corrected = estimator.correct(DECODES, STEP)
    assert corrected.seconds == pytest.approx(0.0088, rel=0.01)
    assert corrected.joules == pytest.approx(3.6)


def test_ends_seen_late_do_not_bias_seconds():
    """An end seen late and the next step, which then seems short, cancel."""
    estimator = Estimator()
    for tick in range(2000):
        late = 0.004 if tick % 3 == 0 else 0.0
        before = 0.004 if tick % 3 == 1 else 0.0
        estimator.observe_run(DECODES, STEP, 0.0, 0.0, 0.008 + late - before)
    assert estimator.correct(DECODES, STEP).seconds == pytest.approx(0.008, rel=0.005)


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
    assert estimator.margin_ratio <= MAX_MARGIN_RATIO


def test_absurd_measurements_are_clamped():
    """Stalls of a minute and a counter gone wild move gains to their bounds at most."""
    estimator = Estimator(IDLE_WATTS)
    for tick in range(3000):
        estimator.observe_run(DECODES, STEP, 0.008 * tick, 0.008 * (tick + 1), 60.0)
    assert 1.0 < estimator.seconds_gain_ratio <= MAX_GAIN
    estimator = Estimator(IDLE_WATTS)
    serve(estimator, 10.0, lambda begin: 1e9)
    assert 1.0 < estimator.joules_gain_ratio <= MAX_GAIN + 1e-9
    estimator = Estimator(IDLE_WATTS)
    serve(estimator, 10.0, lambda begin: 1e-9)
    assert MIN_GAIN - 1e-9 <= estimator.joules_gain_ratio < 1.0
    assert 0.0 <= estimator.margin_ratio <= MAX_MARGIN_RATIO


@pytest.mark.parametrize("measured", [math.nan, math.inf, 0.0, -1.0])
def test_times_that_are_none_teach_nothing(measured):
    """What is not a duration is left out."""
    estimator = Estimator(IDLE_WATTS)
    for tick in range(50):
        estimator.observe_run(DECODES, STEP, 0.008 * tick, 0.008 * (tick + 1), measured)
    assert estimator.correct(DECODES, STEP) == STEP


def test_a_counter_that_resets_starts_a_new_span():
    """Going back to zero is not negative energy; what is learned stays."""
    estimator = Estimator(IDLE_WATTS)
    serve(estimator, 5.0, lambda begin: 3.6)
    estimator.observe_power(state(5.001, 0.0))
    estimator.observe_power(state(5.02, 1.0))
    serve(estimator, 5.0, lambda begin: 3.6, 5.04, 2.0)
    assert estimator.correct(DECODES, STEP).joules == pytest.approx(3.6, rel=0.01)
    assert not estimator.disagrees


@pytest.mark.parametrize("energy", [None, math.nan, math.inf])
def test_no_counter_teaches_no_joules(energy):
    """A sensor without an energy counter, or with nonsense in it, leaves the model alone."""
    estimator = Estimator(IDLE_WATTS)
    for tick in range(500):
        estimator.observe_run(DECODES, STEP, 0.008 * tick, 0.008 * (tick + 1), 0.008)
        estimator.observe_power(state(0.008 * (tick + 1), energy))
    assert estimator.correct(DECODES, STEP) == STEP
    assert estimator.margin_ratio == 0.0
