"""One engine's shaper at run time: the controller, its sensors and its boundary.

Everything that may fail in the shaper is called inside `_guarded`: a failure is
counted, logged once a minute at most, and vLLM schedules on under the fallback cap,
which shares nothing with the controller. After `RETRY_SECONDS` a new controller
takes over; nobody knows what ran before it, so it takes every window as used up.

Budget, mode and extra limits may be set from any thread: each is one assignment, taken
over at the next `schedule()`.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Set
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from shaper.core.budget import Constraints
from shaper.core.controller import Controller
from shaper.core.supervise.admission import FlexRules
from shaper.core.supervise.status import EngineDemand, EngineStatus
from shaper.core.types import (
    Decision,
    EngineLoad,
    PowerBudget,
    PowerLimit,
    PowerState,
    Reason,
    StepLimits,
    StepPrediction,
)
from shaper.engine.fallback_cap import FallbackCap
from shaper.engine.levers import Levers
from shaper.engine.load import engine_load, has_everyone, launched_batch, whole_load
from shaper.engine.protocols import (
    DecisionSink,
    LaunchedStep,
    Mode,
    Sensing,
    Wanted,
)
from shaper.engine.running_batch import RunningBatch
from shaper.engine.step_meter import StepMeter
from shaper.engine.waiting import Waiting
from shaper.ipc.engine_record import SchedulerCounters
from shaper.recording.format import RecordedStep

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

# Long enough for what broke the controller to pass, short enough to shape again soon.
RETRY_SECONDS = 5.0
_DRAIN_SECONDS = 1.0
_LOG_AGAIN_SECONDS = 60.0
# A pause is not asked about again before its date, nor its load read, for so long.
_QUIET_SECONDS = 0.02


class LiveShaper:
    """The shaper of one engine.

    Args:
        scheduler: vLLM's.
        new_controller: makes the controller of a budget that starts at a time; where the last
            argument is true it takes every window as used up.
        new_cap: makes what holds while there is none.
        budget: the first budget.
        shared_limits: of the engine's power group.
        mode: the first mode.
        sampler: publishes power states; None without a sensor.
        log: gets every decision.
        record: gets every step that returned.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        scheduler: Any,
        new_controller: Callable[[PowerBudget, float, bool], Controller],
        new_cap: Callable[[PowerBudget], FallbackCap],
        budget: PowerBudget,
        *,
        shared_limits: tuple[PowerLimit, ...] = (),
        mode: Mode = "on",
        sampler: Sensing | None = None,
        log: DecisionSink | None = None,
        record: Callable[[RecordedStep], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._new_controller = new_controller
        self._new_cap = new_cap
        self._sampler = sampler
        self._log = log
        self._record_step = record
        self.clock = clock
        self._on_close = on_close
        self._tally = RunningBatch(scheduler)
        self._waiting = Waiting(scheduler)
        self._levers = Levers(scheduler, self._tally, self._waiting)
        self.counters = SchedulerCounters()
        self._wanted = self._applied = Wanted(Constraints(budget, (), shared_limits), mode)
        self.standing: EngineStatus | None = None  # as the supervisor last saw it
        self.flex = FlexRules()
        self._cap = new_cap(PowerBudget() if mode != "on" else budget)
        self._controller: Controller | None = None
        if mode != "off":
            self._controller = new_controller(budget, clock(), False)
            self._controller.shadow = mode == "shadow"
        self._failed_seconds = self._cap_since_seconds = float("-inf")
        self._logged_seconds: float | None = None
        self._launched_seconds = float("-inf")
        self._previous: Set[str] = frozenset()
        self._quiet_until_seconds = self._load_until_seconds = -math.inf
        self._quiet_at: tuple[int, ...] = ()
        self._load: EngineLoad | None = None
        self._limits: StepLimits | None = None
        self._flying: deque[LaunchedStep] = deque()
        self._returned_seconds = float("-inf")
        self._state: PowerState | None = None  # that `_told` was told last
        self._told: Controller | None = None
        self._step_meter = StepMeter()

    # --- the scheduler's calls

    def schedule(self, run: Callable[[], Any]) -> Any:
        """Decide, let vLLM schedule through `run`, record."""
        if self._applied.mode == "off" and self._wanted is self._applied:
            return run()
        applied: AbstractContextManager[Any] | None = self._guarded(self._shape)
        if self._applied.mode == "off":
            return run()
        if applied is None:
            now = self.clock()
            applied = self._cap.apply(
                self._scheduler, now - self._launched_seconds, now - self._cap_since_seconds
            )
        with applied:
            output = run()
        self._guarded(self._record, output)
        return output

    def returned(self, scheduler_output: Any) -> None:
        """A step's output is back."""
        if scheduler_output.total_num_scheduled_tokens:
            self._guarded(self._finish, scheduler_output)

    def changed(self) -> None:
        """A request has arrived or was taken away: what was read of the work is old."""
        self._quiet_until_seconds = self._load_until_seconds = -math.inf

    def close(self) -> None:
        """Stop the sampler, remove the status block, close the log."""
        if self._on_close is not None:
            self._guarded(self._on_close)

    # --- others' wishes, from any thread

    @property
    def budget(self) -> PowerBudget:
        """The budget that was asked for last."""
        return self._wanted.constraints.budget

    @property
    def constraints(self) -> Constraints:
        """Everything that limits the engine, as asked for last."""
        return self._wanted.constraints

    @property
    def shaping(self) -> bool:
        """Whether a controller decides and what it decides is applied."""
        return self._controller is not None and self._applied.mode == "on"

    @property
    def demand(self) -> EngineDemand | None:
        """What there is to do, and how it goes; None while no controller is there."""
        controller = self._controller
        return None if controller is None else controller.demand

    def set_budget(self, budget: PowerBudget) -> None:
        """Put another budget in force from the next step on."""
        self._constrain(dataclasses.replace(self.constraints, budget=budget))

    def set_extra_limits(self, limits: tuple[PowerLimit, ...]) -> None:
        """Hold these limits beside the budget's."""
        self._constrain(dataclasses.replace(self.constraints, heat_limits=limits))

    def _constrain(self, constraints: Constraints) -> None:
        if constraints != self._wanted.constraints:
            self._wanted = dataclasses.replace(self._wanted, constraints=constraints)

    def set_mode(self, mode: Mode) -> None:
        """Switch the shaper on, to shadow, or off."""
        if mode != self._wanted.mode:
            self._wanted = dataclasses.replace(self._wanted, mode=mode)

    def renew_cap(self) -> None:
        """Make the fallback cap anew at the next step: something else that it keeps has changed."""
        self._wanted = dataclasses.replace(self._wanted)

    # --- what the calls do

    def _shape(self) -> Levers | None:
        """The levers, set; None where the fallback cap shall hold."""
        limits = self._decide()
        if limits is None:
            return None
        tokens = None if self._load is None else self._load.decode_tokens
        return self._levers.apply(limits, tokens)

    def _take_over(self, wanted: Wanted, now_seconds: float) -> None:
        """Do as others have asked."""
        budget, mode = wanted.constraints.own, wanted.mode
        self._applied = wanted
        self._cap = self._new_cap(PowerBudget() if mode != "on" else budget)
        controller = self._controller
        if mode == "off":
            self._controller = None
        elif controller is not None:
            controller.set_budget(budget, now_seconds)
            controller.shadow = mode == "shadow"
        # An engine that was off starts a controller as one whose controller had failed.

    def _decide(self) -> StepLimits | None:
        now = self.clock()
        wanted = self._wanted
        if wanted is not self._applied:
            self._quiet_until_seconds = -math.inf
            self._take_over(wanted, now)
        if wanted.mode == "off":
            self._load = self._limits = None
            return None
        controller = self._controller
        if controller is None:
            self._load = self._limits = None
            # A step that the cap launched is not in a new controller's books.
            wait = RETRY_SECONDS + (_DRAIN_SECONDS if self._flying else 0.0)
            if now - self._failed_seconds < wait:
                return None
            controller = self._controller = self._new_controller(wanted.constraints.own, now, True)
            controller.shadow = wanted.mode == "shadow"
        self._observe(controller)
        work = self._work()
        if now < self._quiet_until_seconds and work == self._quiet_at:
            return self._limits
        load, self._quiet_until_seconds = self._unchanged_load(work, now), -math.inf
        self._load = self._limits = None
        if load is None:
            self._waiting.asks = controller.limited
            load = engine_load(self._scheduler, self._previous, self._tally, self._waiting)
            # After the first empty step decodes return to the batch.
            self._load_until_seconds = -math.inf if self._previous else now + _QUIET_SECONDS
        self._load = load
        self._limits = controller.plan(load, now)
        if load.more_waiting and self._limits.uncut:
            self._load = whole_load(self._scheduler, load, self._waiting)
            self._limits = controller.plan(self._load, now)
        self._quiet_until_seconds = min(controller.quiet_until_seconds, now + _QUIET_SECONDS)
        self._quiet_at = work
        return self._limits

    def _unchanged_load(self, work: tuple[int, ...], now_seconds: float) -> EngineLoad | None:
        """That of the poll before, if nothing ran, arrived, left or returned since it was read."""
        load, limits = self._load, self._limits
        if load is None or limits is None or limits.run or work != self._quiet_at:
            return None
        return load if now_seconds < self._load_until_seconds and has_everyone(load) else None

    def _observe(self, controller: Controller) -> None:
        state = None if self._sampler is None else self._sampler.latest
        # Most steps come between two readings.
        if state is None or (state is self._state and controller is self._told):
            return
        self._state, self._told = state, controller
        controller.observe(state)
        if state.energy_joules is not None:
            reading = state.sampled_seconds, state.energy_joules
            watts = self._step_meter.read(*reading, controller.idle_watts)
            if watts is not None:
                self.counters.measured_watts = watts
        self.counters.seconds_gain = controller.estimator.seconds_gain_ratio
        self.counters.joules_gain = controller.estimator.joules_gain_ratio

    def _work(self) -> tuple[int, ...]:
        """What changes when work arrives, leaves or returns."""
        scheduler = self._scheduler
        return len(scheduler.running), len(scheduler.waiting), len(self._flying)

    def _record(self, output: Any) -> None:
        now = self.clock()
        if output.total_num_scheduled_tokens:
            # First: the fallback cap's spacing counts on it whatever fails below.
            self._launched_seconds = now
        planned = self._load, self._limits
        batch = launched_batch(self._scheduler, output, self._previous, *planned, self._tally)
        self._previous = output.num_scheduled_tokens.keys()
        if batch.tokens:
            self._flying.append(LaunchedStep(output, now, batch, self._controller))
        controller = self._controller
        if controller is None:
            cap = StepLimits(True, self._cap.prefill_tokens, self._cap.decode_requests)
            decision = Decision(
                now, Reason.FALLBACK_CAP, cap, True, 0, batch.decode_requests, batch.prefill_tokens,
                StepPrediction(0.0, 0.0), 0.0,
            )  # fmt: skip
        else:
            decision = controller.launched(batch, now)
        self.counters.count(decision)
        if self._log is not None:
            state = None if self._sampler is None else self._sampler.latest
            self._log.add(decision, None if state is None else state.instant_watts)

    def _finish(self, output: Any) -> None:
        now = self.clock()
        # Steps return in order; one that failed to be recorded is not among them.
        if not (self._flying and self._flying[0].output is output):
            if not any(each.output is output for each in self._flying):
                return
            while self._flying[0].output is not output:
                self._flying.popleft()
        step = self._flying.popleft()
        start = max(step.launched_seconds, self._returned_seconds)
        self._returned_seconds = now
        self.counters.measured_seconds = now - start
        self._step_meter.ran(now - start)
        if self._record_step is not None and now > start:
            self._record_step(RecordedStep(start, now, step.batch))
        # A controller that took over since then knows nothing of this step.
        if self._controller is not None and step.controller is self._controller:
            self._controller.finished(now)

    def _guarded(self, call: Callable[..., _T], *arguments: Any) -> _T | None:
        try:
            return call(*arguments)
        # The boundary: whatever is wrong in the shaper, vLLM goes on.
        except Exception:
            now = self.clock()
            self._quiet_until_seconds = -math.inf
            if self._controller is not None:
                self._controller, self._cap_since_seconds = None, now
            self._failed_seconds = now
            self.counters.errors += 1
            if self._logged_seconds is None or now - self._logged_seconds > _LOG_AGAIN_SECONDS:
                self._logged_seconds = now
                logger.exception(
                    "the shaper failed (%d times so far); vLLM goes on under the fallback cap %s",
                    self.counters.errors,
                    self._cap,
                )
            return None
