"""Engines in virtual time: vLLM's real scheduler, shaped or not, over an emulated GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# vLLM chooses its platform at import, once per process.
os.environ["SHAPER_EMULATE"] = "h200-sxm"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

from shaper.core.types import PowerLimit
from tests.engine.harness import GPU, MODEL, RecordingLog

vllm = pytest.importorskip("vllm", reason="these tests run vLLM's own scheduler: make setup")


@dataclass
class Rig:
    """One engine in virtual time, with what it did."""

    engine: Any
    shaper: Any
    log: RecordingLog
    outputs: list[dict[str, Any]] = field(default_factory=list)

    def run(self, traffic: list[tuple[float, list[int], int]], seconds: float = 300.0) -> None:
        """Serve (arrival, prompt, output tokens) and go on until all is done, or for `seconds`."""
        config = self.engine.scheduler.vllm_config
        from shaper.simulate.engine import new_request

        for index, (arrival, prompt, tokens) in enumerate(traffic):
            self.engine.run_until(arrival)
            self.engine.add(new_request(f"r{index}", prompt, tokens, config))
        end = traffic[-1][0] + seconds
        while self.engine.busy and self.engine.now_seconds < end:
            self.engine.step()


def plain(output: Any) -> dict[str, Any]:
    """What a `SchedulerOutput` says, as comparable values."""
    cached = output.scheduled_cached_reqs
    return {
        "tokens": dict(output.num_scheduled_tokens),
        "order": list(output.num_scheduled_tokens),
        "new": [(r.req_id, r.num_computed_tokens) for r in output.scheduled_new_reqs],
        "cached": [
            list(cached.req_ids),
            list(cached.num_computed_tokens),
            [list(b or ()) for b in (x[0] if x else () for x in cached.new_block_ids)],
        ],
        "finished": set(output.finished_req_ids),
        "preempted": set(output.preempted_req_ids or ()),
    }


@pytest.fixture(scope="session")
def make_rig() -> Callable[..., Rig]:
    """Builds rigs: `limits=None` is vLLM's own scheduler with no shaper at all."""
    from shaper.simulate.build import new_engine
    from shaper.simulate.engine import engine_config

    configs: dict[bool, Any] = {}

    def make(
        limits: tuple[PowerLimit, ...] | None,
        *,
        asynchronous: bool = True,
        v2_runner: bool = False,
        **settings: Any,
    ) -> Rig:
        if asynchronous not in configs:
            configs[asynchronous] = engine_config(MODEL, GPU, async_scheduling=asynchronous)
        log, outputs = RecordingLog(), []
        engine = new_engine(
            configs[asynchronous],
            GPU,
            limits,
            log=log,
            on_output=lambda output: outputs.append(plain(output)),
            **settings,
        )
        if v2_runner:
            engine.scheduler.use_v2_model_runner = True
        return Rig(engine, getattr(engine.scheduler, "shaper", None), log, outputs)

    return make
