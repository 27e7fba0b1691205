"""Combines what is known of an engine into one `EngineStatus`, beside the path of its steps.

Steps, at each tick:

    health      what the GPUs give less than they should       (`health.py`)
    thermal     where the heat is going, and the limit for it  (`thermal.py`)
    admission   what may enter, judged on both and on demand   (`admission.py`)
    lines       what changed since the last tick, for the log

It runs on the sampler's thread, or from virtual time. It looks at the controller through
one frozen value and asks of it nothing but the extra limits in `EngineStatus.limits`. An
engine that has nothing to do plans nothing, so a demand that is old is one without work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from shaper.core.model.profile import GpuProfile
from shaper.core.supervise.admission import Admission, admission_input
from shaper.core.supervise.health import Health
from shaper.core.supervise.status import (
    Admissibility,
    Degradation,
    EngineDemand,
    EngineStatus,
    ThermalOutlook,
)
from shaper.core.supervise.thermal import Thermal
from shaper.core.types import GpuIdentity, GpuSample, PowerState

_T = TypeVar("_T")

# The controller's own bound on a state that it still trusts: ten refreshes of a meter.
SENSOR_LOST_SECONDS = 1.0
# Longer than a step; a busy engine plans before and after each.
_IDLE_SECONDS = 2.0
# The first start of a driver takes this long at most; before it a sensor is not lost.
_START_SECONDS = 5.0
# What comes back within this is the same episode, and is not said again.
_QUIET_SECONDS = 10.0


class Boundary(Protocol):
    """Runs a part so that its failure costs nothing else; `shaper.gpu.parts` has one."""

    def run(self, part: Any, call: Callable[..., _T], *arguments: object) -> _T | None:
        """What the call returns; None where it failed."""
        ...


class _NoBoundary:
    def run(self, part: Any, call: Callable[..., _T], *arguments: object) -> _T | None:
        return call(*arguments)


class Supervisor:
    """Judges one engine.

    Args:
        profile: of its GPUs.
        gpus: what the reader says of them.
        admission: None: all work may enter.
        metered: False: the engine was told to read no sensor, so none is lost.
        parts: keeps health, heat and admission apart, so that one which fails says nothing
            (heat: what it said last) and the others go on; None: a failure is raised.

    Stateful fields: the parts' own, the start, and when each condition was last said.
    """

    def __init__(
        self,
        profile: GpuProfile,
        gpus: Sequence[GpuIdentity] = (),
        *,
        admission: Admission | None = None,
        metered: bool = True,
        parts: Boundary | None = None,
    ) -> None:
        self._parts: Boundary = _NoBoundary() if parts is None else parts
        self._outlook = ThermalOutlook()
        self._health = Health(profile, gpus)
        self._thermal = Thermal(profile, gpus)
        self._admission = admission
        self._metered = metered
        self._start_seconds: float | None = None
        self._conditions = {
            "lost": _Condition("the GPUs' readings are lost or stuck", "the GPUs are read again"),
            "disagrees": _Condition(
                "metered power and the model disagree by more than the error it states",
                "metered power and the model agree again",
            ),
            "infeasible": _Condition(
                "the budget is below what serving needs at the least; it is served at that floor",
                "the budget carries the least that serving needs again",
            ),
            "heat": _Condition(
                "heat: a power limit holds the GPUs below their slowdown temperature",
                "heat: the power limit for it is let go",
            ),
        }

    def tick(
        self,
        now_seconds: float,
        state: PowerState | None,
        demand: EngineDemand | None,
        *,
        budgeted: bool = False,
        use_ratio: float | None = None,
        wait_seconds: float = 0.0,
        shapes_heat: bool = True,
    ) -> EngineStatus:
        """Judge once.

        Args:
            now_seconds: of this tick.
            state: the sampler's newest, however old.
            demand: the controller's newest; None while there is none.
            budgeted: an operator limits something.
            use_ratio: greatest share of a limit's headroom above idle in use; None: not known.
            wait_seconds: age of the oldest interactive prompt that has not started.
            shapes_heat: whether a limit may be set for the heat now; it is predicted anyway.
        """
        if self._start_seconds is None:
            self._start_seconds = now_seconds
        known = demand or EngineDemand(at_seconds=now_seconds)
        if now_seconds - known.at_seconds > _IDLE_SECONDS and known.busy:
            known = dataclasses.replace(known, busy=False, held_ratio=0.0)
        samples = () if state is None else state.gpus
        thermal = self._parts.run(
            "thermal", self._thermal.observe, now_seconds, samples, shapes_heat
        )
        thermal = self._outlook = thermal or self._outlook
        lost = self._sensor_lost(now_seconds, state)
        judged = self._parts.run("health", self._judge, now_seconds, samples, known)
        said, degradations = judged or ((), ())
        lines = list(said)
        admissibility: Admissibility | None = None
        if self._admission is not None:
            given = admission_input(
                known,
                thermal,
                sensor_lost=lost,
                budgeted=budgeted,
                use_ratio=use_ratio,
                wait_seconds=wait_seconds,
            )
            admissibility = self._parts.run("admission", self._admission.update, given, now_seconds)
        conditions = {"lost": lost, "heat": thermal.limit is not None}
        conditions |= {"disagrees": known.disagrees, "infeasible": known.infeasible}
        for name, condition in self._conditions.items():
            lines += condition.note(now_seconds, conditions[name])
        return EngineStatus(
            at_seconds=now_seconds,
            admissibility=admissibility or Admissibility(),
            degradations=degradations,
            thermal=thermal,
            sensor_lost=lost,
            demand=demand if demand is None else known,
            announcements=tuple(lines),
        )

    def _judge(
        self, now_seconds: float, samples: Sequence[GpuSample], demand: EngineDemand
    ) -> tuple[tuple[str, ...], tuple[Degradation, ...]]:
        gain = demand.seconds_gain_ratio
        lines = self._health.observe(now_seconds, samples, demand.busy, gain)
        return lines, self._health.degradations

    def _sensor_lost(self, now: float, state: PowerState | None) -> bool:
        if not self._metered:
            return False
        if state is None:
            return self._start_seconds is not None and now - self._start_seconds > _START_SECONDS
        return state.age_seconds(now) > SENSOR_LOST_SECONDS


class _Condition:
    """Says when something begins and ends, but not each time that it flickers."""

    def __init__(self, begins: str, ends: str) -> None:
        self._begins, self._ends = begins, ends
        self._said = False
        self._held_seconds: float | None = None

    def note(self, now: float, holds: bool) -> list[str]:
        """The line that is due, if any."""
        if holds:
            self._held_seconds = now
            if not self._said:
                self._said = True
                return [self._begins]
        elif (
            self._said
            and self._held_seconds is not None
            and now - self._held_seconds > _QUIET_SECONDS
        ):
            self._said = False
            return [self._ends]
        return []
