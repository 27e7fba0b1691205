"""Which budget holds now: the configured one, the scheduled one, or a change.

Law. Three layers, from the lowest: what is configured; the entries of the schedule
whose time it is, in their order; a change made while running, until it expires, and
after that its fallback if it has one. A layer says all or some of the three terms
(limits of the engine, limits of each GPU, ramp). A term holds as the highest layer
that says it says it.

Time comes in twice. `wall_seconds` (seconds since 1970) decides on what was stated
in calendar time, `now_seconds` (monotonic) on what was stated as a duration. Nothing
is remembered between two calls, so a wall clock that jumps and comes back leaves
nothing behind.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from shaper.core.types import PowerBudget, PowerLimit

# A GPU passes the driver's enforced limit until the power cap has acted. Source: a B200 at
# 1,000 W (arjunds/efficient-ai, `GPU_power`): bursts at full clock draw about 1.34 times the
# limit, and 0.5 to 0.7 s after the load steps up power is below it. Other GPUs by analogy.
BURST_RATIO = 1.35
BURST_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class BudgetTerms:
    """What one layer says. None: nothing, the layer below holds."""

    limits: tuple[PowerLimit, ...] | None = None
    """Of the engine, all its GPUs together. Empty: no such limit."""
    gpu_limits: tuple[PowerLimit, ...] | None = None
    """Of each GPU. Empty: no such limit."""
    ramp_watts_per_second: float | None = None
    """Infinity: as fast as it likes."""

    def over(self, below: BudgetTerms) -> BudgetTerms:
        """These terms where they say something, else those below."""
        ramp = self.ramp_watts_per_second
        return BudgetTerms(
            below.limits if self.limits is None else self.limits,
            below.gpu_limits if self.gpu_limits is None else self.gpu_limits,
            below.ramp_watts_per_second if ramp is None else ramp,
        )


@dataclass(frozen=True, slots=True)
class Constraints:
    """Everything that limits an engine's power, whoever set it."""

    budget: PowerBudget = field(default_factory=PowerBudget)
    """The operator's, of this engine."""
    heat_limits: tuple[PowerLimit, ...] = ()
    """Against overheating."""
    shared_limits: tuple[PowerLimit, ...] = ()
    """The operator's, of all engines of the power group."""

    @property
    def asked(self) -> bool:
        """Whether an operator limits anything."""
        return not self.budget.empty or bool(self.shared_limits)

    @property
    def budgeted(self) -> bool:
        """Whether anything is limited."""
        return self.asked or bool(self.heat_limits)

    @property
    def own(self) -> PowerBudget:
        """What this engine holds by itself: the budget with the limits against overheating."""
        if not self.heat_limits:
            return self.budget
        return PowerBudget(self.budget.limits + self.heat_limits, self.budget.ramp_watts_per_second)


def resolve(terms: BudgetTerms, gpu_count: int) -> PowerBudget:
    """The terms as one budget of an engine with this many GPUs, shortest window first.

    A limit of each GPU becomes `watts * gpu_count` of the engine: the step model and
    the meter's sums do not tell one GPU's share from another's, and tensor parallelism
    gives all of them the same work. A GPU that draws more than its share is then over
    its limit by as much. Of two limits with one window the lower holds.
    """
    watts_by_window: dict[float, float] = {}
    for limit in (*(terms.limits or ()), *_of_engine(terms.gpu_limits or (), gpu_count)):
        known = watts_by_window.get(limit.window_seconds, math.inf)
        watts_by_window[limit.window_seconds] = min(known, limit.watts)
    ramp = terms.ramp_watts_per_second
    return PowerBudget(
        tuple(PowerLimit(watts, window) for window, watts in sorted(watts_by_window.items())),
        None if ramp is None or math.isinf(ramp) else ramp,
    )


def _of_engine(gpu_limits: Iterable[PowerLimit], gpu_count: int) -> Iterable[PowerLimit]:
    return (PowerLimit(limit.watts * gpu_count, limit.window_seconds) for limit in gpu_limits)


def describe(budget: PowerBudget) -> str:
    """A budget in words: `560 W over 1 s, rising 200 W/s`."""
    parts = [str(limit) for limit in budget.limits]
    if budget.ramp_watts_per_second is not None:
        parts.append(f"rising {budget.ramp_watts_per_second:g} W/s at most")
    return ", ".join(parts) or "no limit"


def never_binds(limit: PowerLimit, other: PowerLimit) -> bool:
    """Whether `limit` holds by itself wherever `other` does.

    A window of `limit` is covered by `n = ceil(window / other.window)` windows of
    `other`, so at most `n * other.watts * other.window` joules fall into it.
    """
    # 1e-9: 0.3 is a little less than three times 0.1.
    windows = math.ceil(limit.window_seconds / other.window_seconds - 1e-9)
    most_joules = windows * other.watts * other.window_seconds
    return most_joules <= limit.watts * limit.window_seconds * (1 + 1e-9)


def highest_watts(window_seconds: float, enforced_watts: float) -> float:
    """The highest mean power over a window that GPUs under this enforced limit can draw.

    Error: some percent low for windows just above `BURST_SECONDS`.
    """
    return enforced_watts * (BURST_RATIO if window_seconds < BURST_SECONDS else 1.0)


def cannot_bind(limits: Iterable[PowerLimit], enforced_watts: float) -> tuple[PowerLimit, ...]:
    """The limits that can never bind, because the driver's power cap already holds them.

    Args:
        limits: of some GPUs together.
        enforced_watts: the driver's enforced limits of these GPUs, summed.
    """
    return tuple(
        limit
        for limit in limits
        if limit.watts >= highest_watts(limit.window_seconds, enforced_watts)
    )


def redundant_pair(limits: Sequence[PowerLimit]) -> tuple[PowerLimit, PowerLimit] | None:
    """A limit that can never bind, and the one that is already tighter; None: there is none."""
    for one, two in combinations(limits, 2):
        if never_binds(two, one):
            return two, one
        if never_binds(one, two):
            return one, two
    return None


@dataclass(frozen=True, slots=True)
class Span:
    """From `start_seconds` to before `end_seconds`, of the wall clock."""

    start_seconds: float
    end_seconds: float


@dataclass(frozen=True, slots=True)
class ScheduledTerms:
    """One entry of the schedule.

    `next_span` gives, for a wall time, the span that holds then or else the next one;
    None when there is none any more. It has no state.
    """

    terms: BudgetTerms
    name: str
    next_span: Callable[[float], Span | None]


@dataclass(frozen=True, slots=True)
class BudgetChange:
    """A change made while running. Without an end it holds until it is cleared.

    At most one of the two ends is given. `fallback` is what is said after it; None:
    nothing, so that the schedule and the configuration hold again.
    """

    terms: BudgetTerms
    end_wall_seconds: float | None = None
    end_seconds: float | None = None
    """Of the monotonic clock."""
    fallback: BudgetTerms | None = None

    def expired(self, wall_seconds: float, now_seconds: float) -> bool:
        """Whether its time is over."""
        over = self.end_seconds is not None and now_seconds >= self.end_seconds
        return over or (self.end_wall_seconds is not None and wall_seconds >= self.end_wall_seconds)


class Source(enum.StrEnum):
    """The highest layer that says something."""

    CONFIGURED = "configured"
    SCHEDULED = "scheduled"
    CHANGED = "changed"
    FALLBACK = "fallback"


@dataclass(frozen=True, slots=True)
class InForce:
    """What holds, and for how long nothing but a new change can alter it."""

    terms: BudgetTerms
    source: Source
    entries: tuple[str, ...]
    """Names of the schedule's entries whose time it is."""
    seconds_left: float
    """Until the next start or end that is known, if the wall clock does not jump."""


@dataclass(frozen=True, slots=True)
class BudgetPlan:
    """The two layers that an operator configures."""

    configured: BudgetTerms = BudgetTerms()
    schedule: tuple[ScheduledTerms, ...] = ()
    """A later entry is laid over an earlier one."""

    def at(
        self, wall_seconds: float, now_seconds: float, change: BudgetChange | None = None
    ) -> InForce:
        """What holds at this moment.

        Args:
            wall_seconds: since 1970.
            now_seconds: of the monotonic clock.
            change: the last change, if it was not cleared.
        """
        terms, source, left = self.configured, Source.CONFIGURED, math.inf
        names: list[str] = []
        for entry in self.schedule:
            span = entry.next_span(wall_seconds)
            if span is None:
                continue
            if span.start_seconds <= wall_seconds:
                terms, source = entry.terms.over(terms), Source.SCHEDULED
                names.append(entry.name)
                left = min(left, span.end_seconds - wall_seconds)
            else:
                left = min(left, span.start_seconds - wall_seconds)
        if change is not None:
            if not change.expired(wall_seconds, now_seconds):
                terms, source = change.terms.over(terms), Source.CHANGED
                if change.end_seconds is not None:
                    left = min(left, change.end_seconds - now_seconds)
                if change.end_wall_seconds is not None:
                    left = min(left, change.end_wall_seconds - wall_seconds)
            elif change.fallback is not None:
                terms, source = change.fallback.over(terms), Source.FALLBACK
        return InForce(terms, source, tuple(names), left)
