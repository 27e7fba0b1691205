"""What is run, in which order, and how long it takes.

The unshaped run goes first, since the budgets are shares of its peak. The others follow
in the order of what would be missed most, were the time to end before them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from shaper.core.types import PowerLimit
from shaper.errors import ConfigError

UNSHAPED = "unshaped"
STATIC = "static"
TOTAL_SECONDS = 900.0
"""Of all stages of one call, server starts included."""
STAGE_SECONDS = 480.0
"""Of one stage, its server's start included."""
WINDOW_SECONDS = 0.1
"""Of the budgets: the shortest that a GPU's own readings can say anything about."""
# What vLLM takes by default on a GPU of 80 GB or more.
DEFAULT_BATCHED_TOKENS = 8192
DEFAULT_SEQUENCES = 1024
# Two plots' worth of colours, and what fits 15 minutes.
MOST_BUDGETS = 2

# A first start on a GPU compiles the model and captures graphs; nobody knows for how long.
FIRST_START_SECONDS = 150.0
FIRST_EMULATED_START_SECONDS = 40.0
DRAIN_SECONDS = 60.0
"""How long requests may still run after the last arrival."""
_USUAL_DRAIN_SECONDS = 15.0
_STOP_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Run:
    """One server under the traffic."""

    name: str
    max_num_batched_tokens: int = DEFAULT_BATCHED_TOKENS
    max_num_seqs: int = DEFAULT_SEQUENCES
    budget_ratio: float | None = None
    """Of the unshaped 100 ms peak; None: no limit."""
    itl_target_seconds: float | None = None

    @property
    def shaped(self) -> bool:
        """Whether it has a power limit, and so needs the unshaped peak."""
        return self.budget_ratio is not None

    def limit(self, peak_watts: float) -> PowerLimit | None:
        """The power limit, by the unshaped run's highest 100 ms mean."""
        if self.budget_ratio is None:
            return None
        return PowerLimit(round(self.budget_ratio * peak_watts, 1), WINDOW_SECONDS)


def runs(
    budget_ratios: Sequence[float], itl_target_seconds: float, static_knobs: tuple[int, int]
) -> tuple[Run, ...]:
    """All runs of a comparison, in order.

    Args:
        budget_ratios: of the unshaped 100 ms peak.
        itl_target_seconds: of the shaped runs that have one.
        static_knobs: `max_num_batched_tokens` and `max_num_seqs` of the static run.
    """
    shaped = [Run(_name(ratio), budget_ratio=ratio) for ratio in budget_ratios]
    targeted = [
        Run(f"{run.name}-itl", budget_ratio=run.budget_ratio, itl_target_seconds=itl_target_seconds)
        for run in shaped
    ]
    return (Run(UNSHAPED), *shaped, Run(STATIC, *static_knobs), *targeted)


def _name(ratio: float) -> str:
    return f"shaped-{100 * ratio:g}".replace(".", "_")


def parse_knobs(text: str) -> tuple[int, int]:
    """`2048x64`: tokens and sequences of a step.

    Raises:
        ConfigError: it is not of that form, or vLLM would refuse it.
    """
    found = re.fullmatch(r"(\d{1,6})x(\d{1,5})", text)
    if found is None:
        raise ConfigError(f"--static {text!r} is not like 2048x64 (tokens x sequences of a step)")
    tokens, sequences = int(found[1]), int(found[2])
    if not 1 <= sequences <= tokens:
        raise ConfigError(f"--static {text!r}: vLLM wants no fewer tokens than sequences, and both")
    return tokens, sequences


def expected_seconds(start_seconds: float, warm_up_seconds: float, span_seconds: float) -> float:
    """What a run takes from its server's start to its end."""
    return start_seconds + warm_up_seconds + span_seconds + _USUAL_DRAIN_SECONDS + _STOP_SECONDS


def start_timeout_seconds(
    left_seconds: float, warm_up_seconds: float, span_seconds: float
) -> float:
    """How long a server may take to start so that its traffic still fits."""
    return left_seconds - expected_seconds(0.0, warm_up_seconds, span_seconds)
