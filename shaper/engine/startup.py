"""Start-up: finds the GPUs, builds what an engine's shaper needs, and starts it."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

from shaper import __version__
from shaper.config import ShaperConfig, check_floor, check_gpu_limits
from shaper.control import ControlFile, Follower, sweep_control_files
from shaper.core.admission import EngineAdmission, FlexRules, Look
from shaper.core.budget import describe
from shaper.core.controller import Controller
from shaper.core.power_model import StepModel
from shaper.core.supervisor import Supervisor
from shaper.core.types import LatencyTargets, PowerBudget
from shaper.engine.compat import check_scheduler, supported, vllm_version
from shaper.engine.control import BudgetControl
from shaper.engine.flex import flex_queue, prompt_wait_seconds
from shaper.engine.membership import Membership, join
from shaper.engine.policies import POLICIES
from shaper.engine.protocols import EngineShaper, NewController, PassThrough
from shaper.engine.readers import EngineGpus, engine_gpus
from shaper.engine.runtime import LiveShaper
from shaper.engine.safe_cap import SafeCap, safe_cap
from shaper.engine.telemetry import DecisionLog, Recorder, Telemetry
from shaper.engine.work import engine_coefficients
from shaper.errors import ShaperError
from shaper.gpu.sampler import Sampler
from shaper.recording import RecordingWriter
from shaper.settings import ADDITIONAL_CONFIG_KEY, load_config
from shaper.status import StatusWriter, run_id

logger = logging.getLogger(__name__)


def attach(scheduler: Any) -> EngineShaper:
    """The shaper for a scheduler that vLLM just made.

    Raises:
        ShaperError: a limit or a latency target is set and can't be kept, e.g. no GPU can be
            read. Without either the engine runs unshaped, and the log says why.
    """
    vllm_config = scheduler.vllm_config
    additional = vllm_config.additional_config
    given = additional.get(ADDITIONAL_CONFIG_KEY) if isinstance(additional, dict) else None
    config = load_config(given, os.environ)
    try:
        return _attach(scheduler, config)
    except ShaperError as error:
        if config.asks_for_shaping:
            raise
        logger.warning("no limit and no latency target is set, and the shaper is off: %s", error)
        return PassThrough()


def _attach(scheduler: Any, config: ShaperConfig) -> LiveShaper:
    check_scheduler(scheduler)
    version = vllm_version()
    if not supported(version):
        logger.warning("the shaper was not tried on vLLM %s; it was on 0.23 to 0.33", version)
    vllm_config = scheduler.vllm_config
    gpus = engine_gpus(vllm_config, config)
    model = StepModel(gpus.profile, engine_coefficients(vllm_config))
    check_floor(config, model.idle_watts, model.gpu_count)
    check_gpu_limits(config, model.gpu_count)
    control = BudgetControl(
        config.budget_plan,
        "shadow" if config.shadow else "on",
        Follower(ControlFile(run_id())),
        gpu_count=model.gpu_count,
        idle_watts=model.idle_watts,
        now_seconds=time.monotonic(),
    )
    first = control.state
    _warn_of_loose_limits(first.budget, [gpu.enforced_limit_watts for gpu in gpus.reader.gpus])
    rank = _rank(vllm_config)
    member = join(config.group, gpus, model, f"{run_id()}/{rank}")
    status = StatusWriter(run_id(), rank, _info(config, gpus, model, vllm_config))
    sweep_control_files()
    log = DecisionLog(_of_rank(config.decision_log, rank))
    recorder = _recorder(config, rank, gpus.profile.name, vllm_config)
    admission = EngineAdmission(
        lambda now_seconds: Look(
            budgeted=not shaper.budget.empty or member is not None,
            use_ratio=telemetry.use_ratio,
            wait_seconds=prompt_wait_seconds(scheduler, now_seconds),
        ),
        config.ttft_target_seconds,
        time.monotonic(),
    )
    supervisor = Supervisor(
        gpus.profile, gpus.reader.gpus, admission=admission, shapes_heat=config.shapes_heat
    )
    telemetry = Telemetry(status, model.idle_watts, log, recorder, supervisor=supervisor)

    def tick(now_seconds: float) -> None:
        try:
            if control.tick(now_seconds):
                shaper.set_budget(control.state.budget)
                shaper.set_mode(control.state.mode)
            status.write("control", control.state.values())
        finally:
            if member is not None:
                if member.tick(control.state.mode, decides=shaper.demand is not None):
                    shaper.renew_cap()
                status.write("group", member.values())
            telemetry.tick(
                now_seconds, sampler.latest, sampler.read_errors, sampler.rejected_readings
            )

    def cap(budget: PowerBudget) -> SafeCap:
        # Nothing is applied in other modes, and nothing is capped.
        if member is not None and control.state.mode == "on":
            budget = member.capped(budget)
        return safe_cap(model.predict, model.gap_watts, budget)

    sampler = Sampler(
        recorder.tap(gpus.reader) if recorder else gpus.reader,
        time.monotonic,
        interval_seconds=config.sample_interval_seconds,
        on_tick=tick,
    )

    def close() -> None:
        status.close()
        sampler.stop()
        if member is not None:
            member.leave()
        log.close()
        if recorder is not None:
            recorder.close()

    shaper = LiveShaper(
        scheduler,
        _new_controller(config, gpus, model, member),
        cap,
        first.budget,
        mode=first.mode,
        sampler=sampler,
        log=log,
        record=recorder.add_step if recorder else None,
        on_close=close,
    )
    shaper.flex = FlexRules(config.flex_max_wait_seconds, config.flex_on_timeout == "refuse")
    telemetry.attach(shaper, lambda: flex_queue(scheduler))
    sampler.start()
    note = " (shadow: decides, applies nothing)" if first.mode == "shadow" else ""
    if config.group is not None:
        shared = describe(PowerBudget(config.group.limits))
        note += f", in power group {config.group.name} with {shared}"
    logger.info("shaper on %s: %s%s", gpus.profile.name, describe(first.budget), note)
    return shaper


def _new_controller(
    config: ShaperConfig, gpus: EngineGpus, model: StepModel, member: Membership | None
) -> NewController:
    targets = LatencyTargets(
        config.itl_target_seconds, config.ttft_target_seconds, config.objective == "efficiency"
    )

    def make(budget: PowerBudget, now_seconds: float, full: bool) -> Controller:
        return Controller(
            model,
            POLICIES[config.policy](config),
            budget,
            now_seconds,
            targets=targets,
            max_pause_seconds=config.max_pause_seconds,
            margin_ratio=config.margin_ratio,
            rest_watts=model.idle_watts,
            rest_after_seconds=gpus.profile.power.gap_hold_seconds,
            full=full,
            group=None if member is None else member.handle,
        )

    return make


def _rank(vllm_config: Any) -> int:
    parallel = vllm_config.parallel_config
    return int(getattr(parallel, "data_parallel_index", parallel.data_parallel_rank))


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
    }


def _of_rank(path: str | None, rank: int) -> str | None:
    """A file of each data-parallel rank's own: `run.csv`, `run.rank1.csv`, ..."""
    if path is None or not rank:
        return path
    whole = Path(path)
    return str(whole.with_name(f"{whole.stem}.rank{rank}{whole.suffix}"))


def _recorder(config: ShaperConfig, rank: int, gpu: str, vllm_config: Any) -> Recorder | None:
    path = _of_rank(config.record, rank)
    if path is None:
        return None
    meta = {
        "version": __version__,
        "gpu": gpu,
        "tensor_parallel": vllm_config.parallel_config.tensor_parallel_size,
        "model_config": vllm_config.model_config.hf_config.to_dict(),
    }
    return Recorder(RecordingWriter(path, meta))


def _warn_of_loose_limits(budget: PowerBudget, enforced: list[float | None]) -> None:
    """Limits above what the driver lets the GPUs draw: allowed, since that can change."""
    known = [watts for watts in enforced if watts is not None]
    total = sum(known)
    if budget.limits and known and all(limit.watts >= total for limit in budget.limits):
        logger.warning(
            "every power limit (lowest: %g W) is at or above the GPUs' enforced limit (%g W): "
            "the driver acts before the shaper does",
            min(limit.watts for limit in budget.limits),
            total,
        )
