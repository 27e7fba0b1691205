"""One tick of an engine beside its steps, from top to bottom.

    control    budget, mode and recording as they are asked for now; the power group's heartbeat
    sense      what the GPUs say, how the sensor fares, what waits, how much of each limit is used
    judge      health, heat and admission, with the limits that follow
    publish    one record for all other processes, and the decision log

Each part fails alone, is counted, and is said once (`shaper/gpu/parts.py`). It runs on the
sampler's thread, so that what is published stays fresh while the engine is idle and no I/O
happens where steps are scheduled. The scheduler's thread counts meanwhile, so two numbers of
one record may be a step apart.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from shaper.core.budget import Constraints
from shaper.core.supervise.status import EngineStatus, Usage
from shaper.core.supervise.supervisor import Supervisor
from shaper.core.types import PowerState
from shaper.engine.control import BudgetControl
from shaper.engine.decision_log import DecisionLog
from shaper.engine.membership import Membership
from shaper.engine.meter_windows import MeterWindows
from shaper.engine.protocols import Mode
from shaper.engine.recorder import Recorder
from shaper.engine.runtime import LiveShaper
from shaper.gpu.parts import Parts
from shaper.gpu.sampler import Sampler
from shaper.ipc.engine_record import EngineRecord, packed
from shaper.ipc.flex import FlexQueue
from shaper.ipc.status_block import StatusWriter

logger = logging.getLogger(__name__)


class Live(NamedTuple):
    """What an engine of a server has beside its steps, and one in virtual time does without."""

    control: BudgetControl
    """Of budget and mode."""
    status: StatusWriter
    """Where the record goes."""
    log: DecisionLog
    """Drained at each tick."""
    recorder: Recorder
    """Follows orders to record."""
    member: Membership | None
    """Of a power group."""

    def close(self) -> None:
        """End everything but the status block, which goes first."""
        if self.member is not None:
            self.member.leave()
        self.log.close()
        self.recorder.close()


class EngineTick:
    """The sampler's `on_tick`.

    Args:
        parts: counts what fails.
        shaper: of the engine.
        sampler: its own.
        supervisor: judges the engine.
        idle_watts: what the engine's GPUs draw with nothing to do.
        flex: what waits in the engine; None before there is a queue.
        shapes_heat: whether heat may limit power, by what limits the engine now.
        live: takes orders and publishes; None: neither is done.

    Stateful fields: what was sensed and judged last.
    """

    def __init__(
        self,
        parts: Parts,
        shaper: LiveShaper,
        sampler: Sampler,
        supervisor: Supervisor,
        idle_watts: float,
        flex: Callable[[], FlexQueue | None],
        shapes_heat: Callable[[Constraints], bool],
        live: Live | None,
    ) -> None:
        self._parts, self._shaper, self._sampler = parts, shaper, sampler
        self._supervisor, self._live = supervisor, live
        self._flex, self._shapes_heat = flex, shapes_heat
        self._windows = MeterWindows(idle_watts)
        self._metered = Usage()
        self._state: PowerState | None = None
        self._record = EngineRecord()

    def __call__(self, now_seconds: float) -> None:
        """Do everything once."""
        if self._live is not None:
            self._control(self._live, now_seconds)
        # Sense. What can't be sensed now stays as it was.
        run, shaper = self._parts.run, self._shaper
        sensor = run("sensor_report", self._sampler.report, now_seconds) or self._record.sensor
        flex = run("flex", self._flex) or self._record.flex
        usage = self._usage(self._sampler.latest)
        # Judge. Nobody is turned away for what is no longer known.
        wait_seconds = 0.0 if flex is None else flex.wait_seconds(now_seconds)
        shaper.standing = run("supervisor", self._judge, now_seconds, usage, wait_seconds)
        self._record = EngineRecord(
            at_seconds=now_seconds,
            power=self._state,
            sensor=sensor,
            usage=usage,
            standing=shaper.standing,
            flex=flex,
            counters=shaper.counters,
            failures=self._parts.errors,
        )
        if self._live is not None:
            run("decision_log", self._live.log.drain)
            run("status_block", self._publish, self._live)

    def _control(self, live: Live, now_seconds: float) -> None:
        run, control, shaper = self._parts.run, live.control, self._shaper
        run("control", control.tick, now_seconds)
        # Each time: what `state` says holds, also where the change could not be logged.
        shaper.set_budget(control.state.budget)
        shaper.set_mode(control.state.mode)
        run("recording", lambda: live.recorder.follow(control.record_order, now_seconds))
        if live.member is not None:
            run("group", self._beat, live.member, control.state.mode)

    def _beat(self, member: Membership, mode: Mode) -> None:
        if member.tick(mode, decides=self._shaper.demand is not None):
            self._shaper.renew_cap()

    def _publish(self, live: Live) -> None:
        record = replace(
            self._record,
            control=live.control.state,
            group=None if live.member is None else live.member.status,
            recording=live.recorder.state,
        )
        live.status.write(packed(record))

    def _usage(self, state: PowerState | None) -> Usage:
        """Of the engine's limits, as metered, and of its group's, as committed."""
        if state is not None and state is not self._state:
            self._state = state
            limits = self._shaper.constraints.own.limits
            metered = self._parts.run("meter_windows", self._windows.observe, state, limits)
            self._metered = metered or Usage()
        member = None if self._live is None else self._live.member
        return self._metered if member is None else self._metered.together(member.usage)

    def _judge(self, now_seconds: float, usage: Usage, wait_seconds: float) -> EngineStatus:
        """Judge, and hand the limits on. Where that fails the last limit stays."""
        shaper, constraints = self._shaper, self._shaper.constraints
        standing = self._supervisor.tick(
            now_seconds,
            self._state,
            shaper.demand,
            budgeted=constraints.budgeted,
            use_ratio=usage.use_ratio,
            wait_seconds=wait_seconds,
            shapes_heat=self._shapes_heat(constraints),
        )
        shaper.standing = standing
        shaper.set_extra_limits(standing.limits)
        for line in standing.announcements:
            logger.warning("%s", line)
        return standing
