"""Start-up: finds the GPUs, builds what an engine's shaper needs, and starts it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shaper import __version__
from shaper.config import ADDITIONAL_CONFIG_KEY, ShaperConfig, check_floor, load_config
from shaper.core.controller import Controller
from shaper.core.policy import Policy
from shaper.core.policy.fixed import FixedPolicy
from shaper.core.policy.windowed import WindowedPlanner
from shaper.core.power_model import StepModel
from shaper.engine.compat import check_scheduler, supported, vllm_version
from shaper.engine.readers import engine_gpus
from shaper.engine.runtime import EngineShaper, LiveShaper, PassThrough
from shaper.engine.safe_cap import safe_cap
from shaper.engine.telemetry import DecisionLog, MeterWindows, Recorder, Telemetry
from shaper.engine.work import engine_coefficients
from shaper.errors import ShaperError
from shaper.gpu.sampler import Sampler
from shaper.recording import RecordingWriter
from shaper.status import StatusWriter, run_id

logger = logging.getLogger(__name__)

POLICIES: dict[str, Callable[[], Policy]] = {
    "predictive": WindowedPlanner,
    "fixed": FixedPolicy,
}


def attach(scheduler: Any) -> EngineShaper:
    """The shaper for a scheduler that vLLM just made.

    Raises:
        ShaperError: a limit or an ITL target is set and can't be kept, e.g. no GPU can be
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
        logger.warning("no limit and no ITL target is set, and the shaper is off: %s", error)
        return PassThrough()


def _attach(scheduler: Any, config: ShaperConfig) -> LiveShaper:
    check_scheduler(scheduler)
    version = vllm_version()
    if not supported(version):
        logger.warning("the shaper was not tried on vLLM %s; it was on 0.23 to 0.33", version)
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
            spend_slack=config.objective == "efficiency",
            max_pause_seconds=config.max_pause_seconds,
            margin_ratio=config.margin_ratio,
            shadow=config.shadow,
        )

    parallel = vllm_config.parallel_config
    rank = getattr(parallel, "data_parallel_index", parallel.data_parallel_rank)
    info = {
        "version": __version__,
        "gpu": gpus.profile.name,
        "model": str(vllm_config.model_config.served_model_name or vllm_config.model_config.model),
        "policy": config.policy,
        "shadow": config.shadow,
        "limits": [(limit.watts, limit.window_seconds) for limit in limits],
    }
    status = StatusWriter(run_id(), rank, info)
    log = DecisionLog(_of_rank(config.decision_log, rank))
    recorder = _recorder(config, rank, gpus.profile.name, vllm_config)
    telemetry = Telemetry(status, MeterWindows(limits, model.idle_watts), log, recorder)
    sampler = Sampler(
        recorder.tap(gpus.reader) if recorder else gpus.reader,
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
        if recorder is not None:
            recorder.close()

    shaper = LiveShaper(
        scheduler,
        new_controller,
        safe_cap(model.predict, model.gap_watts, () if config.shadow else limits),
        sampler=sampler,
        log=log,
        record=recorder.add_step if recorder else None,
        on_close=close,
    )
    telemetry.counters = shaper.counters
    sampler.start()
    _announce(config, gpus.profile.name)
    return shaper


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
