"""How an engine stands: the values that the supervisor takes and gives.

`EngineDemand` comes from the controller, `PowerState` from the sampler; `EngineStatus`
goes to the status block, to the routes that admit or refuse work, and back to the
controller (its extra limit). All are frozen, so that one thread can publish them and
another read them with no lock.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import NamedTuple

from shaper.core.types import PowerLimit


class AdmissionState(enum.StrEnum):
    """Which class of work may enter now, from the most to the least."""

    OPEN = "open"
    """Nothing binds."""
    SHAPED = "shaped"
    """Steps are held back; all work enters."""
    DEFER = "defer"
    """Flex work waits in the engine."""
    SHED = "shed"
    """Flex work is refused."""


class Cause(enum.StrEnum):
    """What a degraded GPU does not give."""

    CLOCK = "clock"
    """The clock is below what power, heat and settings explain."""
    THERMAL = "thermal"
    """The GPU slows itself down for heat."""
    BRAKE = "brake"
    """A power brake or the hardware's slowdown holds the clock."""
    THROUGHPUT = "throughput"
    """Steps take longer than the model's at the measured clock."""


@dataclass(frozen=True, slots=True)
class Degradation:
    """One cause for which an engine gives less than its state should give."""

    cause: Cause
    missing_ratio: float
    """How much is missing, 0 to 1: of the clock (`clock`), of the speed (`throughput`);
    for `thermal` and `brake` the share of the time in which it held."""
    since_seconds: float
    gpu_index: int | None = None
    """The GPU in question; None where it is the engine as a whole."""


@dataclass(frozen=True, slots=True)
class ThermalOutlook:
    """Where the present load takes the hottest GPU. A field is None where it is not known."""

    die_celsius: float | None = None
    """As estimated: the driver's reading is rounded and late."""
    margin_celsius: float | None = None
    """How far the die is below the slowdown temperature."""
    steady_celsius: float | None = None
    """Where the present load leads."""
    slowdown_seconds: float | None = None
    """Until the present load reaches the slowdown temperature; None: it never does."""
    sustained_watts: float | None = None
    """What all GPUs of the engine may draw for good."""
    limit: PowerLimit | None = None
    """What holds them below the slowdown temperature; None while nothing need."""
    recovery_seconds: float | None = None
    """Until `limit` may be let go, if the load stays as it is; None: it can't be said."""


@dataclass(frozen=True, slots=True)
class EngineDemand:
    """What the engine has to do and how its controller fares: the controller publishes it."""

    at_seconds: float
    """When the controller last planned."""
    busy: bool = False
    """Work is running or waits."""
    running_requests: int = 0
    waiting_requests: int = 0
    backlog_tokens: int = 0
    """Prompt tokens that are not computed yet, of waiting and running requests."""
    oldest_wait_seconds: float = 0.0
    """Since the arrival of the prompt that has waited longest for its first step."""
    held_ratio: float = 0.0
    """Share of the last second in which work was held back."""
    wanted_watts: float | None = None
    """What the engine would draw for long if nothing held it back, as predicted."""
    seconds_gain_ratio: float = 1.0
    """Measured over predicted step seconds: against the profile, at the measured clock."""
    joules_gain_ratio: float = 1.0
    """Metered over predicted joules, against the profile."""
    margin_ratio: float = 0.0
    """Part of each limit that is kept free now."""
    disagreement_ratio: float = 0.0
    """Metered over the controller's own (corrected) watts of the last seconds, minus 1."""
    disagrees: bool = False
    """That is more than the error which the model states."""
    infeasible: bool = False
    """The budget is below what serving needs at the least; it is served at that floor."""
    running_cap: int | None = None
    """Requests that may run at once, if the controller caps them."""
    cadence_seconds: float | None = None
    """Between the decode steps, if the controller spaces them."""


class Usage(NamedTuple):
    """How much of some limits is in use; NaN: not known, or there is no limit."""

    headroom_watts: float = math.nan
    """Least of limit minus mean power over its window."""
    use_ratio: float = math.nan
    """Greatest share of a limit's headroom above idle, 0 to 1."""

    def together(self, other: Usage) -> Usage:
        """Of these limits and the others; what is not known counts for nothing."""
        if math.isnan(other.use_ratio):
            return self
        if math.isnan(self.use_ratio):
            return other
        return Usage(
            min(self.headroom_watts, other.headroom_watts), max(self.use_ratio, other.use_ratio)
        )


def usage(limit_watts: float, watts: float, idle_watts: float) -> Usage:
    """Of one limit, at a mean power over its window."""
    # A limit at the idle level has no headroom: anything above idle is all of it.
    most = max(limit_watts - idle_watts, 1.0)
    return Usage(limit_watts - watts, min(1.0, max(0.0, (watts - idle_watts) / most)))


@dataclass(frozen=True, slots=True)
class Admissibility:
    """What may enter, why, and for how long it will stay so."""

    state: AdmissionState = AdmissionState.OPEN
    pressure_ratio: float = 0.0
    """0: nothing presses; 1: no headroom is left."""
    reason: str = ""
    """In words, for people; empty while open."""
    recovery_seconds: float | None = None
    """When to come back; None while nothing is turned away."""
    since_seconds: float = 0.0
    """When it took this state."""


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """How the engine stands at one tick."""

    at_seconds: float
    admissibility: Admissibility = Admissibility()
    degradations: tuple[Degradation, ...] = ()
    """Empty: the GPUs give what their state should give."""
    thermal: ThermalOutlook = ThermalOutlook()
    sensor_lost: bool = False
    demand: EngineDemand | None = None
    """What it was judged on; None before the controller's first plan."""
    announcements: tuple[str, ...] = ()
    """What changed at this tick, as lines for the log."""

    @property
    def limits(self) -> tuple[PowerLimit, ...]:
        """Limits to hold beside the budget's."""
        return () if self.thermal.limit is None else (self.thermal.limit,)
