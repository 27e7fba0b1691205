"""A whole engine in virtual time: scheduler, shaper, emulated GPUs and their meter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from shaper.core.controller import Controller
from shaper.core.policy import Policy
from shaper.core.policy.windowed import WindowedPlanner
from shaper.core.power_model import StepModel
from shaper.core.types import PowerLimit, PowerState
from shaper.emulator.silicon import EmulatedGpus
from shaper.engine.runtime import DecisionSink, LiveShaper
from shaper.engine.safe_cap import safe_cap
from shaper.engine.work import engine_coefficients
from shaper.gpu.profiles import load_profile
from shaper.gpu.sampler import summarise
from shaper.simulate.engine import VirtualEngine, new_scheduler

# The sampler's own pace in a live engine.
_SAMPLE_SECONDS = 0.02


class VirtualSampler:
    """What the sampler's thread would have published by now."""

    def __init__(self, gpus: EmulatedGpus, clock: Callable[[], float]) -> None:
        self._gpus, self._clock = gpus, clock
        self._state: PowerState | None = None

    @property
    def latest(self) -> PowerState | None:
        """The meters' readings of the last 20 ms of virtual time."""
        now, state = self._clock(), self._state
        if state is None or now - state.sampled_seconds >= _SAMPLE_SECONDS:
            self._state = state = summarise(self._gpus.sample(now))
        return state


def new_engine(
    config: Any,
    gpu: str,
    limits: Sequence[PowerLimit] | None,
    *,
    policy: Callable[[], Policy] = WindowedPlanner,
    kv_blocks: int = 50_000,
    itl_target_seconds: float | None = None,
    spend_slack: bool = False,
    max_pause_seconds: float = 1.0,
    margin_ratio: float = 0.0,
    shadow: bool = False,
    log: DecisionSink | None = None,
    on_output: Callable[[Any], None] | None = None,
    host_late_seconds: Callable[[], float] = lambda: 0.0,
) -> VirtualEngine:
    """An engine of `config` (see `engine_config`) on an emulated `gpu`.

    Args:
        limits: None is vLLM's own scheduler with no shaper at all.
        kv_blocks: blocks of the KV cache.
        log: gets every decision.
        policy, itl_target_seconds, spend_slack, max_pause_seconds, margin_ratio, shadow:
            the controller's.
        on_output, host_late_seconds: the engine's.
    """
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    from shaper.engine.scheduler import power_scheduler

    profile = load_profile(gpu)
    model = StepModel(profile, engine_coefficients(config))
    gpus = EmulatedGpus(profile, model, start_seconds=0.0, exact_meter=True)
    asynchronous = bool(config.scheduler_config.async_scheduling)
    holder: list[VirtualEngine] = []

    def clock() -> float:
        return holder[0].now_seconds if holder else 0.0

    def attach(scheduler: Any) -> LiveShaper:
        return LiveShaper(
            scheduler,
            lambda now_seconds: Controller(
                model,
                policy(),
                limits or (),
                now_seconds,
                itl_target_seconds=itl_target_seconds,
                spend_slack=spend_slack,
                max_pause_seconds=max_pause_seconds,
                margin_ratio=margin_ratio,
                shadow=shadow,
            ),
            safe_cap(model.predict, model.gap_watts, limits or ()),
            sampler=VirtualSampler(gpus, clock),
            log=log,
            clock=clock,
        )

    def shaped(*args: Any, **kwargs: Any) -> Any:
        return power_scheduler(*args, attach=attach, **kwargs)

    own = AsyncScheduler if asynchronous else Scheduler
    scheduler = new_scheduler(config, own if limits is None else shaped, kv_blocks)
    engine = VirtualEngine(
        scheduler,
        gpus,
        asynchronous=asynchronous,
        on_output=on_output,
        host_late_seconds=host_late_seconds,
    )
    holder.append(engine)
    return engine
