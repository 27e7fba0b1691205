"""A whole engine in virtual time: scheduler, shaper, emulated GPUs and their meter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from shaper.core.ledger.shared import PowerGroup
from shaper.core.model.power_model import StepModel
from shaper.core.policy import Policy
from shaper.core.policy.windowed import WindowedPlanner
from shaper.core.supervise.admission import Admission
from shaper.core.types import LatencyTargets, PowerBudget, PowerLimit, PowerState
from shaper.emulator.meter import EmulatedReader
from shaper.emulator.silicon import EmulatedGpus
from shaper.engine.build import EngineSetup, build_engine
from shaper.engine.protocols import DecisionSink
from shaper.engine.runtime import LiveShaper
from shaper.engine.work import engine_coefficients
from shaper.gpu.parts import Part, Parts
from shaper.gpu.profiles import load_profile
from shaper.gpu.reader import GpuReader
from shaper.gpu.sampler import Sampler
from shaper.simulate.engine import VirtualEngine, kv_cache, new_scheduler
from shaper.simulate.true_gpu import TrueGpu

# The sampler's own pace in a live engine.
_SAMPLE_SECONDS = 0.02


class VirtualSampler(Sampler):
    """The live engine's sampler without its thread: it ticks when somebody looks."""

    _due_seconds = 0.0
    _published: PowerState | None = None

    @property
    def latest(self) -> PowerState | None:
        """What the sampler's thread would have published by now."""
        now = self._clock()
        if now >= self._due_seconds:
            self._due_seconds = now + self._interval_seconds
            self.tick()
        return self._published

    @latest.setter
    def latest(self, state: PowerState | None) -> None:
        self._published = state


class _RaisingParts(Parts):
    """A failure beside the steps ends the simulation, as one in them is counted."""

    def failed(self, part: Part, error: Exception) -> None:
        raise error


def _models(config: Any, gpu: str, kv_blocks: int | None) -> tuple[StepModel, StepModel, Any]:
    """What steps truly take, what a controller makes of the configuration, and the KV cache."""
    from shaper.emulator.kv_cache import true_model

    profile = load_profile(gpu)
    true = true_model(config, profile)
    cache = kv_cache(config, true, kv_blocks)
    return true, StepModel(profile, engine_coefficients(config, cache)), cache


def new_engine(
    config: Any,
    gpu: str,
    limits: Sequence[PowerLimit] | None,
    *,
    ramp_watts_per_second: float | None = None,
    policy: Callable[[], Policy] = WindowedPlanner,
    kv_blocks: int | None = 50_000,
    itl_target_seconds: float | None = None,
    ttft_target_seconds: float | None = None,
    spend_slack: bool = False,
    max_pause_seconds: float = 1.0,
    margin_ratio: float = 0.0,
    shadow: bool = False,
    log: DecisionSink | None = None,
    on_output: Callable[[Any], None] | None = None,
    host_late_seconds: Callable[[], float] = lambda: 0.0,
    plant: TrueGpu | None = None,
    exact_meter: bool = True,
    meter_seed: int = 0,
    step_noise_ratio: float = 0.0,
    group: PowerGroup | None = None,
    faults: Callable[[GpuReader], GpuReader] = lambda reader: reader,
    supervise: bool = False,
    admission: Admission | None = None,
    ambient_celsius: float | None = None,
) -> VirtualEngine:
    """An engine of `config` (see `engine_config`) on an emulated `gpu`.

    Args:
        limits: None is vLLM's own scheduler with no shaper at all.
        kv_blocks: blocks of the KV cache; None: what the GPU's memory has room for.
        log: gets every decision.
        policy, max_pause_seconds, margin_ratio, group: the controller's.
        ramp_watts_per_second: of its budget.
        itl_target_seconds, ttft_target_seconds, spend_slack: its latency targets.
        shadow: start in this mode.
        on_output, host_late_seconds: the engine's.
        plant: what the emulated GPUs do, if that is not what the served model truly takes.
        exact_meter, meter_seed: whether the meters have no gain error, and which one.
        step_noise_ratio: standard deviation of a step's relative duration.
        faults: puts itself between the meters and the sampler.
        supervise: judge health, heat and, with `admission`, what may enter, as a live engine.
        ambient_celsius: of the emulated GPUs.
    """
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    from shaper.simulate.pauses import VirtualAsyncScheduler, VirtualScheduler

    true, model, cache = _models(config, gpu, kv_blocks)
    gpus = EmulatedGpus(
        (plant or true).profile,
        plant or true,
        start_seconds=0.0,
        seed=meter_seed,
        exact_meter=exact_meter,
        step_noise_ratio=step_noise_ratio,
        ambient_celsius=ambient_celsius,
    )
    asynchronous = bool(config.scheduler_config.async_scheduling)
    holder: list[VirtualEngine] = []

    def clock() -> float:
        return holder[0].now_seconds if holder else 0.0

    def attach(scheduler: Any) -> LiveShaper:
        setup = EngineSetup(
            model,
            faults(EmulatedReader(gpus, clock)),
            policy,
            PowerBudget(tuple(limits or ()), ramp_watts_per_second),
            "shadow" if shadow else "on",
            LatencyTargets(itl_target_seconds, ttft_target_seconds, spend_slack),
            max_pause_seconds=max_pause_seconds,
            margin_ratio=margin_ratio,
            free_hertz=model.profile.clocks.sm_max_hertz,
            group=group,
            parts=_RaisingParts(),
            clock=clock,
            sampler=VirtualSampler,
            supervise=supervise,
            admission=admission,
            log=log,
        )
        return build_engine(scheduler, setup)[0]

    own = AsyncScheduler if asynchronous else Scheduler
    shaped = VirtualAsyncScheduler if asynchronous else VirtualScheduler
    kind = own if limits is None else partial(shaped, attach=attach)
    engine = VirtualEngine(
        new_scheduler(config, kind, cache),
        gpus,
        asynchronous=asynchronous,
        on_output=on_output,
        host_late_seconds=host_late_seconds,
    )
    holder.append(engine)
    return engine
