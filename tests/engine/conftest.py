"""Engines in virtual time: vLLM's real scheduler, shaped or not, over an emulated GPU."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# vLLM chooses its platform at import, once per process.
os.environ["SHAPER_EMULATE"] = "h200-sxm"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

from shaper.core.controller import Controller
from shaper.core.policy import Policy
from shaper.core.policy.windowed import WindowedPlanner
from shaper.core.power_model import StepModel
from shaper.core.types import Decision, PowerLimit
from shaper.emulator.silicon import EmulatedGpus
from shaper.engine.safe_cap import safe_cap
from shaper.gpu.profiles import load_profile
from shaper.gpu.sampler import summarise

vllm = pytest.importorskip("vllm", reason="these tests run vLLM's own scheduler: make setup")

GPU, MODEL = "h200-sxm", "llama-3.1-8b"


class RecordingLog:
    """Keeps every decision."""

    def __init__(self) -> None:
        self.decisions: list[Decision] = []

    def add(self, decision: Decision, meter_watts: float | None) -> None:
        self.decisions.append(decision)


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
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    import shaper.engine.scheduler as shaped
    from shaper.engine.runtime import LiveShaper
    from shaper.engine.work import engine_coefficients
    from shaper.simulate.engine import VirtualEngine, engine_config, new_scheduler

    configs: dict[Any, Any] = {}

    def config_for(**arguments: Any) -> Any:
        key = tuple(sorted(arguments.items()))
        if key not in configs:
            configs[key] = engine_config(MODEL, GPU, **arguments)
        return configs[key]

    def make(
        limits: tuple[PowerLimit, ...] | None,
        *,
        policy: Policy | None = None,
        kv_blocks: int = 50_000,
        asynchronous: bool = True,
        itl_target_seconds: float | None = None,
        max_pause_seconds: float = 1.0,
        shadow: bool = False,
        v2_runner: bool = False,
        host_late_seconds: Callable[[], float] = lambda: 0.0,
        **arguments: Any,
    ) -> Rig:
        config = config_for(async_scheduling=asynchronous, **arguments)
        profile = load_profile(GPU)
        model = StepModel(profile, engine_coefficients(config))
        gpus = EmulatedGpus(profile, model, start_seconds=0.0, exact_meter=True)
        log = RecordingLog()
        holder: list[Any] = []

        def clock() -> float:
            return holder[0].now_seconds if holder else 0.0

        class Sampler:
            @property
            def latest(self) -> Any:
                return summarise(gpus.sample(clock()))

        def attach(scheduler: Any) -> LiveShaper:
            return LiveShaper(
                scheduler,
                lambda now: Controller(
                    model,
                    policy or WindowedPlanner(),
                    limits or (),
                    now,
                    itl_target_seconds=itl_target_seconds,
                    max_pause_seconds=max_pause_seconds,
                    shadow=shadow,
                ),
                safe_cap(model.predict, model.gap_watts, limits or ()),
                sampler=Sampler(),
                log=log,
                clock=clock,
            )

        if limits is None:
            kind: Any = AsyncScheduler if asynchronous else Scheduler
        else:
            kind = shaped.power_scheduler
        patch = pytest.MonkeyPatch()
        try:
            patch.setattr(shaped, "attach", attach)
            scheduler = new_scheduler(config, kind, kv_blocks)
        finally:
            patch.undo()
        if v2_runner:
            scheduler.use_v2_model_runner = True
        rig = Rig(None, getattr(scheduler, "shaper", None), log)
        rig.engine = VirtualEngine(
            scheduler,
            gpus,
            asynchronous=asynchronous,
            on_output=lambda output: rig.outputs.append(plain(output)),
            host_late_seconds=host_late_seconds,
        )
        holder.append(rig.engine)
        return rig

    return make


@pytest.fixture
def random_traffic() -> Callable[..., list[tuple[float, list[int], int]]]:
    """Seeded traffic: bursts, long and short prompts, some sharing a prefix."""

    def make(seed: int, count: int = 60, rate: float = 8.0) -> list[tuple[float, list[int], int]]:
        rng = random.Random(seed)
        shared = [rng.randrange(256) for _ in range(640)]
        traffic, now = [], 0.0
        for _ in range(count):
            now += rng.expovariate(rate) if rng.random() > 0.3 else 0.0
            length = min(12_000, max(1, int(rng.lognormvariate(6.3, 1.1))))
            prompt = [rng.randrange(256) for _ in range(length)]
            if rng.random() < 0.3:
                prompt = shared + prompt
            traffic.append((now, prompt, rng.randint(1, 200)))
        return traffic

    return make
