"""The parts of learning, each alone: step seconds by size, dates of counter moves, joules."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from shaper.core.learn.joules import GAINS, POWER_BINS, JouleGains, place
from shaper.core.learn.seconds import StepSeconds, bin_of
from shaper.core.learn.ticks import CounterTicks
from shaper.core.types import StepBatch


def prompt(tokens: int) -> StepBatch:
    return StepBatch(prefill_requests=1, prefill_tokens=tokens)


def test_bins_are_quarters_of_powers_of_two():
    """Bins rise with the tokens, a step with twice of them is four bins on, and they end."""
    bins = [bin_of(tokens) for tokens in range(1, 40_000)]
    assert bins == sorted(bins)
    assert all(bin_of(2 * tokens) == bin_of(tokens) + 4 for tokens in range(4, 4000))
    assert bin_of(512) == bin_of(600) < bin_of(640)
    assert bin_of(10**9) == max(bins)
    assert bin_of(0) == 0


def test_a_cliff_is_learned_at_its_edge():
    """Prompts of more than 512 tokens take a fifth longer: known after a few steps of each."""
    learned = StepSeconds()
    rng = random.Random(1)
    for _ in range(300):
        tokens = rng.choice((200, 300, 400, 500, 520, 800, 1500))
        seconds = 20e-6 * tokens
        learned.observe(prompt(tokens), seconds, seconds * (1.2 if tokens > 512 else 1.0))
    for tokens, gain in ((300, 1.0), (500, 1.0), (520, 1.2), (1500, 1.2)):
        assert learned.gain(prompt(tokens)) == pytest.approx(gain, abs=0.02)


def test_a_size_that_was_never_seen_takes_the_higher_neighbour():
    """Between sizes that are right and sizes that are slow, a step is taken to be slow."""
    learned = StepSeconds()
    for _ in range(200):
        learned.observe(prompt(256), 0.01, 0.01)
        learned.observe(prompt(2048), 0.04, 0.048)
    assert learned.gain(prompt(256)) == pytest.approx(1.0, abs=0.01)
    for tokens in (700, 2048, 8192):
        assert learned.gain(prompt(tokens)) == pytest.approx(1.2, abs=0.015)


def test_a_late_host_does_not_make_kinds_of_step_differ():
    """Prompts that are seen two milliseconds late, decodes after them: no gain moves far."""
    learned = StepSeconds()
    rng = random.Random(2)
    decode = StepBatch(decode_requests=8, decode_tokens=8)
    for _ in range(1000):
        late = rng.uniform(0.0, 0.004)
        learned.observe(prompt(256), 0.01, 0.01 + late)
        learned.observe(decode, 0.008, 0.008 - late)
        for _ in range(3):
            learned.observe(decode, 0.008, 0.008)
    assert learned.gain(prompt(256)) < 1.05
    assert learned.gain(decode) > 0.95


def test_a_gpu_that_became_slower_is_followed_at_every_size():
    """After a second of decodes that take a quarter longer, prompts not seen since follow."""
    learned = StepSeconds()
    decode = StepBatch(decode_requests=8, decode_tokens=8)
    for _ in range(500):
        learned.observe(decode, 0.008, 0.008)
        learned.observe(prompt(512), 0.012, 0.012)
    for _ in range(50):
        learned.observe(decode, 0.008, 0.01)
        learned.observe(prompt(512), 0.012, 0.015)
    assert learned.gain(decode) == pytest.approx(1.25, abs=0.05)
    assert learned.gain(prompt(512)) == pytest.approx(1.25, abs=0.05)


def moves(period: float, seconds: float, seed: int, reads: tuple[float, float]):
    """Yields the bracket of each move of a counter, and when it was."""
    rng = random.Random(seed)
    phase, now = rng.uniform(0.0, period), 0.0
    while now < seconds:
        before, now = now, now + rng.uniform(*reads)
        count = int((now - phase) // period)
        if count >= 0 and phase + count * period > before:
            yield before, now, phase + count * period


@pytest.mark.parametrize(("period", "seed"), [(0.1, 0), (0.1, 1), (0.0937, 2), (0.0937, 3)])
def test_a_steady_counter_is_dated_to_a_few_milliseconds(period, seed):
    """Readings each 15 to 40 ms: after five seconds moves are dated as well as is claimed."""
    ticks, errors, claimed = CounterTicks(), [], []
    for low, high, true in moves(period, 15.0, seed, (0.015, 0.04)):
        tick = ticks.move(low, high)
        if low > 5.0:
            errors.append((tick.at_seconds - true) ** 2)
            claimed.append(tick.deviation_seconds)
    found = (sum(errors) / len(errors)) ** 0.5
    assert found < 0.0045
    assert found < 2.0 * max(claimed)


def test_a_counter_that_moves_at_each_reading_has_no_period():
    """The middle of each bracket, and its width as the deviation."""
    ticks = CounterTicks()
    for index in range(50):
        tick = ticks.move(0.02 * index, 0.02 * (index + 1))
        assert tick.at_seconds == pytest.approx(0.02 * index + 0.01)
        assert tick.deviation_seconds > 0.005


def test_another_phase_starts_the_dating_again():
    """A driver that was loaded again: the first move at the new phase is in its bracket."""
    ticks = CounterTicks()
    for index in range(100):
        ticks.move(0.1 * index, 0.1 * index + 0.02)
    for index in range(100, 110):
        low = 0.1 * index + 0.055
        tick = ticks.move(low, low + 0.02)
        assert low <= tick.at_seconds <= low + 0.02
    assert tick.deviation_seconds > 0.002


def test_places_are_continuous_and_within_the_power_bins():
    """A power between bins lies between them; beyond the ends, at the ends."""
    assert place(0.1) == (0, 0.0)
    assert place(3.0) == (POWER_BINS - 2, 1.0)
    sums = [sum(place(ratio / 1000.0)) for ratio in range(500, 1200)]
    assert sums == sorted(sums)
    assert max(b - a for a, b in pairwise(sums)) < 0.006


def learn(true: list[float], spans: int, seed: int, noise: float = 0.3) -> JouleGains:
    """Spans of 50 J whose mix of power varies, metered with these gains."""
    rng, learned = random.Random(seed), JouleGains()
    for _ in range(spans):
        high = rng.random()
        row = [50.0 * (1.0 - high), 15.0 * high, 35.0 * high, 1.0]
        metered = sum(g * j for g, j in zip(true, row, strict=True)) + rng.gauss(0.0, noise)
        learned.observe(row, 0.1, metered, noise * noise)
    return learned


@pytest.mark.parametrize("seed", range(3))
def test_gains_of_low_and_high_power_are_told_apart(seed):
    """Low power a tenth too high, high power a tenth too low: both known after ten seconds and
    never sold short. With a meter that agrees, no gain leaves 1 by more than its grain."""
    learned = learn([0.9, 1.0, 1.1, 1.0], 100, seed)
    assert 0.89 < learned.applied[0] < 0.94
    assert 1.085 < learned.applied[2] < 1.13
    right = learn([1.0] * GAINS, 300, seed)
    assert right.applied[:POWER_BINS] == pytest.approx([1.0] * POWER_BINS, abs=0.006)


def test_work_of_one_kind_moves_all_gains():
    """A meter that shows 5% more of decodes is taken to show it of prompts too."""
    learned = JouleGains()
    for _ in range(50):
        learned.observe([50.0, 0.0, 0.0, 0.0], 0.1, 52.5, 0.1)
    assert learned.applied[:POWER_BINS] == pytest.approx([1.05] * POWER_BINS, abs=0.01)


def test_a_gpu_that_changes_is_followed():
    """After a minute of agreement the meter shows a tenth more: followed within two seconds."""
    learned = learn([1.0] * GAINS, 600, 1)
    for _ in range(20):
        learned.observe([25.0, 10.0, 15.0, 1.0], 0.1, 1.1 * 51.0, 0.1)
    assert learned.applied[0] == pytest.approx(1.1, abs=0.03)
