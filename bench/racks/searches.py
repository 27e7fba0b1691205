"""What an operator would have to find by trying: the best static knobs, the highest clock.

Both are tried on the very traffic that they are judged on, at full length, which no operator
can do: the baselines get the benefit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.harness.runner import Run, Search
from bench.racks import policies
from bench.racks.outcome import Outcome
from shaper.core.types import PowerLimit
from shaper.gpu.profiles import load_profile
from shaper.simulate.setup import RackSetup

# From chunks whose weight reads take longer than their arithmetic to an eighth of vLLM's default
# of 8,192; from a batch that queues to one that hardly does at this load.
STATIC_TOKENS = (64, 128, 256, 1024)
STATIC_SEQUENCES = (4, 8, 16)
# Equal steps between the GPU's lowest clock and its highest.
CLOCK_STEPS = 16


@dataclass(frozen=True, slots=True)
class Knobs:
    """One point of the static grid, and what it did."""

    batched_tokens: int
    sequences: int
    outcome: Outcome

    @property
    def text(self) -> str:
        """As shown beside the policy."""
        return f"{self.batched_tokens:,} tokens, {self.sequences} sequences"


@dataclass(frozen=True, slots=True)
class Clock:
    """A clock, and what the rack did at it."""

    hertz: float
    outcome: Outcome

    @property
    def text(self) -> str:
        """As shown beside the policy."""
        return f"{self.hertz / 1e6:.0f} MHz"


def static_grid(
    rack: RackSetup,
    tokens: Sequence[int] = STATIC_TOKENS,
    sequences: Sequence[int] = STATIC_SEQUENCES,
) -> Search[list[Knobs]]:
    """Every combination; the limit is no setting of these runs, so one grid is for all limits."""
    points = [(t, s) for t in tokens for s in sequences if s <= t]
    outcomes = yield [
        Run(f"static knobs, {t:,} tokens, {s} sequences", policies.static(rack, t, s))
        for t, s in points
    ]
    return [Knobs(t, s, outcome) for (t, s), outcome in zip(points, outcomes, strict=True)]


def best_knobs(grid: Sequence[Knobs], limit_watts: float) -> Knobs:
    """The lowest p99 TTFT of those that keep the limit; if none does, the lowest peak."""
    keeping = [knobs for knobs in grid if knobs.outcome.keeps(limit_watts)]
    if keeping:
        return min(keeping, key=lambda knobs: knobs.outcome.ttft_p99_seconds)
    return min(grid, key=lambda knobs: knobs.outcome.metered_peak_watts)


def clock_ladder(rack: RackSetup, steps: int = CLOCK_STEPS) -> list[float]:
    """Clocks that the GPU can be locked at, ascending, from its lowest to its highest."""
    clocks = load_profile(rack.gpu).clocks
    lowest, highest = clocks.sm_min_hertz, clocks.sm_max_hertz
    found = {
        min(highest, round((lowest + (highest - lowest) * i / steps) / clocks.step_hertz)
            * clocks.step_hertz)
        for i in range(steps + 1)
    }  # fmt: skip
    return sorted(hertz for hertz in found if hertz >= lowest)


def highest_clock(
    rack: RackSetup, limit: PowerLimit, steps: int = CLOCK_STEPS
) -> Search[list[Clock]]:
    """The clocks that were tried; the last is the highest that keeps the limit, by halving.

    Takes power to rise with the clock. If even the lowest clock does not keep the limit, it
    is the last.
    """
    ladder = clock_ladder(rack, steps)
    tried: dict[int, Outcome] = {}
    low, high = 0, len(ladder) - 1
    # `low` is taken to keep the limit, above `high` nothing does.
    while low < high:
        middle = (low + high + 1) // 2
        tried[middle] = yield from _at(rack, ladder[middle])
        if tried[middle].keeps(limit.watts):
            low = middle
        else:
            high = middle - 1
    if low not in tried:
        tried[low] = yield from _at(rack, ladder[low])
    tried[low] = tried.pop(low)
    return [Clock(ladder[place], outcome) for place, outcome in tried.items()]


def _at(rack: RackSetup, hertz: float) -> Search[Outcome]:
    name = f"locked clock, {hertz / 1e6:.0f} MHz"
    found: Sequence[Outcome] = yield [Run(name, policies.locked_clock(rack, hertz))]
    return found[0]
