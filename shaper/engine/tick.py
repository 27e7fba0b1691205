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

from shaper.core.budget import Constraints
from shaper.core.supervise.status import EngineStatus, Usage
from shaper.core.supervise.supervisor import Supervisor
from shaper.core.types import PowerState
from shaper.engine.control import BudgetControl
from shaper.engine.decision_log import DecisionLog
from shaper.engine.membership import Membership
from shaper.engine.meter_windows import MeterWindows
from shaper.engine.recorder import Recorder
from shaper.engine.runtime import LiveShaper
from shaper.gpu.parts import Parts
from shaper.gpu.sampler import Sampler
from shaper.ipc.engine_record import EngineRecord, packed
from shaper.ipc.flex import FlexQueue
from shaper.ipc.status_block import StatusWriter

logger = logging.getLogger(__name__)


class EngineTick:
    """The sampler's `on_tick`.

    Args:
        parts: counts what fails.
        control: budget and mode.
        supervisor: judges the engine.
        idle_watts: what the engine's GPUs draw with nothing to do.
        status: the block that the record goes to.
        log: of decisions; drained here.
        recorder: follows orders to record.
        member: of a power group; None where there is none.
        flex: what waits in the engine; None before there is a queue.
        shapes_heat: whether heat may limit power, by what limits the engine now.

    `shaper` and `sampler` are made later than this, and set before the first tick. Stateful
    fields: what was sensed and judged last.
    """

    shaper: LiveShaper
    sampler: Sampler

    def __init__(
        self,
        parts: Parts,
        control: BudgetControl,
        supervisor: Supervisor,
        idle_watts: float,
        status: StatusWriter,
        log: DecisionLog,
        recorder: Recorder,
        member: Membership | None,
        flex: Callable[[], FlexQueue | None],
        shapes_heat: Callable[[Constraints], bool],
    ) -> None:
        self._parts, self._control, self._supervisor = parts, control, supervisor
        self._status, self._log, self._recorder = status, log, recorder
        self._member, self._flex, self._shapes_heat = member, flex, shapes_heat
        self._windows = MeterWindows(idle_watts)
        self._metered = Usage()
        self._state: PowerState | None = None
        self._record = EngineRecord()

    def __call__(self, now_seconds: float) -> None:
        """Do everything once."""
        run, shaper, recorder, member = self._parts.run, self.shaper, self._recorder, self._member
        # Control. What its state says is set each time, also where the change was not logged.
        run("control", self._control.tick, now_seconds)
        control = self._control.state
        shaper.set_budget(control.budget)
        shaper.set_mode(control.mode)
        run("recording", lambda: recorder.follow(self._control.record_order, now_seconds))
        if member is not None:
            run("group", self._beat, member)
        # Sense. What can't be sensed now stays as it was.
        sensor = run("sensor_report", self.sampler.report, now_seconds) or self._record.sensor
        flex = run("flex", self._flex) or self._record.flex
        usage = self._usage(self.sampler.latest)
        # Judge. Nobody is turned away for what is no longer known.
        wait_seconds = 0.0 if flex is None else flex.wait_seconds(now_seconds)
        shaper.standing = run("supervisor", self._judge, now_seconds, usage, wait_seconds)
        # Publish.
        self._record = EngineRecord(
            at_seconds=now_seconds,
            power=self._state,
            sensor=sensor,
            usage=usage,
            standing=shaper.standing,
            control=control,
            group=None if member is None else member.status,
            flex=flex,
            recording=recorder.state,
            counters=shaper.counters,
            failures=self._parts.errors,
        )
        run("decision_log", self._log.drain)
        run("status_block", lambda: self._status.write(packed(self._record)))

    def _beat(self, member: Membership) -> None:
        if member.tick(self._control.state.mode, decides=self.shaper.demand is not None):
            self.shaper.renew_cap()

    def _usage(self, state: PowerState | None) -> Usage:
        """Of the engine's limits, as metered, and of its group's, as committed."""
        if state is not None and state is not self._state:
            self._state = state
            limits = self.shaper.constraints.own.limits
            metered = self._parts.run("meter_windows", self._windows.observe, state, limits)
            self._metered = metered or Usage()
        return self._metered if self._member is None else self._metered.together(self._member.usage)

    def _judge(self, now_seconds: float, usage: Usage, wait_seconds: float) -> EngineStatus:
        """Judge, and hand the limits on. Where that fails the last limit stays."""
        shaper, constraints = self.shaper, self.shaper.constraints
        standing = self._supervisor.tick(
            now_seconds,
            self._state,
            shaper.demand,
            budgeted=constraints.budgeted,
            use_ratio=usage.use_ratio,
            wait_seconds=wait_seconds,
            shapes_heat=self._shapes_heat(constraints),
        )
        shaper.set_extra_limits(standing.limits)
        for line in standing.announcements:
            logger.warning("%s", line)
        return standing
