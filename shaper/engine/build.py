"""Builds an engine's shaper: `build_engine` for one in a server and one in virtual time.

`attach` is the start in a server: it finds the GPUs, builds what a live engine has, and starts it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from shaper import __version__
from shaper.config.model import ShaperConfig, check_floor, check_gpu_limits, loose_settings
from shaper.config.sources import given_settings, load_config
from shaper.core.budget import Constraints, describe
from shaper.core.controller import Controller
from shaper.core.ledger.shared import PowerGroup
from shaper.core.model.power_model import StepModel
from shaper.core.policy import Policy
from shaper.core.supervise.admission import Admission, FlexRules
from shaper.core.supervise.supervisor import Supervisor
from shaper.core.types import LatencyTargets, PowerBudget
from shaper.engine.compat import abort_at_stop, check_scheduler, setting
from shaper.engine.control import BudgetControl
from shaper.engine.decision_log import DecisionLog
from shaper.engine.fallback_cap import fallback_cap
from shaper.engine.membership import join
from shaper.engine.policies import POLICIES
from shaper.engine.protocols import DecisionSink, EngineShaper, Mode, PassThrough
from shaper.engine.readers import EngineGpus, engine_gpus
from shaper.engine.recorder import Recorder
from shaper.engine.refusal import refuse
from shaper.engine.runtime import LiveShaper
from shaper.engine.shapeable import engine_obstacle, refusal
from shaper.engine.tick import EngineTick, Live
from shaper.engine.work import engine_coefficients
from shaper.errors import ShaperError
from shaper.gpu.parts import Parts
from shaper.gpu.reader import GpuReader
from shaper.gpu.sampler import Sampler
from shaper.ipc.control_file import ControlFile, EngineControl, Follower, sweep_control_files
from shaper.ipc.flex import flex_queue
from shaper.ipc.orphan import watch_parent
from shaper.ipc.status_block import StatusWriter, run_id
from shaper.recording.format import path_of_rank

logger = logging.getLogger(__name__)

# Of a reason in the status block, whose header has 4,000 bytes for all.
_LONGEST_REASON = 1000
_MODE_NOTES = {
    "shadow": " (shadow: decides, applies nothing)",
    "off": " (off: vLLM schedules alone)",
}


def attach(scheduler: Any) -> EngineShaper:
    """The shaper for a scheduler that vLLM just made.

    Raises:
        ShaperError: a limit or a latency target is set and can't be kept, e.g. no GPU can be
            read, and the settings don't allow that (`unshaped_ok`). Without either the engine
            runs unshaped, and the log says why.
        SystemExit: the same, in an engine core's own process.
    """
    try:
        return _attach(scheduler)
    except ShaperError as error:
        refuse(error)
        raise


def _attach(scheduler: Any) -> EngineShaper:
    vllm_config = scheduler.vllm_config
    watch_parent(lambda: abort_at_stop(vllm_config))
    config = load_config(given_settings(vllm_config.additional_config), os.environ)
    try:
        obstacle = engine_obstacle(vllm_config, config)
        if obstacle is None:
            check_scheduler(scheduler)
            return _start(scheduler, config)
        if config.asks_for_shaping and not config.unshaped_ok:
            raise refusal(obstacle, config)
    except ShaperError as error:
        if config.asks_for_shaping and not config.unshaped_ok:
            raise
        logger.warning("vLLM schedules alone: the shaper is off: %s", error)
        return _unwatched(vllm_config, config, str(error))
    logger.warning("passing through, vLLM schedules alone: %s", obstacle.why)
    try:
        return _start(scheduler, config, obstacle.why)
    # The boundary to a vLLM that nobody has tried: it serves on, without metrics of ours.
    except Exception:
        logger.exception("the shaper can't watch this engine either")
        return _unwatched(vllm_config, config, obstacle.why)


def _unwatched(vllm_config: Any, config: ShaperConfig, why: str) -> PassThrough:
    """vLLM as it is; where a limit is set, a block says that nobody keeps it."""
    if not config.limits_power:
        return PassThrough()
    known = {"version": __version__, "policy": config.policy, "group": config.power_group}
    why = why[:_LONGEST_REASON]
    try:
        status = StatusWriter(
            run_id(),
            _rank(vllm_config),
            known | {"passes_through": why, "limits_power": True, "shadow": config.shadow},
        )
    # It may be a vLLM that nobody has tried, and it serves on.
    except Exception:
        logger.exception("no metric says that the limit is not kept")
        return PassThrough()
    return PassThrough(status.close)


@dataclass(frozen=True, slots=True)
class EngineSetup:
    """What the shaper of one engine is built of."""

    model: StepModel
    reader: GpuReader
    policy: Callable[[], Policy]
    budget: PowerBudget
    mode: Mode = "on"
    targets: LatencyTargets = field(default_factory=LatencyTargets)
    max_pause_seconds: float = 1.0
    margin_ratio: float = 0.0
    free_hertz: float = 0.0
    """The SM clock that nothing holds down."""
    group: PowerGroup | None = None
    capped: Callable[[PowerBudget], PowerBudget] = lambda budget: budget
    """What the fallback cap has to keep, of a budget."""
    parts: Parts = field(default_factory=Parts)
    clock: Callable[[], float] = time.monotonic
    sampler: Callable[..., Sampler] = Sampler
    interval_seconds: float = 0.02
    supervise: bool = True
    """Judge health, heat and, with `admission`, what may enter."""
    admission: Admission | None = None
    shapes_heat: Callable[[Constraints], bool] = lambda constraints: True
    """Whether heat may limit power, by what limits the engine now."""
    log: DecisionSink | None = None
    """Gets every decision."""
    live: Live | None = None
    """None in virtual time."""


def build_engine(scheduler: Any, setup: EngineSetup) -> tuple[LiveShaper, Sampler]:
    """The shaper of an engine and its sampler, which is not started."""
    model, group, live = setup.model, setup.group, setup.live

    def new_controller(budget: PowerBudget, now_seconds: float, full: bool) -> Controller:
        return Controller(
            model,
            setup.policy(),
            budget,
            now_seconds,
            targets=setup.targets,
            max_pause_seconds=setup.max_pause_seconds,
            margin_ratio=setup.margin_ratio,
            rest_watts=model.idle_watts,
            rest_after_seconds=model.profile.power.gap_hold_seconds,
            full=full,
            group=group,
            free_hertz=setup.free_hertz,
        )

    sampler = setup.sampler(
        setup.reader,
        setup.clock,
        setup.interval_seconds,
        on_samples=None if live is None else live.recorder.add_samples,
        parts=setup.parts,
    )

    def close() -> None:
        if live is not None:
            live.status.close()
        sampler.stop()
        if live is not None:
            live.close()

    shaper = LiveShaper(
        scheduler,
        new_controller,
        lambda budget: fallback_cap(model.predict, model.gap_watts, setup.capped(budget)),
        setup.budget,
        shared_limits=() if group is None else group.limits,
        mode=setup.mode,
        sampler=sampler,
        log=setup.log,
        record=None if live is None else live.recorder.add_step,
        clock=setup.clock,
        on_close=close,
    )
    if setup.supervise:
        sampler.on_tick = _tick(scheduler, setup, shaper, sampler)
    return shaper, sampler


def _tick(scheduler: Any, setup: EngineSetup, shaper: LiveShaper, sampler: Sampler) -> EngineTick:
    gpus, parts = setup.reader.gpus, setup.parts
    supervisor = Supervisor(
        setup.model.profile,
        gpus,
        admission=setup.admission,
        metered=bool(gpus),
        parts=parts,
    )
    return EngineTick(
        parts,
        shaper,
        sampler,
        supervisor,
        setup.model.idle_watts,
        lambda: flex_queue(scheduler),
        setup.shapes_heat,
        setup.live,
    )


def _start(scheduler: Any, config: ShaperConfig, passes_through: str | None = None) -> LiveShaper:
    vllm_config = scheduler.vllm_config
    gpus = engine_gpus(vllm_config, config)
    model = StepModel(gpus.profile, engine_coefficients(vllm_config, scheduler.kv_cache_config))
    check_floor(config, model.idle_watts, model.gpu_count)
    check_gpu_limits(config, model.gpu_count)
    parts = Parts()
    live = _live(config, gpus, model, vllm_config, passes_through, parts)
    first, member = live.control.state, live.member

    def capped(budget: PowerBudget) -> PowerBudget:
        # Nothing is applied in other modes, and nothing is capped.
        if member is not None and live.control.state.mode == "on":
            return member.capped(budget)
        return budget

    shaper, sampler = build_engine(
        scheduler,
        EngineSetup(
            model,
            gpus.reader,
            POLICIES[config.policy],
            first.budget,
            first.mode,
            LatencyTargets(
                config.itl_target_seconds,
                config.ttft_target_seconds,
                config.objective == "efficiency",
            ),
            max_pause_seconds=config.max_pause_seconds,
            margin_ratio=config.margin_ratio,
            free_hertz=gpus.free_hertz,
            group=None if member is None else member.handle,
            capped=capped,
            parts=parts,
            interval_seconds=config.sample_interval_seconds,
            admission=Admission(config.ttft_target_seconds, time.monotonic()),
            shapes_heat=config.shapes_heat,
            log=live.log,
            live=live,
        ),
    )
    shaper.flex = FlexRules(config.flex_max_wait_seconds, config.flex_on_timeout == "refuse")
    live.recorder.start()
    sampler.start()
    logger.info("shaper on %s: %s", gpus.profile.name, _what_holds(config, first))
    return shaper


def _live(
    config: ShaperConfig,
    gpus: EngineGpus,
    model: StepModel,
    vllm_config: Any,
    passes_through: str | None,
    parts: Parts,
) -> Live:
    """Control first: what it refuses, nobody else hears of."""
    control = BudgetControl(
        config.budget_plan,
        "shadow" if config.shadow else "on",
        Follower(ControlFile(run_id())),
        gpu_count=model.gpu_count,
        idle_watts=model.idle_watts,
        now_seconds=time.monotonic(),
        passes_through=passes_through,
        unshaped_ok=config.unshaped_ok,
    )
    for warning in loose_settings(config, gpus.enforced_watts(model.gpu_count), model.gpu_count):
        logger.warning("%s", warning)
    rank = _rank(vllm_config)
    member = join(config.group, gpus, model, f"{run_id()}/{rank}")
    status = StatusWriter(
        run_id(), rank, _info(config, gpus, model, vllm_config) | {"passes_through": passes_through}
    )
    sweep_control_files()
    log = DecisionLog(config.decision_log and str(path_of_rank(config.decision_log, rank)))
    recorder = _recorder(config, rank, gpus.profile.name, vllm_config, parts)
    return Live(control, status, log, recorder, member)


def _what_holds(config: ShaperConfig, first: EngineControl) -> str:
    said = describe(first.budget) + _MODE_NOTES.get(first.mode, "")
    if config.group is None:
        return said
    shared = describe(PowerBudget(config.group.limits))
    return f"{said}, in power group {config.group.name} with {shared}"


def _rank(vllm_config: Any) -> int:
    # One that nobody has tried may have neither, and its block then says only that.
    return int(setting(setting(vllm_config, "parallel_config", None), "data_parallel_index", 0))


def _info(
    config: ShaperConfig, gpus: EngineGpus, model: StepModel, vllm_config: Any
) -> dict[str, object]:
    """What the status block says once and for all."""
    names = vllm_config.model_config
    return {
        "version": __version__,
        "gpu": gpus.profile.name,
        "gpu_count": model.gpu_count,
        "idle_watts": model.idle_watts,
        "model": str(names.served_model_name or names.model),
        "policy": config.policy,
        "shadow": config.shadow,
        "group": config.power_group,
        "limits_power": config.limits_power,
        "unshaped_ok": config.unshaped_ok,
    }


def _recorder(
    config: ShaperConfig, rank: int, gpu: str, vllm_config: Any, parts: Parts
) -> Recorder:
    meta = {
        "version": __version__,
        "gpu": gpu,
        "tensor_parallel": vllm_config.parallel_config.tensor_parallel_size,
        "model_config": vllm_config.model_config.hf_config.to_dict(),
        "quantization": vllm_config.model_config.quantization,
    }
    return Recorder(config.recording_directory, rank, meta, config.record, parts)
