"""What one engine tells the world: its section of the status block, and its log.

Runs on the sampler's thread, so that numbers stay fresh while the engine is idle
and no I/O happens where steps are scheduled.
"""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TextIO

from shaper.core.supervise.status import EngineDemand, EngineStatus
from shaper.core.supervise.supervisor import Supervisor
from shaper.core.types import (
    Decision,
    PowerBudget,
    PowerLimit,
    PowerState,
    Reason,
)
from shaper.engine.meter_windows import MeterWindows, Usage
from shaper.gpu.parts import Parts
from shaper.gpu.sampler import NO_REPORT, SensorReport
from shaper.ipc.flex import FlexQueue
from shaper.ipc.metric_table import (
    NAN,
    SchedulerCounters,
    flex_values,
    or_nan,
    sensor_values,
    standing_values,
)
from shaper.ipc.status_block import StatusWriter

logger = logging.getLogger(__name__)

# Polls of a held engine repeat these a thousand times a second; the first says it all.
_REPEATED = frozenset({Reason.PAUSE, Reason.PREFILL_OVERDUE, Reason.IDLE})
# A log that nobody drains must not eat the memory: a minute of steps.
_MAX_PENDING = 10_000


class DecisionLog:
    """Appends decisions to a file as JSON lines. `add` from one thread, `drain` from another."""

    def __init__(self, path: str | None) -> None:
        self._pending: deque[tuple[Decision, float | None]] = deque(maxlen=_MAX_PENDING)
        self._file: TextIO | None = Path(path).open("a") if path else None  # noqa: SIM115
        self._last: Reason | None = None

    def add(self, decision: Decision, meter_watts: float | None) -> None:
        """Remember a decision for the next `drain`."""
        if self._file is None:
            return
        if decision.reason in _REPEATED and decision.reason is self._last:
            return
        self._last = decision.reason
        self._pending.append((decision, meter_watts))

    def drain(self) -> None:
        """Write what is pending. A full disk costs the log, not the engine."""
        if self._file is None:
            return
        try:
            while self._pending:
                self._file.write(_line(*self._pending.popleft()))
            self._file.flush()
        except OSError as error:
            logger.error("the decision log ends here: %s", error)
            self._file = None

    def close(self) -> None:
        """Write what is pending and let go of the file."""
        self.drain()
        if self._file is not None:
            self._file.close()
            self._file = None


def _line(decision: Decision, meter_watts: float | None) -> str:
    limits, headroom = decision.limits, decision.headroom_watts
    return (
        json.dumps(
            {
                "t": round(decision.at_seconds, 6),
                "reason": decision.reason.value,
                "applied": decision.applied,
                "run": limits.run,
                "limit_prefill_tokens": limits.prefill_tokens,
                "limit_decode_requests": limits.decode_requests,
                "wanted_prefill_tokens": decision.wanted_prefill_tokens,
                "decodes": decision.decode_requests,
                "prefill_tokens": decision.prefill_tokens,
                "predicted_seconds": round(decision.predicted.seconds, 6),
                "predicted_joules": round(decision.predicted.joules, 4),
                "predicted_watts": round(decision.predicted.watts, 1),
                "headroom_watts": round(headroom, 1) if math.isfinite(headroom) else None,
                "meter_watts": meter_watts,
            }
        )
        + "\n"
    )


class Supervised(Protocol):
    """The part of the shaper that is looked at and told of extra limits."""

    counters: SchedulerCounters
    standing: EngineStatus | None

    @property
    def demand(self) -> EngineDemand | None:
        """What there is to do; None while there is no controller."""
        ...

    @property
    def budget(self) -> PowerBudget:
        """The budget in force."""
        ...

    def set_extra_limits(self, limits: tuple[PowerLimit, ...]) -> None:
        """Hold these beside the budget's."""
        ...


class Telemetry:
    """The sampler's `on_tick`: judges, then writes the status block and the log.

    Args:
        status: the block.
        idle_watts: what the engine's GPUs draw with nothing to do.
        log: of decisions; drained here.
        supervisor: judges the engine; None: nobody does.
        parts: keeps what is done here apart, and counts failures; its counts are shown.

    The shaper's counters are read here while its thread counts, so two numbers of one
    scrape may be a step apart. `standing` is what the supervisor said at this tick; None
    while it fails, so that nobody is turned away for what is no longer known.
    """

    def __init__(
        self,
        status: StatusWriter,
        idle_watts: float,
        log: DecisionLog,
        *,
        supervisor: Supervisor | None = None,
        parts: Parts | None = None,
    ) -> None:
        self._status, self._log = status, log
        self._parts = Parts() if parts is None else parts
        self._windows = MeterWindows(idle_watts)
        self._supervisor = supervisor
        self._shaper: Supervised | None = None
        self._flex: Callable[[], FlexQueue | None] | None = None
        self.standing: EngineStatus | None = None
        self._first_joules: float | None = None
        self._last: PowerState | None = None
        self._metered = Usage()
        self._shared: Callable[[], Usage] = Usage

    @property
    def usage(self) -> Usage:
        """Of the engine's limits, as metered, and of its group's, as committed."""
        return self._metered.together(self._shared())

    def attach(
        self,
        shaper: Supervised,
        flex: Callable[[], FlexQueue | None] | None = None,
        shared: Callable[[], Usage] = Usage,
    ) -> None:
        """Look at this shaper from now on, at the flex requests that it defers, and at what
        is in use of its group's limits."""
        self._shaper, self._flex, self._shared = shaper, flex, shared

    def tick(
        self,
        now_seconds: float,
        state: PowerState | None,
        errors: int,
        rejected: int,
        report: SensorReport = NO_REPORT,
    ) -> None:
        """Judge and write everything once."""
        shaper, run = self._shaper, self._parts.run
        if self._supervisor is not None:
            self.standing = run("supervisor", self._supervise, self._supervisor, now_seconds, state)
            if self.standing is None and shaper is not None:
                shaper.standing = None
        if state is not None and state is not self._last:
            self._last = state
            metered = run("meter_windows", self._windows.observe, state, self._limits())
            self._metered = metered or Usage()
        self.write("sampler", self._values, now_seconds, state, (errors, rejected), report)
        if shaper is not None:
            self.write("scheduler", shaper.counters.values)
        self.write("standing", self._standing_values)
        run("flex", self._write_flex, now_seconds)
        run("decision_log", self._log.drain)
        self.write("parts", self._parts.values)

    def write(
        self, section: str, values: Callable[..., Sequence[float]], *arguments: object
    ) -> None:
        """Write one section of the status block; one that can't be told stays as it was."""
        self._parts.run("status_block", lambda: self._status.write(section, values(*arguments)))

    def _supervise(
        self, supervisor: Supervisor, now_seconds: float, state: PowerState | None
    ) -> EngineStatus:
        """Judge, and tell the shaper. Where that fails its last limit stays."""
        shaper = self._shaper
        standing = supervisor.tick(now_seconds, state, None if shaper is None else shaper.demand)
        if shaper is not None:
            shaper.standing = standing
            shaper.set_extra_limits(standing.limits)
        for line in standing.announcements:
            logger.warning("%s", line)
        return standing

    def _standing_values(self) -> list[float]:
        return [] if self.standing is None else standing_values(self.standing)

    def _write_flex(self, now_seconds: float) -> None:
        queue = None if self._flex is None else self._flex()
        if queue is not None:
            self._status.write("flex", flex_values(queue, now_seconds))

    def _limits(self) -> tuple[PowerLimit, ...]:
        extra = () if self.standing is None else self.standing.limits
        return (() if self._shaper is None else self._shaper.budget.limits) + extra

    def _values(
        self,
        now_seconds: float,
        state: PowerState | None,
        reads: tuple[int, int],
        report: SensorReport,
    ) -> list[float]:
        failed = self._parts.errors["supervisor"]
        counts = [*reads, failed, *sensor_values(state, report)]
        if state is None:
            return [NAN] * 7 + [*self.usage, *counts, NAN, now_seconds]
        energy = state.energy_joules
        if energy is not None and self._first_joules is None:
            self._first_joules = energy
        since = NAN if energy is None else energy - (self._first_joules or 0.0)
        return [
            *(or_nan(state.instant_watts), or_nan(state.average_watts), since),
            *(or_nan(state.enforced_limit_watts), or_nan(state.sm_clock_hertz)),
            *(or_nan(state.temperature_celsius), float(state.clock_event_reasons)),
            *self.usage,
            *(*counts, state.sampled_seconds, now_seconds),
        ]
