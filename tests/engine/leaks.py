"""What must be gone when all requests have ended."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from tests.engine.harness import Attacked

# The containers of the shaper's parts may keep what happened lately, so much of it at most.
MOST_KEPT = 70_000


def leaks(world: Attacked) -> list[str]:
    """What is left of requests, in words; empty when nothing is."""
    engine, scheduler, shaper = world.engine, world.engine.scheduler, world.shaper
    found: list[str] = []

    def expect(empty: Any, what: str) -> None:
        if len(empty) if isinstance(empty, Sized) else empty:
            found.append(f"{what}: {empty!r:.100}")

    expect(scheduler.requests, "requests of the scheduler")
    expect(scheduler.running, "running")
    queues = ("waiting", "skipped_waiting", "kv_holding_waiting", "deferred_waiting")
    for name in (*queues, "_inflight_prefills"):
        expect(getattr(scheduler, name, ()), name)
    deferral = scheduler.deferral
    for name in ("_deferred", "_let_in", "_prompts"):
        expect(getattr(deferral, name), f"deferral{name}")
    expect(engine._queue, "steps in flight")
    expect(shaper._flying, "steps that the runtime waits for")
    if shaper._controller is not None:
        expect(shaper._controller._in_flight_steps._queue, "steps that the controller waits for")
    pool = scheduler.kv_cache_manager.block_pool
    held = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
    expect(held, "blocks of the KV cache")
    found += [f"{name}: {size}" for name, size in sizes(shaper).items() if size > MOST_KEPT]
    return found


def sizes(root: Any) -> dict[str, int]:
    """Lengths of all containers that the shaper's objects hold, by their path."""
    found: dict[str, int] = {}
    seen: set[int] = set()

    def visit(value: Any, path: str, depth: int) -> None:
        if id(value) in seen or depth > 6:
            return
        seen.add(id(value))
        if isinstance(value, Sized) and not isinstance(value, (str, bytes)):
            found[path] = len(value)
        if isinstance(value, dict):
            return
        if not type(value).__module__.startswith("shaper."):
            return
        if type(value).__module__.startswith("shaper.emulator"):
            return
        for name in _fields(value):
            visit(getattr(value, name, None), f"{path}.{name}", depth + 1)

    visit(root, "", 0)
    return found


def _fields(value: Any) -> list[str]:
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    return [*slots, *getattr(value, "__dict__", ())]
