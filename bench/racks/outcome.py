"""What is kept of a run: the group's figures, and the arrays that plots and limits need."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shaper.simulate.figures import figures_of, ttft_seconds
from shaper.simulate.setup import RackResult, RackSetup
from shaper.traffic.figures import PowerGrid, window_means
from shaper.traffic.workload import Workload

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]

WINDOW_SECONDS = 0.1
# Goodput is judged by the same targets in every row, whatever the shaper was told.
TTFT_TARGET_SECONDS = 1.0
ITL_TARGET_SECONDS = 0.1
# A window counts as over its limit from here on.
OVER_RATIO = 1.005
# Every tenth of the windows by millisecond: more than a screen has room for.
_STACK_STRIDE = 10
_OF_FIGURES = (
    *("peak_watts", "metered_peak_watts", "mean_watts", "tokens_per_joule"),
    *("output_tokens_per_second", "goodput_requests_per_second"),
    *("requests_arrived", "requests_finished", "kv_mean_ratio", "kv_peak_ratio"),
    *("preemptions", "forced_steps", "shaper_errors"),
)
_LEDGER_CALLS = ("query", "publish", "reserve", "commit")


@dataclass(frozen=True, slots=True)
class Arrays:
    """Of one run; single precision, which is a part in ten million.

    `true_means` and `metered_means` [n] are the group's means over each window of 100 ms, by
    the millisecond at which it begins; `stack` [engines, m] every tenth of each engine's own.
    """

    true_means: Singles
    metered_means: Singles
    stack: Singles
    ttft_seconds: Singles
    itl_seconds: Singles


@dataclass(frozen=True, slots=True)
class Outcome:
    """The figures of one run, of the whole group; NaN where nothing was measured."""

    engines: int
    duration_seconds: float
    peak_watts: float
    metered_peak_watts: float
    mean_watts: float
    ttft_p50_seconds: float
    ttft_p99_seconds: float
    itl_p50_seconds: float
    itl_p99_seconds: float
    e2el_p50_seconds: float
    e2el_p99_seconds: float
    output_tokens_per_second: float
    tokens_per_joule: float
    goodput_requests_per_second: float
    requests_arrived: int
    requests_finished: int
    too_long_requests: int
    kv_mean_ratio: float
    kv_peak_ratio: float
    preemptions: int
    forced_steps: int
    shaper_errors: int
    steps: int
    decisions: int
    """Of the shaper; more than one for a step that is held."""
    wall_seconds: float
    ledger_seconds: float
    """Of processor time, in the shared ledger; 0 where there is none."""
    arrays: Arrays

    def over_share(self, limit_watts: float, *, metered: bool) -> float:
        """Share of the windows above `OVER_RATIO` times a limit; NaN where there is no window."""
        means = self.arrays.metered_means if metered else self.arrays.true_means
        if not len(means):
            return float("nan")
        return float((means > OVER_RATIO * limit_watts).mean())

    def keeps(self, limit_watts: float) -> bool:
        """Whether no window is metered above `OVER_RATIO` times the limit."""
        return self.metered_peak_watts <= OVER_RATIO * limit_watts

    @property
    def engine_seconds_per_second(self) -> float:
        """Simulated engine-seconds for each second of this machine."""
        return self.engines * self.duration_seconds / self.wall_seconds

    @property
    def ledger_microseconds(self) -> float:
        """What a decision spent in the shared ledger, on this machine."""
        return 1e6 * self.ledger_seconds / self.decisions if self.decisions else float("nan")


@contextmanager
def ledger_time() -> Iterator[list[float]]:
    """This thread's seconds in the shared ledger within the block, as a list of one number.

    Of its processor time, so that other processes don't count.
    """
    from shaper.group.ledger import GroupLedger
    from shaper.group.usage import Question

    spent = [0.0]
    within = False

    def timed(call: Any) -> Any:
        @wraps(call)
        def wrapped(*arguments: Any, **named: Any) -> Any:
            nonlocal within
            if within:  # a claim reads the rows
                return call(*arguments, **named)
            within, began = True, time.thread_time()
            try:
                return call(*arguments, **named)
            finally:
                within = False
                spent[0] += time.thread_time() - began

        return wrapped

    own: dict[tuple[type, str], Any] = {
        (GroupLedger, name): getattr(GroupLedger, name) for name in _LEDGER_CALLS
    }
    own[Question, "read"] = Question.read
    for (owner, name), call in own.items():
        setattr(owner, name, timed(call))
    try:
        yield spent
    finally:
        for (owner, name), call in own.items():
            setattr(owner, name, call)


def outcome_of(result: RackResult, ledger_seconds: float = 0.0) -> Outcome:
    """The figures of a run."""
    judged = replace(
        result.setup,
        ttft_target_seconds=TTFT_TARGET_SECONDS,
        itl_target_seconds=ITL_TARGET_SECONDS,
    )
    found = figures_of(result.engines, (), judged)
    figures: dict[str, Any] = {name: getattr(found, name) for name in _OF_FIGURES}
    figures |= {
        f"{name}_{level}_seconds": float(getattr(getattr(found, f"{name}_seconds"), level))
        for name in ("ttft", "itl", "e2el")
        for level in ("p50", "p99")
    }
    return Outcome(
        engines=len(result.engines),
        duration_seconds=result.setup.duration_seconds,
        too_long_requests=result.too_long_requests,
        steps=sum(engine.steps for engine in result.engines),
        decisions=sum(count for engine in result.engines for _, count in engine.reasons),
        wall_seconds=result.wall_seconds,
        ledger_seconds=ledger_seconds,
        arrays=_arrays(result),
        **figures,
    )


def _means(watts: Floats) -> Singles:
    return window_means(PowerGrid(0.0, watts), WINDOW_SECONDS).astype(np.float32)


def _arrays(result: RackResult) -> Arrays:
    seconds, warm = result.setup.duration_seconds, result.setup.warm_up_seconds
    return Arrays(
        true_means=_means(result.watts),
        metered_means=_means(result.metered_watts),
        stack=np.array([_means(engine.watts)[::_STACK_STRIDE] for engine in result.engines]),
        ttft_seconds=_joined([ttft_seconds(engine, seconds, warm) for engine in result.engines]),
        itl_seconds=_joined([engine.gaps(warm) for engine in result.engines]),
    )


def _joined(parts: list[Floats]) -> Singles:
    return np.concatenate(parts).astype(np.float32)


def stack_seconds(outcome: Outcome) -> Floats:
    """[m] the ends of the windows of `Arrays.stack`, seconds since the run's start."""
    count = outcome.arrays.stack.shape[1]
    return np.asarray(np.arange(count) * _STACK_STRIDE * 1e-3 + WINDOW_SECONDS, dtype=np.float64)


def run_one(setup: RackSetup, workload: Workload) -> Outcome:
    """Run a rack and keep what is needed of it.

    Raises:
        ConfigError: the rack can't be run.
    """
    from shaper.simulate.runs import run_rack

    with ledger_time() as spent:
        result = run_rack(setup, workload)
    return outcome_of(result, spent[0])
