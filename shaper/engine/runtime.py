"""One engine's shaper at run time: the controller, its sensors and its boundary.

Everything that may fail in the shaper is called inside `_guarded`: a failure is
counted, logged once a minute at most, and vLLM schedules on under the safe cap,
which shares nothing with the controller. After `RETRY_SECONDS` a new controller
takes over.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Set
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from shaper.core.controller import Controller
from shaper.core.types import (
    Decision,
    EngineLoad,
    PowerState,
    Reason,
    StepBatch,
    StepLimits,
    StepPrediction,
)
from shaper.engine.levers import Levers
from shaper.engine.load import engine_load, launched_batch
from shaper.engine.safe_cap import SafeCap
from shaper.metrics import SchedulerCounters
from shaper.recording import RecordedStep

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

# Long enough for what broke the controller to pass, short enough to shape again soon.
RETRY_SECONDS = 5.0
_LOG_AGAIN_SECONDS = 60.0
# The meter's energy moves every 100 ms: over half a second its grain is a fifth.
_MEASURED_SPAN_SECONDS = 0.5


class EngineShaper(Protocol):
    """What the scheduler calls."""

    def schedule(self, run: Callable[[], Any]) -> Any:
        """Decide, let vLLM schedule through `run`, record."""
        ...

    def returned(self, scheduler_output: Any) -> None:
        """A step's output is back."""
        ...

    def close(self) -> None:
        """Stop what runs beside the engine."""
        ...


class PassThrough:
    """The shaper of an engine that can't be shaped and has no limit: vLLM as it is."""

    def schedule(self, run: Callable[[], Any]) -> Any:
        """vLLM's own."""
        return run()

    def returned(self, scheduler_output: Any) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Sensing(Protocol):
    """The part of the sampler that the runtime reads."""

    @property
    def latest(self) -> PowerState | None:
        """What it last saw."""
        ...


class DecisionSink(Protocol):
    """The part of the decision log that the runtime writes."""

    def add(self, decision: Decision, meter_watts: float | None) -> None:
        """Take one decision."""
        ...


@dataclass(frozen=True, slots=True)
class _Flying:
    """A step that was launched and is not back, and who had decided it."""

    output: Any
    launched_seconds: float
    batch: StepBatch
    controller: Controller | None


class LiveShaper:
    """The shaper of one engine.

    Args:
        scheduler: vLLM's.
        new_controller: makes a controller that starts at the given time.
        cap: what holds while there is none.
        sampler: publishes power states; None without a sensor.
        log: gets every decision.
        record: gets every step that returned.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        scheduler: Any,
        new_controller: Callable[[float], Controller],
        cap: SafeCap,
        *,
        sampler: Sensing | None = None,
        log: DecisionSink | None = None,
        record: Callable[[RecordedStep], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._new_controller = new_controller
        self._cap = cap
        self._sampler = sampler
        self._log = log
        self._record_step = record
        self._clock = clock
        self._on_close = on_close
        self._levers = Levers(scheduler)
        self.counters = SchedulerCounters()
        self._controller: Controller | None = new_controller(clock())
        self._failed_seconds = 0.0
        self._logged_seconds: float | None = None
        self._launched_seconds = float("-inf")
        self._previous: Set[str] = frozenset()
        self._load: EngineLoad | None = None
        self._limits: StepLimits | None = None
        self._flying: deque[_Flying] = deque()
        self._returned_seconds = float("-inf")
        self._energy_start: tuple[float, float] | None = None
        self._busy_seconds = 0.0

    # --- the scheduler's calls

    def schedule(self, run: Callable[[], Any]) -> Any:
        """Decide, let vLLM schedule through `run`, record."""
        limits = self._guarded(self._decide)
        if limits is None:
            limits = self._cap.limits(self._clock() - self._launched_seconds)
        # The levers may fail too; then this one step is vLLM's own.
        decodes = None if self._load is None else self._load.decode_requests
        applied = self._guarded(lambda: self._levers.apply(limits, decodes))
        with applied or ExitStack():
            output = run()
        self._guarded(lambda: self._record(output))
        return output

    def returned(self, scheduler_output: Any) -> None:
        """A step's output is back."""
        if scheduler_output.total_num_scheduled_tokens:
            self._guarded(lambda: self._finish(scheduler_output))

    def close(self) -> None:
        """Stop the sampler, remove the status block, close the log."""
        if self._on_close is not None:
            self._guarded(self._on_close)

    # --- what they do

    def _decide(self) -> StepLimits | None:
        controller = self._controller
        self._load = self._limits = None
        now = self._clock()
        if controller is None:
            if now - self._failed_seconds < RETRY_SECONDS:
                return None
            controller = self._controller = self._new_controller(now)
        state = self._sampler.latest if self._sampler else None
        if state is not None:
            controller.observe(state)
            self._measure(state)
            self.counters.seconds_gain = controller.estimator.seconds_gain_ratio
            self.counters.joules_gain = controller.estimator.joules_gain_ratio
        self._load = engine_load(self._scheduler, self._previous)
        self._limits = controller.plan(self._load, now)
        return self._limits

    def _expected(self) -> StepBatch | None:
        """The step that the limits should give, where that is known before."""
        load, limits = self._load, self._limits
        if load is None or limits is None or not limits.run or limits.decode_requests is not None:
            return None
        return load.batch(limits.prefill_tokens)

    def _record(self, output: Any) -> None:
        now = self._clock()
        batch = launched_batch(self._scheduler, output, self._previous, self._expected())
        self._previous = output.num_scheduled_tokens.keys()
        if batch.tokens:
            self._launched_seconds = now
            self._flying.append(_Flying(output, now, batch, self._controller))
        controller = self._controller
        if controller is None:
            decision = Decision(
                now,
                Reason.SAFE_CAP,
                StepLimits(True, self._cap.prefill_tokens, self._cap.decode_requests),
                True,
                0,
                batch.decode_requests,
                batch.prefill_tokens,
                StepPrediction(0.0, 0.0),
                0.0,
            )
        else:
            decision = controller.launched(batch, now)
        self.counters.count(decision)
        if self._log is not None:
            state = self._sampler.latest if self._sampler else None
            self._log.add(decision, state.instant_watts if state else None)

    def _finish(self, output: Any) -> None:
        now = self._clock()
        # Steps return in order; one that failed to be recorded is not among them.
        if not any(each.output is output for each in self._flying):
            return
        while (step := self._flying.popleft()).output is not output:
            pass
        start = max(step.launched_seconds, self._returned_seconds)
        self._returned_seconds = now
        self.counters.measured_seconds = now - start
        self._busy_seconds += now - start
        if self._record_step is not None and now > start:
            self._record_step(RecordedStep(start, now, step.batch))
        # A controller that took over since then knows nothing of this step.
        if self._controller is not None and step.controller is self._controller:
            self._controller.finished(now)

    def _measure(self, state: PowerState) -> None:
        """Metered power of the steps alone: what is above the gaps, over the time in steps."""
        if state.energy_joules is None or self._controller is None:
            return
        if self._energy_start is None:
            self._energy_start, self._busy_seconds = (state.sampled_seconds, state.energy_joules), 0
            return
        start, before = self._energy_start
        span = state.sampled_seconds - start
        if span < _MEASURED_SPAN_SECONDS:
            return
        busy = min(self._busy_seconds, span)
        if busy > 0.1 * span:
            gaps = (span - busy) * self._controller.idle_watts
            self.counters.measured_watts = (state.energy_joules - before - gaps) / busy
        self._energy_start, self._busy_seconds = (state.sampled_seconds, state.energy_joules), 0

    def _guarded(self, call: Callable[[], _T]) -> _T | None:
        try:
            return call()
        # The boundary: whatever is wrong in the shaper, vLLM goes on.
        except Exception:
            now = self._clock()
            self._controller = None
            self._failed_seconds = now
            self.counters.errors += 1
            if self._logged_seconds is None or now - self._logged_seconds > _LOG_AGAIN_SECONDS:
                self._logged_seconds = now
                logger.exception(
                    "the shaper failed (%d times so far); vLLM goes on under the safe cap %s",
                    self.counters.errors,
                    self._cap,
                )
            return None
