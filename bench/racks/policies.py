"""The racks that are compared: one function for each way to keep a group's limit.

Each takes the unshaped rack and the group's limit, and returns a rack. What has no ledger in
common gets an even share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from shaper.core.types import PowerLimit
from shaper.simulate.setup import RackSetup

WINDOW_SECONDS = 0.1
SMALL_BATCHED_TOKENS = 2048

UNSHAPED = "unshaped"
SMALL = f"unshaped, {SMALL_BATCHED_TOKENS:,} batched tokens"
STATIC = "static knobs"
CAP = "power cap"
CLOCK = "locked clock"
REACTIVE = "reactive loop"
CHUNKS = "latency-only chunks"
ALONE = "shaper, own share each"
SHARED = "shared ledger"

# `None`: no target of its own.
ITL_TARGETS_SECONDS: tuple[float | None, ...] = (None, 0.1, 0.05)
CHUNKS_ITL_TARGET_SECONDS = 0.05


def group_limit(watts: float) -> PowerLimit:
    """The limit of a whole group over 100 ms."""
    return PowerLimit(round(watts, 1), WINDOW_SECONDS)


def share(rack: RackSetup, limit: PowerLimit) -> PowerLimit:
    """An engine's even share of a group's limit."""
    return replace(limit, watts=limit.watts / rack.engines)


def shared_name(itl_target_seconds: float | None) -> str:
    """What a rack with the shared ledger is called."""
    if itl_target_seconds is None:
        return f"{SHARED}, no ITL target"
    return f"{SHARED}, ITL target {1e3 * itl_target_seconds:g} ms"


def static(rack: RackSetup, batched_tokens: int, sequences: int) -> RackSetup:
    """vLLM's own knobs."""
    return replace(rack, max_num_batched_tokens=batched_tokens, max_num_seqs=sequences)


def power_cap(rack: RackSetup, limit: PowerLimit) -> RackSetup:
    """The driver holds each GPU to its share, as `nvidia-smi -pl` would."""
    return replace(rack, gpu_power_cap_watts=share(rack, limit).watts / rack.tensor_parallel)


def locked_clock(rack: RackSetup, hertz: float) -> RackSetup:
    """No GPU's clock rises above this."""
    return replace(rack, gpu_clock_hertz=hertz)


def reactive(rack: RackSetup, limit: PowerLimit) -> RackSetup:
    """A loop of 500 ms on each engine's concurrency, to its share."""
    return replace(rack, shaped=True, shared=False, policy="reactive", limits=(share(rack, limit),))


def chunks(rack: RackSetup) -> RackSetup:
    """Prompts in chunks by the ITL target; knows no limit."""
    return replace(
        rack,
        shaped=True,
        shared=False,
        policy="latency-chunk",
        itl_target_seconds=CHUNKS_ITL_TARGET_SECONDS,
    )


def alone(rack: RackSetup, limit: PowerLimit) -> RackSetup:
    """The shaper on each engine, each with its share, and no ledger in common."""
    return replace(rack, shaped=True, shared=False, limits=(share(rack, limit),))


def shared(
    rack: RackSetup, limit: PowerLimit, itl_target_seconds: float | None = None
) -> RackSetup:
    """The shaper on each engine, with one ledger for all."""
    return replace(rack, shaped=True, group_limits=(limit,), itl_target_seconds=itl_target_seconds)


ORDER = (
    *(UNSHAPED, SMALL, STATIC, CAP, CLOCK, REACTIVE, CHUNKS, ALONE),
    *(shared_name(target) for target in ITL_TARGETS_SECONDS),
)


def limited(rack: RackSetup, limit: PowerLimit) -> list[tuple[str, Callable[[], RackSetup]]]:
    """Those that need no search, with their names, in the order of the table."""
    found: list[tuple[str, Callable[[], RackSetup]]] = [
        (CAP, partial(power_cap, rack, limit)),
        (REACTIVE, partial(reactive, rack, limit)),
        (CHUNKS, partial(chunks, rack)),
        (ALONE, partial(alone, rack, limit)),
    ]
    for target in ITL_TARGETS_SECONDS:
        found.append((shared_name(target), partial(shared, rack, limit, target)))
    return found
