"""Runs a rack in virtual time: `run_rack(setup, workload)` is a function of its arguments.

Each engine is vLLM's real scheduler and KV-cache manager with the real shaper over its
own emulated GPUs; `shaper.simulate.rack` has the order of time. The run ends after
`setup.duration_seconds`, whatever is left to do.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pydantic import ValidationError

from shaper.config.budget import first_line
from shaper.core.ledger.shared import PowerGroup
from shaper.errors import ConfigError
from shaper.gpu.profiles import load_profile
from shaper.simulate.arrivals import Arrival, segments
from shaper.simulate.checks import check_setup
from shaper.simulate.rack import VirtualRack
from shaper.simulate.router import new_router
from shaper.simulate.setup import RackResult, RackSetup
from shaper.simulate.simulated_engine import SimulatedEngine
from shaper.traffic.figures import GRID_SECONDS
from shaper.traffic.workload import Workload, prompt_token_ids

# How often progress is shown, in simulated time.
_PROGRESS_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class RackProgress:
    """How far a run is."""

    now_seconds: float
    duration_seconds: float
    arrived_requests: int


@lru_cache(maxsize=4)
def _config(
    gpu: str, model: str, tensor_parallel: int, tokens: int, requests: int, caching: bool
) -> Any:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from shaper.simulate.engine import engine_config

    try:
        return engine_config(
            model,
            gpu,
            tensor_parallel_size=tensor_parallel,
            max_num_batched_tokens=tokens,
            max_num_seqs=requests,
            # Prompts without block ids have nothing in common: a cache could only cost time.
            enable_prefix_caching=caching,
        )
    except ValidationError as error:
        raise ConfigError(f"vLLM refuses this engine: {first_line(error)}") from error


def _groups(setup: RackSetup, config: Any) -> list[PowerGroup | None]:
    """A handle of the shared ledger for each engine, or None for each."""
    if not (setup.shaped and setup.shared and setup.group_limits):
        return [None] * setup.engines
    from shaper.emulator.kv_cache import true_model
    from shaper.group import memory_groups

    model = true_model(config, load_profile(setup.gpu))
    handles = memory_groups(
        setup.group_limits,
        setup.engines,
        idle_watts=model.gap_watts,
        rest_watts=model.idle_watts,
        rest_after_seconds=model.profile.power.gap_hold_seconds,
    )
    return list(handles)


def _seats(setup: RackSetup, config: Any) -> list[SimulatedEngine]:
    """The engines. Their KV blocks are made by the hundred thousand: no collection meanwhile."""
    collects = gc.isenabled()
    gc.disable()
    try:
        groups = _groups(setup, config)
        return [SimulatedEngine(setup, index, config, group) for index, group in enumerate(groups)]
    finally:
        if collects:
            gc.enable()


def _fitting(arrivals: Sequence[Arrival], config: Any) -> tuple[list[Arrival], int]:
    """The arrivals that an engine can serve, and how many can't be.

    vLLM makes sure that a request of the model's whole context fits the KV cache.
    """
    most = config.model_config.max_model_len
    kept = [
        each for each in arrivals if each.request.prompt_tokens + each.request.output_tokens <= most
    ]
    return kept, len(arrivals) - len(kept)


def _serve(
    setup: RackSetup,
    seats: Sequence[SimulatedEngine],
    arrivals: Sequence[Arrival],
    config: Any,
    progress: Callable[[RackProgress], None] | None,
) -> dict[str, int]:
    """Let the requests arrive and the engines run to the end: prompt tokens by request's name."""
    from shaper.simulate.engine import new_request

    router = new_router(setup.router, seats)
    rack = VirtualRack([each.engine for each in seats])
    prompts: dict[str, int] = {}
    shown_seconds = 0.0

    def run_until(seconds: float) -> None:
        nonlocal shown_seconds
        while progress is not None and shown_seconds + _PROGRESS_SECONDS <= seconds:
            shown_seconds += _PROGRESS_SECONDS
            rack.run_until(shown_seconds)
            progress(RackProgress(shown_seconds, setup.duration_seconds, len(prompts)))
        rack.run_until(seconds)

    # The engines' blocks and tables are some million objects that no collection need look at.
    gc.freeze()
    try:
        for number, arrival in enumerate(arrivals):
            run_until(arrival.at_seconds)
            name = f"r{number}"
            tokens = prompt_token_ids(arrival.request, number, setup.seed)
            prompts[name] = len(tokens)
            request = new_request(name, tokens, arrival.request.output_tokens, config)
            rack.arrive(router(arrival), request, arrival.at_seconds)
        run_until(setup.duration_seconds)
    finally:
        gc.unfreeze()
    return prompts


def run_rack(
    setup: RackSetup,
    workload: Workload,
    progress: Callable[[RackProgress], None] | None = None,
) -> RackResult:
    """Serve a workload on a rack. The same arguments give the same result.

    Args:
        setup: the rack.
        workload: as recorded; `setup` says how it is dealt and how fast it goes.
        progress: called now and then.

    Raises:
        ConfigError: the setup can't be run, or no request fits the model.
    """
    check_setup(setup)
    caching = any(request.block_ids for request in workload.requests)
    config = _config(
        setup.gpu,
        setup.model,
        setup.tensor_parallel,
        setup.max_num_batched_tokens,
        setup.max_num_seqs,
        caching,
    )
    start = time.perf_counter()
    arrivals = segments(
        workload,
        setup.engines,
        setup.duration_seconds,
        seed=setup.seed,
        rate_scale=setup.rate_scale,
    )
    seats = _seats(setup, config)
    arrivals, too_long = _fitting(arrivals, config)
    if not arrivals:
        raise ConfigError(
            f"no request of {workload.name} arrives within {setup.duration_seconds:g} s and fits "
            f"{setup.model}: {too_long} are longer than its context"
        )
    prompts = _serve(setup, seats, arrivals, config, progress)
    milliseconds = round(setup.duration_seconds / GRID_SECONDS)
    return RackResult(
        setup=setup,
        workload=workload.name,
        engines=tuple(each.result(prompts, milliseconds) for each in seats),
        too_long_requests=too_long,
        wall_seconds=time.perf_counter() - start,
    )
