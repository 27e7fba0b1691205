"""Which engines can be shaped: of all others nobody would keep a limit, and a start is refused.

Asked three times, as early as the answer can be known: of the command line, of vLLM's
configuration in the server's process, and of the engine that makes its scheduler. Where a
limit or a latency target is set, an obstacle ends the start with one line; `unshaped_ok`
starts all the same, and the engine then says that it passes everything through.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

from shaper.config.model import ShaperConfig
from shaper.engine.compat import (
    RANGE,
    is_diffusion,
    is_encoder_only,
    remote_ray_hosts,
    setting,
    supported,
    vllm_version,
)
from shaper.engine.work import engine_coefficients
from shaper.errors import EngineError, FleetError, GpuError

logger = logging.getLogger(__name__)

SCHEDULER_PATH = "shaper.PowerScheduler"
_OUR_PATHS = frozenset({SCHEDULER_PATH, "shaper.engine.scheduler.power_scheduler"})


class Obstacle(NamedTuple):
    """Why an engine is not shaped, and what its operator can do."""

    why: str
    instead: str

    def __str__(self) -> str:
        return f"{self.why}; {self.instead}"


def version_obstacle(version: str, force_version: bool) -> Obstacle | None:
    """Whether the shaper was tried on this vLLM, or is forced upon it."""
    if supported(version) or force_version:
        return None
    return Obstacle(
        f"vLLM {version} is outside {RANGE}, the versions that the shaper was tried on",
        "install one of them, or shape all the same with --force-version",
    )


def layout_obstacle(layout: Any) -> Obstacle | None:
    """What a layout of ranks over GPUs and hosts forbids.

    Args:
        layout: vLLM's parsed arguments, or its `parallel_config`: their names are the same.
    """
    for check in (_ranks_that_decide_alone, _gpus_not_modelled, _gpus_elsewhere):
        found = check(layout)
        if found is not None:
            return found
    return None


def _ranks_that_decide_alone(layout: Any) -> Obstacle | None:
    if layout.distributed_executor_backend == "external_launcher":
        return Obstacle(
            "with the external launcher each tensor-parallel rank schedules by itself, and ranks "
            "that decide differently hang",
            "let vLLM start its workers (--distributed-executor-backend mp)",
        )
    if setting(layout, "enable_elastic_ep", False):
        return Obstacle(
            "elastic expert parallelism changes the ranks and their GPUs while it runs",
            "leave --enable-elastic-ep out",
        )
    return None


def _gpus_not_modelled(layout: Any) -> Obstacle | None:
    stages = layout.pipeline_parallel_size
    if stages > 1:
        # Neither a step's time nor its watts are those of the model.
        return Obstacle(
            f"pipeline parallelism (of {stages}) runs several steps at once, each on some of the "
            "GPUs, and is not modelled",
            "use --tensor-parallel-size in its place",
        )
    for name in ("prefill", "decode"):
        ranks = setting(layout, f"{name}_context_parallel_size", 1) or 1
        if ranks > 1:
            return Obstacle(
                f"{name} context parallelism (of {ranks}) is not modelled",
                f"leave --{name}-context-parallel-size out",
            )
    return None


def _gpus_elsewhere(layout: Any) -> Obstacle | None:
    own = "run a server of its own on each host, each with its share of the limit"
    nodes = setting(layout, "nnodes", 1) or 1
    if nodes > 1 or setting(layout, "node_rank", 0):
        return Obstacle(f"the engine spans {nodes} hosts, and the GPUs of one are read", own)
    if setting(layout, "headless", False):
        return Obstacle(
            "--headless serves ranks of another host's server, which shows neither their limit "
            "nor what they draw",
            own,
        )
    ranks = layout.data_parallel_size
    local = setting(layout, "data_parallel_size_local", None)
    if ranks > 1 and setting(layout, "data_parallel_backend", "mp") == "ray":
        return Obstacle(
            f"Ray places the {ranks} data-parallel ranks, on any host, and passes no settings of "
            "the shaper on to them",
            "use --data-parallel-backend mp",
        )
    if local is not None and local < ranks:
        return Obstacle(
            f"of the {ranks} data-parallel ranks {local} are on this host, and nobody here keeps "
            "a limit for the others",
            own,
        )
    others = remote_ray_hosts(layout)
    if others:
        return Obstacle(f"Ray has placed workers on {others} other host(s)", own)
    return None


def model_obstacle(vllm_config: Any) -> Obstacle | None:
    """What the model forbids, by vLLM's whole configuration."""
    model, ranks = vllm_config.model_config, vllm_config.parallel_config.data_parallel_size
    other = "serve it without a limit"
    if ranks > 1 and model.is_moe:
        # A rank that schedules nothing runs a dummy batch, so that a pause draws power, and
        # its experts still serve the other ranks.
        return Obstacle(
            f"the {ranks} data-parallel ranks of a mixture-of-experts model step together: none "
            "can pause by itself",
            "use --tensor-parallel-size (with --enable-expert-parallel) in place of "
            "--data-parallel-size",
        )
    if setting(model, "runner_type", "generate") == "pooling":
        return Obstacle("a pooling model's steps are not modelled", other)
    if is_diffusion(vllm_config):
        return Obstacle("a diffusion model denoises its tokens in steps that no model has", other)
    if is_encoder_only(vllm_config):
        return Obstacle("an engine of an encoder alone runs no steps that are modelled", other)
    if setting(model, "is_encoder_decoder", False):
        return Obstacle("an encoder-decoder model's encoder is not modelled", other)
    return None


def engine_obstacle(vllm_config: Any, config: ShaperConfig) -> Obstacle | None:
    """Why this engine is vLLM's alone; None where it is shaped."""
    return (
        version_obstacle(vllm_version(), config.force_version)
        or layout_obstacle(vllm_config.parallel_config)
        or model_obstacle(vllm_config)
    )


def scheduler_obstacle(scheduler_class: Any) -> Obstacle | None:
    """Whether vLLM will make a scheduler that is not ours."""
    if is_ours(scheduler_class):
        return None
    if scheduler_class is None:
        return Obstacle(
            "the settings name a limit and nothing names the scheduler that would keep it",
            f"add --scheduler-cls {SCHEDULER_PATH}, or start with shaper serve",
        )
    return Obstacle(
        f"the scheduler is {scheduler_class}, which keeps no limit",
        f"give --scheduler-cls {SCHEDULER_PATH} in its place",
    )


def is_ours(scheduler_class: Any) -> bool:
    """Whether this is our scheduler, a path to it, or a subclass of it."""
    if isinstance(scheduler_class, str) and scheduler_class in _OUR_PATHS:
        return True
    if scheduler_class is None:
        return False
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from shaper.engine.scheduler import Shaped, power_scheduler

    try:
        found = scheduler_class
        if isinstance(scheduler_class, str):
            found = resolve_obj_by_qualname(scheduler_class)
    # Whatever is wrong with it, it is not ours, and vLLM will say what is wrong.
    except Exception:
        return False
    return found is power_scheduler or (isinstance(found, type) and issubclass(found, Shaped))


def check_arguments(arguments: Any, config: ShaperConfig) -> None:
    """Refuse a command line by which nobody would keep what is asked.

    Raises:
        EngineError: one line, with what to do.
    """
    if config.asks_for_shaping:
        version = version_obstacle(vllm_version(), config.force_version)
        _refuse(version or layout_obstacle(arguments), config)


def check_engine(vllm_config: Any, config: ShaperConfig) -> None:
    """The same by vLLM's configuration of the engine, before it is made.

    Raises:
        EngineError: one line, with what to do; also where the model's work can't be computed.
    """
    if not config.asks_for_shaping:
        return
    scheduler = scheduler_obstacle(vllm_config.scheduler_config.scheduler_cls)
    _refuse(scheduler or engine_obstacle(vllm_config, config), config)
    if not config.unshaped_ok:
        engine_coefficients(vllm_config)  # or the engine finds out once the model is loaded


def check_scheduler_class(scheduler_class: Any, config: ShaperConfig) -> None:
    """Refuse settings that no scheduler will read.

    Raises:
        EngineError: one line, with what to do.
    """
    if config.asks_for_shaping:
        _refuse(scheduler_obstacle(scheduler_class), config)


def _refuse(obstacle: Obstacle | None, config: ShaperConfig) -> None:
    if obstacle is None:
        return
    if config.unshaped_ok:
        logger.warning("nobody keeps %s (--unshaped-ok): %s", asked(config), obstacle.why)
        return
    raise refusal(obstacle, config)


@contextlib.contextmanager
def unless_unshaped_ok(config: ShaperConfig) -> Iterator[None]:
    """What is checked inside stops the start, unless the operator has said that it need not:
    a GPU that can't be read, a group that can't be joined."""
    try:
        yield
    except (GpuError, FleetError) as error:
        if not config.unshaped_ok:
            raise
        logger.warning("nobody keeps %s (--unshaped-ok): %s", asked(config), error)


def refusal(obstacle: Obstacle, config: ShaperConfig) -> EngineError:
    """The one line about an engine of which nobody would keep what is asked."""
    return EngineError(
        f"nobody would keep {asked(config)}: {obstacle}, or start unshaped with --unshaped-ok"
    )


def asked(config: ShaperConfig) -> str:
    """What an operator asks for, in words."""
    if config.power_group is not None:
        return f"the limit of power group {config.power_group}"
    return "the power limit" if config.limits_power else "the latency target"
