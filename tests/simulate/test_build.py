"""Engines in virtual time are built as engines of a server are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shaper.core.types import PowerLimit
from shaper.engine import build as live
from shaper.simulate import build as virtual
from tests.engine.harness import GPU, MODEL

SHAPER = Path(live.__file__).parent.parent


def test_live_and_virtual_engines_are_built_by_the_same_function(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the same model, limit and policy; a live engine has more beside its steps."""
    from shaper.simulate.engine import engine_config, kv_cache, new_scheduler

    built: list[tuple[live.EngineSetup, Any]] = []
    build_engine = live.build_engine

    def seen(scheduler: Any, setup: live.EngineSetup) -> Any:
        made = build_engine(scheduler, setup)
        built.append((setup, made[0]))
        return made

    for module in (live, virtual):
        monkeypatch.setattr(module, "build_engine", seen)
    config, limit = engine_config(MODEL, GPU), PowerLimit(500.0, 1.0)
    engine = virtual.new_engine(config, GPU, (limit,), kv_blocks=2500)
    config.additional_config = {"power_shaper": {"limits": "500W@1s"}}
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    cache = kv_cache(config, built[0][0].model, 2500)
    shaper = live.attach(new_scheduler(config, AsyncScheduler, cache))
    shaper.close()
    (simulated, first), (served, second) = built
    assert (first, second) == (engine.scheduler.shaper, shaper)
    assert (simulated.live is None, served.live is None) == (True, False)
    for name in ("budget", "mode", "policy", "targets", "interval_seconds"):
        assert getattr(simulated, name) == getattr(served, name)
    assert simulated.model.coefficients == served.model.coefficients


@pytest.mark.parametrize("part", ["LiveShaper", "Controller", "Supervisor", "EngineTick"])
def test_nothing_else_builds_a_part_of_an_engine(part: str) -> None:
    """A second wiring would part from the first."""
    callers = [path for path in SHAPER.rglob("*.py") if f" {part}(\n" in path.read_text()]
    assert callers == [SHAPER / "engine" / "build.py"]
