"""One engine's shaper at run time: the controller, its sensors and its boundary.

Everything that may fail in the shaper is called inside `_guarded`: a failure is
counted, logged once a minute at most, and vLLM schedules on under the safe cap,
which shares nothing with the controller. After `RETRY_SECONDS` a new controller
takes over.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Set
from contextlib import ExitStack
from typing import Any, Protocol, TypeVar

from shaper import __version__
from shaper.config import ADDITIONAL_CONFIG_KEY, ShaperConfig, check_floor, load_config
from shaper.core.controller import Controller
from shaper.core.policy import Policy
from shaper.core.policy.fixed import FixedPolicy
from shaper.core.policy.windowed import WindowedPlanner
from shaper.core.power_model import StepModel
from shaper.core.types import (
    Decision,
    PowerState,
    Reason,
    StepLimits,
    StepPrediction,
)
from shaper.engine.compat import check_scheduler
from shaper.engine.levers import Levers
from shaper.engine.load import engine_load, launched_batch
from shaper.engine.readers import engine_gpus
from shaper.engine.safe_cap import SafeCap, safe_cap
from shaper.engine.telemetry import DecisionLog, MeterWindows, Telemetry
from shaper.engine.work import engine_coefficients
from shaper.errors import ShaperError
from shaper.gpu.sampler import Sampler
from shaper.metrics import SchedulerCounters
from shaper.status import StatusWriter, run_id

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

# Long enough for what broke the controller to pass, short enough to shape again soon.
RETRY_SECONDS = 5.0
_LOG_AGAIN_SECONDS = 60.0
# The meter's energy moves every 100 ms: over half a second its grain is a fifth.
_MEASURED_SPAN_SECONDS = 0.5

POLICIES: dict[str, Callable[[], Policy]] = {
    "predictive": WindowedPlanner,
    "fixed": FixedPolicy,
}


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

    def stop(self) -> None:
        """End its thread."""
        ...


class LiveShaper:
    """The shaper of one engine.

    Args:
        scheduler: vLLM's.
        new_controller: makes a controller that starts at the given time.
        cap: what holds while there is none.
        sampler: publishes power states; None without a sensor.
        publish: gets the scheduler's section of the status block.
        log: gets every decision.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        scheduler: Any,
        new_controller: Callable[[float], Controller],
        cap: SafeCap,
        *,
        sampler: Sensing | None = None,
        publish: Callable[[list[float]], None] | None = None,
        log: DecisionLog | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._new_controller = new_controller
        self._cap = cap
        self._sampler = sampler
        self._publish = publish
        self._log = log
        self._clock = clock
        self._on_close = on_close
        self._levers = Levers(scheduler)
        self.counters = SchedulerCounters()
        self._controller: Controller | None = new_controller(clock())
        self._failed_seconds = 0.0
        self._logged_seconds: float | None = None
        self._launched_seconds = float("-inf")
        self._previous: Set[str] = frozenset()
        self._energy_start: tuple[float, float] | None = None
        self._busy_seconds = 0.0
        self._show()

    # --- the scheduler's calls

    def schedule(self, run: Callable[[], Any]) -> Any:
        """Decide, let vLLM schedule through `run`, record."""
        limits = self._guarded(self._decide)
        if limits is None:
            limits = self._cap.limits(self._clock() - self._launched_seconds)
        # The levers may fail too; then this one step is vLLM's own.
        applied = self._guarded(lambda: self._levers.apply(limits))
        with applied or ExitStack():
            output = run()
        self._guarded(lambda: self._record(output))
        return output

    def returned(self, scheduler_output: Any) -> None:
        """A step's output is back."""
        if scheduler_output.total_num_scheduled_tokens:
            self._guarded(self._finish)

    def close(self) -> None:
        """Stop the sampler, remove the status block, close the log."""
        if self._on_close is not None:
            self._guarded(self._on_close)

    # --- what they do

    def _decide(self) -> StepLimits | None:
        controller = self._controller
        now = self._clock()
        if controller is None:
            if now - self._failed_seconds < RETRY_SECONDS:
                return None
            controller = self._controller = self._new_controller(now)
        state = self._sampler.latest if self._sampler else None
        if state is not None:
            controller.observe(state)
            self._measure(state)
        return controller.plan(engine_load(self._scheduler, self._previous), now)

    def _record(self, output: Any) -> None:
        now = self._clock()
        batch = launched_batch(self._scheduler, output, self._previous)
        self._previous = output.num_scheduled_tokens.keys()
        if batch.tokens:
            self._launched_seconds = now
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
        self._show()

    def _finish(self) -> None:
        if self._controller is not None:
            seconds = self._controller.finished(self._clock())
            self._busy_seconds += seconds
            self.counters.measured_seconds = seconds

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

    def _show(self) -> None:
        if self._controller is not None:
            self.counters.seconds_gain = self._controller.estimator.seconds_gain_ratio
            self.counters.joules_gain = self._controller.estimator.joules_gain_ratio
        if self._publish is not None:
            self._publish(self.counters.values())

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


def attach(scheduler: Any) -> EngineShaper:
    """The shaper for a scheduler that vLLM just made.

    Raises:
        ShaperError: a limit is configured and can't be kept, e.g. no GPU can be read.
            Without a limit the engine runs unshaped, and the log says why.
    """
    vllm_config = scheduler.vllm_config
    additional = vllm_config.additional_config
    given = additional.get(ADDITIONAL_CONFIG_KEY) if isinstance(additional, dict) else None
    config = load_config(given, os.environ)
    try:
        return _attach(scheduler, config)
    except ShaperError as error:
        if config.limits:
            raise
        logger.warning("no power limit is set and the shaper is off: %s", error)
        return PassThrough()


def _attach(scheduler: Any, config: ShaperConfig) -> LiveShaper:
    check_scheduler(scheduler)
    vllm_config = scheduler.vllm_config
    gpus = engine_gpus(vllm_config, config)
    model = StepModel(gpus.profile, engine_coefficients(vllm_config))
    check_floor(config, model.idle_watts)
    limits = config.power_limits
    _warn_of_loose_limits(config, [gpu.enforced_limit_watts for gpu in gpus.reader.gpus])

    def new_controller(now_seconds: float) -> Controller:
        return Controller(
            model,
            POLICIES[config.policy](),
            limits,
            now_seconds,
            itl_target_seconds=config.itl_target_seconds,
            max_pause_seconds=config.max_pause_seconds,
            margin_ratio=config.margin_ratio,
            shadow=config.shadow,
        )

    rank = vllm_config.parallel_config.data_parallel_index
    info = {
        "version": __version__,
        "gpu": gpus.profile.name,
        "model": str(vllm_config.model_config.served_model_name or vllm_config.model_config.model),
        "policy": config.policy,
        "shadow": config.shadow,
        "limits": [(limit.watts, limit.window_seconds) for limit in limits],
    }
    status = StatusWriter(run_id(), rank, info)
    log = DecisionLog(f"{config.decision_log}.{rank}" if rank else config.decision_log)
    telemetry = Telemetry(status, MeterWindows(limits, model.idle_watts), log)
    sampler = Sampler(
        gpus.reader,
        time.monotonic,
        interval_seconds=config.sample_interval_seconds,
        on_tick=lambda now_seconds: telemetry.tick(
            now_seconds, sampler.latest, sampler.read_errors, sampler.rejected_readings
        ),
    )

    def close() -> None:
        status.close()
        sampler.stop()
        log.close()

    shaper = LiveShaper(
        scheduler,
        new_controller,
        safe_cap(model.predict, model.gap_watts, () if config.shadow else limits),
        sampler=sampler,
        publish=lambda values: status.write("scheduler", values),
        log=log,
        on_close=close,
    )
    sampler.start()
    _announce(config, gpus.profile.name)
    return shaper


def _warn_of_loose_limits(config: ShaperConfig, enforced: list[float | None]) -> None:
    """Limits above what the driver lets the GPUs draw: allowed, since that can change."""
    known = [watts for watts in enforced if watts is not None]
    total = sum(known)
    if config.limits and known and all(limit.watts >= total for limit in config.limits):
        logger.warning(
            "every power limit (lowest: %g W) is at or above the GPUs' enforced limit (%g W): "
            "the driver acts before the shaper does",
            min(limit.watts for limit in config.limits),
            total,
        )


def _announce(config: ShaperConfig, gpu: str) -> None:
    limits = ", ".join(f"{x.watts:g} W over {x.window_seconds:g} s" for x in config.limits)
    mode = " (shadow: decides, applies nothing)" if config.shadow else ""
    logger.info("shaper on %s: %s%s", gpu, limits or "no limit", mode)
